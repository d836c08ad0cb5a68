"""Checkpoints in one file, in the layouts of the original training code and of ComfyUI."""
