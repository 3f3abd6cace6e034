"""The method on one screen: gradient of the test measurement, one pull-back per stage, the query that results.

start   a = ∇f(φ_K)                                         gradients of the test examples' losses
for k = K … 1:
    u_k = (∂²F_k/∂trained² + 2α P_prox + λ)⁻¹ a_trained     one inverse-curvature-vector product per stage
    b   = a_frozen − ∂/∂frozen ⟨∇_trained F_k, u_k⟩         on frozen names: eq. (11)
    b   = 2α u_k                                            on proximal names: eqs. (13)–(15)
    a   = b, carried to the parameters of stage k − 1
an unrolled stage, in the place of u_k: λ from step to step back through the recorded run, see `unrolled`
influence of an example x of stage k:  I(x) = ∂f/∂ε = −⟨u_k, ∇ℓ_x⟩, eq. (6); positive: more of x raises f
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from ..curvature.derivatives import Evaluation, example_gradients
from ..engine import Engine
from ..engine.accelerated import to_device
from ..engine.checkpoints import Checkpoint, open_checkpoint
from ..engine.corpus import as_corpus, as_rows, first_rows
from ..engine.files import flat_keys, nested_keys
from ..engine.hashing import digest
from ..errors import InputError
from ..vectors import Block
from .chain import BoundStage, Chain
from .differentiation import Differentiation, StageCertificate, StageSolution
from .direction import Direction
from .measurements import Loss, as_measurement
from .predictions import predictions
from .query import Query
from .replicates import joined
from .stage import Stage

if TYPE_CHECKING:
    from accelerate import Accelerator


class MultiStageInfluence(Chain):
    """Multi-stage influence functions (Chen et al., NeurIPS 2020) through any number of stages.

    Args:
        stages: first (pretraining) to last (the finetuning whose predictions are explained).
        accelerator: an `accelerate.Accelerator`; defaults to a new one.
        progress: show progress bars.
        sharded: each process holds its shard of a solver's vectors instead of whole vectors (`curvature.sharded`).
            Their memory falls with the number of processes, and a product has one more exchange between them.

    Raises:
        InputError: the stages do not fit together; the message names the first tensor that differs.

    One stage is Koh & Liang (2017). Here ℓ = ½(m − x)², so that the mean m = 2 of the data is a minimum, F'' = 1, and
    the influence of x on the loss at 0 is −(m − 0)(m − x):

    >>> import torch
    >>> from transformers import PretrainedConfig, PreTrainedModel
    >>> from hf_msif import objectives, solvers
    >>> class Mean(PreTrainedModel):
    ...     def __init__(self):
    ...         super().__init__(PretrainedConfig())
    ...         self.m = torch.nn.Parameter(torch.tensor(2.0))
    ...     def forward(self, x):
    ...         return self.m - x
    >>> class Square(objectives.Objective):
    ...     def collate(self, rows):
    ...         return {"x": torch.tensor([row["x"] for row in rows])}
    ...     def losses(self, call, batch):
    ...         return call(x=batch["x"]) ** 2 / 2, torch.ones(len(batch["x"]))
    >>> data = [{"x": 1.0}, {"x": 3.0}]
    >>> stage = Stage("only", Mean(), Square(), data, curvature="hessian", solver=solvers.Dense())
    >>> msif = MultiStageInfluence([stage], progress=False)
    >>> msif.query([{"x": 0.0}]).score(data).influence()
    array([-2.,  2.])
    """

    def __init__(
        self,
        stages: Sequence[Stage],
        accelerator: Accelerator | None = None,
        progress: bool = True,
        sharded: bool = False,
    ):
        super().__init__(stages, Engine(accelerator, progress, sharded))

    def query(
        self,
        tests,
        aggregate: str | None = None,
        checkpoints: str | os.PathLike | None = None,
        replicates: int | Literal["auto"] = "auto",
        measurement: Any = "loss",
        compare: bool = True,
    ) -> Query:
        """Pulls the loss of test examples (or another measurement of them) back through all stages: one pull-back per
        stage, however large the corpus.

        Args:
            tests: examples of the last stage (rows as its objective reads them).
            aggregate: None: one column per test example; "sum" or "mean": one column for all of them, eq. (8).
            checkpoints: a folder for checkpoints of long solves; None: nothing is saved. After an interruption, the
                same query with the same folder continues from them, also on another number of processes.

            replicates: R, how often everything is done again with other masks and another part of the curvature
                sample, for error bars (`replicates.Replicates`, `scoring.noise.Noise`): each replicate has
                1/R of the `curvature_samples`, and `draws` masks of its own. "auto": two where the curvature of a
                stage is estimated on a sample of its rows, one otherwise. Where nothing is drawn there is one.
            measurement: f, what is explained: "loss"; "log_probability" or "logit_margin" of the row's label;
                `measurements.LogProbability("predicted")` or of any class, `LogitMargin` likewise,
                `SpanLogProbability("some words")` of a language model; or a function (call, batch) → (B,). Influences
                have its sign: positive means that more of a row raises f.
            compare: compare the replicates of each stage on 256 of its rows, for `Query.noise`. Where the rows are
                scored at once, False saves that: `Query.score` compares them on rows that it scores anyway.

        Returns:
            A `Query`: the solution of every stage with its certificate.

        Warns:
            UserWarning: a stage's system was not solved to its tolerance.

        Raises:
            InputError: bad rows, replicates below 1 or more than `curvature_samples`, a test loss that is not finite,
                a solve whose result would mean nothing (it met negative curvature, or its residual is not below 1,
                that of u = 0), or a run whose adjoint grew beyond `Stage.max_growth`.
        """
        rows = as_rows(tests, "the test examples")
        number = self.number_of_replicates(replicates)
        explained = as_measurement(measurement)
        measured, values = self.measurement(rows, aggregate, explained)
        losses = values if isinstance(explained, Loss) else self.losses(rows)
        cache_key = ""
        if checkpoints:
            asked = [rows, aggregate or "", number, explained.identity]
            cache_key = digest([*asked, *(s.cache_key for s in self.stages)])
        opened = {
            (bound, r): open_checkpoint(checkpoints, checkpoint_name(bound.name, r), cache_key, self.engine)
            for bound in self.stages
            for r in range(number)
        }
        by_stage: dict[BoundStage, list[tuple[Differentiation, StageSolution]]] = {b: [] for b in self.stages}
        # Where the last stages draw nothing, all replicates have their solutions in common: name → adjoint.
        common: dict[BoundStage, Block] = {}
        try:
            for r in range(number):
                adjoint, is_common = measured, True
                for bound in reversed(self.stages):
                    differentiation = bound.differentiation.replicate(r, number)
                    is_common = is_common and differentiation is bound.differentiation
                    if is_common and r:
                        by_stage[bound].append(by_stage[bound][0])
                        adjoint = common.get(bound, {})
                        continue
                    solution, adjoint = _pulled_back(differentiation, adjoint, opened[bound, r])
                    by_stage[bound].append((differentiation, solution))
                    if is_common:
                        common[bound] = adjoint
        except InputError:  # under the same settings it would be refused again
            self._forget(opened.values(), checkpoints)
            raise
        solutions = {b.name: joined(*zip(*each, strict=True)) for b, each in reversed(by_stage.items())}
        query = Query(solutions, rows, losses, aggregate, self, measurement=str(explained), values=values)
        query.predictions = predictions(self.stages[-1], rows)
        for name in solutions if compare else ():
            query.noise(name)
        self._forget(opened.values())
        return query

    def number_of_replicates(self, replicates: int | Literal["auto"] = "auto") -> int:
        """R of a query that is asked for `replicates`; 1 where nothing is drawn."""
        differentiations = [bound.differentiation for bound in self.stages]
        if replicates == "auto":
            samples = [d.sampled_rows for d in differentiations if d.sampled_rows is not None]
            return 2 if samples and min(samples) > 1 else 1
        if isinstance(replicates, bool) or not isinstance(replicates, int) or replicates < 1:
            raise InputError(f"replicates is {replicates!r}; expected at least 1, or 'auto'.")
        return replicates if any(d.draws for d in differentiations) else 1

    def self_influence(
        self, rows, stage: str | None = None, columns: int = 16, approximate: bool = False
    ) -> np.ndarray:
        """∇ℓ_xᵀ (A + λ)⁻¹ ∇ℓ_x of rows x of any stage: minus the influence of x on its own loss.

        By the stage's own curvature A and solver it takes one column of a solve per row: for a few rows, as the head
        of a list. `approximate` takes EK-FAC for A (exact for curvature="ekfac"), and all rows in one pass, after a
        fit of A and one solve, which tells λ.

        Args:
            rows: a table of rows as `Query.token_scores` takes them, as `scores.top(50).to_dict("records")`; where it
                is approximate, any corpus that `Query.score` takes.
            stage: name of the stage whose examples they are; defaults to the first. It must be an implicit one.
            columns: rows that are solved for at a time; their gradients are held.
            approximate: by EK-FAC, in one pass.

        Returns:
            (rows,) in float64, in their order; not negative, unless the curvature is indefinite.

        Warns:
            UserWarning: a system was not solved to its tolerance.

        Raises:
            InputError: bad rows, a stage that is not implicit, or a solve whose result would mean nothing.
        """
        bound = self.stage(stage)
        if approximate:
            _, gradients, certificate = self._self_solved(bound, first_rows(as_corpus(rows, "the rows"), 1))
            # Which direction it is does not matter: of its scores the norms alone are read.
            objective = bound.differentiation.objective
            solution = Direction(bound.model, objective, gradients, certificate, lambda: bound.compared_rows)
            scores = Query({bound.name: solution}, [], [], None, self).score(rows, stage=bound.name, norms="self")
            return scores.frame["self_influence"].to_numpy()
        rows = as_rows(rows, "the rows")
        starts = range(0, len(rows), columns)
        return np.concatenate([self._self_solved(bound, rows[n : n + columns])[0] for n in starts])

    def _self_solved(self, bound: BoundStage, rows: list[dict]) -> tuple[np.ndarray, Block, StageCertificate]:
        """The self-influence of a few rows by a solve, their gradients, and the certificate of the solve."""
        batch = to_device(bound.objective.collate(rows), self.engine.device)
        with bound.model.evaluating():
            gradients = example_gradients(Evaluation(bound.model, bound.objective, batch), bound.split.trained)
        values, certificate = bound.differentiation.self_solve(gradients)
        judge(bound.name, certificate)
        return values.cpu().numpy(), gradients, certificate

    def _forget(self, checkpoints: Iterable[Checkpoint | None], folder: str | os.PathLike | None = None) -> None:
        """Deletes checkpoints, and their folder where it is given and nothing else is in it."""
        for checkpoint in filter(None, checkpoints):
            checkpoint.delete()
        if folder is not None and self.engine.is_main:
            with suppress(OSError):
                os.rmdir(folder)


def checkpoint_name(stage: str, replicate: int) -> str:
    """The name of the checkpoint of a stage in a replicate.

    >>> checkpoint_name("pretraining", 0), checkpoint_name("pretraining", 1)
    ('pretraining', 'pretraining.1')
    """
    return f"{stage}.{replicate}" if replicate else stage


def _pulled_back(
    differentiation: Differentiation, adjoint: Block, checkpoint: Checkpoint | None
) -> tuple[StageSolution, Block]:
    """The solution of a stage, and the adjoint of the stage before; for the first stage, none."""
    bound = differentiation.bound
    finished = _finished(differentiation, checkpoint)
    solution, inherited = finished or differentiation.pull_back(adjoint, checkpoint)
    judge(bound.name, solution.certificate)
    if bound.before is None:
        return solution, {}
    if checkpoint is not None and finished is None:
        tensors = flat_keys({"solution": solution.tensors(), "inherited": inherited})
        checkpoint.save(tensors, {"done": True, "certificate": solution.certificate.to_dict()})
    return solution, bound.carry(inherited)


def _finished(differentiation: Differentiation, copy: Checkpoint | None) -> tuple[StageSolution, Block] | None:
    """The result of a `pull_back` that finished before an interruption, under the same cache key; None otherwise."""
    saved = copy.load() if copy is not None else None
    if saved is None or "done" not in saved[1]:
        return None
    parts: dict[str, Block] = {"solution": {}, "inherited": {}, **nested_keys(saved[0])}
    return differentiation.load(parts["solution"], saved[1]["certificate"]), parts["inherited"]


def judge(stage: str, certificate: StageCertificate) -> None:
    """Refuses a solution that has no meaning (`flaw`); warns about one that is not solved to tolerance."""
    reason = flaw(certificate)
    if reason is not None:
        raise InputError(f"stage {stage!r}: {reason}. {certificate}")
    if not all(certificate.converged):
        warnings.warn(f"stage {stage!r}: not solved to tolerance. {certificate}", stacklevel=4)


def flaw(certificate: StageCertificate) -> str | None:
    """Why a solution has no meaning; None where it has one, converged or not."""
    # The status alone counts: MINRES sets the flag `negative_curvature` for an indefinite system that it has solved.
    if "negative_curvature" in certificate.status:
        return "the inverse-curvature-vector product has no meaning"
    # Runs and formulas solve no system, and have no residual. NaN is not below 1 either.
    too_large = [residual for residual in getattr(certificate, "residual", ()) if not residual < 1]
    if too_large:
        return (
            f"the relative residual of the inverse-curvature-vector product is {too_large[0]:.2g}; expected below 1, "
            "which u = 0 reaches without work: give the solver more damping or more iterations, or take another solver"
        )
    return None
