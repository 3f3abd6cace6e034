"""Checks of a stage when it is bound: would its scores mean what they say? Each costs a few passes of a few rows.

A check takes a `BoundStage` and returns a `Finding`, or refuses the stage by an `InputError`. A new one is a function
here, or anywhere, and a line in `registry.CHECKS`.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor

from .. import vectors
from ..adapters.functional import precision_advice, without_tf32
from ..curvature.base import Curvature
from ..curvature.derivatives import (
    Evaluation,
    NotTwiceDifferentiableError,
    check_differentiability_is_meant,
    directional_derivatives,
)
from ..curvature.hessian import Hessian
from ..curvature.padding import ROUNDING, ROUNDING_OF_OTHERS, batch_effect, smallest, tempered
from ..errors import InputError, first_line
from .chain import BoundStage
from .findings import Finding
from .implicit import Implicit

ASYMMETRY = 100  # times rounding, in sums over all parameters


def determinism(bound: BoundStage) -> Finding:
    """The same rows give the same batch and the same losses, also after another row was read in between.

    Raises:
        InputError: they do not: random numbers, or a state from call to call.
    """
    rows, objective = bound.compared_rows, bound.objective
    with bound.engine.raising_together(), torch.no_grad(), bound.model.evaluating():
        batches = [bound.collate([rows[-1]]), bound.collate([rows[0]]), bound.collate([rows[-1]])]
        try:
            losses = [Evaluation(bound.model, objective, batch).losses({})[0].double() for batch in batches]
        except RuntimeError as error:
            if not precision_advice(_dtype(bound)):
                raise
            raise InputError(
                f"stage {bound.name!r}: {_class(bound)} fails in float64 ({first_line(error)}); expected a model that "
                f"computes in the dtype of its parameters: mend its configuration{precision_advice(_dtype(bound))}."
            ) from error
        for key, first in batches[0].items():
            if isinstance(first, Tensor) and not torch.equal(first, batches[2][key]):
                raise InputError(
                    f"stage {bound.name!r}: {type(objective).__name__}.collate made two different batches of the same "
                    f"row ({key!r} differs); expected a function of the rows alone, with random numbers that depend "
                    "on the row's example_id."
                )
        for row, loss in ((rows[-1], losses[0]), (rows[0], losses[1])):
            if not loss.isfinite().all():
                raise InputError(
                    f"stage {bound.name!r}: the loss of its row {row['example_id']!r} is not finite; expected a "
                    f"number: leave the row out, check the weights{precision_advice(_dtype(bound))}."
                )
        gap = _relative(losses[0], losses[2])
        if not gap <= _rounding(bound):
            raise InputError(
                f"stage {bound.name!r}: the loss of the same row is {float(losses[0].sum()):.6g}, and "
                f"{float(losses[2].sum()):.6g} after another row was read: {_class(bound)} draws random numbers or "
                "keeps a state from call to call; expected a loss that depends on the row alone: switch that off in "
                "its configuration."
            )
    return Finding("determinism", "the same loss twice", gap)


def padding(bound: BoundStage) -> Finding:
    """Rows from short to long have the same losses and gradients alone and together.

    Where they have not, and batches of rows of equal length help, the bound stage uses such batches from then on: its
    scores are then those of one row at a time.

    Warns:
        UserWarning: it does.

    Raises:
        InputError: rows of equal length depend on each other, too, or the model takes no batch of several rows.
    """
    rows = bound.compared_rows
    if len(rows) < 2:
        return Finding("padding", "there is one row only")
    engine, objective = bound.engine, bound.objective
    with engine.raising_together():
        try:
            effect = batch_effect(bound.model, objective, rows, bound.split.trained)
        except (ValueError, RuntimeError, IndexError) as error:
            raise _no_batches(bound, error) from error
    effect = engine.broadcast_object(effect)
    if not effect.reaches_loss:
        kind = " from short to long" if effect.padded else ""
        text = f"{len(rows)} rows{kind} have the same losses alone and together"
        return Finding("padding", text, effect.beside_others)
    if effect.mixes:
        beside = "rows of equal length" if effect.padded else "other rows"
        raise InputError(
            f"stage {bound.name!r}: the loss of a row changes beside {beside} in the same batch (its gradient by "
            f"{max(effect.beside_others, effect.beside_equals):.1e}): {_class(bound)} or "
            f"{type(objective).__name__} mixes the rows of a batch; expected losses of single rows, eq. (6)."
        )
    bound.objective = objective.unpadded()
    text = "padding reaches the loss: batches of rows of equal length are used, whose scores are those of single rows"
    if engine.is_main:
        warnings.warn(
            f"stage {bound.name!r}: {text} (a gradient moved by {effect.beside_others:.1e} beside longer rows in "
            f"{_class(bound)}).{pad_ids_text(bound)}",
            stacklevel=2,
        )
    return Finding("padding", text, effect.beside_others)


def causality(bound: BoundStage) -> Finding:
    """Of a causal objective: another token moves no logit before it. Tried are the first and the last tokens of a long
    row, and some between them.

    Raises:
        InputError: one does: the loss of every token sees the token itself.
    """
    objective = bound.objective
    if not objective.causal:
        return Finding("causality", f"{type(objective).__name__} is not causal")
    with bound.engine.raising_together(), torch.no_grad(), bound.model.evaluating():
        batch = bound.collate([bound.compared_rows[-1]])
        inputs, length = batch["input_ids"].shape
        # Of a document in windows the first one.
        batch = {k: t[:1] if isinstance(t, Tensor) and t.dim() and len(t) == inputs else t for k, t in batch.items()}
        if length < 2:
            return Finding("causality", "no row has two tokens")
        places = _places(length)
        rows = {
            key: t.repeat_interleave(len(places) + 1, 0) if isinstance(t, Tensor) else t for key, t in batch.items()
        }
        ids, vocabulary = rows["input_ids"], _vocabulary(bound, rows["input_ids"])
        for k, place in enumerate(places, 1):
            ids[k, place] = ids[k, 0] if ids[k, place] != ids[k, 0] else (ids[k, 0] + 1) % vocabulary
        logits = _logits(bound, rows).double()
        moved = (logits[1:] - logits[:1]).abs().amax(2)
        before = torch.stack([row[:place].max() for row, place in zip(moved, places, strict=True)])
        effect = float(before.max() / moved.max().clamp(min=1e-30))
        if not effect <= _rounding(bound):
            place = places[int(before.argmax())]
            raise InputError(
                f"stage {bound.name!r}: {type(objective).__name__} predicts each token from those before it, but in "
                f"{_class(bound)} another token {place + 1} moves the logits before it by {float(before.max()):.2g}: "
                "the loss would see its own targets; expected a causal model (of BERT's kind: one that was trained "
                "with config.is_decoder=True), or the objective that this model was trained with."
            )
    return Finding("causality", "another token moves no logit before it", effect)


def symmetry(bound: BoundStage) -> Finding:
    """Of an implicit stage: ⟨w, C v⟩ = ⟨v, C w⟩ for random vectors v and w and the curvature C of two rows, whose
    losses are `tempered`.

    Of a model whose functions have no forward-mode derivative, C is the Hessian, whatever the stage computes: its own
    backward functions are all that is known of its derivatives, and only the Hessian shows whether they are some.

    The difference is relative to ‖C v‖, which is about the Frobenius norm of C: E⟨w, C v⟩² = ‖C‖².

    Raises:
        InputError: the product is not symmetric, so that it is no curvature; or it cannot be computed.
    """
    rows = bound.compared_rows
    rows = [rows[0], rows[-1]] if len(rows) > 1 else rows
    with bound.engine.raising_together():
        objective = tempered(bound.objective, bound.model, rows)
        forward_mode = _has_forward_mode(bound, rows[0])
    place = bound.model, objective, rows, bound.split.trained, bound.engine, bound.batch_size
    reason = _no_products(bound)
    operator: Curvature = Hessian(*place)
    if reason is None:
        curvature = bound.stage.curvature_class(*place)
        if curvature.is_symmetric:
            reason = f"curvature={bound.stage.curvature_name!r} is symmetric by construction"
        if forward_mode:
            operator = curvature
    if reason is not None and forward_mode:
        return Finding("symmetry", reason)
    if not operator.count:
        return Finding("symmetry", "none of the compared rows has a term")
    one, other = (vectors.rademacher(operator.parameters, 1, seed) for seed in (1, 2))
    try:
        with without_tf32():
            products = [operator.matvec(v) for v in (one, other)]
    except (RuntimeError, NotTwiceDifferentiableError) as error:
        if isinstance(error, RuntimeError):
            check_differentiability_is_meant(error)
        if reason is not None:
            return Finding("symmetry", f"{reason}, and a backward function of {_class(bound)} has no derivative")
        raise InputError(
            f"stage {bound.name!r}: {_class(bound)} has no derivative of the kind that curvature="
            f"{bound.stage.curvature_name!r} needs ({first_line(error)}); expected a model whose functions can be "
            "differentiated twice, curvature='ekfac', or solvers.Identity()."
        ) from error
    left, right = float(vectors.dot(other, products[0])), float(vectors.dot(one, products[1]))
    least = 1e-2 * _rounding(bound)  # of a product that is zero only rounding is left
    gap = abs(left - right) / max(*(float(vectors.norm(product)) for product in products), least)
    if not gap <= ASYMMETRY * _rounding(bound):
        raise InputError(
            f"stage {bound.name!r}: the curvature product of {_class(bound)} is not symmetric (⟨w, C v⟩ and ⟨v, C w⟩ "
            f"differ by {gap:.1e} of ‖C v‖): a backward function in it is no derivative of its forward function, so "
            "that no influence can be computed; expected another model, or its attention replaced by an exact one."
        )
    if not forward_mode:
        text = "a Hessian product is symmetric, and reverse mode takes the place of a forward mode that is not there"
        return Finding("symmetry", text, gap)
    return Finding("symmetry", "a curvature product is symmetric", gap)


def _no_products(bound: BoundStage) -> str | None:
    """Why a stage takes no curvature products; None: it does."""
    if not isinstance(bound.differentiation, Implicit):
        return "the stage has no curvature"
    solver = bound.differentiation.solver
    if not solver.products(1, 1):
        return f"{type(solver).__name__} uses no curvature"
    return None


def _has_forward_mode(bound: BoundStage, row: dict) -> bool:
    """Whether the functions that a row's loss passes have forward-mode derivatives, by small tensors of all layers."""
    names = smallest(bound.model, bound.split.trained)
    direction = {name: torch.ones_like(bound.model.parameters[name]) for name in names}
    with torch.no_grad(), bound.model.evaluating():
        directional_derivatives(Evaluation(bound.model, bound.objective, bound.collate([row])), direction)
    return bound.model.forward_mode


# --- what they share


def _class(bound: BoundStage) -> str:
    return type(bound.stage.model).__name__


def _dtype(bound: BoundStage) -> torch.dtype:
    return next(iter(bound.model.parameters.values())).dtype


def _rounding(bound: BoundStage) -> float:
    """The relative difference up to which two numbers that should be equal may differ."""
    return ROUNDING.get(_dtype(bound), ROUNDING_OF_OTHERS)


def _places(length: int) -> list[int]:
    """Numbers of tokens after the first: the next four, the last three, and some between them."""
    between = range(5, length - 3, max(1, (length - 8) // 6))
    return sorted({place for place in (1, 2, 3, 4, *between, *range(length - 3, length)) if 0 < place < length})


def _relative(one: Tensor, other: Tensor) -> float:
    """The difference, relative to the larger one; absolute where both are small, as of rows learned by heart."""
    return float((one - other).norm() / torch.maximum(one.norm(), other.norm()).clamp(min=1.0))


def _vocabulary(bound: BoundStage, ids: Tensor) -> int:
    tokenizer = bound.objective.tokenizer
    return len(tokenizer) if hasattr(tokenizer, "__len__") else int(ids.max()) + 1


def _logits(bound: BoundStage, batch: dict[str, Any]) -> Tensor:
    """The logits, (B, T, V), of the model's call inside the objective."""
    outputs: list[Tensor] = []
    call = bound.model.bind({})

    def watched(**inputs):
        output = call(**inputs)
        outputs.append(output.logits)
        return output

    bound.objective.losses(watched, batch)
    return outputs[0]


def pad_ids_text(bound: BoundStage) -> str:
    """A sentence about pad ids of model and tokenizer that differ: the likely cause, where they do."""
    tokenizer, config = bound.objective.tokenizer, getattr(bound.stage.model, "config", None)
    model_id, token_id = getattr(config, "pad_token_id", None), getattr(tokenizer, "pad_token_id", None)
    if token_id is None or model_id == token_id:
        return ""
    return (
        f" The tokenizer pads with id {token_id}, model.config.pad_token_id is {model_id}: where they should agree, "
        f"set model.config.pad_token_id = {token_id}."
    )


def _no_batches(bound: BoundStage, error: Exception) -> Exception:
    """What to raise where a batch of two rows fails: an `InputError` if one row alone works, else the error."""
    try:
        with torch.no_grad(), bound.model.evaluating():
            for row in bound.compared_rows:
                Evaluation(bound.model, bound.objective, bound.collate([row])).losses({})
    except Exception:
        return error
    return InputError(
        f"stage {bound.name!r}: {_class(bound)} takes single rows, but not several of different length in a batch "
        f"({first_line(error)}); expected a model that takes padded batches.{pad_ids_text(bound)}"
    )
