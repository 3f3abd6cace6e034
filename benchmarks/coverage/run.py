"""Which architectures of transformers the library computes influence for: examines all, and writes docs/coverage.md.

    python benchmarks/coverage/run.py                     # every architecture with both heads; some minutes
    python benchmarks/coverage/run.py --tasks first       # without second tasks of an architecture
    python benchmarks/coverage/run.py --only bert mixtral --page runs/coverage/some.md

Pairs are examined in processes of their own, some pairs each. One that ends its process is named, and the others go
on. Results are appended to a file, so that an interrupted run continues; a change of the library or of the suite, and
`--again`, start anew. The exit code is 1 where fewer than 95 % pass.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
from datetime import date
from pathlib import Path

import torch
import transformers
from examination import LIMITS, SECONDS, Examination
from tabulate import tabulate
from tiny_models import Pair, pairs

FOLDER = Path(__file__).parent
ROOT = FOLDER.parents[1]
SHARE = 0.95
PER_PROCESS = 8
MEASURES = {"query": "query", "scores": "scores", "batches": "batch of 1 or 6", "symmetry": "symmetry"}

PAGE = """# Architectures

*Written by `make coverage-suite`; do not edit.*

**{passed} of {number} architectures pass** ({share:.0%}) with their first task, and {passed_pairs} of {pairs} pairs
with second tasks; transformers {transformers}, torch {torch} on the CPU, {day}.

Every architecture of transformers that has a language model and a sequence classifier is made tiny, with random
weights (`benchmarks/coverage`). Those that have several language models (masked, sequence-to-sequence, causal, next
sentence, replaced tokens) have a pair for each. The classifier's encoder is that of the language model, frozen; its
head is trained. A query goes through both stages, and is compared with plain reverse-mode gradients of the models as
they are, one row at a time. All numbers are relative to the largest one; a pair fails above {limit:.0e} in float64,
and {limit32:.0e} in float32. (Models that normalise in float32 whatever their dtype is are exact to 1e-7 or so.)

| column | what is compared |
| --- | --- |
| query | the direction of the pretraining stage, with its mixed derivative, eq. (11), by `solvers.Identity()` |
| scores | influences of six sentences, and −⟨u, ∇ℓ⟩ by a backward pass per sentence |
| batch of 1 or 6 | influences by batches of one and of six sentences of different length |
| symmetry | ⟨w, G v⟩ and ⟨v, G w⟩ of a Gauss-Newton product |

Float32 stands where the library refused float64 and named it.

{failures}## All pairs

{table}
"""


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", choices=["first", "all"], default="all")
    parser.add_argument("--only", nargs="*", help="architectures, or architecture/task")
    parser.add_argument("--results", type=Path, default=ROOT / "runs" / "coverage" / f"{version()}.jsonl")
    parser.add_argument("--page", type=Path, default=ROOT / "docs" / "coverage.md")
    parser.add_argument("--again", action="store_true", help="forget the results that are there")
    args = parser.parse_args(argv)

    chosen = [p for p in pairs(args.tasks) if not args.only or {p.name, p.architecture} & set(args.only)]
    args.results.parent.mkdir(parents=True, exist_ok=True)
    if args.again:
        args.results.unlink(missing_ok=True)
    results = finished(args.results)
    missing = [pair for pair in chosen if pair.name not in results]
    while missing:
        run_process(missing[:PER_PROCESS], args.results)
        results = finished(args.results)
        missing = [pair for pair in chosen if pair.name not in results]
        print(f"{len(chosen) - len(missing)} of {len(chosen)}", file=sys.stderr)
    examinations = [results[pair.name] for pair in chosen]
    args.page.write_text(page(examinations))
    passed, number = passed_architectures(examinations)
    for e in examinations:
        if not e.passed:
            print(f"{e.name}: {e.error}")
    seconds = sum(e.seconds for e in examinations)
    print(
        f"passed {passed} of {number} architectures with their first task, and {sum(e.passed for e in examinations)} "
        f"of {len(examinations)} pairs, in {seconds:.0f} s of processor time"
    )
    return 0 if passed >= SHARE * number else 1


def passed_architectures(examinations: list[Examination]) -> tuple[int, int]:
    """How many architectures pass with the first of their tasks that were examined, and how many there are."""
    first = dict[str, Examination]()
    for e in examinations:
        first.setdefault(e.name.split("/")[0], e)
    return sum(e.passed for e in first.values()), len(first)


def version() -> str:
    """A digest of everything that a result depends on."""
    digest = hashlib.sha256(f"{torch.__version__} {transformers.__version__}".encode())
    for path in sorted([*(ROOT / "hf_msif").rglob("*.py"), *FOLDER.glob("*.py")]):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def run_process(chunk: list[Pair], results: Path) -> None:
    """Examines pairs in a process; one that ends it, or outlasts it, gets a result that says so.

    Raises:
        SystemExit: the process did not come to the first pair.
    """
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(FOLDER / "examination.py"), *(pair.name for pair in chunk)]
    before = results.stat().st_size if results.exists() else 0
    with results.open("a") as file:
        try:
            # A signal does not reach code that never returns to Python; other work may share the processor.
            process = subprocess.run(
                command, stdout=file, stderr=subprocess.PIPE, env=environment, timeout=10 * SECONDS * len(chunk)
            )
            said = process.stderr.decode(errors="replace").strip().splitlines()[-1:]
            end = ": ".join([f"its process ended with exit code {process.returncode}", *said])
        except subprocess.TimeoutExpired:
            end = "its process did not end"
    started, ended = lines(results, before)
    if not started:
        raise SystemExit(f"{command[1]}: {end}")
    if started[-1] not in ended:
        pair = next(pair for pair in chunk if pair.name == started[-1])
        crashed = Examination(pair.name, [pair.language_model, pair.classifier], error=end)
        with results.open("a") as file:
            file.write("\n" + json.dumps(vars(crashed)) + "\n")  # its process may have left half a line


def lines(path: Path, start: int = 0) -> tuple[list[str], dict[str, dict]]:
    """The names of the pairs that were started, and the results by name, from a byte of the file on."""
    started, ended = list[str](), dict[str, dict]()
    for line in path.read_bytes()[start:].splitlines() if path.exists() else []:
        try:
            entry = json.loads(line)
        except json.JSONDecodeError:  # an interruption cut it
            continue
        if "started" in entry:
            started.append(entry["started"])
        elif "name" in entry:
            ended[entry["name"]] = entry
    return started, ended


def finished(path: Path) -> dict[str, Examination]:
    return {name: Examination(**entry) for name, entry in lines(path)[1].items()}


def page(examinations: list[Examination]) -> str:
    """docs/coverage.md."""
    failed = [e for e in examinations if not e.passed]
    failures = ""
    if failed:
        rows = [[e.name, e.error.replace("|", "/").replace("\n", " ")] for e in failed]
        failures = "## What does not pass\n\n" + _markdown(rows, ["pair", "why"]) + "\n\n"
    rows = [
        [
            e.name,
            " → ".join(f"`{name}`" for name in e.classes),
            "yes" if e.passed else "no",
            e.dtype,
            *(_number(getattr(e, measure)) for measure in MEASURES),
            "; ".join(e.notes).replace("|", "/"),
        ]
        for e in examinations
    ]
    passed, number = passed_architectures(examinations)
    return PAGE.format(
        passed=passed,
        number=number,
        share=passed / max(number, 1),
        passed_pairs=len(examinations) - len(failed),
        pairs=len(examinations),
        transformers=transformers.__version__,
        torch=torch.__version__.split("+")[0],
        day=date.today(),
        limit=LIMITS[torch.float64],
        limit32=LIMITS[torch.float32],
        failures=failures,
        table=_markdown(rows, ["pair", "classes", "passes", "dtype", *MEASURES.values(), "notes"]),
    )


def _markdown(rows: list[list], headers: list[str]) -> str:
    return tabulate(rows, headers=headers, tablefmt="pipe", disable_numparse=True)


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.0e}"


if __name__ == "__main__":
    sys.exit(main())
