"""Datasets by name and the loaders that feed them to a model."""

from movae_fast.data.datasets import DATASETS, DatasetInfo
from movae_fast.data.loaders import (
    LOADERS,
    DaliLoader,
    Loader,
    ResidentLoader,
    TorchLoader,
    choose_loader,
    make_loader,
)
from movae_fast.data.prepared import Prepared, open_split
from movae_fast.data.sources import ImageFiles, Images, ReadOptions, Subset, limited
from movae_fast.data.transforms import Binarizer, to_unit

__all__ = [
    "DATASETS",
    "LOADERS",
    "Binarizer",
    "DaliLoader",
    "DatasetInfo",
    "ImageFiles",
    "Images",
    "Loader",
    "Prepared",
    "ReadOptions",
    "ResidentLoader",
    "Subset",
    "TorchLoader",
    "choose_loader",
    "limited",
    "make_loader",
    "open_split",
    "to_unit",
]
