"""Results and how they are shown.

A `Result` is the JSON of an evaluation; `write_bundle` adds arrays, images and plots to its folder. `compare` puts the
metrics of results into `Comparison`s, and their `Table`s hold what is shown: text, intervals, best marks, notes.
`table` writes tables as Markdown, LaTeX or HTML, `html` makes pages of tables and `galleries`, `plots` draws. Titles
of metrics (`table.titled`) and colours of plots (`drawing.COLOURS`) are defined here for all rooms.
"""
