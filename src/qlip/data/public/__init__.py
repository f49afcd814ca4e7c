"""Public data sets by name, fetched into a cache."""

from qlip.data.public.cache import cache_folder, read_manifest
from qlip.data.public.registry import DATASETS, PublicDataset, get, open_named

__all__ = ["DATASETS", "PublicDataset", "cache_folder", "get", "open_named", "read_manifest"]
