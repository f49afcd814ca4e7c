"""What is trained."""

from qlip.training.tasks.stage1 import Stage1

__all__ = ["Stage1"]
