"""Read the original files of every dataset, in one module per kind of dataset; `DATASETS` describes each."""

from movae_fast.data.datasets.catalog import DATASETS
from movae_fast.data.datasets.info import DatasetInfo

__all__ = ["DATASETS", "DatasetInfo"]
