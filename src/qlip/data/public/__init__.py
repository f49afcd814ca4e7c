"""Public data sets by name, fetched into a cache."""

from qlip.data.public.registry import DATASETS, DatasetInfo, get, open_named
from qlip.data.public.store import cache_folder, read_manifest

__all__ = ["DATASETS", "DatasetInfo", "cache_folder", "get", "open_named", "read_manifest"]
