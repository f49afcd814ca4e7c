"""Documents of text and images that UM3 trains on, packed into rows and mixed.

`config.DataSection` names sources; `feed.open_feed` opens the feed of batches that a Trainer reads. `texts` reads texts
from files, `interleaved` documents of texts and images; both are stored as ids by `stored` and cut into rows. `pairs`
reads or draws images with their captions. `documents` puts ids of texts and images together, and `mixture` says which
kind of document stands at which position of the stream.
"""
