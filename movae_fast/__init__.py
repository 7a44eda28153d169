"""Train multi-objective variational autoencoders as fast as single-objective ones.

    import movae_fast
    run = movae_fast.train("demo", epochs=2)
    model = movae_fast.load(run)
    movae_fast.evaluate(run)

Each name is imported when it is first used: `import movae_fast` imports nothing else.
"""

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from movae_fast.api.evaluation import evaluate
    from movae_fast.api.hub import HubModel
    from movae_fast.api.loading import load
    from movae_fast.api.sentence_model import SentenceModel
    from movae_fast.api.trained_model import Quantized, TrainedModel
    from movae_fast.api.trained_run import TrainedRun
    from movae_fast.api.training import train

__all__ = [
    "HubModel",
    "Quantized",
    "SentenceModel",
    "TrainedModel",
    "TrainedRun",
    "evaluate",
    "load",
    "train",
]

_MODULES = {
    "HubModel": "hub",
    "Quantized": "trained_model",
    "SentenceModel": "sentence_model",
    "TrainedModel": "trained_model",
    "TrainedRun": "trained_run",
    "evaluate": "evaluation",
    "load": "loading",
    "train": "training",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'movae_fast' has no attribute {name!r}")
    from importlib import import_module

    value = globals()[name] = getattr(import_module(f"movae_fast.api.{_MODULES[name]}"), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
