"""Messages of a conversation: typed on the keyboard, or a line each from stdin."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import suppress

from qlip.cli.console import note, say, show, usage_error
from qlip.errors import QLIPError
from qlip.files import text_of

Answer = Callable[[str, list[str]], object]
"""Answers a message with the images before it."""


def converse(
    first: list[str],
    help_text: str,
    *,
    answer: Answer,
    check_image: Callable[[str], object],
    reset: Callable[[], None],
    draw: Answer | None = None,
) -> None:
    """Answer what is typed, until /quit or the end of input; an error ends one message, not the conversation.

    Args:
        first: images before the first message, also after /reset.
        help_text: commands, one line.
        answer: called with a message.
        check_image: called with an image's file; raises QLIPError if it cannot be read.
        reset: called at /reset.
        draw: called with the text of /draw; None has no such command.
    """
    for file in first:
        check_image(file)
    with suppress(ImportError):  # not on Windows
        import readline  # noqa: F401  # keys that edit a line
    note(help_text)
    waiting = first
    while True:
        try:
            line = input("> ").strip()
        except EOFError:
            show()
            return
        word, _, rest = line.partition(" ")
        rest = rest.strip()
        if word == "/quit":
            return
        try:
            if word == "/reset":
                reset()
                waiting = first
            elif word == "/image" and rest:
                check_image(rest)
                waiting = [*waiting, rest]
            elif word == "/draw" and rest and draw is not None:
                draw(rest, waiting)
                waiting = []
            elif word.startswith("/"):
                say(help_text)
            elif line:
                answer(line, waiting)
                waiting = []
        except QLIPError as error:
            say(str(error))


def is_typed() -> bool:
    """Return whether messages come from the keyboard."""
    return sys.stdin is not None and sys.stdin.isatty()


def lines_of_stdin(noun: str) -> list[str]:
    """Messages on stdin, one per line.

    Args:
        noun: name of a message, which is also its option's.

    Raises:
        UsageError: there is none.
    """
    read = b"" if sys.stdin is None else sys.stdin.buffer.read()
    lines = [line.strip() for line in text_of(read, "stdin").splitlines()]
    if not any(lines):
        usage_error(f"no {noun}; give --{noun}, or lines on stdin")
    return [line for line in lines if line]
