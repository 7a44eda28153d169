"""TF32's switches: set without a GPU, and read by every getter that torch and its compiler have."""

import subprocess
import sys

import pytest

# In a process of its own: what is left behind by a wrong setting breaks whoever reads it next.
READ = """
import sys, torch
from movae_fast.training.precision import Precision
for name in sys.argv[1:]:
    Precision(name, torch.device("cuda"))
with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True):
    pass
print(
    torch.get_float32_matmul_precision(),
    torch.backends.cuda.matmul.allow_tf32,
    torch.backends.cuda.matmul.fp32_precision == "tf32",
    torch.backends.cudnn.allow_tf32,
    torch.backends.cudnn.conv.fp32_precision == "tf32",
    torch.backends.cudnn.rnn.fp32_precision == "tf32",
)
"""


@pytest.mark.parametrize(("names", "matmul", "tf32"), [("tf32", "high", True), ("tf32 bf16", "highest", False)])
def test_every_getter_of_tf32_works_and_agrees(names, matmul, tf32):
    command = [sys.executable, "-c", READ, *names.split()]
    said = subprocess.run(command, capture_output=True, text=True, check=False)
    assert said.returncode == 0, said.stderr[-1000:]
    assert said.stdout.split() == [matmul, *[str(tf32)] * 5]
