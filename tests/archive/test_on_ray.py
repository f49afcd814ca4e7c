"""The engine on Ray makes the same bytes as the one of this process, also when processes are killed."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path

import pyarrow as pa
import pytest

from qlip import QLIPError
from qlip.archive.dataset.layout import Layout, part_name
from qlip.archive.dataset.schema import Views
from qlip.archive.tokenize import on_ray
from qlip.archive.tokenize.encoder import Encoder, describe
from qlip.archive.tokenize.inputs import find
from qlip.archive.tokenize.runner import Run, encode_here
from qlip.data.storage.retry import DeniedError
from tests.archive.test_runner import ROOT, files, tars
from tests.cli.conftest import Command, save_checkpoint
from tests.cli.conftest import qlip as qlip  # the command, as a fixture
from tests.data.objects import denying_store
from tests.data.samples import encoded

pytest.importorskip("ray.data")
QLIP = [sys.executable, "-m", "qlip", "tokenize"]
OPTIONS = ["--embeddings", "--fit", "keep-aspect", "--crops", "flip", "--batch-size", "4"]
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("model") / "one", seed=0)


def command(source: str, out: Path, model: Path, *more: str) -> list[str]:
    return [*QLIP, source, "-o", str(out), "--model", str(model), *OPTIONS, *more]


def ran(arguments: list[str], **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        arguments, capture_output=True, text=True, check=False, cwd=ROOT, env=ENVIRONMENT | environment
    )


def lines_of_qlip(stderr: str) -> list[str]:
    """Lines without the one in which Ray's core confirms its log level."""
    return [line for line in stderr.splitlines() if "Set ray log level from environment variable" not in line]


def processes() -> dict[int, tuple[int, str]]:
    """(parent, command line) of every process."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            status = (folder / "stat").read_text().rpartition(")")[2].split()
            words = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue  # it ended meanwhile
        if status[0] != "Z":
            found[int(folder.name)] = int(status[1]), words
    return found


def below(pid: int) -> dict[int, str]:
    """Command lines of all processes that one has started, directly or not."""
    everyone, found, new = processes(), dict[int, str](), {pid}
    while new:
        new = {one for one, (parent, _) in everyone.items() if parent in new and one not in found}
        found |= {one: everyone[one][1] for one in new}
    return found


def image_folder(folder: Path) -> Path:
    folder.mkdir()
    (folder / "0.png").write_bytes(encoded(0))
    return folder


@pytest.mark.parametrize("views", [Views(fit="keep-aspect"), Views(fit="tiles", size=(64, 96))])
def test_on_ray__rows_between_processes_are_equal(tmp_path: Path, model: Path, views: Views) -> None:
    """Rows as Ray carries them, without Ray."""
    work = describe(str(model), views, batch_size=4, embeddings=True)
    found = find(tars(tmp_path / "in", 2, broken=1))
    run = Run(Layout(str(tmp_path / "one")), found, work)
    here = list(encode_here(run.todo, Encoder(work), work, 1))
    decode, encode, there = on_ray._Decode(work), on_ray._Encode(work, 1), []
    for part, shard in run.todo:
        for row in decode({"part": part, "shard": shard}):
            (done,) = encode(pa.Table.from_pylist([row])).to_pylist()
            there.append(on_ray._piece(done))
    assert [(one.part, one.number, one.end, one.failed) for one in there] == [
        (one.part, one.number, one.end, one.failed) for one in here
    ]
    assert all(
        one.table is two.table is None or one.table.equals(two.table) for one, two in zip(here, there, strict=True)
    )
    Path(tmp_path / "in/001.tar").write_bytes(b"x")
    (failed,) = [on_ray._piece(row) for row in decode({"part": 1, "shard": found.shards[1]})]
    assert failed.part == 1 and "001.tar" in str(failed.failed) and failed.table is failed.end is None
    with denying_store(image_folder(tmp_path / "photos"), "0.png") as address:
        (row,) = decode({"part": 0, "shard": find(address).shards[0]})
        with pytest.raises(DeniedError, match=f"^{address}/0.png: no permission"):
            on_ray._piece(row)


def test_check_room__refuses_more_workers_than_there_is_room_for(model: Path) -> None:
    work = describe(str(model), Views())
    cluster = on_ray.Cluster("head:6379", cpus=2, gpus=0, max_node_cpus=2, nodes=1)
    with pytest.raises(QLIPError, match="2 workers: the cluster has 2 CPUs, and one must be left to read"):
        next(on_ray.encode_on_ray([], work, cluster, 2))
    on_gpus = describe(str(model), Views(), device="cuda")
    with pytest.raises(QLIPError, match="1 workers: the cluster has 0 GPUs"):
        next(on_ray.encode_on_ray([], on_gpus, cluster, 1))


def test_store_bytes__within_bounds() -> None:
    assert 80 << 20 <= on_ray._store_bytes() <= 1 << 30


def test_tokenize__no_cluster_is_one_line(tmp_path: Path, qlip: Command, model: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound and not listening: no answer
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        source = tars(tmp_path / "in", 1)
        tried = qlip("tokenize", source, "-o", tmp_path / "out", "--model", model, "--ray-address", address)
    (line,) = tried.error_lines
    assert tried.code == 1 and line.startswith(f"qlip: no Ray cluster at {address} (Connection refused); check")
    tried = qlip("tokenize", source, "-o", tmp_path / "out", "--model", model, "--ray-address", "head")
    assert "no address of a Ray cluster; write auto, or HOST:6379" in tried.err
    tried = qlip("tokenize", source, "-o", tmp_path / "out", "--model", model, "--ray-address", "ray://head:10001")
    assert "Ray's client is not supported; run on one of its machines with auto" in tried.err


def test_tokenize__a_dry_run_asks_the_cluster_and_checks_the_device(
    tmp_path: Path, qlip: Command, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, out = tars(tmp_path / "in", 3, images=9), tmp_path / "out"
    command = ["tokenize", source, "-o", out, "--model", model, "--batch-size", 2, "--dry-run"]
    assert qlip(*command, "--device", "cuda:7").code == 2
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        assert f"no Ray cluster at {address} (Connection refused)" in qlip(*command, "--ray-address", address).err
    asked: list[str | None] = []

    @contextmanager
    def two_machines(address: str | None = None, workers: int = 1) -> Iterator[on_ray.Cluster]:
        asked.append(address)
        with redirect_stdout(sys.stderr):
            yield on_ray.Cluster(address, cpus=8, gpus=4, max_node_cpus=4, nodes=2)

    monkeypatch.setattr(on_ray, "start_ray", two_machines)
    command += ["--ray-address", "head:6379"]
    dry = qlip(*command, "--json").json
    assert (dry["workers"], dry["engine"], dry["device"], asked) == (4, "Ray", "cpu", ["head:6379"])
    said = qlip(*command).out
    assert (
        "images/s per worker, from 6 images, measured here on cpu, not on cuda\n" in said and "with 4 workers" in said
    )
    assert qlip(*command, "--device", "cpu", "--json").json["workers"] == 2
    assert "5 workers: the cluster has 4 GPUs" in qlip(*command, "--workers", 5).err
    assert qlip(*command, "--device", "cuda:1").code == 2 and not out.exists()


def test_on_ray__same_bytes_as_one_process_and_no_messages(tmp_path: Path, model: Path) -> None:
    source = tars(tmp_path / "in", 4, broken=1)
    whole = (tmp_path / "in/002.tar").read_bytes()
    (tmp_path / "in/002.tar").write_bytes(whole[: len(whole) // 2])
    here = ran(command(source, tmp_path / "here", model, "--workers", "0"))
    there = ran(command(source, tmp_path / "there", model, "--workers", "1", "--json"))
    assert here.returncode == there.returncode == 1
    assert files(tmp_path / "here") == files(tmp_path / "there")
    first, *rest = lines_of_qlip(there.stderr)
    assert first == "4 shards on Ray here, 1 worker on cpu"
    assert [line.partition(":")[0] for line in rest] == ["002.tar", "1 of 4 shards failed; the others are done"]
    assert json.loads(there.stdout)["workers"] == 1


def wait_for(what: object, seconds: float = 300) -> None:
    """Until a function returns something true."""
    end = time.monotonic() + seconds
    while not what():  # type: ignore[operator]
        assert time.monotonic() < end, "nothing happened"
        time.sleep(0.05)


@pytest.mark.slow
def test_on_ray__kills_of_driver_and_workers_lose_and_repeat_nothing(tmp_path: Path, model: Path) -> None:
    """Ten, of the driver, of a reader and of the model, at moments drawn from a seed; half at least inside a shard."""
    rng = random.Random(3)
    source, out = tars(tmp_path / "in", 30, images=150, broken=5), tmp_path / "killed"
    assert ran(command(source, tmp_path / "whole", model, "--workers", "0")).returncode == 0
    kills: list[str] = []
    inside = 0
    while len(kills) < 10:
        driver = Driver(command(source, out, model, "--workers", "1"), out)
        for wanted in ("ray::FlatMap", "ray::MapWorker"):
            if len(kills) < 9 and (victim := driver.one_of_its(wanted, rng.uniform(0, 1))) is not None:
                inside += bool(killed(victim) & {victim})
                kills.append(wanted)
        wait_for(lambda driver=driver: driver.ended() or driver.parts() > driver.parts_before)  # type: ignore[misc]
        time.sleep(rng.uniform(0, 0.5))
        assert not driver.ended(), "the shards are too few for so many kills"
        left = {pid for pid, words in below(driver.process.pid).items() if "Agent" not in words}
        inside += bool(killed(driver.process.pid))
        driver.process.wait()
        kills.append("driver")
        wait_for(lambda left=left: not left & set(processes()), 60)  # type: ignore[misc]  # Ray's agents take a minute
    assert {"driver", "ray::FlatMap", "ray::MapWorker"} == set(kills)
    assert inside >= 5, f"only {inside} of {len(kills)} kills fell inside a shard"
    last = ran(command(source, out, model, "--workers", "1"))
    assert last.returncode == 0, last.stderr
    assert files(out) == files(tmp_path / "whole")


@pytest.mark.slow
def test_on_ray__ctrl_c_and_sigterm_keep_finished_parts(tmp_path: Path, model: Path) -> None:
    """Twice: by Ctrl-C, which a terminal sends to all processes of its group, and by a scheduler's SIGTERM."""
    source, out = tars(tmp_path / "in", 24, images=40, broken=5), tmp_path / "out"
    assert ran(command(source, tmp_path / "whole", model, "--workers", "0")).returncode == 0
    whole, kept = files(tmp_path / "whole"), dict[str, bytes]()
    for number, send in ((signal.SIGINT, os.killpg), (signal.SIGTERM, os.kill)):
        driver = Driver(command(source, out, model, "--workers", "2"), out)
        wait_for(lambda driver=driver: driver.ended() or driver.parts() > driver.parts_before + 1)  # type: ignore[misc]
        assert not driver.ended()
        started_here = {pid for pid, words in below(driver.process.pid).items() if "Agent" not in words}
        send(driver.process.pid, number)
        said = driver.process.communicate(timeout=60)[1]
        assert driver.process.returncode == 130, said
        assert lines_of_qlip(said)[1:] == ["stopped; finished parts are kept; run the same command to continue"]
        wait_for(lambda left=started_here: not left & set(processes()), 60)  # type: ignore[misc]
        entries = Layout(str(out)).manifest()
        assert driver.parts_before < len(entries) < 24
        stands = {
            name: (out / name).read_bytes() for entry in entries for name in (f"data/{part_name(entry.part)}.parquet",)
        }
        assert all(whole[name] == data for name, data in stands.items()) and stands.items() >= kept.items()
        kept = stands
    last = ran(command(source, out, model, "--workers", "2", "--json"))
    assert last.returncode == 0, last.stderr
    assert json.loads(last.stdout)["parts_made"] == 24 - len(kept) and files(out) == whole


class Driver:
    """A command under way."""

    def __init__(self, arguments: list[str], out: Path) -> None:
        self.data = out / "data"
        self.parts_before = self.parts()
        self.process = subprocess.Popen(
            arguments, cwd=ROOT, env=ENVIRONMENT, stderr=subprocess.PIPE, text=True, start_new_session=True
        )

    def parts(self) -> int:
        """That are written."""
        return len(list(self.data.glob("part*")))

    def ended(self) -> bool:
        """Whether it did."""
        return self.process.poll() is not None

    def its(self, wanted: str) -> list[int]:
        """Workers of a kind that are at a shard."""
        everyone = below(self.process.pid).items()
        return [pid for pid, words in everyone if words.startswith(wanted) and inside_a_shard(words)]

    def one_of_its(self, wanted: str, delay: float) -> int | None:
        """A worker of a kind at a shard, a while after there was the first."""
        wait_for(lambda: self.ended() or self.its(wanted))
        time.sleep(delay)
        wait_for(lambda: self.ended() or self.its(wanted))
        return next(iter(self.its(wanted)), None)


def killed(pid: int) -> set[int]:
    """Kill a process with -9; which were inside a shard then, of it and of those that it had started.

    It is halted before they are asked: a driver writes no part after that, a worker ends no task.
    """
    os.kill(pid, signal.SIGSTOP)
    everyone = processes()
    named = {one: everyone[one][1] for one in (pid, *below(pid)) if one in everyone}
    os.kill(pid, signal.SIGKILL)
    return {one for one, words in named.items() if inside_a_shard(words)}


def inside_a_shard(words: str) -> bool:
    """Ray gives a process the name of the task that it is at: a reader is at one while it reads its shard, a model
    while it has a batch."""
    return words.startswith("ray::FlatMap") or (words.startswith("ray::MapWorker") and ".submit" in words)


@pytest.mark.slow
def test_on_ray__a_lost_cluster_is_one_line_and_a_later_run_resumes(tmp_path: Path, model: Path) -> None:
    """A real one, of this machine; its head and its node are killed in the middle."""
    source, out = tars(tmp_path / "in", 30, images=40), tmp_path / "out"
    with socket.socket() as free:
        free.bind(("", 0))
        port = free.getsockname()[1]
    ray = [sys.executable, "-m", "ray.scripts.scripts"]
    folder = tempfile.mkdtemp(prefix="q")  # its sockets' paths may not be long
    start = [*ray, "start", "--head", f"--port={port}", "--num-cpus=2", "--include-dashboard=false"]
    start += [f"--temp-dir={folder}", "--object-store-memory=200000000"]
    environment = {"RAY_AUTH_MODE": "token", "RAY_USAGE_STATS_ENABLED": "0"}
    known = set(processes())
    assert ran(start, **environment).returncode == 0
    mine = {pid: words for pid, (_, words) in processes().items() if pid not in known and folder in words}
    try:
        driver = subprocess.Popen(
            command(source, out, model, "--ray-address", f"127.0.0.1:{port}"),
            cwd=ROOT,
            env=ENVIRONMENT | environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        wait_for(lambda: driver.poll() is not None or len(list((out / "data").glob("part*"))) >= 2)
        assert driver.poll() is None
    finally:
        for pid, words in mine.items():
            if "gcs_server" in words or "raylet" in words:
                os.kill(pid, signal.SIGKILL)
        shutil.rmtree(folder, ignore_errors=True)
    _, said = driver.communicate(timeout=120)
    for pid in mine.keys() & processes().keys():  # its monitors, which would stay for ever
        os.kill(pid, signal.SIGKILL)
    assert driver.returncode == 1
    assert said.splitlines()[-1].startswith("qlip: ") and "finished work is kept, the same command resumes it" in said
    done = len(Layout(str(out)).finished())
    assert 2 <= done < 30
    again = ran(command(source, out, model, "--workers", "0", "--json"))
    assert again.returncode == 0 and json.loads(again.stdout)["parts_made"] == 30 - done
