"""Clients of the object store, the backend, the GPU and the broker's management API."""
