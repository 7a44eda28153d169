"""Make an interactive page of a trained model: sliders for latents and beta, or a map of codes that can be
edited."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from movae_fast.data import Loader, to_unit
from movae_fast.evaluation.sample_source import SampleSource
from movae_fast.models import GaussianVAE
from movae_fast.models.vq_vae import VQVAE
from movae_fast.pages.sheets import latent_name
from movae_fast.pictures import to_pixels

SLIDERS = 24  # the most that a page has; latents without one keep the value of the test image or draw
REACH = 3.0  # range of a slider to either side of 0, in standard deviations of the prior
# gradio's settings for one call at a time: the model has one beta, which each call sets.
ONE: dict[str, Any] = {"concurrency_limit": 1, "concurrency_id": "model"}
SIDE = 320  # of an image on the page, in pixels


class Viewer:
    """Compute the images that the page shows, with a model in evaluation mode and its test images.

    normalize: whether the model's images are in [-1, 1] instead of [0, 1]. loader: of the test images, None if
    they cannot be read.
    """

    def __init__(self, source: SampleSource, normalize: bool, loader: Loader | None) -> None:
        self.source, self.model, self.normalize, self.loader = source, source.model, normalize, loader

    @property
    def images(self) -> int:
        """Return the number of test images; 0 without a loader."""
        return 0 if self.loader is None else len(self.loader.source)

    def pixels(self, images: Tensor) -> np.ndarray:
        """Return an image [1, C, S, S] in the model's range as uint8 [h, w, 3], enlarged to a side of about
        SIDE pixels."""
        return to_pixels(to_unit(images, self.normalize), max(1, SIDE // images.shape[-1]))[0]

    def test_image(self, number: int) -> Tensor:  # [1, C, S, S] in the model's range
        """Return a test image by its number from 0. Raises ValueError for a number that no image has."""
        if self.loader is None or not 0 <= number < self.images:
            raise ValueError(f"test image {number}: there are {self.images:,}, numbered from 0")
        return next(iter(self.loader.take(torch.tensor([number]))))[0]

    def set_beta(self, log10_beta: float) -> None:
        """Set a multi-rate model to the beta 10^log10_beta; another model stays as it is."""
        if self.model.rates is not None:
            self.model.set_beta(10.0**log10_beta)

    @torch.no_grad()
    def from_latents(self, z: Tensor, log10_beta: float = 0.0) -> np.ndarray:
        """Return the image uint8 [h, w, 3] decoded from latents [1, D] at the beta 10^log10_beta."""
        self.set_beta(log10_beta)
        return self.pixels(self.model.to_image(self.model.decode(z.to(self.model.device))))

    @torch.no_grad()
    def latents_of(self, number: int, log10_beta: float = 0.0) -> tuple[np.ndarray, Tensor]:
        """Return a test image uint8 [h, w, 3] and the mean [1, D] of its posterior at the beta
        10^log10_beta."""
        assert isinstance(self.model, GaussianVAE)
        self.set_beta(log10_beta)
        x = self.test_image(number)
        return self.pixels(x), self.model.encode(x)[0].float().cpu()

    def draw(self, seed: int) -> Tensor:  # [1, D]
        """Return a draw of latents from the prior that was fitted, or the model's own."""
        return self.source.latents(1, torch.Generator().manual_seed(seed)).float().cpu()

    @torch.no_grad()
    def sample(self, seed: int, temperature: float = 1.0, log10_beta: float = 0.0) -> np.ndarray:
        """Return an image drawn from the prior that was fitted, or the model's own."""
        self.set_beta(log10_beta)
        generator = torch.Generator().manual_seed(seed)
        (image,) = self.source.images_at(temperature, 1, 1, generator)
        return self.pixels(image)

    @torch.no_grad()
    def codes_of(self, number: int) -> tuple[np.ndarray, list[list[int]]]:
        """Return a test image uint8 [h, w, 3] and its map of codes, as a list of rows."""
        assert isinstance(self.model, VQVAE)
        x = self.test_image(number)
        index = self.model.quantize(self.model.encode(x)[0])[1]
        return self.pixels(x), index[0].tolist()

    @torch.no_grad()
    def from_codes(self, codes: list[list[Any]]) -> np.ndarray:
        """Return the image uint8 [h, w, 3] decoded from a map of codes. Raises ValueError for an entry that is
        no index of the codebook."""
        assert isinstance(self.model, VQVAE)
        side, count = self.model.side, self.model.num_embeddings
        try:
            index = torch.tensor([[int(code) for code in row] for row in codes])
        except (TypeError, ValueError):
            raise ValueError(
                f"every cell of the map has a code, a whole number from 0 to {count - 1}"
            ) from None
        if index.shape != (side, side) or int(index.min()) < 0 or int(index.max()) >= count:
            raise ValueError(f"the map has {side} x {side} codes, whole numbers from 0 to {count - 1}")
        index = index[None].to(self.model.device)
        return self.pixels(self.model.to_image(self.model.decode(self.model.lookup(index))))

    def random_codes(self, seed: int) -> list[list[int]]:
        """Return a map of codes from the prior that was fitted; without one, each by how often training chose
        it."""
        return self.source.codes(1, torch.Generator().manual_seed(seed))[0].tolist()


def page(viewer: Viewer, title: str) -> Any:
    """Return the page of a model, a `gradio.Blocks`: sliders, a map of codes, or draws, as fits the model."""
    import gradio as gr

    with gr.Blocks(title=title, analytics_enabled=False) as blocks:
        gr.Markdown(f"# {title}")
        if isinstance(viewer.model, VQVAE) and len(viewer.model.code_sizes) == 1:
            codes_page(gr, viewer)
        elif isinstance(viewer.model, GaussianVAE):
            latents_page(gr, viewer)
        else:
            draws_page(gr, viewer)
    return blocks


def beta_slider(gr: Any, viewer: Viewer) -> Any:
    """Return a slider of log10 beta over the range of a multi-rate model; a hidden one for another model."""
    rates = viewer.model.rates
    if rates is None:
        return gr.Slider(0, 1, value=0, visible=False, label="log10 beta")
    low, high = math.log10(rates.beta_min), math.log10(rates.beta_max)
    start = float(rates.evaluated.reshape(-1)[0]) / math.log(10)
    return gr.Slider(
        low, high, value=start, step=0.01, label="log10 of beta: detail left, a compact code right"
    )


def latents_page(gr: Any, viewer: Viewer) -> None:
    """Lay out sliders for a vector of latents beside the image that is decoded from them."""
    model = viewer.model
    assert isinstance(model, GaussianVAE)
    count = min(model.latent_dim, SLIDERS)
    whole = gr.State(torch.zeros(1, model.latent_dim).tolist())
    with gr.Row():
        with gr.Column():
            original = gr.Image(label="test image", interactive=False, visible=viewer.images > 0)
            image = gr.Image(
                viewer.from_latents(viewer.draw(0) * 0), label="image of the sliders", interactive=False
            )
        with gr.Column():
            beta = beta_slider(gr, viewer)
            number = gr.Number(0, label="test image, by number", precision=0, visible=viewer.images > 0)
            take = gr.Button("Latents of this test image", visible=viewer.images > 0)
            seed = gr.Number(0, label="seed", precision=0)
            draw = gr.Button(f"Draw latents from {viewer.source.name}")
            sliders = [
                gr.Slider(-REACH, REACH, value=0, step=0.05, label=latent_name(model, k)) for k in range(count)
            ]

    def changed(z: list[list[float]], log10_beta: float, *values: float) -> np.ndarray:
        latents = torch.tensor(z)
        latents[0, :count] = torch.tensor(values)
        return viewer.from_latents(latents, log10_beta)

    def placed(z: Tensor) -> list[Any]:
        return [z.tolist(), *(round(value, 3) for value in z[0, :count].clamp(-REACH, REACH).tolist())]

    def encoded(k: float, log10_beta: float) -> list[Any]:
        shown, z = said(gr, lambda: viewer.latents_of(int(k), log10_beta))
        return [shown, viewer.from_latents(z, log10_beta), *placed(z)]

    def drawn(k: float, log10_beta: float) -> list[Any]:
        z = viewer.draw(int(k))
        return [viewer.from_latents(z, log10_beta), *placed(z)]

    moved = [slider.release for slider in sliders]
    gr.on([beta.release, *moved], changed, [whole, beta, *sliders], image, api_name="latents", **ONE)
    take.click(encoded, [number, beta], [original, image, whole, *sliders], api_name="encode", **ONE)
    draw.click(drawn, [seed, beta], [image, whole, *sliders], api_name="draw", **ONE)


def codes_page(gr: Any, viewer: Viewer) -> None:
    """Lay out a table of codes that can be edited beside the image that is decoded from them."""
    start = viewer.codes_of(0) if viewer.images else (None, viewer.random_codes(0))
    with gr.Row():
        original = gr.Image(start[0], label="test image", interactive=False, visible=viewer.images > 0)
        image = gr.Image(viewer.from_codes(start[1]), label="image of the codes", interactive=False)
    with gr.Row():
        number = gr.Number(0, label="test image, by number", precision=0, visible=viewer.images > 0)
        take = gr.Button("Codes of this test image", visible=viewer.images > 0)
        seed = gr.Number(0, label="seed", precision=0)
        fitted = viewer.source.fitted is not None
        how = f"from {viewer.source.name}" if fitted else "by how often they are used"
        draw = gr.Button(f"Draw codes {how}")
    codes = gr.Dataframe(
        start[1], type="array", datatype="number", interactive=True, label="the codes: change a cell"
    )

    def encoded(k: float) -> list[Any]:
        shown, index = said(gr, lambda: viewer.codes_of(int(k)))
        return [shown, viewer.from_codes(index), index]

    def drawn(k: float) -> list[Any]:
        index = viewer.random_codes(int(k))
        return [viewer.from_codes(index), index]

    def edited(index: list[list[Any]]) -> np.ndarray:
        return said(gr, lambda: viewer.from_codes(index))

    take.click(encoded, number, [original, image, codes], api_name="encode", **ONE)
    draw.click(drawn, seed, [image, codes], api_name="draw", **ONE)
    codes.input(edited, codes, image, api_name="codes", **ONE)


def draws_page(gr: Any, viewer: Viewer) -> None:
    """Lay out draws of a hierarchy or of several codebooks, which are too many for sliders."""
    beta = beta_slider(gr, viewer)
    warm = viewer.source.is_prior
    warmth = gr.Slider(
        0.1, 1.2, value=0.8 if warm else 1.0, step=0.05, label="temperature of the prior", visible=warm
    )
    seed = gr.Number(0, label="seed", precision=0)
    button = gr.Button("Draw")
    image = gr.Image(label="sample", interactive=False)

    def drawn(k: float, temperature: float, log10_beta: float) -> np.ndarray:
        return viewer.sample(int(k), temperature, log10_beta)

    button.click(drawn, [seed, warmth, beta], image, api_name="draw", **ONE)


def said(gr: Any, compute: Any) -> Any:
    """Return the result of calling `compute`; a ValueError that it raises is shown on the page."""
    try:
        return compute()
    except ValueError as error:
        raise gr.Error(str(error), print_exception=False) from None
