"""Work on finished datasets.

`verify` checks a dataset, `merge`, `split` and `sample` make new ones, `decode` turns rows back into images. Datasets
leave by `export_webdataset` (tars), `export_arrays` (plain arrays of ids) and `hub`; `import_files` reads .qlip files.
"""
