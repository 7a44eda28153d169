"""Set the model and its losses to the stage of a step, for a progressive ladder."""

from movae_fast.models import ProVLAE
from movae_fast.objectives import LossVector
from movae_fast.schedules import Stages


def apply_stage(stages: Stages, step: int, model: ProVLAE, losses: LossVector) -> None:
    """Put the step's stage, alpha and weights into the model's and the losses' tensors, which stay in place."""
    model.set_stage(stages.stage(step), stages.alpha(step))
    losses.set_active_rungs(model.active, stages.pre_kl)
