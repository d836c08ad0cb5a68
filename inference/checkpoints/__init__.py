"""Checkpoints: what one is, what it takes, loading it, and where it then lives. Free of torch until it loads."""
