"""Methods of mixtures of experts."""
