"""Feed batches of images to a model; the loaders `resident`, `dali` and `torch` give the same batches."""

from movae_fast.data.loaders.choose import LOADERS, choose_loader, make_loader
from movae_fast.data.loaders.dali import DaliLoader
from movae_fast.data.loaders.loader import Loader
from movae_fast.data.loaders.resident import ResidentLoader
from movae_fast.data.loaders.torch_workers import TorchLoader

__all__ = ["LOADERS", "DaliLoader", "Loader", "ResidentLoader", "TorchLoader", "choose_loader", "make_loader"]
