"""Read datasets by name, and feed them to a model through one of three loaders.

`DATASETS` describes every dataset; the modules that read and load are imported at their first use.
"""

from typing import TYPE_CHECKING

from movae_fast import lazy
from movae_fast.data.datasets import DATASETS, DatasetInfo

if TYPE_CHECKING:
    from movae_fast.data.binarize import Binarizer
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

__getattr__, __dir__ = lazy.exports(
    __name__,
    {
        "binarize": ("Binarizer",),
        "loaders": (
            *("LOADERS", "DaliLoader", "Loader", "ResidentLoader", "TorchLoader", "choose_loader"),
            "make_loader",
        ),
        "prepared": ("Prepared", "open_split"),
        "sources": ("ImageFiles", "ImageSource", "Images", "ReadOptions", "Subset", "limited"),
        "transforms": ("to_unit",),
    },
)

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
