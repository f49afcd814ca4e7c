"""Training: recipes, tasks, and the Trainer that owns time."""

from qlip.training.recipe import Recipe, load_recipe
from qlip.training.run import Outcome, run

__all__ = ["Outcome", "Recipe", "load_recipe", "run"]
