"""Training of UM3: the task ``um3``.

`recipe` is the schema of its recipes; `start` makes or loads the model that one starts from; `task` trains, and
`validation` measures held-out texts, captions and images between the steps.
"""
