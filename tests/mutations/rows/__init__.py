"""The rows of the fault matrix that are held by tests on the real parts, by what breaks."""

from tests.mutations.rows import backend, broker, process, store

ROWS = (*broker.ROWS, *process.ROWS, *store.ROWS, *backend.ROWS)
