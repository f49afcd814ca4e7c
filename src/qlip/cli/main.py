"""The command `qlip`: its help page, and the conversion of errors into one line and an exit code."""

from __future__ import annotations

import io
import sys
import warnings
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from qlip import QLIPError, __version__
from qlip.cli import console
from qlip.cli.console import FAILURE, STOPPED, USAGE, UsageError, say
from qlip.cli.dataset import data, search, tokenize, tokens
from qlip.cli.evaluation import compare, evaluate
from qlip.cli.image import chat, classify, decode, demo, describe, draw, embed, encode, reconstruct
from qlip.cli.model import convert, export, info, recipe, train, um3, vlm

IMAGES, DATASETS, MODELS = "Images", "Token datasets", "Models"

EPILOG = """
**Examples**

`qlip demo` — see it work, then open demo/demo.png

`qlip draw "a red circle above a blue square"` — an image from a sentence

`qlip chat photo.jpg -m runs/vlm/nano/model` — ask a trained model about an image

`qlip encode photos/ -o tokens/` — every image below photos/ as a .qlip file

`qlip decode tokens/ -o rebuilt/` — images from .qlip files

`qlip reconstruct photo.jpg --size 256 256 -o grid.png` — original beside reconstruction, at a larger size

`qlip classify *.jpg --labels "cat, dog, ship"` — zero-shot classification

`qlip train nano/stage1 schedule.steps=2000` — a short training of the bundled model

**Output.** Results go to stdout, as JSON with --json; progress, notes and errors go to stderr. A file you name with
--output is replaced; files whose names follow from the inputs are overwritten only with --overwrite.

**Exit codes.** 0: success. 1: something failed; if it was one of many inputs, the others are done. 2: wrong usage,
nothing was done. 130: stopped with Ctrl-C or by SIGTERM, finished files are kept. An error is one line; --debug shows
the traceback.
"""


ORDER = (
    "demo draw chat describe encode decode reconstruct classify embed tokenize search tokens "
    "train eval compare vlm um3 convert export recipe info data"
)
"""Commands in the order in which a user needs them."""


class Manual(TyperGroup):
    """Commands in :data:`ORDER`, then others; Ctrl-C ends with one line."""

    def list_commands(self, ctx: Any) -> list[str]:
        """Names of the commands and groups."""
        order = ORDER.split()
        return sorted(super().list_commands(ctx), key=lambda name: order.index(name) if name in order else len(order))

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
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog=EPILOG,
)


@app.callback(invoke_without_command=True)
def qlip(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
    quiet: Annotated[
        bool, typer.Option("--quiet", "-q", help="Print results, warnings and errors only: no progress, no notes.")
    ] = False,
    verbose: Annotated[
        bool, typer.Option("--verbose", "-v", help="Also print log messages of the libraries in use.")
    ] = False,
    debug: Annotated[
        bool, typer.Option("--debug", help="Show the traceback of an error; accepted anywhere in the command.")
    ] = False,
) -> None:
    """Turn images into a few hundred bytes, and back; compare images with text; train and evaluate the models.

    QLIP is a visual tokenizer aligned with text: it turns an image into a grid of discrete tokens, from which the image
    can be reconstructed, and into a vector that can be compared with text. A small trained model comes with this
    package and is used unless --model names another one.
    """
    console.set_verbosity(quiet=quiet, verbose=verbose)
    if version:
        console.show(f"qlip {__version__}")
    elif context.invoked_subcommand is None:
        console.show(context.get_help())


app.command(rich_help_panel=IMAGES)(demo.demo)
app.command(rich_help_panel=IMAGES)(draw.draw)
app.command(rich_help_panel=IMAGES)(chat.chat)
app.command(rich_help_panel=IMAGES)(describe.describe)
app.command(rich_help_panel=IMAGES)(encode.encode)
app.command(rich_help_panel=IMAGES)(decode.decode)
app.command(rich_help_panel=IMAGES)(reconstruct.reconstruct)
app.command(rich_help_panel=IMAGES)(classify.classify)
app.command(rich_help_panel=IMAGES)(embed.embed)
app.command(rich_help_panel=DATASETS)(tokenize.tokenize)
app.command(rich_help_panel=DATASETS)(search.search)
app.add_typer(tokens.app, name="tokens", rich_help_panel=DATASETS)
app.command(rich_help_panel=MODELS)(train.train)
app.add_typer(evaluate.app, name="eval", rich_help_panel=MODELS)
app.command("compare", rich_help_panel=MODELS)(compare.compare)
app.add_typer(vlm.app, name="vlm", rich_help_panel=MODELS)
app.add_typer(um3.app, name="um3", rich_help_panel=MODELS)
app.command(rich_help_panel=MODELS)(convert.convert)
app.command(rich_help_panel=MODELS)(export.export)
app.add_typer(recipe.app, name="recipe", rich_help_panel=MODELS)
app.command(rich_help_panel=MODELS)(info.info)
app.add_typer(data.app, name="data", rich_help_panel=MODELS)


def run(arguments: list[str]) -> int:
    """Run one command line and return the exit code.

    Args:
        arguments: words after ``qlip``.
    """
    debug = "--debug" in _before_dashes(arguments)
    arguments = [argument for argument in arguments if argument != "--debug"] if debug else arguments
    show, warnings.showwarning = warnings.showwarning, console.show_warning
    try:
        code = app(args=arguments, prog_name="qlip", standalone_mode=False)
        return code if isinstance(code, int) else 0
    except typer.TyperException as error:
        shown: BaseException = error
        say(f"qlip: {error.format_message()}{_see_help(error)}")
        code = error.exit_code
    except QLIPError as error:
        shown, code = error, USAGE if isinstance(error, UsageError) else FAILURE
        say(f"qlip: {error}")
    except UnicodeEncodeError as error:
        if error.reason != "surrogates not allowed":
            raise
        shown, code = error, FAILURE
        name = error.object if len(error.object) <= 200 else f"...{error.object[max(0, error.start - 100) :][:200]}..."
        say(f"qlip: {name}: is not UTF-8, and this command needs names that are; rename the file or folder")
    except MemoryError as error:
        shown, code = error, FAILURE
        say("qlip: out of memory; try a smaller --batch-size or --size")
    except BrokenPipeError:
        sys.stderr.close()  # the reader of the output is gone
        return FAILURE
    except OSError as error:
        shown, code = error, FAILURE
        say(f"qlip: {error.filename or 'the system'}: {error.strerror or error}")
    finally:
        warnings.showwarning = show
    if debug:
        console.show_traceback(shown)
    return int(code)


def _before_dashes(arguments: list[str]) -> list[str]:
    return arguments[: arguments.index("--")] if "--" in arguments else arguments


def _see_help(error: typer.TyperException) -> str:
    context = getattr(error, "ctx", None)
    if error.exit_code != USAGE or context is None:
        return ""
    return f" (see {context.command_path} --help)"


def main() -> None:
    """Entry point of the command."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # file names may hold bytes that are not text
    sys.exit(run(sys.argv[1:]))
