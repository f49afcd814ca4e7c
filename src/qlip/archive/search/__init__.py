"""Nearest neighbours of a dataset's embeddings.

`Vectors` reads the embeddings in blocks, `build` makes an index of them with faiss, `measure_recall` sets how far it
searches, `NearestIndex` answers queries from its files, and `Searcher` turns rows into `Hit`s with keys and tokens.
"""
