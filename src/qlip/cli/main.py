"""The command `qlip`: its page of help, and the one place where errors become a line and an exit code."""

from __future__ import annotations

import io
import sys
import traceback
from typing import Annotated, Any

import torch
import typer
from typer.core import TyperGroup

from qlip import QLIPError, __version__
from qlip.cli.console import FAILURE, STOPPED, USAGE, UsageError, say
from qlip.cli.dataset import data, search, tokenize, tokens
from qlip.cli.dataset import tokens_codec as entropy
from qlip.cli.dataset import tokens_index as search_index
from qlip.cli.evaluation import compare, evaluate
from qlip.cli.image import classify, demo, embed, encode, reconstruct
from qlip.cli.model import ablate, balance, convert, export, info, probe, train

PICTURES, WORDS, MODELS = "Pictures and tokens", "Pictures and words", "Models and data"
ARCHIVE = "Pictures by the million"

EPILOG = """
**Examples**

`qlip demo` — see it work, then look at demo/demo.png

`qlip encode photos/ -o tokens/` — every picture below photos/ as a .qlip file

`qlip decode tokens/ -o rebuilt/` — and back

`qlip reconstruct photo.jpg --size 256 256 -o grid.png` — what the tokens keep, at a larger size

`qlip classify *.jpg --labels "cat, dog, ship"` — name pictures

`qlip train nano/stage1 schedule.steps=2000` — train the bundled model yourself, a little

**Output.** Results go to stdout, as JSON with --json; progress, notes and errors go to stderr. A file you name with
--output is replaced; files whose names follow from the inputs are never overwritten without --overwrite.

**Exit codes.** 0 all done; 1 something failed (of many inputs, the others are done); 2 the command was typed wrong,
nothing was done; 130 stopped with Ctrl-C or by SIGTERM, finished files are kept. Errors are one line; --debug shows the
traceback.
"""


class Manual(TyperGroup):
    """Commands in the order they were added, and Ctrl-C in one line."""

    def invoke(self, ctx: Any) -> Any:
        """Run the command."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            say("stopped")
            raise typer.Exit(STOPPED) from None


app = typer.Typer(
    name="qlip",
    cls=Manual,
    rich_markup_mode="markdown",
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog=EPILOG,
)


@app.callback(invoke_without_command=True)
def qlip(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
    debug: Annotated[
        bool, typer.Option("--debug", help="Show the traceback of an error; anywhere on the line.")
    ] = False,
) -> None:
    """Images as a few hundred bytes that also know what is in them.

    QLIP is a visual tokenizer aligned with text: it turns an image into a grid of discrete tokens from which the
    image can be rebuilt, and into a vector that can be compared with words. A small trained model comes with this
    package and is used unless --model names another.
    """
    if version:
        print(f"qlip {__version__}")
    elif context.invoked_subcommand is None:
        print(context.get_help())


app.command(rich_help_panel=PICTURES)(demo.demo)
app.command(rich_help_panel=PICTURES)(encode.encode)
app.command(rich_help_panel=PICTURES)(encode.decode)
app.command(rich_help_panel=PICTURES)(reconstruct.reconstruct)
app.command(rich_help_panel=WORDS)(classify.classify)
app.command(rich_help_panel=WORDS)(embed.embed)
app.command(rich_help_panel=ARCHIVE)(tokenize.tokenize)
app.add_typer(tokens.app, name="tokens", rich_help_panel=ARCHIVE)
app.command(rich_help_panel=ARCHIVE)(search_index.index)
app.command(rich_help_panel=ARCHIVE)(search.search)
app.command(rich_help_panel=MODELS)(info.info)
app.command(rich_help_panel=MODELS)(convert.convert)
app.command(rich_help_panel=MODELS)(train.train)
app.command(rich_help_panel=MODELS)(balance.balance)
app.command(rich_help_panel=MODELS)(ablate.ablate)
app.add_typer(evaluate.app, name="eval", rich_help_panel=MODELS)
app.command("compare", rich_help_panel=MODELS)(compare.compare)
app.command(rich_help_panel=MODELS)(export.export)
app.add_typer(entropy.app, name="codec", rich_help_panel=MODELS)
app.add_typer(data.app, name="data", rich_help_panel=MODELS)
app.add_typer(probe.app, name="probe", rich_help_panel=MODELS)


def run(arguments: list[str]) -> int:
    """Run one command line; returns the exit code.

    Args:
        arguments: what follows ``qlip``.
    """
    debug = "--debug" in _before_dashes(arguments)
    arguments = [argument for argument in arguments if argument != "--debug"] if debug else arguments
    try:
        code = app(args=arguments, prog_name="qlip", standalone_mode=False)
        return code if isinstance(code, int) else 0
    except typer.TyperException as error:
        shown: BaseException = error
        say(f"qlip: {error.format_message()}{_where_to_read(error)}")
        code = error.exit_code
    except QLIPError as error:
        shown, code = error, USAGE if isinstance(error, UsageError) else FAILURE
        say(f"qlip: {error}")
    except (torch.OutOfMemoryError, MemoryError) as error:
        shown, code = error, FAILURE
        say("qlip: out of memory; try a smaller --batch-size or --size")
    except BrokenPipeError:
        sys.stderr.close()  # the reader of our output left: nothing to say, and nobody to say it to
        return FAILURE
    except OSError as error:
        shown, code = error, FAILURE
        say(f"qlip: {error.filename or 'the system'}: {error.strerror or error}")
    if debug:
        traceback.print_exception(shown)
    return int(code)


def _before_dashes(arguments: list[str]) -> list[str]:
    return arguments[: arguments.index("--")] if "--" in arguments else arguments


def _where_to_read(error: typer.TyperException) -> str:
    context = getattr(error, "ctx", None)
    if error.exit_code != USAGE or context is None:
        return ""
    return f" (see {context.command_path} --help)"


def main() -> None:
    """Entry point of the command."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # file names may be no text
    sys.exit(run(sys.argv[1:]))
