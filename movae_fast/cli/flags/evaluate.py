"""Define and check the flags of `movae evaluate`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from movae_fast.choices import Order
from movae_fast.cli import parsing
from movae_fast.evaluation.metric_names import check_wanted
from movae_fast.training.run_list import find_run

DESCRIPTION = "Objectives, bounds, image quality and disentanglement of a trained model: movae evaluate RUN"


@dataclass
class EvaluateConfig:
    """Evaluation.

    Args:
        weights: The run's folder or a checkpoint; may stand first without its flag.
        metrics: Comma-separated, of `objectives`, `elbo` (rate, distortion, active units; of text perplexity
            and mutual information too), `images` (PSNR, SSIM, MS-SSIM), `depth` (of codes: bits and error by
            the number of codebooks used), `lpips`, `fid`, `kid`, `precision_recall`, `density_coverage` (of
            sets of images, by --fid_weights or --feature_network) and, for data with factors, mig, mig_sup,
            mig_sampled, mig_sup_sampled, modularity, jemmig, factor_vae, sap, dci; `all` is every one that
            applies, `auto` leaves out the slow ones.
        samples: Images whose codes the factor metrics are fitted on; half as many more test dci and sap.
        seed: Seed of the choice of images and of every draw.
        iw: Draws of the importance-weighted bound; 0 leaves it out.
        iw_images: Test images, or sentences, of the importance-weighted bound.
        oracle: Of `lstm_text`, compute the true likelihood of the sentences of --iw (seconds each), and the
            bound's gap to it.
        fid_weights: File of torch-fidelity's Inception weights, for the scores of sets; adds FID and KID, to
            the test images, of reconstructions and samples, where --metrics names no score. Codes are sampled
            from a fitted prior alone.
        feature_network: TorchScript file of another network, from uint8 images [N, 3, H, W] to features [N, F];
            or `random`, fixed random convolutions, whose scores compare models with each other only.
        lpips_weights: File of torchvision's VGG16 weights, for `lpips` of reconstructions.
        fid_images: Test images, reconstructions and samples of each score; published values take 10,000
            or more.
        prior: The prior that samples come from: the one that was fitted last (auto), one by its name, or none.
        order: In which order a maskgit prior fills in the codes of samples: that of a Halton sequence, or where
            it is the most confident.
        beta: Beta of a multi-rate model; the default is 1, or the end of its range that is nearest to it.
        limit_test: Use this many evenly spaced test images; 0 means all.
        batch_size: Images (500) or sentences (32, which bounds their mutual information) at a time.
        save_dir: Folder for the files; the default is evaluation/ in the run's folder.
        device: `auto`, `cpu`, `cuda` or `cuda:1`.
        data_dir: Folder of the original files, if not where training had it.
    """

    weights: str
    metrics: str = "auto"
    samples: int = 10_000
    seed: int = 0
    iw: int = 0
    iw_images: int = 256
    oracle: bool = False
    fid_weights: str | None = None
    feature_network: str | None = None
    lpips_weights: str | None = None
    fid_images: int = 10_000
    prior: str = "auto"
    order: Order = "halton"
    beta: float | None = None
    limit_test: int = 0
    batch_size: int | None = None
    save_dir: str | None = None
    device: str = "auto"
    data_dir: str | None = None


def parse(argv: Sequence[str]) -> EvaluateConfig:
    """Return the flags of `movae evaluate` with the run as a path. Raises ValueError for an invalid flag or
    unknown run."""
    words = parsing.first_word_as("weights", argv)
    which = "which model? give the run's folder: movae evaluate RUN, or --weights FILE"
    config = parsing.read_flags(EvaluateConfig, "evaluate", DESCRIPTION, words, "weights", which)
    check_wanted(config, dashes="--")
    config.weights = str(find_run(config.weights))
    return config
