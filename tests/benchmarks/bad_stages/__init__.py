"""Stages of a GPU measurement that end badly, each named for what it does."""
