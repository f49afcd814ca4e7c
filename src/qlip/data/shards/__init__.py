"""Tar shards in the layout of webdataset: files of one key are a sample.

`shard_patterns.py` expands patterns to addresses, `tar_index.py` walks over the headers of a tar. A `ShardIndex` holds
the offsets of one shard's samples; `build_index` writes it beside the tar. `IndexedShards` numbers the samples of many
shards for random access; `streaming.py` reads shards without an index, from front to back.
"""
