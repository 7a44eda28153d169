"""Parse the loss weights of a model's objectives as a user gives them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from movae_fast.names import nearest

if TYPE_CHECKING:
    from movae_fast.models import VAE, ModelInfo


def resolve_weights(
    model: type[VAE] | ModelInfo,
    image_shape: tuple[int, int, int],
    given: Sequence[float] | Mapping[str, float] | None,
    beta: float | None = None,
    defaults: Mapping[str, float] | None = None,
) -> list[float]:
    """Return the objectives' loss weights in order: those given as a list or by name, or the weight `beta`,
    else the defaults.

    `beta` sets the weight of the model's regulariser (`beta_objective`) alone. Raises ValueError, which lists
    the objectives in order, for a wrong number of weights, an unknown name, or a weight that is negative or not
    finite.
    """
    defaults = defaults or model.weighted_objectives({}, image_shape)
    names, weights = list(defaults), list(defaults.values())
    order = ", ".join(names)
    if beta is not None and given is not None:
        raise ValueError(f"--beta and --loss_weights both set the weight of {model.beta_objective}; give one")
    if beta is not None:
        # kl, or the kl_1, kl_2, … of a ladder; without a codebook to commit to, the entropy of its codes.
        stems = [name.partition("_")[0] for name in names]
        weighed = "entropy" if model.beta_objective == "commitment" and "entropy" in stems else None
        weighed = weighed or model.beta_objective
        if weighed not in stems:
            raise ValueError(f"--beta is the weight of {weighed}, which there is not; objectives: {order}")
        weights = [beta if stem == weighed else w for stem, w in zip(stems, weights, strict=True)]
    if isinstance(given, Mapping):
        for name, value in given.items():
            if name not in names:
                raise ValueError(
                    f"--loss_weights.{name}: no such objective{nearest(name, names)}; in order: {order}"
                )
            weights[names.index(name)] = float(value)
    elif given is not None:
        if len(given) != len(names):
            raise ValueError(
                f"--loss_weights has {len(given)} values; the objectives are {len(names)}, in order: {order}"
            )
        weights = [float(w) for w in given]
    for name, weight in zip(names, weights, strict=True):
        if not math.isfinite(weight) or weight < 0:
            raise ValueError(f"--loss_weights: {name} is {weight}; a weight is finite and not negative")
    if not any(weights):
        raise ValueError(f"--loss_weights are all zero: nothing to train; in order: {order}")
    return weights
