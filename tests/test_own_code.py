"""torch.compile's limit of recompilations is for one function, not for all models of a process."""

import pytest
import torch

from movae_fast.own_code import with_own_code
from movae_fast.training.compiled import Compiled


def scaled_by(k):
    def scale(x, *, plus=0.0):
        return x * k + plus

    return scale


class Holder:
    def __init__(self, k):
        self.k = k

    def scale(self, x):
        return x * self.k


def test_a_copy_computes_the_same():
    assert with_own_code(scaled_by(3))(2, plus=1) == 7
    assert with_own_code(Holder(3).scale)(2) == 6
    a, b = with_own_code(Holder(1).scale), with_own_code(Holder(1).scale)
    assert a.__func__.__code__ != b.__func__.__code__


def test_many_models_of_a_process_are_compiled_without_meeting_the_limit():
    x = torch.ones(2)
    with torch._dynamo.config.patch(recompile_limit=2):
        for k in range(5):
            assert float(Compiled(Holder(float(k)).scale, "default")(x)[0]) == k
        torch._dynamo.reset()
        shared = [torch.compile(Holder(k).scale, fullgraph=True, dynamic=False) for k in (0.0, 1.0, 2.0)]
        shared[0](x), shared[1](x)
        with pytest.raises(Exception, match="fullgraph"):  # what one code for all of them meets
            shared[2](x)
