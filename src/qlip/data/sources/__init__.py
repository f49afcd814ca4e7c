"""Sources of captioned and labelled images, all behind `CaptionedImages`: random access by position.

`FolderImages`, `TarImages`, `ParquetImages` and `KarpathyImages` read files as they are; `labelled.py` adds class
folders, class numbers and label lists, with names from a `ClassTable`. `open_path` picks the class by the path;
`captions.py` draws the caption that a training step uses.
"""
