"""A loss that is not finite ends all processes after the same step, whenever each of them learns of it."""

import pytest

from movae_fast.training import loop
from movae_fast.training.telemetry import NonFiniteError
from movae_fast.training.world import World


class Telemetry:
    """A window that arrives late, with a failure in it."""

    def __init__(self, arrives):
        self.arrives = arrives

    def lines(self, wait=False):
        if wait or self.arrives:
            raise NonFiniteError(7, "kl", float("nan"))
        yield from ()


class Stub:
    def __init__(self, arrives, size):
        self.telemetry, self.world, self.logs, self.step = Telemetry(arrives), World(0, size), None, 9


def test_alone_a_process_raises_at_once():
    with pytest.raises(NonFiniteError, match="kl became nan at step 7"):
        loop.log_unless_failed(Stub(True, 1), None)


def test_with_others_it_tells_them_first_and_they_find_the_same_error():
    first, late = Stub(True, 2), Stub(False, 2)
    error = loop.log_unless_failed(first, None)
    assert isinstance(error, NonFiniteError)
    assert loop.log_unless_failed(late, None) is None  # its window has not arrived
    assert str(loop.failure_elsewhere(late)) == str(error)
    assert loop.NOT_FINITE > 64  # above every signal's number: the largest wins
