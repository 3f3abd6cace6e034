"""The method on one screen: gradient of the test measurement, one pull-back a stage, the query that results.

start   a = ∇f(φ_K)                                         the test examples' loss gradients
for k = K … 1:
    u_k = (∂²F_k/∂trained² + 2α P_prox + λ)⁻¹ a_trained     one inverse-curvature-vector product a stage
    b   = a_frozen − ∂/∂frozen ⟨∇_trained F_k, u_k⟩         on frozen names: eq. (11)
    b   = 2α u_k                                            on proximal names: eqs. (13)–(15)
    a   = b, carried to the parameters of stage k − 1
an unrolled stage: λ from step to step back through its run, see `unrolled`
influence of an example x of stage k:  I(x) = ∂f/∂ε = −⟨u_k, ∇ℓ_x⟩, eq. (6); positive: more of x raises the test loss
"""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import vectors
from ..curvature.derivatives import Evaluation, gradient
from ..engine.accelerated import Engine
from ..engine.checkpoints import Checkpoint
from ..engine.checkpoints import at as checkpoint_at
from ..engine.corpus import as_rows
from ..engine.hashing import digest
from ..errors import InputError
from ..solvers import Certificate
from ..vectors import Block
from . import unrolled
from .chain import Link, bind
from .query import Query
from .stage import Stage
from .unrolled import RunCertificate


def pull_back(
    link: Link, adjoint: Block, solver: Any = None, checkpoint: Checkpoint | None = None
) -> tuple[Block, Block, Certificate | RunCertificate]:
    """One stage of the chain: solves for u_k and hands the adjoint on to what the stage inherited.

    A stage with an unrolled link is pulled back through its run (`unrolled.pull_back`), whatever the solver.

    Args:
        link: the stage.
        adjoint: a = ∂f/∂φ_k, on the trained and the frozen names, (Q, *parameter.shape).
        solver: in the place of the stage's own.
        checkpoint: where the solver's state is kept now and then, and gone on from.

    Returns:
        u_k on the trained names; b on the inherited names; the certificate of the solve.
    """
    if link.recording is not None:
        return unrolled.pull_back(link, adjoint, checkpoint.question + link.stage.name if checkpoint else None)
    trained = vectors.select(adjoint, link.split.trained)
    solution = link.solve(trained, solver or link.stage.solver, checkpoint)
    u = solution.value
    inherited: Block = {}
    if link.split.frozen:
        mixed = link.operator.mixed(u, link.split.frozen)
        inherited |= {name: adjoint[name] - mixed[name] for name in link.split.frozen}
    inherited |= {name: link.tie(name) * u[name] for name in link.split.proximal}
    return u, inherited, solution.certificate


class MultiStageInfluence:
    """Multi-stage influence functions (Chen et al., NeurIPS 2020) through any number of stages.

    Args:
        stages: first (pretraining) to last (the finetuning whose predictions are explained).
        accelerator: an `accelerate.Accelerator`; made when none is given.
        progress: show progress bars.
        sharded: each process holds its slice of a solver's vectors instead of all of them (`slices`): their memory
            falls with the number of processes, and a product has one more exchange.

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

    def __init__(self, stages: Sequence[Stage], accelerator=None, progress: bool = True, sharded: bool = False):
        self.engine = Engine(accelerator, progress, sharded)
        self.links = bind(stages, self.engine)

    def link(self, stage: str | None = None) -> Link:
        """The bound stage of that name; the first one by default."""
        if stage is None:
            return self.links[0]
        found = {link.stage.name: link for link in self.links}
        if stage not in found:
            raise InputError(f"there is no stage {stage!r}; the stages are {list(found)}.")
        return found[stage]

    def query(self, tests, aggregate: str | None = None, checkpoints: str | os.PathLike | None = None) -> Query:
        """Pulls the loss of test examples back through all stages: one IHVP a stage, whatever the size of the corpus.

        Args:
            tests: examples of the last stage (rows as its objective reads them).
            aggregate: None: one column a test example; "sum" or "mean": one column for the group, eq. (8).
            checkpoints: a folder for copies of a long solve; the same question, asked again there after an
                interruption, goes on from them, also on another number of processes.

        Returns:
            `Query`: u_k of every stage with the certificates.

        Warns:
            UserWarning: a stage's system was not solved to its tolerance.

        Raises:
            InputError: bad rows, a test loss that is not finite, or a solve that met negative curvature: its result
                would mean nothing.
        """
        rows = as_rows(tests, "the test examples")
        adjoint, losses = self.measurement(rows, aggregate)
        solutions, certificates = {}, {}
        question = digest([rows, aggregate or "", *(link.question for link in self.links)]) if checkpoints else ""
        kept = {link: checkpoint_at(checkpoints, link.stage.name, question, self.engine) for link in self.links}
        for link in reversed(self.links):
            found = _finished(link, kept[link])
            u, inherited, certificate = found or pull_back(link, adjoint, checkpoint=kept[link])
            judge(link.stage.name, certificate)
            solutions[link.stage.name], certificates[link.stage.name] = u, certificate
            if link.before is not None:
                if kept[link] is not None and found is None:
                    flat = {f"{part}/{n}": t for part, b in (("u", u), ("b", inherited)) for n, t in b.items()}
                    kept[link].save(flat, {"done": True, "certificate": certificate.to_dict()})
                adjoint = link.carry(inherited)
        query = Query(solutions, certificates, rows, losses, aggregate, self)
        for checkpoint in filter(None, kept.values()):
            checkpoint.forget()
        return query

    def measurement(self, rows: list[dict], aggregate: str | None = None) -> tuple[Block, list[float]]:
        """∇f at the final parameters, one column a test example or one for the group, eq. (8), and the losses f."""
        if aggregate not in (None, "sum", "mean"):
            raise InputError(f"aggregate is {aggregate!r}; expected None, 'sum' or 'mean'.")
        last = self.links[-1]
        names = (*last.split.trained, *last.split.frozen)
        # A backward pass an example goes through the whole batch: alone it pays for itself only.
        size = 1 if aggregate is None else last.stage.batch_size
        width = len(rows) if aggregate is None else 1
        like = {n: last.model.parameters[n].new_empty(1).expand(width, *last.model.parameters[n].shape) for n in names}
        found: list[tuple[int, float]] = []

        def parts() -> Iterator[Block]:
            for indices, batch in self.engine.batches(rows, last.stage.objective, size):
                evaluation = Evaluation(last.model, last.stage.objective, batch)
                found.extend(zip(indices, evaluation.losses({})[0].tolist(), strict=True))
                own = gradient(evaluation, names)
                if aggregate is None:
                    yield {n: _in_column(g, indices[0], width) for n, g in own.items()}
                else:
                    yield {n: g.unsqueeze(0) for n, g in own.items()}

        with last.model.evaluating():
            adjoint = self.engine.sum(like, parts())
        losses = [loss for _, loss in sorted(self.engine.gather(found))]
        odd = [row["example_id"] for row, loss in zip(rows, losses, strict=True) if not math.isfinite(loss)]
        if odd:
            raise InputError(f"the loss of the test examples with example_id {odd[:5]} is not finite.")
        return (vectors.scale(adjoint, 1.0 / len(rows)) if aggregate == "mean" else adjoint), losses


def _in_column(g: Tensor, index: int, width: int) -> Tensor:
    """A block's tensor that holds g in one column."""
    return g.new_zeros(width, *g.shape).index_copy_(0, torch.tensor([index], device=g.device), g.unsqueeze(0))


def _finished(link: Link, checkpoint: Checkpoint | None):
    """What `pull_back` found for the same question before an interruption; None where it did not finish."""
    found = checkpoint.load() if checkpoint is not None else None
    if found is None or "done" not in found[1]:
        return None
    parts: dict[str, Block] = {"u": {}, "b": {}}
    for key, t in found[0].items():
        part, name = key.split("/", 1)
        parts[part][name] = t
    kind = Certificate if link.recording is None else RunCertificate
    return parts["u"], parts["b"], kind.from_dict(found[1]["certificate"])


def judge(stage: str, certificate: Certificate | RunCertificate) -> None:
    """Refuses a solution without meaning, warns about a rough one."""
    # The flag `negative_curvature` also informs about an indefinite operator, which MINRES may face and CG may not.
    if "negative_curvature" in certificate.status:
        raise InputError(f"stage {stage!r}: the inverse-curvature-vector product has no meaning. {certificate}")
    if not all(certificate.converged):
        warnings.warn(f"stage {stage!r}: not solved to tolerance. {certificate}", stacklevel=3)
