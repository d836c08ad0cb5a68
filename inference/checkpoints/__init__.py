"""Checkpoints: identifying, loading and placing them. Free of torch until the load."""
