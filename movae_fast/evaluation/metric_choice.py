"""Choose the metrics that a model and its data have."""

from __future__ import annotations

from movae_fast.evaluation.measure import applies
from movae_fast.evaluation.metric_names import ON_FACTORS, ON_IMAGES, QUICK, check_metrics, named
from movae_fast.models import LATENT_WORDS, VAE
from movae_fast.names import ArgumentError
from movae_fast.training.config import TrainConfig


def chosen_metrics(metrics: str, trained: TrainConfig, model: VAE, iw: int) -> list[str]:
    """Return the metrics to compute, in order, of names with commas between them, "all" or "auto".

    iw: draws of the importance-weighted bound, 0 for none. Raises ArgumentError for a metric that the model or
    the data do not have.
    """
    check_metrics(metrics)
    info, arch = trained.info, trained.model.arch
    # Continuous factors have names and no sizes.
    factors, has = bool(info.factor_sizes), LATENT_WORDS[model.latents]
    if iw and model.latents == "codebook":
        raise ArgumentError(f"iw needs a model with a Gaussian posterior; {arch} has {has}")
    if iw and trained.objective.recons_dist == "gaussian_optimal":
        raise ArgumentError(
            "iw weights draws by their likelihood; gaussian_optimal fits its variance to each image and "
            "draw: leave it out"
        )
    if metrics in ("auto", "all"):
        wanted = ON_FACTORS if metrics == "all" else QUICK
        return [n for n in (*ON_IMAGES, *wanted) if n != "lpips" and applies(n, model.latents, factors)]
    names = named(metrics)
    for name in names:
        if name in ON_FACTORS and not factors:
            known = "continuous ones" if info.factor_names else "none"
            raise ArgumentError(
                f"metrics {name} needs data with known discrete factors; {info.name} has {known}"
            )
        if not applies(name, model.latents, factors):
            needs = LATENT_WORDS["vector"] if name in ON_FACTORS else "latents"
            needs = "codes" if name == "depth" else needs
            raise ArgumentError(f"metrics {name} needs a model with {needs}; {arch} has {has}")
    return names
