"""Peak memory of the process, versions of packages, forked children, and systems that lack what Linux has."""

from __future__ import annotations

import mmap
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from qlip import assets
from qlip.runtime.machine import package_versions, peak_memory, reset_peak_memory

CPU = torch.device("cpu")


def test_peak_memory__rises_and_is_reset() -> None:
    was_reset = reset_peak_memory(CPU)
    before = peak_memory(CPU, was_reset)
    assert 2**24 < before < 2**40
    # 128 MiB more than is held; where it cannot be reset, than ever before, in pages that nothing freed
    much = mmap.mmap(-1, 2**27 + (0 if was_reset else before))
    for place in range(0, len(much), mmap.PAGESIZE):
        much[place] = 1
    most = peak_memory(CPU, was_reset)
    assert most >= before + 4 * 2**24
    much.close()
    if reset_peak_memory(CPU):
        assert peak_memory(CPU, was_reset=True) < most - 2**24


def test_package_versions__none_for_a_package_that_is_not_installed() -> None:
    assert package_versions(["torch", "no-such-package"]) == {"torch": torch.__version__, "no-such-package": None}


CHILD = """
import os, torch
from qlip import assets
from qlip.lm import DecoderModel
DecoderModel.from_pretrained(assets.path(assets.BUNDLED_DRAWER))  # any model that is read from a checkpoint
x = torch.ones(256, 256)
expected = x @ x
child = os.fork()
if child == 0:
    os._exit(0 if torch.equal(x @ x, expected) else 1)
raise SystemExit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) or torch.get_num_threads() != 2)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_survive_fork__a_forked_child_computes_behind_any_loaded_model() -> None:
    environment = os.environ | {"OMP_NUM_THREADS": "2"}
    subprocess.run([sys.executable, "-c", CHILD], env=environment, check=True, timeout=100)


WINDOWS = """
import os, signal, sys, torch  # torch asks for the system by its name
from pathlib import Path
for name in ("SIGUSR1", "SIGUSR2", "SIGHUP", "pthread_sigmask", "sigwaitinfo", "sigwait", "SIG_BLOCK", "SIG_SETMASK"):
    delattr(signal, name)
for name in ("sysconf", "register_at_fork", "fork", "statvfs", "getuid", "pread", "mkfifo"):
    delattr(os, name)
sys.modules.update(resource=None, fcntl=None, pwd=None)

import qlip.training, qlip.evaluation, qlip.cli.dataset.tokenize, qlip.cli.evaluation.evaluate
from qlip import QLIPError
from qlip.cli.main import main
from qlip.files import locked
from qlip.runtime.machine import peak_memory, total_memory

image, out = sys.argv[1:]
assert peak_memory(torch.device("cpu")) == 0 and total_memory() is None
with locked(Path(out), "busy"):
    try:
        with locked(Path(out), "busy"):
            raise SystemExit("two hold one lock")
    except QLIPError as error:
        assert str(error) == "busy", error
sys.argv = ["qlip", "encode", image, "-o", out]
main()
"""


def test_commands__work_without_what_windows_lacks(tmp_path: Path) -> None:
    out = tmp_path / "out"
    image = str(assets.path("images", "cat.jpg"))
    subprocess.run([sys.executable, "-c", WINDOWS, image, str(out)], check=True, timeout=100)
    assert (out / "cat.qlip").stat().st_size > 224
