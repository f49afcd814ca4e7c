"""Work on finished datasets.

`verify` checks a dataset, `merge`, `split` and `sample` make new ones, `decode` turns rows back into images,
`export_webdataset` writes tars, `export_arrays` plain arrays of ids, `import_files` reads .qlip files, and `hub` uploads and downloads.
"""
