"""A dataset on disk and its readers.

`Layout` knows the files, `DatasetInfo` describes their content, `Entry` is a part in the manifest. `TokenDataset` reads
rows through `RowGroups`; `TokenFeed` and `TokenStream` give shuffled, resumable batches for training.
"""
