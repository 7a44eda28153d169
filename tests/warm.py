"""What every process of `lives` would otherwise do first: imports on demand, a first figure with its fonts."""

import tempfile
from pathlib import Path

import sklearn.datasets  # noqa: F401
import tensorboard.compat.proto.event_pb2
import tensorboard.compat.proto.summary_pb2
import tensorboard.summary.writer.record_writer  # noqa: F401
import torch._dynamo  # noqa: F401
import torchjd.aggregation  # noqa: F401

import movae_fast.training.loop  # noqa: F401
from movae_fast.plots import loss_curves

with tempfile.TemporaryDirectory() as folder:
    loss_curves(Path(folder, "a.png"), [{"step": 1, "train/kl": 1.0, "test/kl": 1.0}], ["kl"])
