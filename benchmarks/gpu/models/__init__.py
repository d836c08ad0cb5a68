"""The models that are measured, and the jobs that are drawn with them."""
