"""What a process of a real launch does: run by `torchrun`, with a folder in which the one-process results lie.

On a machine with fewer GPUs than processes these share them: by gloo, since NCCL wants a GPU for each.

Each check asserts the world's size first; a failed assertion in any process fails the launch.
"""

import sys
import warnings
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs

from helpers import tiny, toy
from helpers.runs import Run, pair, unrolled_chain
from hf_msif import InputError, MultiStageInfluence, Query, Stage, solvers, training, vectors
from hf_msif.adapters.split import decayed_names
from hf_msif.curvature.derivatives import Evaluation, example_gradients
from hf_msif.engine import Engine
from hf_msif.engine.files import load_tensors
from hf_msif.errors import ProcessError
from hf_msif.influence.implicit import Implicit
from hf_msif.training.optimisers import AdamW
from hf_msif.training.trajectory import of_models

CORPUS = tiny.rows(23, seed=7, longest=18)
TESTS = tiny.rows(3, seed=8)


def chain(dtype, sharded=False, curvature="gauss_newton", corpus=17, solver=None, pretraining=()):
    """A BERT pretrained and finetuned with its encoder trained, so that both stages have a mixed or proximal term."""
    before = tiny.model("bert", "masked", dtype=dtype)
    after = tiny.finetuned(before, "bert", dtype=dtype)
    # The same few iterations everywhere: what differs is what the processes add up.
    solver = solver or solvers.CG(damping=0.5, tol=1e-12, max_iter=3)
    first = {"solver": solver, "curvature": curvature, "batch_size": 32, "weight_decay": 0.01, **dict(pretraining)}
    stages = [
        Stage("pre", before, tiny.objective("masked"), tiny.rows(corpus, seed=1, longest=18), **first),
        Stage(
            "fine",
            after,
            tiny.objective("classification"),
            tiny.rows(9, seed=2),
            trainable=["*.layer.*", "classifier*"],
            alpha=0.3,
            solver=solver,
            batch_size=2,
        ),
    ]
    return MultiStageInfluence(stages, progress=False, sharded=sharded)


def results(dtype, **settings):
    """Query vectors, residuals and scores of the whole pipeline."""
    made = chain(dtype, **settings)
    query = made.query(TESTS)
    found = {f"{stage}/{n}": t for stage, u in query.solutions.items() for n, t in u.tensors().items()}
    for name, rows in (("many", CORPUS), ("few", CORPUS[:2]), ("one", CORPUS[:1])):
        scores = query.score(rows, batch_size=3)
        found[f"scores/{name}"] = torch.tensor(np.stack([scores.influence(q) for q in range(3)]))
    found["alone"] = torch.tensor(query.score(CORPUS, stage="fine").influence(1))
    terms = query.token_scores(CORPUS[:2])
    found["terms"] = torch.tensor(terms[[f"influence_{q}" for q in range(3)]].to_numpy())
    replicated = made.query(TESTS[:1], replicates=2).score(CORPUS)
    found["replicated/influence"] = torch.tensor(replicated.influence())
    # Their fit takes logarithms of small differences of replicates, which a solve to its last digit does not keep.
    if dtype == torch.float64 and "solver" not in settings:
        found["replicated/errors"] = torch.tensor(replicated.standard_error())
    group = made.query(TESTS, aggregate="mean")
    found |= {f"group/{n}": t for n, t in group.solutions["pre"].tensors().items()}
    found["N"] = torch.tensor([made.stage("pre").count, made.stage("fine").count])
    links = [made.stage(name).differentiation for name in ("pre", "fine")]
    found["norm"] = torch.tensor([link.gradient_norm for link in links if isinstance(link, Implicit)])
    return found


# Two states of a run by AdamW, whose second moments are estimated, and whose momentum goes from segment to segment.
STATES = [tiny.model("bert", "masked", seed=seed) for seed in (0, 3)]
SEGMENTS = {
    "link": "segments",
    "checkpoints": of_models(STATES, [4, 9], [0.01] * 9, AdamW(weight_decay=0.1), decayed_names(STATES[0]), batch=4),
    "solver": solvers.Auto(tol=1e-12, max_iter=12),
}
AUTO = solvers.CG(damping_fraction=0.1, tol=1e-12, max_iter=3)  # with less damping three iterations gain nothing
CASES = {
    "float64": {"dtype": torch.float64},
    "float32": {"dtype": torch.float32},
    "sharded": {"dtype": torch.float64, "sharded": True},
    "sharded-minres": {
        "dtype": torch.float64,
        "sharded": True,
        "curvature": "hessian",
        "solver": solvers.MinRes(damping=3.0, tol=1e-12, max_iter=3),
    },
    "sharded-auto": {"dtype": torch.float64, "sharded": True, "solver": AUTO},
    "sharded-block": {
        "dtype": torch.float64,
        "sharded": True,
        "solver": solvers.BlockCG(damping=0.5, tol=1e-12, max_iter=300, preconditioner=solvers.Nystrom(rank=6)),
    },
    "ekfac": {"dtype": torch.float64, "sharded": True, "curvature": "ekfac"},
    "ekfac-closed": {
        "dtype": torch.float64,
        "curvature": "ekfac",
        "pretraining": {"solver": solvers.ClosedForm(damping=0.5)}.items(),
    },
    "segments": {"dtype": torch.float64, "sharded": True, "pretraining": SEGMENTS.items()},
    "one-sentence": {"dtype": torch.float64, "corpus": 1},
    "two-sentences": {"dtype": torch.float64, "corpus": 2},
}


def same(folder, world):
    """The results of one process, to 1e-10 in float64 and 1e-5 in float32."""
    for name, settings in CASES.items():
        expected, _ = load_tensors(folder / f"{name}.safetensors")
        tolerance = 1e-5 if settings["dtype"] == torch.float32 else 1e-10
        sizes: dict[str, float] = {}  # of whole vectors: a key's bias, say, has no gradient but rounding
        for key, t in expected.items():
            sizes[key.split("/")[0]] = max(sizes.get(key.split("/")[0], 0.0), float(t.abs().max()))
        for key, found in results(**settings).items():
            size = sizes[key.split("/")[0]]
            gap = float((found.cpu() - expected[key]).abs().max())
            assert gap <= tolerance * size, f"{name}: {key} differs by {gap / size:.1e} in a world of {world}"


def sharded(folder, world):
    """A process holds its shard of a solver's vectors, no more."""
    from hf_msif.curvature.sharded import Sharded

    made = chain(torch.float64, sharded=True)
    operator = Sharded(made.stage("pre").differentiation.operator, made.engine)
    whole = sum(p.numel() for p in operator.operator.parameters.values())
    v = vectors.rademacher(operator.operator.parameters, 2, seed=0)
    shards = operator.cut(v)
    assert shards["shard"].shape == (2, -(-whole // world))
    product = operator.matvec(shards)
    assert product["shard"].shape == shards["shard"].shape
    torch.testing.assert_close(operator.dot(shards, shards), vectors.dot(v, v), rtol=1e-12, atol=0)
    torch.testing.assert_close(operator.join(shards), v, rtol=0, atol=0)
    tiny.close(operator.join(product), operator.operator.matvec(v), 1e-12)


def columns(folder, world):
    """Each column comes from one process and has its bits; a process that fails tells all."""
    engine, like = Engine(progress=False), {"w": torch.zeros(3), "b": torch.zeros((), dtype=torch.float64)}
    like = {name: t.to(engine.device) for name, t in like.items()}

    def made(number):
        for q in range(engine.rank, number, world):
            generator = torch.Generator().manual_seed(q)
            yield q, {n: torch.randn(t.shape, generator=generator, dtype=t.dtype).to(t) for n, t in like.items()}

    for number in (1, 7):
        block = engine.columns(like, number, made(number))
        for q in range(number):
            generator = torch.Generator().manual_seed(q)
            for name, t in like.items():
                expected = torch.randn(t.shape, generator=generator, dtype=t.dtype).to(t)
                assert block[name].shape == (number, *t.shape)
                assert torch.equal(block[name][q], expected), f"column {q} of {number} in a world of {world}"

    def bad():
        yield from made(1)
        if engine.rank == world - 1:
            raise InputError("the second test is bad")

    with pytest.raises(InputError, match=r"^the second test is bad$"):
        engine.columns(like, 1, bad())


def failing(folder, world):
    """What fails in one process is raised in all, with its message; what they do next still works."""
    engine = Engine(progress=False)
    last, like = world - 1, {"w": torch.zeros(1, 2, device=engine.device)}

    def parts():
        yield {"w": torch.ones_like(like["w"])}
        if engine.rank == last:
            raise InputError("the third sentence is bad")

    with pytest.raises(InputError, match=r"^the third sentence is bad$"):
        engine.sum(like, parts())
    other = f"^process {last} of {world} failed: MemoryError: no memory left$"

    def alone():
        with engine.raising_together():
            if engine.rank == last:
                raise MemoryError("no memory left")

    with pytest.raises((ProcessError, MemoryError), match="no memory" if engine.rank == last else other):
        alone()
    assert engine.sum(like, [{"w": torch.full_like(like["w"], 2.0)}])["w"].tolist() == [[2.0 * world] * 2]
    assert engine.gather([engine.rank]) == list(range(world))
    assert engine.broadcast_object(f"from {engine.rank}") == "from 0"
    bad = [*CORPUS[:5], {"example_id": "odd", "text": None}]
    with pytest.raises(InputError, match="'odd' has None in column 'text'"):
        chain(torch.float64).query(TESTS[:1]).score(bad, batch_size=1)


def streams(folder, world):
    """A stream is read once, by the main process, and scored as the table that it comes from."""
    query = chain(torch.float64).query(TESTS[:1])
    table = [{**row, "example_id": i} for i, row in enumerate(CORPUS)]
    expected = query.score(table)
    read = []

    def rows():
        for row in table:
            read.append(row["example_id"])
            yield row

    stream = datasets.IterableDataset.from_generator(rows)
    found = query.score(stream, part_rows=5, batch_size=1)
    plain = ["example_id", "text", "text_sha256", "duplicates", "terms"]
    assert found.frame[plain].equals(expected.frame[plain])
    np.testing.assert_allclose(found.influence(), expected.influence(), rtol=1e-10)
    assert found.frame.example_id.tolist() == [row["example_id"] for row in table]
    assert query.chain.engine.is_main or not read


def durable(folder, world):
    """Parts of one world, finished by this one: `tests/test_durable.py` has the rest."""
    query = chain(torch.float64).query(TESTS)
    expected = query.score(CORPUS)
    found = query.score(CORPUS, output_dir=folder / f"out-{world}", part_rows=4)
    assert found.frame.example_id.tolist() == expected.frame.example_id.tolist()
    for q in range(3):
        np.testing.assert_allclose(found.influence(q), expected.influence(q), rtol=1e-10)
    sized = query.score(CORPUS, output_dir=folder / f"sized-{world}", part_rows=4, norms="self")
    bound = query.chain.stages[0]
    with bound.model.evaluating():
        evaluation = Evaluation(bound.model, bound.objective, bound.objective.collate(CORPUS))
        gradients = example_gradients(evaluation, bound.split.trained)
    np.testing.assert_allclose(sized.frame.gradient_norm, vectors.norm(gradients), rtol=1e-9)
    metric = bound.differentiation.metric(query.certificates[bound.name])
    np.testing.assert_allclose(sized.frame.self_influence, metric.squares(gradients), rtol=1e-9)
    kept = query.score(CORPUS, output_dir=folder / f"kept-{world}", part_rows=4, keep=3)
    assert kept.top(3, query=2).example_id.tolist() == expected.top(3, query=2).example_id.tolist()
    assert kept.metadata["kept"]["all"][0]["count"] == len(CORPUS)
    stream = datasets.IterableDataset.from_generator(lambda: iter([*CORPUS]))
    short = query.score(stream, output_dir=folder / f"short-{world}", part_rows=4, keep=3, dtype="bfloat16")
    assert short.top(3, query=2).example_id.tolist() == expected.top(3, query=2).example_id.tolist()
    assert short.metadata["shortlist"]["recall_rows"] == len(CORPUS)


def unrolled(folder):
    """Query vectors through a run that `record_run` recorded there."""
    run, before, model = run_of()
    model.load_state_dict(torch.load(folder / "run.pt"))
    query = unrolled_chain(run, before, model, folder / "run", batch_size=3).query(toy.toy_rows(9, 3))
    return {f"{stage}/{n}": t for stage, u in query.solutions.items() for n, t in u.tensors().items()}


def run_of():
    return (
        Run(toy.toy_rows(3, 7), [], momentum=0.8, clip=0.2, batch=3, epochs=2),
        *pair(),
    )


def record_run(folder):
    run, before, model = run_of()
    run.record(model, folder / "run", before)
    torch.save(model.state_dict(), folder / "run.pt")


def runs(folder, world):
    """An unrolled stage: the processes share every step's batch, also where one of them has no row of it."""
    expected, _ = load_tensors(folder / "unrolled.safetensors")
    for key, found in unrolled(folder).items():
        torch.testing.assert_close(found.cpu(), expected[key], rtol=1e-9, atol=1e-12)
    # Fewer rows than processes: nothing of what scoring does may wait for a process that has no batch.
    run, before, model = run_of()
    model.load_state_dict(torch.load(folder / "run.pt"))
    made = unrolled_chain(run, before, model, folder / "run", batch_size=3)
    made.query(toy.toy_rows(9, 3)).save_pretrained(folder / f"unrolled_query_{world}")
    again = unrolled_chain(run, before, model, folder / "run", batch_size=3)
    scores = Query.from_pretrained(folder / f"unrolled_query_{world}", again).score(run.rows[:1], stage="second")
    weight = float(expected["second/weights"][0, 0])
    np.testing.assert_allclose(scores.influence(0), [again.stage("second").count * weight], rtol=1e-9)


def linear_head(folder, world):
    """scikit-learn gets the terms of all processes; one whose losses are no cross-entropies is refused by all."""
    rows, settings = toy.toy_rows(2, 30), {"trainable": ["head.*"], "weight_decay": 0.05, "batch_size": 7}
    found, newton = toy.toy(1), toy.toy(1)
    engine = Engine(progress=False)
    report = training.polish(found, toy.ToyObjective(), rows, method="sklearn", engine=engine, **settings)
    assert report.gradient_norm < 1e-12
    training.polish(newton, toy.ToyObjective(), rows, tol=1e-12, engine=engine, **settings)
    torch.testing.assert_close(found.head.weight, newton.head.weight, rtol=0, atol=1e-10)
    with pytest.raises(InputError, match=r"losses of stage 'stage' \(OneIsOdd\) are not softmax"):
        training.polish(newton, OneIsOdd(), rows, method="sklearn", engine=engine, **settings)


class OneIsOdd(toy.ToyObjective):
    """Row 5's loss, which one process has, is no cross-entropy."""

    def collate(self, rows):
        return super().collate(rows) | {"odd": torch.tensor([row["example_id"] == 5 for row in rows])}

    def losses(self, call, batch):
        sums, counts = super().losses(call, batch)
        return sums + batch["odd"] * sums**2, counts


CHECKS = (same, sharded, columns, failing, streams, durable, runs, linear_head)


def main():
    folder, size = Path(sys.argv[1]), int(sys.argv[2])
    backend = "gloo" if size > torch.cuda.device_count() else "nccl"
    accelerator = Accelerator(kwargs_handlers=[InitProcessGroupKwargs(backend=backend)])
    assert accelerator.num_processes == size, f"{accelerator.num_processes} processes run, not {size}"
    assert accelerator.device.type == ("cuda" if torch.cuda.is_available() else "cpu")
    assert size == 1 or torch.distributed.get_backend() == backend
    warnings.filterwarnings("ignore", message=".*not solved to tolerance")
    for check in CHECKS:
        check(folder, size)
        if accelerator.is_main_process:
            print(f"{check.__name__}: passed in a world of {size}", flush=True)
    accelerator.end_training()


if __name__ == "__main__":
    main()
