"""`qlip data index`."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.cli.conftest import Command
from tests.data.objects import serving
from tests.data.samples import shard, tars


def test_data_index__counts_and_continues(qlip: Command, tmp_path: Path) -> None:
    tars(tmp_path / "in", 40)
    assert qlip("data", "index", f"{tmp_path}/in/tars-*.tar").out == ("2 shards, 40 samples: 2 indexed, 0 up to date\n")
    Path(tmp_path / "in" / "tars-01.tar.index").unlink()
    shard(tmp_path / "in" / "tars-00.tar", range(7))
    shown = qlip("data", "index", f"{tmp_path}/in/tars-{{00..02}}.tar", "--json")
    assert shown.code == 1 and [one["samples"] for one in shown.json["results"]] == [7, 20]
    assert [one["made"] for one in shown.json["results"]] == [True, True]
    assert shown.error_lines == [
        f"{tmp_path}/in/tars-02.tar: No such file or directory; check the path",
        "1 of 3 shards failed; the others are done",
    ]
    ran = qlip("data", "index", f"{tmp_path}/in/tars-0[01].tar", "-o", f"{tmp_path}/out", "-j", "1")
    assert ran.code == 0 and len(list((tmp_path / "out").iterdir())) == 2


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("cut.tar", None, "truncated"),
        ("x.tar.gz", b"\x1f\x8b rest of it" * 100, "it is compressed); unpack it to a plain .tar"),
        ("x.tar", b"text, not a tar" * 100, "not an uncompressed tar file"),
    ],
)
def test_data_index__names_files_that_are_no_tars(
    qlip: Command, tmp_path: Path, name: str, content: bytes | None, message: str
) -> None:
    whole = shard(tmp_path / "whole.tar", range(6)).read_bytes()
    (tmp_path / name).write_bytes(whole[:9000] if content is None else content)
    ran = qlip("data", "index", tmp_path / name, tmp_path / "whole.tar")
    assert ran.code == 1 and ran.out == "1 shard, 6 samples: 1 indexed, 0 up to date\n"
    assert message in ran.error_lines[0] and name in ran.error_lines[0] and len(ran.error_lines) == 2
    assert not (tmp_path / f"{name}.index").exists()


def test_data_index__ctrl_c_keeps_finished_indexes(tmp_path: Path) -> None:
    """A store that answers slowly: the first shard's index is there, of the second nothing is."""
    (tmp_path / "objects").mkdir()
    with serving(tmp_path / "objects") as server:
        tars(server.folder, 40)
        server.fault = lambda request: "slow" if request.path == "tars-01.tar" and request.method == "GET" else None
        command = [sys.executable, "-m", "qlip", "data", "index", f"{server.address}/tars-{{00..01}}.tar"]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        running = subprocess.Popen(
            [*command, "-o", str(tmp_path / "out"), "-j", "1"], stderr=subprocess.PIPE, text=True, env=environment
        )
        end = time.monotonic() + 60
        while not any(r.path == "tars-01.tar" and r.method == "GET" for r in server.requests):
            assert time.monotonic() < end and running.poll() is None
            time.sleep(0.02)
        running.send_signal(signal.SIGINT)
        _, said = running.communicate(timeout=60)
    assert running.returncode == 130 and "stopped; finished indexes are kept" in said
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["tars-00.tar.index"]
