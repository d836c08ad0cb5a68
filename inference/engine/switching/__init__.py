"""Several models on one device: which of them are there, and when one makes way for another."""
