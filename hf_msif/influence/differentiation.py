"""How a stage is differentiated: `Differentiation`, and what a query holds per stage. (Their names: `registry`.)"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Protocol

from torch import Tensor, nn

from ..adapters.split import Split, split
from ..curvature.norms import Metric
from ..display import Displayed, Summary
from ..engine import Engine
from ..engine.checkpoints import Checkpoint
from ..errors import InputError
from ..objectives import Objective
from ..scoring.scorable import RowInfluence
from ..training.polish import PolishReport
from ..vectors import Block
from .cost import Cost


class StageCertificate(Protocol):
    """How far a pull-back of one stage can be trusted. Lists have one entry per query column."""

    @property
    def converged(self) -> list[bool]: ...

    @property
    def status(self) -> list[str]: ...

    def to_dict(self) -> dict[str, Any]: ...


@dataclass(frozen=True, repr=False)
class DirectCertificate(Displayed):
    """Certificate of a pull-back by a formula: no system is solved and no run is replayed, so nothing has to converge.

    Attributes:
        method: name of the formula, for people.
        columns: Q, the number of query columns.
    """

    method: str
    columns: int

    @property
    def converged(self) -> list[bool]:
        return [True] * self.columns

    @property
    def status(self) -> list[str]:
        return ["direct"] * self.columns

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def summary(self) -> Summary:
        return Summary(f"{self.method}: a formula, nothing was solved")


class NamedTensors(Mapping[str, Tensor]):
    """A solution that can be read by the names of its tensors: `solution["encoder.weight"]`, `solution.items()`.

    A subclass writes `tensors()`.
    """

    def tensors(self) -> dict[str, Tensor]:
        """The tensors by name."""
        raise NotImplementedError

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors()[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors())

    def __len__(self) -> int:
        return len(self.tensors())


class StageSolution(Protocol):
    """What a query holds of one stage, Q columns: enough to score any row of it; the scorer asks only this."""

    @property
    def certificate(self) -> StageCertificate: ...

    @property
    def columns(self) -> int:
        """Q, the number of test examples, or 1 for a group of them."""
        ...

    def influence(self, batch: dict[str, Any], rows: list[dict]) -> RowInfluence:
        """The influence I(x) = ∂f/∂ε of each row x, eq. (6), with the loss of the row and the number of its terms.

        Args:
            batch: B rows as the stage's objective collates them, on the engine's device.
            rows: the rows themselves.

        Returns:
            influence, (B, Q) in float64, positive where more of the row raises the test loss; losses, (B,), sums over
            terms; counts, (B,).
        """
        ...

    def tensors(self) -> dict[str, Tensor]:
        """The tensors that are saved with the query, by name; `Differentiation.load` takes them."""
        ...


class Differentiation:
    """How the finished parameters of a stage depend on its examples and on the stage before.

    A subclass writes `pull_back` and `load`. Everything else has a default; the default of `damped`, `cost` and
    `retraining` is to refuse. A class, or a function that makes a differentiation for a bound stage, can be given to
    `Stage(link=...)`, or in a configuration as `link: mypackage.mymodule:MyDifferentiation`. A line in
    `registry.DIFFERENTIATIONS` gives a class a name, by which `Stage(link="name")` finds it.

    Args:
        bound: the stage in its place in the chain, a `chain.BoundStage`. Its `objective` makes the batches of rows
            that are scored; `bound.stage.objective` is that of training, which may draw other masks.
    """

    needs_run: ClassVar[bool | None] = None  # whether Stage.run must name a folder, or must not; None: it may
    masks_of_training: ClassVar[bool] = False  # whether the objective's random numbers must be those of training

    # `Any` stands for `chain.BoundStage` and `stage.Stage` in this module: theirs import it. A subclass names them.
    def __init__(self, bound: Any):
        self.bound = bound

    def pull_back(self, adjoint: Block, checkpoint: Checkpoint | None = None) -> tuple[StageSolution, Block]:
        """Takes a = ∂f/∂φ_k, on the trained and the frozen names, to the stage's solution and to b = ∂f/∂W_before.

        Args:
            adjoint: a, tensors of shape (Q, *parameter.shape).
            checkpoint: saves and loads the state of long work; None: nothing is saved.

        Returns:
            The solution; b on the inherited names, shaped like `adjoint`.
        """
        raise NotImplementedError

    def load(self, tensors: dict[str, Tensor], certificate: dict[str, Any]) -> StageSolution:
        """The solution of which `tensors` and `certificate` were saved.

        Args:
            tensors: what `StageSolution.tensors` returned, on the engine's device.
            certificate: what `StageCertificate.to_dict` returned.

        Raises:
            InputError: the tensors do not have the names and shapes of the stage's solution.
        """
        raise NotImplementedError

    @property
    def objective(self) -> Objective:
        """The objective by whose losses the rows of its solutions are scored; defaults to the stage's."""
        return self.bound.objective

    @property
    def sampled_rows(self) -> int | None:
        """How many rows of the stage are sampled, as for a curvature; None: it rests on no sample (the default)."""
        return None

    @property
    def draws(self) -> bool:
        """Whether anything is drawn, rows or masks; otherwise `replicate` is the differentiation itself."""
        return self.sampled_rows is not None

    def replicate(self, number: int, of: int) -> Differentiation:
        """The differentiation by masks and a sample of rows of its own: that of replicate `number` of `of`.

        Defaults to itself: nothing is drawn or sampled, so that its solution has no sampling noise of its own.
        """
        return self

    def facts(self) -> dict[str, Any]:
        """Facts about the stage that a query's certificate holds beside the solution's certificate; JSON-able."""
        return {"weight_decay": self.bound.stage.weight_decay, "alpha": None, "alpha_estimate": None}

    def summary(self, certificate: StageCertificate, facts: Mapping[str, Any]) -> str:
        """The certificate in words, with what `facts` returned for the stage."""
        return str(certificate)

    def identity(self) -> dict[str, Any]:
        """What the pull-back depends on beside the stage's model, data, objective and settings: name for people →
        plain value or SHA-256. Defaults to the name of the folder `Stage.run`."""
        return {"run": None if self.bound.stage.run is None else str(self.bound.stage.run)}

    def known_size(self) -> tuple[float, int] | None:
        """N of all rows and the number of rows, if a pass over them has been made already; None otherwise."""
        return None

    def metric(self, certificate: StageCertificate) -> Metric:
        """The quadratic form of self-influences: EK-FAC of the curvature, inverted as the stage's solver does it.

        Args:
            certificate: of the solution whose rows are scored; says λ.

        Raises:
            InputError: there is no linear system.
        """
        raise self._unsolved()

    def self_solve(self, gradients: Block) -> tuple[Tensor, StageCertificate]:
        """∇ᵀ (A + λ)⁻¹ ∇ of each column ∇ of `gradients`, (Q,) in float64, by the stage's own solver.

        Raises:
            InputError: there is no linear system.
        """
        raise self._unsolved()

    def _unsolved(self) -> InputError:
        return InputError(
            f"stage {self.bound.name!r} is differentiated by link={self.bound.stage.link_name!r}, without a linear "
            "system in which its rows would have a self-influence; expected an implicit stage."
        )

    def damped(self, damping: float) -> Differentiation:
        """The same differentiation with another damping λ of its linear system.

        Raises:
            InputError: there is no linear system to damp.
        """
        raise InputError(
            f"stage {self.bound.name!r} is differentiated by link={self.bound.stage.link_name!r}, without a linear "
            "system to damp; expected an implicit stage."
        )

    def dampings(self) -> list[float]:
        """Values of λ for a sweep, ascending.

        Raises:
            InputError: there is no linear system to damp.
        """
        self.damped(1.0)  # which says why
        raise NotImplementedError(f"{type(self).__name__} has damped, but no dampings.")

    def prepare(self) -> None:
        """Work that all processes must do together; it is done before `memory`, which each process answers alone."""

    def memory(self, columns: int, free: int, processes: int) -> dict[str, int]:
        """What a pull-back holds on each process beside the model: name → bytes.

        Args:
            columns: Q, the number of query columns.
            free: bytes of free memory; what would not fit is not measured.
            processes: the number of processes.
        """
        return {}

    def sketch(self, adjoint: Block) -> Block | None:
        """About the adjoint that `pull_back` hands on, at a fraction of its price; None where there is no such way.

        A plan asks it, to foretell what the stage before will take.
        """
        return None

    def cost(self, columns: int, processes: int = 1, adjoint: Block | None = None) -> Cost:
        """What a pull-back of Q = `columns` columns takes on each process, measured on a few rows.

        Args:
            columns: Q.
            processes: that share the work.
            adjoint: about ∂f/∂φ_k, by which iterations can be foretold; None: it is not known.

        Raises:
            InputError: the differentiation does not define this method.
        """
        raise InputError(
            f"link={self.bound.stage.link_name!r} of stage {self.bound.name!r} does not say what it costs."
        )

    @classmethod
    def planned(cls, bound: Any, arguments: Any) -> Differentiation:
        """The differentiation of a stage that is still to be trained, with the `TrainingArguments` `arguments`."""
        return cls(bound)

    @classmethod
    def retraining(cls, stage: Any, before: Any, engine: Engine) -> Retraining:
        """How validation trains the stage again; `before` is the stage before, or None.

        Raises:
            InputError: the differentiation does not define this method.
        """
        raise InputError(f"stage {stage.name!r}: link={stage.link_name!r} does not say how it is trained again.")


class Retraining:
    """How a stage is trained again without some of its examples, as its differentiation predicts it.

    Attributes:
        stage: the stage.
        roles: the roles of its parameters.
        polishes: whether the stage ends at a stationary point of F, to which `training.polish` takes it.
    """

    polishes: ClassVar[bool] = True

    def __init__(self, stage: Any, before: Any, engine: Engine):
        self.stage, self.engine = stage, engine
        model = before.model if before is not None else None
        self.roles: Split = split(stage.name, stage.model, model, stage.trainable, stage.resized)

    def settings(self) -> Any:
        """What the retrained model depends on, beside the stage's own settings; JSON-able."""
        return self.stage.link_name

    def handed_on(self) -> Collection[str]:
        """The inherited names whose values a warm start takes from the stage before, as that was retrained."""
        return self.roles.frozen

    def prepare(self, polish: Callable[..., PolishReport]) -> Any:
        """Work that is done once for all warm starts; each `warm_start` receives its result.

        Args:
            polish: `polish(omit, **settings)` is `training.polish` of the finished model in its place in the chain.
        """
        return None

    def warm_start(
        self, model: nn.Module, terms: Mapping[str, Any], polish: Callable[..., PolishReport], prepared: Any
    ) -> PolishReport | None:
        """Trains `model` in place, from its present parameters.

        Args:
            terms: what defines F, keyword arguments of `training.polish` and `training.record`: previous, trainable,
                weight_decay, alpha, resized, omit (the example ids to leave out), name; where rows are weighted, which
                asks only a stage that is not polished, weights (ω of every row).
            polish: `polish(omit, **settings)` is `training.polish` of this model.
            prepared: what `prepare` returned.

        Returns:
            The report of the polishing, or None where nothing is polished.
        """
        raise NotImplementedError

    def begin(self, model: nn.Module) -> None:
        """Sets a copy of the finished model to where a warm start begins; `handed_on` names are written afterwards."""

    def from_scratch(self, model: nn.Module, arguments: Any, terms: Mapping[str, Any]) -> None:
        """Trains an untrained `model` in place.

        Args:
            arguments: Hugging Face's `TrainingArguments`.
            terms: what defines F, keyword arguments of `training.train` and `training.record`: previous, trainable,
                weight_decay, alpha, resized, omit (the example ids to leave out), name.
        """
        raise NotImplementedError
