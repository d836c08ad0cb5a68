"""The model families behind the interface in `base.py`, and how they are loaded, checked and compiled."""
