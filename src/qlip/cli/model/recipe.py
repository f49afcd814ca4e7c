"""`qlip recipe`: examine and compare training recipes."""

from __future__ import annotations

import typer

from qlip.cli.model import ablate, balance, dryrun, probe

app = typer.Typer(
    help="Examine training recipes: balance their losses, probe gradients, compare variants, estimate resources.",
    no_args_is_help=True,
)
app.command("balance")(balance.balance)
app.command("probe")(probe.probe)
app.command("ablate")(ablate.ablate)
app.command("dry-run")(dryrun.dry_run)
