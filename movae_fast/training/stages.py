"""Set a progressive ladder's model and losses to the stage of a step."""

from movae_fast.models import ProVLAE
from movae_fast.objectives import LossVector
from movae_fast.schedules import Stages


def apply_stage(stages: Stages, step: int, model: ProVLAE, losses: LossVector) -> None:
    """Write the stage, alpha and KL weights of `step` into tensors of the model and the losses, in place."""
    model.set_stage(stages.stage(step), stages.alpha(step))
    losses.set_active_rungs(model.active, stages.pre_kl)
