"""Training of vision-language models: the task ``vlm``.

`recipe` is the schema of its recipes; `start` loads or makes the model that one starts from, with a `vocabulary` for a
decoder of its own; `question_feed` makes batches of questions about made scenes; `task` trains; `validation` counts
right answers between the steps.
"""
