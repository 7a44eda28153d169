"""Read each dataset's original files; DATASETS says what is known of each."""

from movae_fast.data.datasets.catalog import DATASETS, DatasetInfo

__all__ = ["DATASETS", "DatasetInfo"]
