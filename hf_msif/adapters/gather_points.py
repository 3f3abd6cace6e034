"""Finds where the last layer of an encoder can gather the states at masked positions, by trying it out.

No class of models is known here. A layer whose attention is followed by anything that needs the other tokens (tokens
mixed once more, a head on the pooler, an output of all hidden states) gathers later, or only after the encoder.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from .positions import GatherPoint, LastLayer, Positions, batch_shape, forward, states_of
from .split import encoder

logger = logging.getLogger(__name__)

Run = Callable[[Mapping[str, Tensor], dict], Any]

SAMPLE_ROWS = 4
# Of rounding in float32. States that are gathered too early are wrong by what the other tokens add to them.
TOLERANCE = 1e-5
GRADIENT_TOLERANCE = 1e-4


def find_gather_point(
    model: nn.Module, run: Run, parameters: Mapping[str, Tensor], positions: Positions, inputs: dict[str, Any]
) -> GatherPoint | None:
    """The earliest moment in the last layer at which the states can be gathered, tried out on a few rows of a batch.

    The moments are the starts and ends of the layer's modules, from the first one on at which a token's states depend
    on other tokens. The layer is run with one after the other, until its output at the positions is that of a plain
    run. Then the whole model must agree: all of its outputs, and the gradients of a random weighting of them in all
    parameters, since what is multiplied by zero shows in no output.

    Args:
        model: the model, also with PEFT adapters, in evaluation mode.
        run: calls the model with parameters and a dict of inputs; returns its output.
        parameters: name → value.
        positions: (rows, columns), two index tensors (M,), M > 0.
        inputs: of the model.

    Returns:
        The point; None if there is none, or if the model fails on these rows.
    """
    try:
        positions, inputs = _sample(positions, inputs, SAMPLE_ROWS)
        point = _search(model, lambda kwargs: run(parameters, kwargs), positions, inputs)
        if point is None or not _agrees(model, run, parameters, positions, inputs, {"point": point}, {}):
            return None
        return point
    except Exception:  # an error of the model itself comes again in its plain run
        logger.debug("%s gathers after its encoder", type(model).__name__, exc_info=True)
        return None


def head_needs_all(
    model: nn.Module, run: Run, parameters: Mapping[str, Tensor], positions: Positions, inputs: dict[str, Any]
) -> bool:
    """Whether a head cannot run on the encoder's states at some positions alone, tried out on a row of a batch.

    It cannot where these states are not those of the tokens (Perceiver's latents), or where it looks at several.

    Args:
        model, run, parameters, positions, inputs: as `find_gather_point` takes them.
    """
    try:
        positions, inputs = _sample(positions, inputs, 1)
        return not _agrees(model, run, parameters, positions, inputs, {}, {"whole_head": True})
    except Exception:  # an error of the model itself comes again in its plain run
        logger.debug("%s runs its head at all positions", type(model).__name__, exc_info=True)
        return True


def _sample(positions: Positions, inputs: dict[str, Any], number: int) -> tuple[Positions, dict[str, Any]]:
    """`number` rows of the inputs that have positions, and these positions in another order."""
    (rows, columns), size = positions, batch_shape(inputs)[0]
    sampled_rows = rows.unique()[:number]
    inside = torch.isin(rows, sampled_rows)
    inputs = {
        name: value[sampled_rows] if isinstance(value, Tensor) and value.dim() and len(value) == size else value
        for name, value in inputs.items()
    }
    return (torch.searchsorted(sampled_rows, rows[inside]).flip(0), columns[inside].flip(0)), inputs


def _search(model: nn.Module, run: Callable[[dict], Any], positions: Positions, inputs: dict) -> GatherPoint | None:
    """The first point at which the last layer alone agrees: of the modules in lists, the one that is called last."""
    shape, calls, points = batch_shape(inputs), list[tuple[nn.Module, tuple, dict]](), list[GatherPoint | None]()

    def called(layer: nn.Module, args: tuple, kwargs: dict) -> None:
        if args and isinstance(args[0], Tensor) and args[0].dim() == 3 and args[0].shape[:2] == shape:
            calls.append((layer, args, kwargs))

    def finished(_module, _args, _output) -> None:  # here the parameters are still those of the run
        while handles:
            handles.pop().remove()
        if calls:
            layer, args, kwargs = calls[-1]
            point = _search_layer(layer, args, kwargs, positions)
            points.append(point and replace(point, calls=sum(other is layer for other, _, _ in calls)))

    lists = [m for m in encoder(model).modules() if isinstance(m, nn.ModuleList)]
    layers = dict.fromkeys(layer for entries in lists for layer in entries)
    handles = [layer.register_forward_pre_hook(called, with_kwargs=True) for layer in layers]
    handles.append(model.register_forward_hook(finished))
    try:
        with torch.no_grad():
            forward(model, run, None, inputs)
    finally:
        for handle in handles:
            handle.remove()
    return points[0] if points else None


def _search_layer(layer: nn.Module, args: tuple, kwargs: dict, positions: Positions) -> GatherPoint | None:
    """`_search` in one call of the layer."""
    shape = tuple(args[0].shape[:2])
    moments, mixed = _moments(layer, args, kwargs)
    with torch.no_grad():
        states = states_of(layer(*args, **kwargs))

    def agrees(point: GatherPoint, rows: Tensor, columns: Tensor) -> bool:
        try:
            with torch.no_grad(), LastLayer(point, (rows, columns), shape).hooks():
                gathered = states_of(layer(*args, **kwargs))
        except Exception:  # most wrong points end in shapes that do not fit
            return False
        return _close(gathered, states[rows, columns].unsqueeze(0))

    rows, columns = positions
    for i in range(mixed, len(moments)):
        module, at_start = moments[i]
        if moments.count((module, True)) == 1:
            ended = dict.fromkeys(m for m, start in moments[: i + (not at_start)] if not start)
            point = GatherPoint(layer, 1, module, at_start, tuple(ended))
            # A batch may have no position at all; a layer that cuts its tokens into chunks fails there.
            if agrees(point, rows, columns) and agrees(point, rows[:0], columns[:0]):
                return point
    return None


def _moments(layer: nn.Module, args: tuple, kwargs: dict) -> tuple[list[tuple[nn.Module, bool]], int]:
    """Each start (True) and end (False) of a module in a call of the layer, and the number of the first one at which
    states depend on those of other tokens; the number of all if they never do."""
    moments: list[tuple[nn.Module, bool]] = []
    mixing: list[int] = []
    leaf = args[0].detach().requires_grad_()
    generator = torch.Generator().manual_seed(0)

    def note(module: nn.Module, at_start: bool, values: Any) -> None:
        for x in values:
            if (
                not mixing
                and isinstance(x, Tensor)
                and x.shape[:2] == leaf.shape[:2]
                and x.dim() == 3
                and x.requires_grad
            ):
                one = (x[0, 0] * torch.randn(x.shape[2], generator=generator).to(x)).sum()
                (slope,) = torch.autograd.grad(one, leaf, retain_graph=True, materialize_grads=True, allow_unused=True)
                if slope.flatten(0, 1)[1:].any():
                    mixing.append(len(moments))
        moments.append((module, at_start))

    def started(module: nn.Module, args: tuple, kwargs: dict) -> None:
        note(module, True, [*args, *kwargs.values()])

    def ended(module: nn.Module, _args, output: Any) -> None:
        note(module, False, output if isinstance(output, tuple) else [output])

    inner = [m for m in layer.modules() if m is not layer]
    handles = [m.register_forward_pre_hook(started, with_kwargs=True) for m in inner]
    handles += [m.register_forward_hook(ended) for m in inner]
    try:
        with torch.enable_grad():
            layer(leaf, *args[1:], **kwargs)
    finally:
        for handle in handles:
            handle.remove()
    return moments, mixing[0] if mixing else len(moments)


def _agrees(
    model: nn.Module,
    run: Run,
    parameters: Mapping[str, Tensor],
    positions: Positions,
    inputs: dict,
    way: dict[str, Any],
    true_way: dict[str, Any],
) -> bool:
    """Whether the model's outputs and their gradients are the same by two ways of `forward`."""
    leaves = {n: p.detach().requires_grad_() for n, p in parameters.items() if p.is_floating_point()}

    def outputs_and_gradients(way: dict[str, Any]) -> tuple[list[Tensor], Tensor, Tensor]:
        """The outputs; of each parameter's gradient, its product with a vector of ±1 and its norm."""
        output = forward(model, lambda kwargs: run({**parameters, **leaves}, kwargs), positions, inputs, **way)
        outputs = [t for t in tree_leaves(output) if isinstance(t, Tensor)]
        generator = torch.Generator().manual_seed(0)
        weighted = [(t * torch.randn(t.shape, generator=generator).to(t)).sum() for t in outputs if t.requires_grad]
        gradients = torch.autograd.grad(
            torch.stack(weighted).sum(), list(leaves.values()), allow_unused=True, materialize_grads=True
        )
        signs = (torch.randint(2, g.shape, generator=generator).to(g).mul_(2).sub_(1) for g in gradients)
        products = [(g * s).sum(dtype=torch.float64) for g, s in zip(gradients, signs, strict=True)]
        return (
            [t.detach() for t in outputs],
            torch.stack(products),
            torch.stack([g.norm().double() for g in gradients]),
        )

    with torch.enable_grad():
        outputs, products, _ = outputs_and_gradients(way)
        true_outputs, true_products, norms = outputs_and_gradients(true_way)
    # The gradients of some parameters are nothing but rounding.
    gradients_agree = (products - true_products).abs() <= GRADIENT_TOLERANCE * (norms + 1e-3 * norms.max())
    same_outputs = len(outputs) == len(true_outputs) and all(map(_close, outputs, true_outputs))
    return same_outputs and bool(gradients_agree.all())


def _close(x: Tensor, y: Tensor) -> bool:
    """Whether x is y up to rounding."""
    return x.shape == y.shape and float((x.double() - y.double()).norm()) <= TOLERANCE * float(y.double().norm())
