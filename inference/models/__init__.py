"""The model families: one file for each behind the interface in `base.py`."""
