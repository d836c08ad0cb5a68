"""Settings and logging. Imports nothing of ours: everything else may import it."""
