"""Run `movae serve`: a page to look into a trained model."""

from __future__ import annotations

import os
import socket
import sys
from pathlib import Path
from typing import Any

from movae_fast.cli.flags.serve import ServeConfig
from movae_fast.cli.trained import say_source
from movae_fast.data import Loader
from movae_fast.evaluation.sample_source import SampleSource, find_source
from movae_fast.evaluation.trained import adapt_config, caption_of
from movae_fast.models import VAE
from movae_fast.names import ArgumentError, first_line
from movae_fast.pages.live import Viewer, page
from movae_fast.training.build import load_trained, make_loader
from movae_fast.training.config import TrainConfig
from movae_fast.training.device import resolve_device
from movae_fast.training.run_folder import folder_of

LOOPBACK = ("127.0.0.1", "localhost", "::1")


def run(config: ServeConfig) -> int:
    """Serve the interactive page of a trained model until Ctrl-C, and return the exit status."""
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # nothing is told to anybody
    try:
        import gradio  # noqa: F401
    except ImportError:
        raise ValueError("movae serve needs the extra: pip install 'movae-fast[web]'") from None
    check_free(config.host, config.port)
    blocks = build(config)
    print(f"http://{config.host}:{config.port}  (Ctrl-C ends it)", flush=True)
    launch(blocks, config, wait=True)
    return 0


def build(config: ServeConfig) -> Any:
    """Load the model and return its page."""
    device = resolve_device(config.device)
    trained, model, _, step = load_trained(Path(config.weights), device)
    if trained.is_text:
        raise ValueError(f"{config.weights} is a model of text; movae sample prints its sentences")
    adapt_config(trained, config.device, config.data_dir, 1)
    title = caption_of(trained, Path(config.weights), step=step)
    source = source_of(config, trained, model)
    say_source("serve", source)
    return page(Viewer(source, trained.data.normalize, test_images(trained, device)), title)


def source_of(config: ServeConfig, trained: TrainConfig, model: VAE) -> SampleSource:
    """Return what the page's draws are drawn from.

    A prior is fitted at one beta, and the page of a multi-rate model moves it: such a page draws from the
    model's own prior. Raises ArgumentError for a prior that does not fit.
    """
    if model.rates is None:
        return find_source(folder_of(Path(config.weights)), trained, model, config.prior)
    if config.prior not in ("auto", "none"):
        raise ArgumentError(f"prior {config.prior} is of one beta, which this page moves; leave it out")
    return SampleSource(model)


def test_images(trained: TrainConfig, device: Any) -> Loader | None:
    """Return the test images; None, with a line on standard error, where they cannot be read."""
    try:
        return make_loader(trained, device, "test")
    except (ValueError, OSError) as error:
        print(
            f"movae serve: without test images, which cannot be read here: {first_line(error)}", file=sys.stderr
        )
        return None


def check_free(host: str, port: int) -> None:
    """Raise ValueError for an address that is not this machine's, and for a port that is taken."""
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as error:
        reason = error.strerror or str(error)
        raise ValueError(f"--host {host} --port {port}: {reason}; give another --port, or --host") from None


def launch(blocks: Any, config: ServeConfig, wait: bool) -> Any:
    """Start the server; with `wait` return when it ends.

    On loopback a page that names another host is refused, so that no site in the user's browser can reach the
    model by a name that it points here.
    """
    import gradio
    from starlette.middleware import Middleware
    from starlette.middleware.trustedhost import TrustedHostMiddleware

    hosts = list(LOOPBACK) if config.host in LOOPBACK else ["*"]
    return blocks.launch(
        server_name=config.host,
        server_port=config.port,
        share=False,
        quiet=True,
        footer_links=[],
        ssr_mode=False,
        theme=gradio.themes.Default(font=["system-ui", "sans-serif"], font_mono=["monospace"]),
        prevent_thread_lock=not wait,
        app_kwargs={"middleware": [Middleware(TrustedHostMiddleware, allowed_hosts=hosts)]},
    )
