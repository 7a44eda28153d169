"""Read datasets by name, and feed them to a model by one of three loaders."""

from movae_fast.data.binarize import Binarizer
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
from movae_fast.data.sources import ImageFiles, Images, ImageSource, ReadOptions, Subset, limited
from movae_fast.data.transforms import to_unit

__all__ = [
    "DATASETS",
    "LOADERS",
    "Binarizer",
    "DaliLoader",
    "DatasetInfo",
    "ImageFiles",
    "ImageSource",
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
