"""Datasets by name and the loaders that feed them to a model."""

from movae_fast.data.loaders import LOADERS, Loader, ResidentLoader, TorchLoader, choose_loader
from movae_fast.data.sets import DATASETS, DatasetInfo
from movae_fast.data.sources import ImageFiles, Images, ReadOptions, Subset
from movae_fast.data.transforms import to_unit

__all__ = [
    "DATASETS",
    "LOADERS",
    "DatasetInfo",
    "ImageFiles",
    "Images",
    "Loader",
    "ReadOptions",
    "ResidentLoader",
    "Subset",
    "TorchLoader",
    "choose_loader",
    "to_unit",
]
