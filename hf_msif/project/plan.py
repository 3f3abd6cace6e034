"""What a run will cost, measured on a few batches per stage before it is started."""

from __future__ import annotations

import sys
from dataclasses import asdict, replace
from typing import TYPE_CHECKING

from ..engine.progress import duration
from ..engine.stream import Stream
from ..errors import InputError
from ..influence.cost import Cost, size_text, time_text
from ..influence.replicates import replicated
from ..scoring.mask_noise import MOST_ROUNDS
from .budget import Affordable, Solve, within
from .explained import checked_part
from .memory import available_bytes

if TYPE_CHECKING:
    from ..influence.chain import BoundStage
    from .run import Run


def plan(run: Run, processes: int = 1, budget: float | None = None) -> dict:
    """Measures what a query and a scoring of a run will take.

    Stages that are not trained yet are measured with untrained weights. Times are estimates from a few batches; for
    several processes they leave out the communication.

    Args:
        run: the run.
        processes: the number of processes that would share the work.
        budget: seconds for a query and a scoring; `text` then says what they buy.

    Returns:
        `text` for people; `stages`: name → `Cost.to_dict()`; `checks`: name → its
        `Finding.to_dict()`; `splits`: name → the roles of its parameters;
        `solve_seconds` and `usual_solve_seconds` of all stages; `score_seconds` of the whole corpus; with a budget
        `budget`, what it buys, null where that is not one row; `disk_bytes`; `memory_bytes` that are needed at a time
        on each process beside the models; `free_bytes`.
    """
    checked_part(run)
    models = {name: run.present_model(name) for name in run.names}
    columns = 1 if run.aggregate else len(run.tests())
    corpus = run.config.corpus.sample
    if not isinstance(run.rows(run.ranked), Stream):
        corpus = len(list(run.corpus()))
    chain = run.chain(models, planned=True)
    lines: list[str] = []
    costs: dict[str, Cost] = {}
    # Of untrained weights nothing is to be foretold.
    adjoints = (
        chain.sketched_adjoints(run.tests(), run.aggregate, run.measurement)
        if all(map(run.is_trained, run.names))
        else {}
    )
    differentiations = [run.planned(bound) for bound in chain.stages]
    replicates = chain.number_of_replicates(run.config.test.replicates)
    for bound in chain.stages:
        trained = run.is_trained(bound.name)
        summary = replace(bound.split.summary(), steps=())
        lines.append(str(summary) + ("" if trained else "\n  not trained yet: untrained weights"))
        cost = differentiations[len(costs)].cost(columns, processes, adjoints.get(bound.name))
        lines += [f"  {line}" for line in cost.text]
        cost = replicated(cost, bound, replicates, differentiations[len(costs) :], processes)
        if "replicates" in cost.details:
            times = _usual_and_worst(cost.usual_seconds, cost.solve_seconds)
            lines.append(f"  {replicates} replicates (test.replicates), for error bars: {times} in all")
        costs[bound.name] = cost
        lines += [f"  {line}" for line in _checks(bound, cost.solve_seconds)]
    rows, counted = corpus or 1000, f"{corpus:,} rows" if corpus else "1,000 rows of the stream"
    scorings, masks = _mask_rounds(run, chain.stage(run.ranked))
    seconds = costs[run.ranked].score_seconds_per_row / processes * rows * scorings
    usual, worst = (sum(getattr(cost, name) for cost in costs.values()) for name in ("usual_seconds", "solve_seconds"))
    disk = sum(cost.vector_bytes + cost.disk_bytes for cost in costs.values())
    lines += [
        f"query, all stages: {_usual_and_worst(usual, worst)}",
        f"scoring {counted} for {columns} column(s){masks}: {time_text(seconds)}",
        f"disk: {size_text(disk)} for the query and recorded runs, about {size_text(rows * (300 + 16 * columns))} for "
        f"the scores of {counted}",
    ]
    needed = max(cost.memory_bytes for cost in costs.values())
    free = available_bytes(chain.engine.device)
    lines.append(f"memory: {size_text(needed)} at a time on each process beside the models, of {size_text(free)} free")
    if needed > free:
        lines.append("this does not fit: msif query would refuse (see memory_check)")
    bought = {}
    if budget is not None:
        affordable, text = _within(run, chain.stage(run.ranked), costs, budget, processes)
        bought = {"budget": affordable and asdict(affordable)}
        lines += text
    return {
        "text": "\n".join(lines),
        "stages": {name: cost.to_dict() for name, cost in costs.items()},
        "checks": {bound.name: [finding.to_dict() for finding in bound.findings] for bound in chain.stages},
        "splits": {bound.name: bound.split.table() for bound in chain.stages},
        "solve_seconds": worst,
        "usual_solve_seconds": usual,
        "score_seconds": seconds,
        **bought,
        "disk_bytes": disk,
        "memory_bytes": needed,
        "free_bytes": free,
    }


def _usual_and_worst(usual: float, worst: float) -> str:
    """Two times, or one where they are the same."""
    return time_text(worst) if usual == worst else f"usually {time_text(usual)}, at most {time_text(worst)}"


def _mask_rounds(run: Run, bound: BoundStage) -> tuple[float, str]:
    """How often a row is scored for its `corpus.mask_rounds`, in rounds of the stage, and these rounds for people."""
    rounds = run.config.corpus.mask_rounds
    if rounds is None or not bound.stage.has_mask_rounds:
        return 1.0, ""
    assert bound.stage.mask_rounds is not None
    most = MOST_ROUNDS if rounds == "auto" else rounds
    text = f" with {'at most ' if rounds == 'auto' else ''}{most} round(s) of masks"
    return most / bound.stage.mask_rounds, text


def _within(
    run: Run, bound: BoundStage, costs: dict[str, Cost], budget: float, processes: int
) -> tuple[Affordable | None, list[str]]:
    """What a budget buys, and the lines that tell it with the flags that spend it."""
    cost, rows = costs[bound.name], run.rows(bound.name)
    there = sys.maxsize if isinstance(rows, Stream) else len(rows)
    solves = {name: Solve.of(each, usual=True) for name, each in costs.items()}
    try:
        affordable = within(
            budget,
            cost.score_seconds_per_row / processes,
            there,
            solves,
            mask_rounds=bound.stage.mask_rounds if bound.stage.has_mask_rounds else None,
        )
    except InputError as error:
        return None, [str(error)]
    corpus, flags = run.config.corpus, []
    sample = None if affordable.rows == there else affordable.rows
    text = f"{affordable.rows:,} rows scored" if sample else f"all {there:,} rows scored"
    if sample != corpus.sample:
        flags.append(f"--corpus.sample {sample or 'null'}")
    if affordable.mask_rounds is not None:
        text += f" with {affordable.mask_rounds} round(s) of masks"
        if affordable.mask_rounds != (corpus.mask_rounds or bound.stage.mask_rounds):
            flags.append(f"--corpus.mask_rounds {affordable.mask_rounds}")
    for name, samples in affordable.curvature_samples.items():
        text += f", a curvature of {name} on {samples:,} of {solves[name].samples:,} rows"
        if samples != solves[name].samples:
            flags.append(f"--stages.{name}.curvature_samples {samples}")
    text = f"a budget of {duration(budget)} buys {text}: {time_text(affordable.seconds)}"
    return affordable, [text, *([f"  by {' '.join(flags)}"] if flags else [])]


def _checks(bound: BoundStage, solve_seconds: float) -> list[str]:
    """What the checks of a stage found, and what they cost beside its solve."""
    seconds = sum(finding.seconds for finding in bound.findings)
    share = f", {seconds / solve_seconds:.1%} of the solve" if solve_seconds else ""
    return [f"checks: {time_text(seconds)}{share}", *(f"  {finding}" for finding in bound.findings)]
