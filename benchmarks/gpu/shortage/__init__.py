"""Stage 5: what is left of a set of jobs where memory ends and where the device fails."""
