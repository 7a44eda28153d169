"""Read the original files of every dataset, a module for each kind; `DATASETS` says what is known of each."""

from movae_fast.data.datasets.catalog import DATASETS
from movae_fast.data.datasets.info import DatasetInfo

__all__ = ["DATASETS", "DatasetInfo"]
