"""A workspace resumes its own plan, refuses another one and names the keys that differ."""

from __future__ import annotations

import multiprocessing
import multiprocessing.synchronize
from pathlib import Path

import pytest

from qlip import QLIPError
from qlip.runtime.workspace import PLAN, Workspace, lock_folder

ONE = {"model": "a", "batch_size": 4, "shape": (1, 2)}


def test_claim__resumes_the_same_plan(tmp_path: Path) -> None:
    first = Workspace(tmp_path / "w", ONE)
    first.claim()
    assert not first.done("rows.bin")
    first.write("rows.bin", b"123")
    second = Workspace(tmp_path / "w", dict(reversed(ONE.items())))
    second.claim()
    assert second.done("rows.bin") and second.read("rows.bin") == b"123"
    assert sorted(path.name for path in (tmp_path / "w").iterdir()) == [PLAN, "rows.bin"]


@pytest.mark.parametrize(
    ("plan", "keys"),
    [
        (ONE | {"batch_size": 8}, "batch_size"),
        (ONE | {"seed": None, "model": "b"}, "model, seed"),
        ({"model": "a"}, "batch_size, shape"),
    ],
)
def test_claim__refuses_another_plan_and_names_the_keys(tmp_path: Path, plan: dict[str, object], keys: str) -> None:
    Workspace(tmp_path, ONE).claim()
    before = (tmp_path / PLAN).read_bytes()
    with pytest.raises(QLIPError) as error:
        Workspace(tmp_path, plan, of="measurement").claim()
    assert str(error.value) == (
        f"{tmp_path}: holds another measurement ({keys} differ); choose another folder, or delete this one"
    )
    assert (tmp_path / PLAN).read_bytes() == before


def test_claim__refuses_a_plan_that_cannot_be_read(tmp_path: Path) -> None:
    for content in (b"\xff", b"[1]", b"{"):
        (tmp_path / PLAN).write_bytes(content)
        with pytest.raises(QLIPError, match=r"holds another run \(plan.json differ\)"):
            Workspace(tmp_path, ONE).claim()


def test_claim__restart_deletes_results_of_another_plan_only(tmp_path: Path) -> None:
    work = Workspace(tmp_path, ONE)
    work.claim(restart=True)
    work.write("a", b"1")
    work.claim(restart=True)
    assert work.done("a")
    other = Workspace(tmp_path, {"model": "b"})
    other.claim(restart=True)
    assert not other.done("a") and not work.done("a")
    other.claim()


def test_writing__leaves_nothing_after_an_error(tmp_path: Path) -> None:
    work = Workspace(tmp_path, ONE)
    with pytest.raises(RuntimeError), work.writing("a") as path:
        path.write_bytes(b"half")
        raise RuntimeError
    assert not list(tmp_path.iterdir())
    with work.writing("a") as path:
        path.write_bytes(b"whole")
    assert work.read("a") == b"whole"


class Memory(dict[str, bytes]):
    """A store in memory."""

    def exists(self, address: str) -> bool:
        return address in self

    def read(self, address: str) -> bytes:
        return self[address]

    def write(self, address: str, data: bytes) -> None:
        self[address] = data


def test_workspace__in_a_store(tmp_path: Path) -> None:
    store = Memory()
    work = Workspace("s3://bucket/w/", ONE, record="export.json", files=store)
    work.claim()
    work.write("a", b"1")
    with work.writing("b") as path:
        path.write_bytes(b"2")
    with pytest.raises(RuntimeError), work.writing("c") as path:
        raise RuntimeError
    assert store.pop("s3://bucket/w/export.json") and store == {"s3://bucket/w/a": b"1", "s3://bucket/w/b": b"2"}
    assert work.done("b") and work.read("b") == b"2"


def hold(folder: Path, ready: multiprocessing.synchronize.Event) -> None:
    with Workspace(folder, ONE).lock():
        ready.set()
        multiprocessing.Event().wait()


def test_lock__one_process_at_a_time_and_ends_with_it(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    ready = context.Event()
    holder = context.Process(target=hold, args=(tmp_path / "w", ready))
    holder.start()
    assert ready.wait(30)
    message = f"^{tmp_path}/w: another run is running here; wait for it, or stop it$"
    with pytest.raises(QLIPError, match=message), Workspace(tmp_path / "w", ONE).lock():
        pass
    holder.kill()
    holder.join()
    with Workspace(tmp_path / "w", ONE).lock():
        pass


def test_lock_folder__names_what_cannot_be_a_folder(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(QLIPError, match="file: is a file; give a folder"), lock_folder(tmp_path / "file", ""):
        pass
    with pytest.raises(QLIPError, match="cannot write"), lock_folder(tmp_path / "file" / "below", ""):
        pass
