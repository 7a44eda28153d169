"""List the names of the metrics of `movae evaluate`, without importing what computes them."""

from typing import Protocol

from movae_fast.names import ArgumentError, nearest
from movae_fast.training.limits import Bounds, check_values

ON_IMAGES = ("objectives", "elbo", "images", "depth", "lpips")
# Of sets of images, by a network's features.
ON_SETS = ("fid", "kid", "precision_recall", "density_coverage")
# Of codes and known factors: the names of `disentanglement.METRICS`, in its order.
ON_FACTORS = (
    *("mig", "mig_sup", "mig_sampled", "mig_sup_sampled", "modularity", "jemmig", "factor_vae", "sap"),
    "dci",
)
QUICK = ("mig", "mig_sup", "modularity", "jemmig")  # those of factors that `auto` takes


def named(metrics: str) -> list[str]:
    """Return the names in a comma-separated text, in the spelling used here; unknown names are kept."""
    return [name.strip().lower().replace("-", "_") for name in metrics.split(",") if name.strip()]


def check_metrics(metrics: str) -> None:
    """Raise ArgumentError for a metric that there is not, and for none."""
    if metrics in ("auto", "all"):
        return
    valid = [*ON_IMAGES, *ON_SETS, *ON_FACTORS]
    for name in named(metrics):
        if name not in valid:
            raise ArgumentError(f"metrics {name}: unknown{nearest(name, valid)}; valid: {', '.join(valid)}")
    if not named(metrics):
        raise ArgumentError(f"metrics is empty; valid: {', '.join(valid)}")


class Asked(Protocol):
    """Define what is checked of a wish for metrics, before the model is loaded."""

    @property
    def metrics(self) -> str: ...

    @property
    def fid_weights(self) -> str | None: ...

    @property
    def feature_network(self) -> str | None: ...

    @property
    def lpips_weights(self) -> str | None: ...


def check_wanted(wanted: Asked, dashes: str = "") -> None:
    """Raise ValueError for numbers out of bounds, and ArgumentError as `check_metrics` and `check_networks`
    do."""
    check_values(wanted, samples=Bounds(100), fid_images=Bounds(2))
    check_metrics(wanted.metrics)
    check_networks(wanted, dashes)


def check_networks(wanted: Asked, dashes: str = "") -> None:
    """Raise ArgumentError for a metric without the network whose features it compares, and for two networks.

    dashes: what the message puts before the names of other arguments; the first one's are added by the command
    line.
    """
    if wanted.fid_weights and wanted.feature_network:
        raise ArgumentError(
            f"fid_weights and {dashes}feature_network both choose the features' network; give one"
        )
    if ("lpips" in named(wanted.metrics)) != (wanted.lpips_weights is not None):
        raise ArgumentError(f"metrics lpips and {dashes}lpips_weights FILE need each other")
    if wanted.fid_weights or wanted.feature_network:
        return
    for name in named(wanted.metrics):
        if name in ON_SETS:
            raise ArgumentError(
                f"metrics {name} compares features: give {dashes}fid_weights FILE (Inception), "
                f"{dashes}feature_network FILE, or {dashes}feature_network random"
            )
