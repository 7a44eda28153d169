"""Set the precision of a step: float32, TF32, or autocast to bfloat16 or float16 with a loss scale."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from movae_fast.choices import PrecisionName

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


class Precision:
    """Provide the autocast context of the networks and, for fp16, the loss scaling.

    Losses, the latents' parameters, the codebook look-up, Gramian, projection and the optimizer run outside
    autocast. An fp16 step whose gradients overflow is skipped on the device and halves the loss scale. The
    Gramian is computed of unscaled rows, so that the scale does not influence the aggregation.
    """

    def __init__(self, name: PrecisionName, device: torch.device) -> None:
        if name == "tf32" and device.type != "cuda":
            raise ValueError(f"--precision tf32 is CUDA's; on {device.type} use fp32 or bf16")
        self.name, self.device = name, device
        if device.type == "cuda":
            # torch 2.11 has these switches twice. The newer ones (fp32_precision) leave the older ones as they
            # were, whose getters then raise, in the midst of a compilation by max-autotune; these two set both.
            torch.set_float32_matmul_precision("high" if name == "tf32" else "highest")
            torch.backends.cudnn.allow_tf32 = name == "tf32"
        self.scaler = torch.amp.GradScaler(device.type) if name == "fp16" else None

    def autocast(self) -> AbstractContextManager[None]:
        """Return the autocast context in which the networks run."""
        dtype = DTYPES.get(self.name)
        return torch.autocast(self.device.type, dtype=dtype or torch.bfloat16, enabled=dtype is not None)

    def scale(self, weights: Tensor) -> Tensor:
        """Return the losses' weights times fp16's loss scale."""
        return self.scaler.scale(weights) if self.scaler is not None else weights

    def unscaled(self, gramian: Tensor) -> Tensor:
        """Return the Gramian that the unscaled rows would have."""
        if self.scaler is None:
            return gramian
        one = torch.ones((), dtype=gramian.dtype, device=gramian.device)
        return gramian / self.scaler.scale(one).square()

    def loss_scale(self) -> Tensor | None:  # []
        """Return the loss scale, a factor on all rows, as a tensor [] on the device; None without loss
        scaling."""
        return None if self.scaler is None else self.scaler.scale(torch.ones((), device=self.device))

    def unscale_gradients(self, optimizer: torch.optim.Optimizer) -> None:
        """Divide the parameters' `.grad` by the loss scale, which must be done before clipping."""
        if self.scaler is not None:
            self.scaler.unscale_(optimizer)

    def restart(self) -> None:
        """Reset the loss scaler after a step that was broken off, since it expects every step to be
        completed."""
        if self.scaler is not None:
            state = self.scaler.state_dict()
            self.scaler = torch.amp.GradScaler(self.device.type)
            self.scaler.load_state_dict(state)

    def state_dict(self) -> dict[str, Any]:
        return self.scaler.state_dict() if self.scaler is not None else {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if self.scaler is not None:
            self.scaler.load_state_dict(state)
