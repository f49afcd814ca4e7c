"""Parquet files of image URLs, as LAION publishes its lists: read by ranges of rows."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

from qlip.archive.tokenize.url_list import ADDRESS_FIELDS, Fetching, UrlList, url_of
from qlip.data.sources.base import CAPTION_FIELDS, LABEL_FIELDS, field_of
from qlip.data.sources.parquet import open_table, rows_of
from qlip.data.storage.address import public_address
from qlip.errors import QLIPError, require


def count_rows(address: str) -> int:
    """Return the number of rows of a Parquet file. Raises QLIPError: no column of URLs."""
    table = open_table(address)
    if field_of(names := table.schema_arrow.names, ADDRESS_FIELDS) is None:
        raise QLIPError(
            f"{public_address(address)}: no column of images (bytes, or a struct with bytes) or of URLs; it has"
            f" {', '.join(names)}"
        )
    return int(table.metadata.num_rows)


class UrlTable(UrlList):
    """Images of consecutive rows of a Parquet file of URLs; see `UrlList`.

    Args:
        address: of the file.
        first, count: rows [first, first + count).
        caption_field: column of the caption; by default one of `CAPTION_FIELDS`.
        fetching: limits of fetching the images.
        columns: further columns to read, into `RawSample.record`.

    Raises:
        QLIPError: no such column, or the file became shorter.
    """

    def __init__(
        self,
        address: str,
        first: int,
        count: int,
        caption_field: str | None,
        fetching: Fetching | None = None,
        columns: Sequence[str] = (),
    ) -> None:
        table = open_table(address)
        names = table.schema_arrow.names
        wanted = [*columns, *([] if caption_field is None else [caption_field])]
        if absent := [name for name in wanted if name not in names]:
            raise QLIPError(f"{public_address(address)}: no column {absent[0]!r}; it has {', '.join(names)}")
        known = {*ADDRESS_FIELDS, *CAPTION_FIELDS, *LABEL_FIELDS}
        read = [name for name in names if name.lower() in known or name in wanted]
        sizes = [table.metadata.row_group(number).num_rows for number in range(table.num_row_groups)]
        starts = list(accumulate(sizes, initial=0))
        groups = [
            number
            for number, size in enumerate(sizes)
            if starts[number] < first + count and starts[number] + size > first
        ]
        if starts[-1] < first + count:
            raise QLIPError(f"{public_address(address)}: changed after it was opened; start again")
        before = first - starts[groups[0]]
        try:
            records = rows_of(table.read_row_groups(groups, columns=read).slice(before, count))
        except (OSError, require("pyarrow", extra="tables").ArrowException) as error:
            raise QLIPError(
                f"{public_address(address)}: rows {first + 1:,} to {first + count:,} cannot be read"
                f" ({' '.join(str(error).split())[:200]}); fetch or write the file again"
            ) from None
        super()._open(address, [(url_of(record), record) for record in records], first, caption_field, fetching)
