"""Without the compiled extension the ops give the same answers, more slowly, and say so."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from movae_fast import ops
from movae_fast.cli import doctor
from movae_fast.ops import extension
from movae_fast.ops.gramian_weights import METHODS


def results() -> dict[str, Any]:
    """What every op gives on fixed problems, gradients included."""
    generator = torch.Generator().manual_seed(0)
    found: dict[str, Any] = {}
    for name, shape in {"rows": (60, 7), "maps": (3, 7, 4, 5)}.items():
        for dtype in (torch.float32, torch.float64, torch.bfloat16):
            z = torch.randn(*shape, generator=generator).to(dtype)
            codebook = torch.randn(20, 7, generator=generator).to(dtype)
            z.view(shape[0], 7, -1)[1, 3, 0] = torch.nan
            codebook[4, 2] = torch.inf
            key = f"{name} {dtype}"
            found[f"nearest_code {key}"] = ops.nearest_code(z, codebook)
            codebook[4] = 9
            for gradient in ("straight_through", "rotation", "codebook"):
                leaves = [z.nan_to_num(0.5).requires_grad_(), codebook.clone().requires_grad_()]
                z_q, index, sq_err, count, code_sum = ops.quantize(*leaves, gradient=gradient)
                upstream = torch.randn(z_q.shape, generator=generator).to(dtype)
                loss = (z_q * upstream).float().sum() + sq_err.mean() + ops.code_error(*leaves, index).sum()
                grads = torch.autograd.grad(loss, leaves)
                values: list[Tensor] = [z_q.detach(), index, sq_err.detach(), count, code_sum, *grads]
                found[f"quantize {gradient} {key}"] = values
    found["nothing usable"] = ops.nearest_code(torch.randn(3, 2), torch.full((4, 2), torch.nan))
    leaves = [t.requires_grad_() for t in torch.randn(3, 30, 6, generator=generator).unbind()]
    for estimator in ("mws", "mss"):
        terms = ops.tc_terms(*leaves, 100, estimator)
        grads = torch.autograd.grad(sum(t.sum() for t in terms), leaves)
        found[f"tc_terms {estimator}"] = [*(t.detach() for t in terms), *grads]
    leaves = [torch.randn(s, generator=generator).requires_grad_() for s in ((4, 7, 5, 5), 7, 7, (4, 7))]
    terms = ops.norm_swish(*leaves)
    grads = torch.autograd.grad(terms[0].square().sum(), leaves)
    found["norm_swish"] = [*(t.detach() for t in terms), *grads]
    rows = torch.randn(5, 40, generator=generator)
    rows[1] = -rows[0] + 0.1 * rows[1]
    found["gramian"], found["combine"] = ops.gramian(rows), ops.combine(rows, torch.arange(5.0))
    for mode in ("upgrad", "dualproj"):
        found[f"project_weights {mode}"] = ops.project_weights(found["gramian"], mode=mode)
    found["upgrad_weights"] = ops.upgrad_weights(rows)
    order = torch.rand(5, 5, generator=generator).argsort(1)
    for method in METHODS:
        options = {"order": order} if method == "pcgrad" else {}
        found[f"gramian_weights {method}"] = ops.gramian_weights(found["gramian"], method, **options)
    found["doctor"] = doctor.op_paths()
    return found


ALONE = """
import sys, warnings, torch
sys.modules["movae_fast._csrc"] = None  # an import that fails
from tests.test_ops_extension import doctor, results
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    found = results()
found["warnings"] = [str(w.message) for w in caught]
found["status"] = doctor.run(doctor.DoctorFlags())
torch.save(found, sys.argv[1])
"""


def test_the_ops_fall_back_to_plain_torch_and_say_so_once(tmp_path: Path) -> None:
    path = tmp_path / "found.pt"
    subprocess.run([sys.executable, "-c", ALONE, str(path)], check=True, cwd=Path(__file__).parent.parent)
    found = torch.load(path)
    assert len(found.pop("warnings")) == 1
    assert found.pop("status") == 1
    paths = found.pop("doctor")
    assert set(paths) == set(ops.__all__)
    for op in set(ops.__all__) - set(doctor.BY_TORCH):
        assert "cpu plain torch, because the extension is missing" in paths[op]
        assert "cpu C++" in doctor.op_paths()[op]
    expected = results()
    expected.pop("doctor")
    assert set(found) == set(expected)
    for name, values in expected.items():
        if isinstance(values, Tensor) and not name.startswith(("gramian", "combine")):
            assert torch.equal(found[name], values), name
            continue
        values, peers = ([v] if isinstance(v, Tensor) else v for v in (values, found[name]))
        for mine, theirs in zip(peers, values, strict=True):
            assert mine.dtype == theirs.dtype, name
            if not mine.is_floating_point():
                assert torch.equal(mine, theirs), name
                continue
            # A gradient is a sum of three terms, each of which torch rounds to the dtype.
            # The projection's condition number is at most 1 / reg_eps.
            factor = 8e4 if "weights" in name else 8
            if "cagrad" in name:  # CLARABEL stops 1e-8 short of the optimum, which is its root away
                factor = 1e-3 / torch.finfo(mine.dtype).eps
            limit = factor * torch.finfo(mine.dtype).eps * theirs.double().norm()
            assert (mine.double() - theirs.double()).norm() <= limit, name


EVERY_CPU_OP = {
    "nearest_code": lambda: ops.nearest_code(torch.ones(2, 3), torch.ones(4, 3)),
    "quantize": lambda: ops.quantize(torch.ones(2, 3), torch.ones(4, 3)),
    "code_error": lambda: ops.code_error(torch.ones(2, 3), torch.ones(4, 3), torch.tensor([0, 1])),
    "gramian": lambda: ops.gramian(torch.ones(2, 3)),
    "combine": lambda: ops.combine(torch.ones(2, 3), torch.ones(2)),
    "project_weights": lambda: ops.project_weights(torch.eye(2)),
    "project_rows": lambda: ops.project_rows(torch.ones(2), torch.eye(2)),
    "step_multipliers": lambda: ops.step_multipliers(torch.eye(2), torch.ones(2)),
    "upgrad_weights": lambda: ops.upgrad_weights(torch.ones(2, 3)),
    "tc_terms": lambda: ops.tc_terms(*torch.ones(3, 4, 2), 10),
    "norm_swish": lambda: ops.norm_swish(torch.ones(2, 3, 2, 2), *torch.ones(2, 3)),
}


@pytest.mark.parametrize("op", EVERY_CPU_OP)
def test_one_way_to_force_an_instruction_set(op: str) -> None:
    """MOVAE_CPU_ISA, read at each call by every op but gramian_weights, whose C++ has one path only, and those
    that have no C++."""
    assert set(EVERY_CPU_OP) == set(ops.__all__) - {"gramian_weights", *doctor.BY_TORCH}
    call = EVERY_CPU_OP[op]
    with (
        extension.forced_isa("sse9"),
        pytest.raises(ValueError, match=r"^MOVAE_CPU_ISA: 'sse9' is not .*those are: .*portable$"),
    ):
        call()
    for isa in ("", "auto", *extension.csrc.nearest_code_isas()):
        with extension.forced_isa(isa):
            call()


def test_a_forced_instruction_set_is_that_of_the_block_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MOVAE_CPU_ISA", raising=False)
    fastest = extension.csrc.nearest_code_isa()
    with extension.forced_isa("portable"):
        assert extension.csrc.nearest_code_isa() == extension.csrc.tc_terms_isa() == "portable"
        with extension.forced_isa(fastest):
            assert extension.csrc.nearest_code_isa() == fastest
        with pytest.raises(ValueError, match="sse9"), extension.forced_isa("sse9"):
            ops.gramian(torch.ones(2, 3))
        assert extension.csrc.nearest_code_isa() == "portable"
    assert "MOVAE_CPU_ISA" not in os.environ
    assert extension.csrc.nearest_code_isa() == fastest
