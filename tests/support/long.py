"""The mark of tests that `make test` leaves out: each has a shorter form beside it. `make long` runs them all."""

import os

import pytest

IS_LONG = "LONG" in os.environ
long = pytest.mark.skipif(not IS_LONG, reason="long: `make long` runs it")
