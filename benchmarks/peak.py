"""Peak memory of one operation in its own process: ``python -m benchmarks.peak CASE_AS_JSON`` prints bytes."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import asdict

import torch

from benchmarks.cases import Case, Contender, Operation, work
from benchmarks.measure import peak_bytes


def in_subprocess(case: Case, operation: Operation, contender: Contender, threads: int) -> int:
    """Run the operation once in a new interpreter; return its peak memory in bytes."""
    request = {"case": asdict(case), "operation": operation, "contender": contender, "threads": threads}
    command = [sys.executable, "-m", "benchmarks.peak", json.dumps(request)]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


def main() -> None:
    """Run the operation that the JSON argument describes, and print its peak memory."""
    request = json.loads(sys.argv[1])
    torch.set_num_threads(request["threads"])
    print(peak_bytes(work(Case(**request["case"]), request["operation"], request["contender"])))


if __name__ == "__main__":
    main()
