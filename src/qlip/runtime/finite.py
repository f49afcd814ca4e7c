"""Refuse NaN and infinity where numbers enter or leave a model: every comparison with NaN is false, so it wins."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from qlip.errors import QLIPError


def is_finite(values: Tensor) -> bool:
    """Return whether no value is NaN or infinite; costs about as much as reading the tensor once."""
    if not values.numel():
        return True
    return bool(torch.stack(values.detach().aminmax()).isfinite().all())  # both are NaN if any value is


def require_finite(values: Tensor, what: str, remedy: str, names: Sequence[str] | None = None) -> None:
    """Refuse values that are NaN or infinite.

    Inside torch.compile, torch.export and on the meta device, where values are not known, nothing is checked.

    Args:
        values: floating, of any shape and device; the first dimension counts images, texts or tokens.
        what: name of the values in the error, such as "pixel_values".
        remedy: end of the error: what to do about it.
        names: name of each row in the error, such as file names; by default "row 3", or nothing for a single row.

    Raises:
        QLIPError: names the first row that is not finite.
    """
    if torch.compiler.is_compiling() or values.is_meta or is_finite(values):
        return
    rows = values.detach().reshape(len(values), -1) if values.dim() else values.detach().reshape(1, 1)
    row = int((~rows.isfinite().all(1)).nonzero()[0, 0])
    where = names[row] if names is not None else f"row {row}" if len(rows) > 1 else ""
    kind = "NaN" if bool(rows[row].isnan().any()) else "infinite values"
    raise QLIPError(f"{where}{': ' if where else ''}{what} hold {kind}; {remedy}")
