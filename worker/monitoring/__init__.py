"""Health, metrics, status and why the GPU is idle."""
