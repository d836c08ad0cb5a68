"""Schedulers, and the arithmetic of a lane's denoise steps."""
