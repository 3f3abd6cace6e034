"""What a run will cost, measured on a few batches per stage before it is started."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from ..engine.stream import Stream
from ..influence.cost import Cost, size_text, time_text
from .memory import available_bytes

if TYPE_CHECKING:
    from ..influence.chain import BoundStage
    from .run import Run


def plan(run: Run, processes: int = 1) -> dict:
    """Measures what a query and a scoring of a run will take.

    Stages that are not trained yet are measured with untrained weights. Times are estimates from a few batches; for
    several processes they leave out the communication.

    Args:
        run: the run.
        processes: the number of processes that would share the work.

    Returns:
        `text` for people; `stages`: name → `Cost.to_dict()`; `checks`: name → its
        `Finding.to_dict()`; `splits`: name → the roles of its parameters;
        `score_seconds` of the whole corpus; `disk_bytes`; `memory_bytes` that are needed at a time on each process
        beside the models; `free_bytes`.
    """
    run.checked_test_part()
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
        number = replicates if any(d.draws for d in differentiations[len(costs) :]) else 1
        if number > 1:
            cost = _replicated(cost, number, differentiations[len(costs)].sampled_rows is not None)
            lines.append(
                f"  {number} replicates (test.replicates), for error bars: {time_text(cost.solve_seconds)} in all"
            )
        costs[bound.name] = cost
        lines += [f"  {line}" for line in _checks(bound, cost.solve_seconds)]
    rows, counted = corpus or 1000, f"{corpus:,} rows" if corpus else "1,000 rows of the stream"
    seconds = costs[run.ranked].score_seconds_per_row / processes * rows
    disk = sum(cost.vector_bytes + cost.disk_bytes for cost in costs.values())
    lines += [
        f"scoring {counted} for {columns} column(s): {time_text(seconds)}",
        f"disk: {size_text(disk)} for the query and recorded runs, about {size_text(rows * (300 + 16 * columns))} for "
        f"the scores of {counted}",
    ]
    needed = max(cost.memory_bytes for cost in costs.values())
    free = available_bytes(chain.engine.device)
    lines.append(f"memory: {size_text(needed)} at a time on each process beside the models, of {size_text(free)} free")
    if needed > free:
        lines.append("this does not fit: msif query would refuse (see memory_check)")
    return {
        "text": "\n".join(lines),
        "stages": {name: cost.to_dict() for name, cost in costs.items()},
        "checks": {bound.name: [finding.to_dict() for finding in bound.findings] for bound in chain.stages},
        "splits": {bound.name: bound.split.table() for bound in chain.stages},
        "score_seconds": seconds,
        "disk_bytes": disk,
        "memory_bytes": needed,
        "free_bytes": free,
    }


def _replicated(cost: Cost, number: int, sampled: bool) -> Cost:
    """The cost of that many replicates: each has its part of the curvature's rows where these are a sample, and all of
    them otherwise; its own solution, and its own losses of the rows that are scored."""
    solves = 1 if sampled else number
    return replace(
        cost,
        solve_seconds=solves * cost.solve_seconds,
        score_seconds_per_row=number * cost.score_seconds_per_row,
        vector_bytes=number * cost.vector_bytes,
    )


def _checks(bound: BoundStage, solve_seconds: float) -> list[str]:
    """What the checks of a stage found, and what they cost beside its solve."""
    seconds = sum(finding.seconds for finding in bound.findings)
    share = f", {seconds / solve_seconds:.1%} of the solve" if solve_seconds else ""
    return [f"checks: {time_text(seconds)}{share}", *(f"  {finding}" for finding in bound.findings)]
