"""The engine in a process of its own: free of torch but for what the child loads."""
