"""The backend, and the way to it."""

from tests.mutations.row import Row

ROWS: tuple[Row, ...] = ()
