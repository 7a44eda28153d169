"""Name the metrics of `movae evaluate`; none is computed or imported here."""

ON_IMAGES = ("objectives", "elbo", "images", "depth")
# Of codes and known factors: the names of `disentanglement.METRICS`, in its order.
ON_FACTORS = (
    *("mig", "mig_sup", "mig_sampled", "mig_sup_sampled", "modularity", "jemmig", "factor_vae", "sap"),
    "dci",
)
QUICK = ("mig", "mig_sup", "modularity", "jemmig")  # those of factors that `auto` takes


def named(metrics: str) -> list[str]:
    """Return the names in a text with commas between them, as they are spelt here; unknown ones too."""
    return [name.strip().lower().replace("-", "_") for name in metrics.split(",") if name.strip()]
