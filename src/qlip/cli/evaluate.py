"""`qlip eval`: the figures of a model's card."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from qlip.cli import options
from qlip.cli.console import new_table, print_json, print_table, progress, stoppable

if TYPE_CHECKING:
    from qlip.evaluation.protocol import Measurement


def evaluate(
    model: options.Model = options.DEFAULT_MODEL,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Only the first so many pictures of each set; the result says how many.")
    ] = None,
    device: options.Device = "auto",
    dtype: options.DtypeOption = options.Dtype.float32,
    as_json: options.Json = False,
) -> None:
    """Measure a model on held-out pictures: what its tokens keep, and whether it names what they show.

    Uses the sets that qlip data get fetches: cifar10, emoji, clipart, wallpapers. The full pass takes some minutes.
    """
    from qlip.cli import models
    from qlip.evaluation.card import CARD
    from qlip.evaluation.protocol import open_evaluation

    tokenizer = models.load(model, device, dtype)
    sizes = [len(open_evaluation(row.data, tokenizer.processor, limit)) for row in CARD]
    results: list[tuple[str, Measurement]] = []
    with stoppable("nothing was reported"), progress("measuring", sum(sizes)) as bar:
        for row in CARD:
            results.append((row.title, row.run(tokenizer.model, tokenizer.processor, limit, bar.advance)))
    if as_json:
        print_json(
            {"model": tokenizer.described(), "results": [{"title": title} | asdict(one) for title, one in results]}
        )
        return
    rebuilt = new_table("rebuilt", "set", "n", "PSNR", "SSIM", "shrink PSNR", "bit marginals")
    named = new_table("named", "set", "n", "classes", "top-1", "top-5", "chance", "what it is")
    for title, one in results:
        values = one.values
        if one.protocol == "reconstruction":
            marginals = f"{values['bit_marginal_min']:.2f} to {values['bit_marginal_max']:.2f}"
            psnr, ssim, shrunk = f"{values['psnr']:.2f} dB", f"{values['ssim']:.3f}", f"{values['shrink_psnr']:.2f} dB"
            rebuilt.add_row(title, one.data, f"{one.count:,}", psnr, ssim, shrunk, marginals)
        else:
            percent = tuple(f"{values[key]:.1f}%" for key in ("top1", "top5", "chance"))
            named.add_row(title, one.data, f"{one.count:,}", f"{values['classes']:.0f}", *percent, one.protocol)
    print_table(rebuilt)
    print()
    print_table(named)
    print(f"\nPrepared as the checkpoint says: {results[0][1].preparation}.")
