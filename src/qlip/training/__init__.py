"""Training of any task: a `Kind` builds a `Job` from a recipe, and `run` trains it in a folder.

`Trainer` owns time: steps, schedule, checkpoints, signals, the log. A `Task` is a model and how a batch becomes losses.
A `Feed` gives batches, `Parallel` joins the ranks. Nothing here knows images or text, except ``tasks`` (the tokenizer's
two stages) and ``studies`` (programs over several runs).
"""

from qlip.training.job import Job, Kind
from qlip.training.recipe import load_recipe
from qlip.training.recipe_schema import RunRecipe
from qlip.training.run import Outcome, run

__all__ = ["Job", "Kind", "Outcome", "RunRecipe", "load_recipe", "run"]
