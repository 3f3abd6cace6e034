"""One measurement in one process: loads a problem, takes F, runs one library, writes one JSON file.

    PYTHON worker.py CASE.json RESULT.json

PYTHON is that of the library's environment. The clock counts CPU seconds of this process, which has one thread.
"""

from __future__ import annotations

import ctypes
import gc
import importlib
import json
import platform
import re
import resource
import statistics
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

PACKAGES = ("torch", "transformers", "numpy")


class Clock:
    """Counts the CPU seconds of the blocks that it times; what a library does outside of them is not its score.

    Attributes:
        seconds: their sum.
    """

    def __init__(self) -> None:
        self.seconds = 0.0

    @contextmanager
    def running(self) -> Iterator[None]:
        started = time.process_time()
        try:
            yield
        finally:
            self.seconds += time.process_time() - started


class Memory:
    """Peak resident memory since the object was made, in bytes over what was resident then (Linux, glibc)."""

    def __init__(self) -> None:
        gc.collect()
        ctypes.CDLL("libc.so.6").malloc_trim(0)  # what a first run freed is given back
        self.before = _status("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # the peak so far is forgotten

    @property
    def peak(self) -> int:
        return max(0, _status("VmHWM") - self.before)


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return 1024 * int(line.split()[1])
    raise KeyError(field)


def measure(case: dict[str, Any]) -> dict[str, Any]:
    """Runs a case; returns what was measured, with the scores, if there are any, as an array under "scores"."""
    import torch
    from problem import MaskedWords, Problem, forward_pass

    torch.set_num_threads(1)
    library = importlib.import_module(f"libraries.{case['library']}")
    problem = Problem.load(case["problem"]).first(case.get("train"), case.get("queries"))
    masked = MaskedWords(problem.model())
    forward_pass(masked, problem.train[:64])  # the first pass of a process also chooses kernels
    forward = [_forward_seconds(masked, problem) for _ in range(3)]
    run, arguments = getattr(library, case["measurement"]), case.get("arguments", {})
    if case.get("warm_up"):  # imports and first calls are no part of a rate
        with suppress(Exception):
            run(problem.first(case["warm_up"], 1), MaskedWords(problem.model()), Clock(), **arguments)
    memory, clock = Memory(), Clock()
    result = run(problem, masked, clock, **arguments)
    return {
        "forward_seconds": statistics.median(forward),
        "seconds": clock.seconds,
        "peak_bytes": memory.peak,
        **result,
    }


def _forward_seconds(masked: Any, problem: Any, at_least: float = 0.3) -> float:
    """CPU seconds of one forward pass; a small model's is repeated, since the clock is coarse."""
    from problem import forward_pass

    started, passes = time.process_time(), 0
    while passes == 0 or time.process_time() - started < at_least:
        forward_pass(masked, problem.train)
        passes += 1
    return (time.process_time() - started) / passes


def reason(error: Exception, memory: int) -> str:
    """An error in one line of a table."""
    message = " ".join(str(error).split())
    refused = re.search(r"tried to allocate (\d+) bytes", message)
    if refused or isinstance(error, MemoryError):
        more = f": a tensor of {int(refused[1]) / 2**30:.1f} GiB was refused" if refused else ""
        return f"needs more than {memory / 2**30:.0f} GiB{more}"
    return f"{type(error).__name__}: {message[:160]}"


def main(case_path: str, result_path: str) -> None:
    case = json.loads(Path(case_path).read_text())
    for kind, limit in ((resource.RLIMIT_CPU, case["limit"]), (resource.RLIMIT_DATA, case["memory"])):
        resource.setrlimit(kind, (limit, resource.getrlimit(kind)[1]))
    versions = {"python": platform.python_version()} | {name: version(name) for name in PACKAGES}
    try:
        result = measure(case)
    except Exception as error:  # a library that cannot do it is a result, too
        traceback.print_exc()
        result = {"error": reason(error, case["memory"])}
    scores = result.pop("scores", None)
    if scores is not None:
        import numpy as np

        np.save(Path(result_path).with_suffix(".npy"), np.asarray(scores, dtype=np.float64))
    library = case["library"]
    result["versions"] = versions | ({} if library == "hf_msif" else {library: version(library)})
    Path(result_path).write_text(json.dumps(result))


if __name__ == "__main__":
    main(*sys.argv[1:])
