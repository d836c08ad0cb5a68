"""Styles and industries that a job may name: the bundled file, an operator's own, and how both are read."""
