"""Run evaluators over datasets.

`suites` makes lists of `EvalSpec`s; `run_specs` (evaluate) groups them into passes; `evaluate_dataset` runs one pass,
resumable and shared among processes; `open_set` (datasets) opens a dataset by its name. `scene_answers` scores answers
to questions about made scenes, of any model.
"""
