"""`read_ahead`, `in_batches` and `WriteBehind`."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from qlip import QLIPError
from qlip.cli import io_pipeline as flow
from qlip.cli.console import Failures
from qlip.cli.inputs import Input

SOON = 30  # seconds that a thread is given


def items(count: int) -> list[Input]:
    return [Input(Path(f"{number}.png"), str(number)) for number in range(count)]


def test_read_ahead__loads_later_inputs_meanwhile() -> None:
    started = [threading.Event() for _ in range(10)]

    def load(item: Input) -> str:
        started[int(item.name)].set()
        return item.name

    stream = flow.read_ahead(items(10), load, Failures(), depth=4)
    assert next(stream)[1] == "0"
    assert all(event.wait(SOON) for event in started[:4])  # before they were asked for
    assert not started[5].is_set()  # no more than the depth
    assert [loaded for _, loaded in stream] == [str(number) for number in range(1, 10)]


def test_read_ahead__broken_input_is_skipped(capsys: pytest.CaptureFixture[str]) -> None:
    def load(item: Input) -> str:
        if item.name == "1":
            raise QLIPError("1.png: broken\nbeyond repair")
        if item.name == "2":
            raise PermissionError(13, "Permission denied")
        return item.name

    failures = Failures()
    assert [loaded for _, loaded in flow.read_ahead(items(4), load, failures)] == ["0", "3"]
    assert capsys.readouterr().err == "1.png: broken beyond repair\n2.png: Permission denied\n"
    assert [failure["input"] for failure in failures.found] == ["1.png", "2.png"]


def test_read_ahead__unexpected_error_is_raised() -> None:
    def load(item: Input) -> str:
        raise KeyError(item.name)

    with pytest.raises(KeyError):
        list(flow.read_ahead(items(2), load, Failures()))


def test_write_behind__writes_meanwhile_and_waits_at_the_end() -> None:
    release, written = threading.Event(), list[str]()

    def write(name: str) -> None:
        assert release.wait(SOON)
        written.append(name)

    done: list[Input] = []
    with flow.WriteBehind(Failures(), done.append) as writer:
        for item in items(3):
            writer.submit(item, lambda name=item.name: write(name))  # type: ignore[misc]
        assert written == []  # submit did not wait
        release.set()
    assert sorted(written) == ["0", "1", "2"] and len(done) == 3


def test_write_behind__submitted_results_are_written_on_ctrl_c() -> None:
    written: list[str] = []
    with pytest.raises(KeyboardInterrupt), flow.WriteBehind(Failures(), lambda item: None) as writer:
        for item in items(3):
            writer.submit(item, lambda name=item.name: written.append(name))  # type: ignore[misc]
        raise KeyboardInterrupt
    assert sorted(written) == ["0", "1", "2"]


def test_in_batches__one_shape_per_batch_and_nothing_lost() -> None:
    stream = [1, 20, 2, 3, 30, 40, 4, 5]
    found = list(flow.in_batches(stream, 2, lambda value: value >= 10))
    assert found == [[1, 2], [20, 30], [3, 4], [40], [5]]
