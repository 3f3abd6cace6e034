"""EK-FAC: Gauss-Newton in blocks, one per parameter, whose inverse is a closed form (George et al., 2018).

Two passes over the data make it: the eigenbases of each block, from a share of the rows, and the variances of the
gradients of all rows along them (`blocks`). The gradients are those of labels that are drawn from the model's own
predictions (`fisher`), layer by layer (`layers`). After that, products, inverses and other functions of the matrix
read no data.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable, Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor

from .. import vectors
from ..adapters.functional import FunctionalModel
from ..engine.accelerated import Engine
from ..engine.checkpoints import Checkpoint
from ..engine.hashing import contents, digest, objective_identity, tensors_fingerprint
from ..errors import InputError
from ..objectives import Objective
from ..solvers.operator import rounding_unit
from ..vectors import Block
from .base import Curvature
from .blocks import Gradients, KroneckerBlock
from .derivatives import Evaluation, example_gradients
from .fisher import Fisher, Sampled
from .layer_rules import Call, Layer
from .layers import LayerMap
from .matrices import MatrixShape, collect, shapes_of

FEWEST_BASIS_ROWS = 32


class EKFAC(Curvature):
    """(1/N) Σ_i C_i + ridge with C_i in blocks, each of them U ⊗ V diag(λ) (U ⊗ V)ᵀ; positive semi-definite.

    λ_kl = (1/N) Σ_i (Uᵀ G_i V)²_kl, where G_i is the gradient of example i's loss, under sampled labels, in the
    block's parameter (`blocks`). What it leaves out of the Gauss-Newton matrix: the curvature between two parameters,
    and what is not diagonal in the basis. `trace` is exact for the gradients that were drawn, which no rotation
    changes. The first use of the matrix fits it, and nothing fits it again.

    Args:
        model: gives the parameters at which the losses are differentiated.
        objective: gives the losses.
        rows: the examples; each process reads its shard of them, in each pass anew.
        names: trained parameters, the operator's space.
        engine: runs the passes and adds up over processes.
        batch_size: rows per batch.
        ridge: parameter name → a number, or a tensor that broadcasts to the parameter. Defaults to none.
        fisher: whose gradients: `fisher.Sampled(draws, seed)`, an estimate of Gauss-Newton, or `fisher.Empirical()`.
        basis_share: the share of the rows, at least `FEWEST_BASIS_ROWS`, from which the bases are estimated.
        folder: where a fit is saved, and found again by what it was made of; None: nothing is saved.

    Raises:
        InputError: `basis_share` is not in (0, 1].

    >>> import torch
    >>> from hf_msif.objectives import Objective
    >>> from transformers.modeling_outputs import SequenceClassifierOutput
    >>> class Model(torch.nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.head = torch.nn.Linear(1, 2, bias=False)
    ...     def forward(self, x):
    ...         return SequenceClassifierOutput(logits=self.head(x))
    >>> class Labels(Objective):
    ...     def collate(self, rows):
    ...         return {"x": torch.tensor([row["x"] for row in rows]), "y": torch.tensor([row["y"] for row in rows])}
    ...     def losses(self, call, batch):
    ...         logits = call(x=batch["x"]).logits
    ...         sums = torch.nn.functional.cross_entropy(logits, batch["y"], reduction="none")
    ...         return sums, torch.ones_like(sums)
    >>> model = Model()
    >>> _ = torch.nn.init.zeros_(model.head.weight)
    >>> rows = [{"example_id": 0, "x": [2.0], "y": 0}]
    >>> operator = EKFAC(FunctionalModel(model), Labels(), rows, ("head.weight",), Engine(progress=False), 1)
    >>> v = {"head.weight": torch.tensor([[[1.0], [-1.0]]])}
    >>> operator.matvec(v)["head.weight"].flatten().round(decimals=4).tolist()  # x² (diag(p) − ppᵀ) v, p = (½, ½)
    [2.0, -2.0]
    """

    holds_batches: ClassVar[bool] = False
    is_symmetric: ClassVar[bool] = True
    semidefinite: ClassVar[bool] = True

    def __init__(
        self,
        model: FunctionalModel,
        objective: Objective,
        rows: list[dict],
        names: tuple[str, ...],
        engine: Engine,
        batch_size: int,
        ridge: Mapping[str, float | Tensor] | None = None,
        *,
        fisher: Fisher = Sampled(),  # noqa: B008  (frozen)
        basis_share: float = 0.25,
        folder: str | os.PathLike | None = None,
    ):
        super().__init__(model, objective, rows, names, engine, batch_size, ridge)
        if not 0 < basis_share <= 1:
            raise InputError(f"basis_share is {basis_share!r}; expected a share of the rows in (0, 1].")
        self.fisher, self.basis_share, self.folder = fisher, basis_share, folder

    @classmethod
    def of(cls, operator: Curvature, **settings: Any) -> EKFAC:
        """The approximation of another curvature: of the same losses, rows and quadratic terms."""
        names = tuple(operator.parameters)
        engine, size, ridge = operator.engine, operator.batch_size, operator.ridge
        return cls(operator.model, operator.objective, operator.rows, names, engine, size, ridge, **settings)

    # --- the blocks

    @cached_property
    def layers(self) -> LayerMap:
        """Which layers make the gradients; the rest has a backward pass per example."""
        return LayerMap(self.model, self.objective, tuple(self.parameters), self.rows)

    @cached_property
    def _shapes(self) -> dict[str, MatrixShape]:
        return shapes_of(self.parameters, self.layers.layers)

    @cached_property
    def blocks(self) -> dict[str, KroneckerBlock]:
        """Parameter name → its fitted block."""
        checkpoint = None
        if self.folder is not None:
            path = Path(self.folder) / f"ekfac-{self.cache_key[:16]}.safetensors"
            checkpoint = Checkpoint(path, self.cache_key, self.engine)
            saved = checkpoint.load()
            if saved is not None:
                return self._restored(saved[0])
        fitted = self._fitted()
        if checkpoint is not None:
            checkpoint.save(_tensors(fitted), {})
        return fitted

    def _fitted(self) -> dict[str, KroneckerBlock]:
        if not self.count:
            raise InputError(f"none of the {self.examples} rows of the curvature has a term to predict: add rows.")
        started = time.perf_counter()
        fitted = {name: shape.block(self.parameters[name]) for name, shape in self._shapes.items()}
        looked = time.perf_counter() - started  # at the layers
        self._pass(self._basis_rows(), fitted, KroneckerBlock.add_moments, "EK-FAC: bases")
        sides = [(b, side) for b in fitted.values() for side in ("left", "right") if getattr(b, side) is not None]
        started = time.perf_counter()
        for number, (block, side) in enumerate(sides):
            moments = self.engine.all_reduce(getattr(block, side).double())
            if not moments.isfinite().all():
                raise InputError("a gradient of the curvature's rows is not finite: check the weights and the rows.")
            setattr(block, side, moments)
            if number % self.engine.processes == self.engine.rank:
                block.decompose(side)
            else:
                setattr(block, side, block.eigenvalues.new_zeros(moments.shape))
        for block, side in sides:  # each process has decomposed its share of them
            setattr(block, side, self.engine.all_reduce(getattr(block, side)))
        self.fixed_seconds = looked + time.perf_counter() - started
        for block in fitted.values():
            block.begin()
        self._pass(self.rows, fitted, KroneckerBlock.add_squares, "EK-FAC: eigenvalues")
        for block in fitted.values():
            total = self.engine.all_reduce(block.eigenvalues.double()) / self.count
            block.eigenvalues = total.to(block.eigenvalues)
        return fitted

    def _basis_rows(self) -> list[dict]:
        """A share of the rows, chosen by their ids alone."""
        size = max(round(self.basis_share * self.examples), FEWEST_BASIS_ROWS)
        if size >= self.examples:
            return self.rows

        def number(row: dict) -> str:
            return hashlib.sha256(f"basis\x1f{row['example_id']}".encode()).hexdigest()

        return sorted(self.rows, key=number)[:size]

    def _pass(self, rows: list[dict], into: dict[str, KroneckerBlock], add: Callable, desc: str) -> None:
        """Adds the gradients of all rows of this process to the blocks."""
        from torch.nn.attention import SDPBackend, sdpa_kernel

        layers = self.layers
        kernels = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
        total = len(self.engine.local_batches(rows, self.objective, self.batch_size))
        # First derivatives alone: fast kernels of attention have them.
        with self.engine.raising_together(), self.model.evaluating(), sdpa_kernel(kernels):
            batches = self.engine.batches(rows, self.objective, self.batch_size)
            for indices, batch in self.engine.bar(batches, total=total, desc=desc, unit=" batches"):
                ids = [rows[i]["example_id"] for i in indices]
                for objective in self.fisher.objectives(self.objective, ids):
                    evaluation = Evaluation(self.model, objective, batch)
                    for name, gradients in self._gradients(layers, evaluation, len(ids)).items():
                        add(into[name], gradients)

    def _gradients(self, layers: LayerMap, evaluation: Evaluation, examples: int) -> dict[str, Gradients]:
        """The gradients of a batch's examples, by parameter."""
        made = {name: Gradients() for name in self.parameters}
        apart = [name for name, shape in self._shapes.items() if shape.is_apart]

        def receive(layer: Layer, call: Call) -> None:
            collect(made, layer, call, apart)

        layers.run(evaluation, examples, receive)
        if apart:
            for name, columns in example_gradients(evaluation, apart).items():
                made[name].add_vectors(columns.reshape(examples, -1))
        return made

    def rehearse(self, evaluation: Evaluation, v: Block) -> None:
        self._gradients(self.layers, evaluation, len(evaluation.losses({})[0]))

    def approximations(self) -> list[str]:
        """How the blocks approximate the Gauss-Newton matrix, one line per kind, with numbers of parameters."""
        kinds: dict[str, list[str]] = {}
        for name, shape in self._shapes.items():
            kinds.setdefault(shape.kind, []).append(name)
        lines = []
        for kind, names in kinds.items():
            size = sum(self.parameters[name].numel() for name in names)
            lines.append(f"{kind}: {size:,} parameters in {len(names)} tensors (first {names[0]})")
        return lines

    def keep_in(self, folder: Path) -> None:
        self.folder = self.folder or folder

    def held_bytes(self) -> int:
        entries = 0
        for shape in self._shapes.values():
            m, n = shape.size
            entries += m * n + shape.left * m**2 + shape.right * n**2
        return entries * next(iter(self.parameters.values())).element_size()

    # --- saving

    @cached_property
    def cache_key(self) -> str:
        """SHA-256 of everything that a fit depends on."""
        tensors = {**self.model.parameters, **self.model.buffers}
        facts = [tensors_fingerprint(tensors), list(self.parameters), objective_identity(self.objective), self.rows]
        return digest([*facts, repr(contents(self.fisher)), self.basis_share])

    def save(self, path: str | os.PathLike) -> None:
        """Writes the fit, as safetensors; all processes must call it together."""
        Checkpoint(Path(path), self.cache_key, self.engine).save(_tensors(self.blocks), {})

    def load(self, path: str | os.PathLike) -> EKFAC:
        """Takes the fit that `save` wrote in the place of one of its own; returns itself.

        Raises:
            InputError: there is no fit of the same model, objective, rows and settings.
        """
        saved = Checkpoint(Path(path), self.cache_key, self.engine).load()
        if saved is None:
            raise InputError(
                f"{path} holds no fit of this curvature: the model, the objective, the rows or a setting is another "
                "one, or the file is damaged; expected a file of EKFAC.save: fit again."
            )
        vars(self)["blocks"] = self._restored(saved[0])
        return self

    def _restored(self, tensors: dict[str, Tensor]) -> dict[str, KroneckerBlock]:
        fitted = {name: shape.block(self.parameters[name]) for name, shape in self._shapes.items()}
        for key, t in tensors.items():
            part, name = key.split("/", 1)
            setattr(fitted[name], part, t)
        return fitted

    # --- the operator

    def matvec(self, v: Block) -> Block:
        """A v for every column of v; no pass over the data."""
        product = self._applied(v, lambda eigenvalues: eigenvalues, {})
        for name, strength in self.ridge.items():
            product[name] = product[name] + strength * v[name]
        return product

    def products(self, v: Block) -> Iterator[Block]:
        """Blocks that add up to N (A − ridge) v over the processes, as those of other curvatures do."""
        fitted, count = self.blocks, self.count  # by all processes together
        assert fitted
        if not self.engine.is_main:
            return iter(())
        return iter([vectors.scale(self._applied(v, lambda eigenvalues: eigenvalues, {}), count)])

    def function(self, v: Block, f: Callable[[Tensor], Tensor]) -> Block:
        """f(A) v for every column of v.

        Args:
            v: the columns.
            f: a function of eigenvalues, elementwise.

        Raises:
            InputError: the ridge is not a number per parameter, so that A has another eigenbasis.
        """
        return self._applied(v, f, self._ridges)

    def inverse(self, v: Block, damping: float = 0.0) -> Block:
        """(A + λI)⁻¹ v for every column of v; the cached factors stay as they are.

        Args:
            v: the columns.
            damping: λ.

        Raises:
            InputError: A + λI is singular, or the ridge is not a number per parameter.
        """
        self.check_regular(damping)
        return self.function(v, lambda eigenvalues: 1 / (eigenvalues + damping))

    def check_regular(self, damping: float) -> None:
        """Refuses a sum A + λI that is singular.

        Raises:
            InputError: its smallest eigenvalue is not positive beyond rounding.
        """
        smallest, largest = self.smallest_eigenvalue(), self.largest_eigenvalue()
        if not smallest + damping > rounding_unit(self.parameters) * largest:
            raise InputError(
                f"the smallest eigenvalue of EK-FAC is {smallest:.3g} and damping is {damping:.3g}; expected a "
                "positive sum, beyond rounding: give a damping above 0."
            )

    def transformed(self, f: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
        """f of the eigenvalues of A, parameter name → (m, n): f(A) in the bases of `blocks`."""
        return {name: f(block.eigenvalues + self._ridges[name]) for name, block in self.blocks.items()}

    def trace(self) -> float:
        """tr A: the sum of all eigenvalues."""
        total = 0.0
        for name, block in self.blocks.items():
            total += float((block.eigenvalues.double() + self._ridges[name]).sum())
        return total

    def smallest_eigenvalue(self) -> float:
        """The smallest eigenvalue of A."""
        return min(float((block.eigenvalues + self._ridges[name]).min()) for name, block in self.blocks.items())

    def largest_eigenvalue(self) -> float:
        """The largest eigenvalue of A."""
        return max(float((block.eigenvalues + self._ridges[name]).max()) for name, block in self.blocks.items())

    @cached_property
    def _ridges(self) -> dict[str, float | Tensor]:
        """The quadratic terms in the blocks' bases: numbers, or tensors of shape (m, n)."""
        found: dict[str, float | Tensor] = dict.fromkeys(self.parameters, 0.0)
        for name, strength in self.ridge.items():
            if isinstance(strength, Tensor) and strength.numel() > 1:
                p = self.parameters[name]
                strength = self._shapes[name].matrices(strength.to(p).expand(p.shape).unsqueeze(0))[0]
            found[name] = self.blocks[name].ridge_of(name, strength)
        return found

    def _applied(self, v: Block, f: Callable[[Tensor], Tensor], ridges: Mapping[str, float | Tensor]) -> Block:
        made = {}
        for name, t in v.items():
            shape = self._shapes[name]
            made[name] = shape.stored(self.blocks[name].apply(shape.matrices(t), f, ridges.get(name, 0.0)), t)
        return made


def _tensors(fitted: Mapping[str, KroneckerBlock]) -> dict[str, Tensor]:
    return {f"{part}/{name}": t for name, block in fitted.items() for part, t in block.parts().items()}
