"""One attention mask per process."""
