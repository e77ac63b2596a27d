"""Features that save activation memory."""
