"""Tasks: models, losses and optimizers of our two stages."""

from qlip.training.tasks.stage1 import Stage1
from qlip.training.tasks.stage2 import Stage2

__all__ = ["Stage1", "Stage2"]
