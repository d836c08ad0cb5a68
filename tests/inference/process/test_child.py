"""What the engine's process does around its engine."""

import gc

import pytest

from inference.process.child import loading


def test_loaded_objects_are_not_gone_through_again() -> None:
    loaded = []

    with loading():
        assert not gc.isenabled()
        loaded.append(["a module's object"])

    assert gc.isenabled()
    assert all(one is not loaded[0] for one in gc.get_objects())


def test_collection_goes_on_after_a_load_that_failed() -> None:
    with pytest.raises(MemoryError), loading():
        raise MemoryError

    assert gc.isenabled()
