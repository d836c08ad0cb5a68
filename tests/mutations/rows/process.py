"""The worker's processes, and the machine below them."""

from tests.mutations.row import Row

ROWS: tuple[Row, ...] = ()
