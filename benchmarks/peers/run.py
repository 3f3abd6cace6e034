"""hf_msif beside kronfluence, bergson, captum and dattri: time, memory and agreement of their scores.

    python benchmarks/peers/environments.py                          # once: a virtual environment per peer
    python benchmarks/peers/run.py --repeats 3 --output runs/peers   # the comparison
    python benchmarks/peers/run.py --size small --output runs/peers_small

Every measurement is one process of one thread in the environment of its library, and the libraries take turns. What
was measured lies in OUTPUT/results and is not measured again, so that an interrupted run continues. At the end,
OUTPUT holds `measurements.parquet` (one row per measurement), `tables.md` and `quality.png`.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import signal
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import environments
import measurements
import numpy as np
import pandas as pd
import tables

HERE = Path(__file__).resolve().parent
GROUPS = ("score", "fit", "solve", "quality")


def main() -> None:
    settings = arguments()
    output, sizes = Path(settings.output), measurements.SMALL if settings.size == "small" else measurements.Sizes()
    (output / "results").mkdir(parents=True, exist_ok=True)
    problems(output, sizes, settings.only)
    listed = everything(output, sizes, settings.only)
    for repeat in range(settings.repeats):
        for case in listed:
            if not case.once or repeat == 0:
                run(case, repeat, output, settings)
    frame = collect(listed, settings.repeats, output)
    frame.to_parquet(output / "measurements.parquet")
    text = tables.markdown(frame, machine())
    (output / "tables.md").write_text(text)
    if "quality" in settings.only:
        tables.plot(frame, output / "quality.png")
    print(text)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", default="runs/peers", help="folder for problems, results and tables")
    parser.add_argument("--repeats", type=int, default=3, help="of every measurement that does not take minutes")
    parser.add_argument(
        "--size", choices=["full", "small"], default="full", help="small: to try it, in a quarter of an hour"
    )
    parser.add_argument("--only", nargs="+", choices=GROUPS, default=list(GROUPS), help="some of the measurements")
    parser.add_argument("--limit", type=int, default=1800, help="CPU seconds after which a measurement is ended")
    parser.add_argument("--memory", type=float, default=16.0, help="GiB that a measurement may have")
    return parser.parse_args()


def problems(output: Path, sizes: measurements.Sizes, only: list[str]) -> None:
    """Makes the problems that are missing; a problem is whole when its `problem.json` is there."""
    import prepare
    import torch

    torch.set_num_threads(1)
    for vocabulary in sizes.vocabularies:
        folder = output / f"cost_{vocabulary}"
        if not (folder / "problem.json").exists() and only != ["quality"]:
            prepare.cost(folder, sizes.sentences, max(sizes.queries), vocabulary)
    if not (output / "quality" / "problem.json").exists() and "quality" in only:
        prepare.quality(output / "quality", *sizes.quality)
    if not (output / "quality" / "gradients.npz").exists() and "quality" in only:
        prepare.gradient_products(output / "quality")


def everything(output: Path, sizes: measurements.Sizes, only: list[str]) -> list[measurements.Case]:
    """All cases of the measurements asked for."""
    listed = {"score": measurements.scoring, "fit": measurements.fitting, "solve": measurements.solving}
    result = [case for name, make in listed.items() if name in only for case in make(sizes)]
    if "quality" in only:
        damping = json.loads((output / "quality" / "problem.json").read_text())["damping"]
        result += measurements.quality(sizes, damping)
    return result


def place(case: measurements.Case, repeat: int, output: Path) -> Path:
    return output / "results" / f"{case.key}.{repeat}.json"


def run(case: measurements.Case, repeat: int, output: Path, settings: argparse.Namespace) -> None:
    """Measures a case in a process of its own, unless its result lies there."""
    path = place(case, repeat, output)
    if path.exists() and json.loads(path.read_text())["settings"] == case.settings:
        return None
    python = environments.python_of(case.library)
    if not python.exists():
        return write(path, case, {"error": "no environment: run benchmarks/peers/environments.py"})
    print(f"{case.key}, repeat {repeat}", flush=True)
    asked, answer = path.with_suffix(".case"), path.with_suffix(".part")
    limits = {"limit": settings.limit, "memory": int(settings.memory * 2**30)}
    asked.write_text(json.dumps(asdict(case) | limits | {"problem": str(output / case.problem)}))
    environment = os.environ | dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
    environment |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    with path.with_suffix(".log").open("w") as log:
        code = subprocess.call([python, HERE / "worker.py", asked, answer], env=environment, stdout=log, stderr=log)
    asked.unlink()
    if code == 0:
        result = json.loads(answer.read_text())
        answer.unlink()
    elif code == -signal.SIGXCPU:
        result = {"error": f"not finished after {settings.limit:,} s of CPU"}
    else:
        result = {"error": f"the process ended with code {code}"}
    write(path, case, result)
    return None


def write(path: Path, case: measurements.Case, result: dict[str, Any]) -> None:
    path.write_text(json.dumps({"settings": case.settings, **result}))


def collect(listed: list[measurements.Case], repeats: int, output: Path) -> pd.DataFrame:
    """One row per measurement."""
    rows = []
    for case in listed:
        for repeat in range(1 if case.once else repeats):
            path = place(case, repeat, output)
            result = json.loads(path.read_text())
            scores = path.with_suffix(".npy")
            if case.measurement == "quality" and scores.exists():
                result |= compare(case, np.load(scores), output / "quality")
            rows.append(tables.row_of(asdict(case), repeat, with_version(case.library, result)))
    return pd.DataFrame(rows)


def with_version(library: str, result: dict[str, Any]) -> dict[str, Any]:
    """The result with the version of its library, also where it failed."""
    import hf_msif

    version = hf_msif.__version__ if library == "hf_msif" else environments.versions(library).get(library, "")
    return result | {"versions": result.get("versions", {}) | {library: version}}


def compare(case: measurements.Case, scores: np.ndarray, folder: Path) -> dict[str, Any]:
    """How well scores agree with what is known of the problem."""
    if not np.isfinite(scores).all():
        return {"error": "scores that are not finite"}
    subsets, exact = np.load(folder / "subsets.npz"), np.load(folder / "exact.npz")
    result = tables.agreement(scores, exact, subsets["omissions"], subsets["effects"])
    if case.method == "gradient":
        products = np.load(folder / "gradients.npz")[tables.COVERAGE[case.library]]
        result["gradient_error"] = tables.relative_error(scores, products)
    return result


def machine() -> dict[str, Any]:
    """The kind of processor, as the system names it, and the versions that matter."""
    import torch
    import transformers

    cpu = platform.processor() or platform.machine()
    information = Path("/proc/cpuinfo")
    if information.exists():
        names = [
            line.split(":", 1)[1] for line in information.read_text().splitlines() if line.startswith("model name")
        ]
        cpu = f"{names[0].strip()} ({platform.machine()})" if names else cpu
    packages = (
        f"Python {platform.python_version()}, torch {torch.__version__}, transformers {transformers.__version__}"
    )
    return {"cpu": cpu, "cores": os.cpu_count(), "packages": packages}


if __name__ == "__main__":
    sys.exit(main())
