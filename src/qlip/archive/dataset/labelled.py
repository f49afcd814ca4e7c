"""Tokens with class ids, for models that generate images of a class."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor
from torch.utils.data import Dataset

from qlip.archive.dataset.dataset import TokenDataset, check_dataset
from qlip.archive.dataset.parquet_reader import Numbers
from qlip.errors import QLIPError, nearest
from qlip.files import is_number

NO_CLASS = -1


class LabelledTokens(Dataset[tuple[Tensor, int]]):
    """Pairs (indices, class id) of a dataset's rows; a map-style dataset of PyTorch.

    Args:
        dataset: with labels.
        classes: names of the classes, a class's id is its place; by default the dataset's own labels, in numerical
            order if all of them are whole numbers, else in alphabetical order.

    Raises:
        QLIPError: the dataset was made without labels, or holds none.
    """

    def __init__(self, dataset: TokenDataset, classes: Sequence[str] | None = None) -> None:
        check_dataset(dataset)
        if classes is not None and not (isinstance(classes, Sequence) and all(isinstance(one, str) for one in classes)):
            raise QLIPError(f"classes {str(classes)[:70]}: give the names of the classes, a list of strings")
        self.dataset = dataset
        self.classes = tuple(classes) if classes is not None else _labels(dataset)
        if not self.classes:
            raise QLIPError(f"{dataset.layout.address}: none of its images has a label")

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.dataset[index], int(self.class_ids([index])[0])

    def __getitems__(self, rows: Sequence[int]) -> list[tuple[Tensor, int]]:
        """Return the pairs of many rows; called by PyTorch's DataLoader."""
        return list(zip(self.dataset.indices(rows), self.class_ids(rows).tolist(), strict=True))

    def class_ids(self, rows: Sequence[int] | Numbers) -> Tensor:
        """Return the class ids of rows, int64 (B,); -1 for a row without a label.

        Raises:
            QLIPError: a label that is none of the classes.
        """
        labels = self.dataset.captions_and_labels(rows)[1]
        unknown = next((label for label in labels if label is not None and label not in self._ids), None)
        if unknown is not None:
            raise QLIPError(
                f"{self.dataset.layout.address}: label {unknown!r} is none of the {len(self.classes):,} classes"
                f"{nearest(unknown, self.classes)}"
            )
        return torch.tensor([NO_CLASS if label is None else self._ids[label] for label in labels], dtype=torch.int64)

    @cached_property
    def _ids(self) -> dict[str, int]:
        return {name: number for number, name in enumerate(self.classes)}


def _labels(dataset: TokenDataset) -> tuple[str, ...]:
    """Return the distinct labels of a dataset, in the order of their ids."""
    dataset.captions_and_labels([])  # raises if there are none
    found: set[str | None] = set()
    for part in range(len(dataset.groups.parts)):
        for group in range(len(dataset.groups.group_ends(part))):
            found |= set(dataset.groups.table(part, group, ["label"]).column(0).unique().to_pylist())
    names = [name for name in found if name is not None]
    numbers = all(map(is_number, names))
    return tuple(sorted(names, key=lambda name: (int(name) if numbers else 0, name)))
