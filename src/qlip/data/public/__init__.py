"""Public datasets and weights by name, fetched once into a cache.

A module per dataset defines its `PublicDataset`: a description and a `build` function. `get` looks it up in `DATASETS`,
gives `build` a `Builder` that fetches packages (`fetch.py`) and writes tar shards, texts or weights, and moves the
finished folder with its manifest into the cache (`cache.py`). `open_named` opens a split of images, `find_texts` finds
one of texts (`texts`); they never fetch. Made scenes (`scenes.py`, `scene_captions.py`) are drawn when they are read,
without a cache.
"""

from qlip.data.public.builder import PublicDataset
from qlip.data.public.cache import read_manifest
from qlip.data.public.registry import DATASETS, find_texts, get, is_here, open_named, require_datasets
from qlip.files import cache_folder

__all__ = [
    "DATASETS",
    "PublicDataset",
    "cache_folder",
    "find_texts",
    "get",
    "is_here",
    "open_named",
    "read_manifest",
    "require_datasets",
]
