"""Ring attention as a function for programs that bring their own groups."""
