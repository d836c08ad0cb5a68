"""The engine in a process of its own. Only the child imports torch."""
