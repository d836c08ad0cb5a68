"""Adapters in the model: the memory that they may take, and the pages that they are kept in."""
