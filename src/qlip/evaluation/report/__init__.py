"""Results and how they are shown.

A `Result` is the JSON of an evaluation, `write_bundle` adds arrays, images and plots to its folder. `compare` puts
results into `Table`s, which `tables` writes as Markdown, LaTeX or HTML; `html` makes pages, `plots` draws. Titles of
metrics (`compare.titled`) and colours of plots (`drawing.COLOURS`) are defined here for all rooms.
"""
