"""How a stage is differentiated: the base class, the table of its kinds, and what a query holds of a stage."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Protocol

from torch import Tensor, nn

from ..adapters.split import Split, split
from ..engine import Engine
from ..engine.checkpoints import Checkpoint
from ..errors import InputError
from ..scoring.scorer import RowInfluence
from ..training.polish import PolishReport
from ..vectors import Block
from .cost import Cost


class StageCertificate(Protocol):
    """How far a pull-back of one stage can be trusted; lists have one entry per column."""

    @property
    def converged(self) -> list[bool]: ...

    @property
    def status(self) -> list[str]: ...

    def to_dict(self) -> dict[str, Any]: ...


@dataclass(frozen=True)
class DirectCertificate:
    """Of a pull-back by a formula, where no system is solved and no run is replayed: there is nothing to converge.

    Attributes:
        method: its name, for people.
        columns: Q.
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

    def __str__(self) -> str:
        return f"{self.method}: a formula, nothing was solved"


class StageSolution(Protocol):
    """What a query holds of one stage, Q columns: enough to score any row of it; the scorer asks only this."""

    @property
    def certificate(self) -> StageCertificate: ...

    @property
    def columns(self) -> int:
        """Q, the number of test examples, or 1 for a group of them."""
        ...

    def influence(self, batch: dict[str, Any], rows: list[dict]) -> RowInfluence:
        """I(x) = ∂f/∂ε of each row x, eq. (6), its loss and how many terms that sums.

        Args:
            batch: the rows as the stage's objective collates them, on the engine's device.
            rows: the rows themselves.
        """
        ...

    def tensors(self) -> dict[str, Tensor]:
        """What is saved with the query; `Differentiation.load` reads it."""
        ...


class Differentiation:
    """How the finished parameters of a stage depend on its examples and on the stage before.

    A subclass writes `pull_back` and `load`; all else has a default. `register` puts it under a name; a class, or any
    callable that makes one of a bound stage, can also be given to `Stage(link=...)`, or in a configuration as
    `link: mypackage.mymodule:MyDifferentiation`.

    Args:
        bound: the stage in its place, a `chain.BoundStage`.
    """

    name: ClassVar[str] = ""
    needs_run: ClassVar[bool | None] = None  # whether Stage.run must name a folder, or must not; None: it may

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
        """The solution of saved `StageSolution.tensors()` (on the engine's device) and `certificate.to_dict()`."""
        raise NotImplementedError

    def facts(self) -> dict[str, Any]:
        """What a query's certificate says of the stage beside the solution's own; JSON-able."""
        return {"weight_decay": self.bound.stage.weight_decay, "alpha": None, "alpha_estimate": None}

    def summary(self, certificate: StageCertificate, facts: Mapping[str, Any]) -> str:
        """The certificate in words."""
        return str(certificate)

    def cache_key(self) -> Any:
        """Settings that the pull-back depends on, beside the stage's model and objective: a value of plain parts."""
        return [repr(self.bound.stage.run)]

    def known_size(self) -> tuple[float, int] | None:
        """N of all rows and their number, where a pass over them has been made already."""
        return None

    def damped(self, damping: float) -> Differentiation:
        """The same with another damping.

        Raises:
            InputError: there is no linear system to damp.
        """
        raise InputError(
            f"stage {self.bound.name!r} is differentiated by link={self.name!r}, without a linear system to damp; "
            "expected an implicit stage."
        )

    def prepare(self) -> None:
        """Makes what all processes must make together, before `memory` is asked of each one alone."""

    def memory(self, columns: int, free: int, processes: int) -> dict[str, int]:
        """What a pull-back of Q columns holds on each process beside the model: name → bytes.

        `free` is what there is: nothing is measured that would not fit.
        """
        return {}

    def cost(self, columns: int, processes: int = 1) -> Cost:
        """What a pull-back of Q columns takes, measured on a few rows."""
        raise InputError(f"link={self.name!r} of stage {self.bound.name!r} does not say what it costs.")

    @classmethod
    def planned(cls, bound: Any, arguments: Any) -> Differentiation:
        """The same for a stage that is still to be trained with `arguments` (Hugging Face's `TrainingArguments`)."""
        return cls(bound)

    @classmethod
    def retraining(cls, stage: Any, before: Any, engine: Engine) -> Retraining:
        """How validation trains the stage again; `before` is the stage before, or None."""
        raise InputError(f"stage {stage.name!r}: link={stage.link_name!r} does not say how it is trained again.")


class Retraining:
    """How a stage is trained again without some of its examples, as its differentiation predicts it.

    Attributes:
        stage: the stage.
        roles: of its parameters.
        polishes: whether it ends at a stationary point of F, so that `training.polish` takes it there.
    """

    polishes: ClassVar[bool] = True

    def __init__(self, stage: Any, before: Any, engine: Engine):
        self.stage, self.engine = stage, engine
        model = before.model if before is not None else None
        self.roles: Split = split(stage.name, stage.model, model, stage.trainable, stage.resized)

    def settings(self) -> Any:
        """What the retrained model depends on beside the stage's own settings; JSON-able."""
        return self.stage.link_name

    def handed_on(self) -> Collection[str]:
        """The inherited names that a warm start takes from the retrained stage before."""
        return self.roles.frozen

    def prepare(self, polish: Callable[..., PolishReport]) -> Any:
        """Work that is done once for all warm starts; each `warm_start` is given its result.

        `polish(omit, **settings)` is `training.polish` of the finished model in its place in the chain.
        """
        return None

    def warm_start(
        self, model: nn.Module, terms: Mapping[str, Any], polish: Callable[..., PolishReport], prepared: Any
    ) -> PolishReport | None:
        """Trains `model`, in place, from where it is.

        Args:
            terms: F, as `training.polish` and `training.record` take it: previous, trainable, weight_decay, alpha,
                resized, omit (the ids to leave out), name.
            polish: `polish(omit, **settings)` is `training.polish` of this model.
            prepared: what `prepare` returned.
        """
        raise NotImplementedError

    def begin(self, model: nn.Module) -> None:
        """Puts a copy of the finished model where a warm start begins, before the stage before hands on its values."""

    def from_scratch(self, model: nn.Module, arguments: Any, terms: Mapping[str, Any]) -> None:
        """Trains an untrained `model`, in place, by `arguments`; `terms` as for `warm_start`."""
        raise NotImplementedError


DIFFERENTIATIONS: dict[str, type[Differentiation]] = {}


def register(name: str) -> Callable[[type[Differentiation]], type[Differentiation]]:
    """Puts a class of differentiations into the table under the name that `Stage(link=name)` uses."""

    def add(kind: type[Differentiation]) -> type[Differentiation]:
        kind.name = name
        DIFFERENTIATIONS[name] = kind
        return kind

    return add
