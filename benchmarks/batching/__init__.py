"""The step-level batch against plain diffusers, on a CPU."""
