"""Runs a model whose head is needed only at some token positions, without most of the work for the other tokens.

A masked-LM head over a large vocabulary is most of a small model's work, and only about 15 % of the tokens are masked:
the encoder's output is gathered at their positions before the head. The last layer can gather earlier, since what
follows its attention acts on each token alone. Where, `find_gather_point` tries out; it knows no class of models.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from .peft import unwrap
from .split import encoder

Positions = tuple[Tensor, Tensor]

SAMPLE_ROWS = 4
# Of rounding in float32. States that are gathered too early are wrong by a share of what the attention adds to them.
TOLERANCE = 1e-5
GRADIENT_TOLERANCE = 1e-4


@dataclass(frozen=True)
class GatherPoint:
    """A moment in the last layer of an encoder, from which on its modules act on each token alone.

    Attributes:
        layer: the last layer.
        calls: how often a pass calls it; the last of these calls is meant.
        module: the module in it whose inputs or output are gathered.
        at_start: its inputs are; else its output.
        before: the modules that end before that moment. They need the states of all tokens.
    """

    layer: nn.Module
    calls: int
    module: nn.Module
    at_start: bool
    before: tuple[nn.Module, ...]


class OrderError(RuntimeError):
    """The last layer did not run as it did when its `GatherPoint` was found."""


def forward(
    model: nn.Module,
    run: Callable[[dict], Any],
    positions: Positions | None,
    inputs: dict[str, Any],
    point: GatherPoint | None = None,
) -> Any:
    """Runs a model whose head is needed only at some token positions.

    Args:
        model: the model, also with PEFT adapters.
        run: calls the model with a dict of inputs; returns its output.
        positions: (rows, columns), two index tensors (M,); None: all positions.
        inputs: of the model. `use_cache=False` is added if the model knows it and `inputs` does not set it.
        point: where the states are gathered; None: after the encoder.

    Returns:
        The model's output; its `logits`, if it has any, have the shape (M, V) with positions.

    Raises:
        OrderError: the last layer ran otherwise than `point` says, and the output would be wrong.
    """
    if "use_cache" in inspect.signature(unwrap(model).forward).parameters:
        inputs = {"use_cache": False, **inputs}
    if positions is None:
        return run(inputs)
    base = encoder(model)
    headless = base is unwrap(model)
    with nullcontext() if headless else _gathered(base, positions, point, _lead(inputs)):
        output = run(inputs)
    if getattr(output, "logits", None) is not None:  # if there are none, the objective raises the error
        output.logits = output.logits[positions] if headless else output.logits[0]
    return output


def _lead(inputs: Mapping[str, Any]) -> tuple[int, ...]:
    """(B, T) of the inputs; () if no input has two axes."""
    return next((tuple(t.shape[:2]) for t in inputs.values() if isinstance(t, Tensor) and t.dim() >= 2), ())


@contextmanager
def _gathered(
    base: nn.Module, positions: Positions, point: GatherPoint | None, lead: tuple[int, ...]
) -> Iterator[None]:
    """Inside, the base model's output has only the states at `positions`."""
    early = None if point is None else _LastLayer(point, positions, lead)

    def hook(_module, _args, output):
        if early is not None and early.gathered is not None:
            early.check(_states(output))
            return output
        # One row of M tokens, (1, M, d): heads work on each position alone, and expect three dimensions.
        if isinstance(output, tuple):
            return (output[0][positions].unsqueeze(0), *output[1:])
        output.last_hidden_state = output.last_hidden_state[positions].unsqueeze(0)
        return output

    handle = base.register_forward_hook(hook)
    try:
        with nullcontext() if early is None else early.hooks():
            yield
    finally:
        handle.remove()


def _states(output: Any) -> Tensor:
    """The hidden states in the output of a layer or an encoder: a tensor, a tuple or a `ModelOutput`."""
    return output if isinstance(output, Tensor) else output[0]


class _LastLayer:
    """The last layer in one pass: it is given the gathered states, and its modules before the point those of all.

    In that way also a residual sum in the layer's own code gets gathered states.

    Attributes:
        states: (B, T, d), the input of the layer.
        gathered: (1, M, d), the same at the positions; None: the layer does not gather in this pass.
        passed: whether the point is behind.
    """

    def __init__(self, point: GatherPoint, positions: Positions, lead: tuple[int, ...]):
        self.point, self.lead = point, lead
        self.shape = 1, len(positions[0])
        self.index = positions[0] * lead[-1] + positions[1] if lead else None
        self.calls, self.passed = 0, False
        self.states: Tensor | None = None
        self.gathered: Tensor | None = None

    @contextmanager
    def hooks(self) -> Iterator[None]:
        point = self.point
        handles = [
            point.layer.register_forward_pre_hook(self._enter),
            *(m.register_forward_pre_hook(self._with_all_states, with_kwargs=True) for m in point.before),
            point.module.register_forward_pre_hook(self._gather_inputs, with_kwargs=True)
            if point.at_start
            else point.module.register_forward_hook(self._gather_output),
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def check(self, states: Tensor) -> None:
        """Raises `OrderError` unless the pass went as its point says; `states` are the encoder's output."""
        if not self.passed or states.shape[:2] != self.shape:
            raise self._other_order()

    def _other_order(self) -> OrderError:
        return OrderError(f"{type(self.point.layer).__name__} ran otherwise than when its GatherPoint was found.")

    def _enter(self, layer: nn.Module, args: tuple) -> tuple | None:
        if self.gathered is not None:
            raise self._other_order()
        self.calls += 1
        # Where one row of M tokens is gathered whole, both kinds of states would look alike.
        usable = bool(args) and self._has_all(args[0]) and self.lead != self.shape
        # A layer may exchange its modules for other ones; dropout would draw other numbers.
        modules = list(layer.modules()) if usable and self.calls == self.point.calls else []
        if not any(m is self.point.module for m in modules) or any(m.training for m in modules):
            return None
        self.states, self.gathered = args[0], self._gather(args[0])
        return (self.gathered, *args[1:])

    def _with_all_states(self, _module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        if self.gathered is None or self.passed:
            return None
        return self._map(lambda x: self.states if x is self.gathered else x, args, kwargs)

    def _gather_inputs(self, _module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        if self.gathered is None:
            return None
        self.passed = True
        return self._map(self._gather, args, kwargs)

    def _gather_output(self, _module, _args, output: Any) -> Any:
        if self.gathered is None:
            return output
        self.passed = True
        return tuple(map(self._gather, output)) if isinstance(output, tuple) else self._gather(output)

    @staticmethod
    def _map(change: Callable, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        return tuple(map(change, args)), {name: change(value) for name, value in kwargs.items()}

    def _has_all(self, x: Any) -> bool:
        return isinstance(x, Tensor) and x.dim() == 3 and x.shape[:2] == self.lead

    def _gather(self, x: Any) -> Any:
        """The rows at the positions of a tensor with the states of all tokens; anything else is returned as it is."""
        return x.flatten(0, 1).index_select(0, self.index).unsqueeze(0) if self._has_all(x) else x


# How a point is found ------------------------------------------------------------------------------------------------


def find_gather_point(
    model: nn.Module,
    run: Callable[[Mapping[str, Tensor], dict], Any],
    parameters: Mapping[str, Tensor],
    positions: Positions,
    inputs: dict[str, Any],
) -> GatherPoint | None:
    """The earliest moment in the last layer at which the states can be gathered, tried out on a few rows of a batch.

    The last layer is run with every moment in the order of its modules, until its output agrees with that of all
    tokens. Then the whole model must agree: every output, and the gradient in every parameter of a random weighting of
    the outputs. The layer alone must fail where it sees nothing but the gathered tokens; if it does not, then its
    attention has no effect on these rows, and they show nothing.

    Args:
        model: the model, also with PEFT adapters, in evaluation mode.
        run: calls the model with parameters and a dict of inputs; returns its output.
        parameters: name → value.
        positions: (rows, columns), two index tensors (M,), M > 0.
        inputs: of the model.

    Returns:
        The point; None if there is none, or the model fails on these rows.
    """
    try:
        positions, inputs = _sample(positions, inputs)
        point = _search(model, lambda kwargs: run(parameters, kwargs), positions, inputs)
        if point is None or not _agrees(model, run, parameters, positions, inputs, point):
            return None
        return point
    except (
        Exception
    ):  # whatever a model does not allow, it need not; an error of its own comes again in the plain pass
        return None


def _sample(positions: Positions, inputs: dict[str, Any]) -> tuple[Positions, dict[str, Any]]:
    """A few rows of the inputs, and some of their positions in another order."""
    (rows, columns), (size, length) = positions, _lead(inputs)
    some = rows.unique()[:SAMPLE_ROWS]
    inside = torch.isin(rows, some)
    rows, columns = torch.searchsorted(some, rows[inside]).flip(0), columns[inside].flip(0)
    # A layer that cuts its tokens into chunks needs a multiple of their length: the number has no divisor of T.
    number = next(n for n in range(len(rows), 0, -1) if math.gcd(n, length) == 1)
    inputs = {
        name: value[some] if isinstance(value, Tensor) and value.dim() and len(value) == size else value
        for name, value in inputs.items()
    }
    return (rows[:number], columns[:number]), inputs


def _search(model: nn.Module, run: Callable[[dict], Any], positions: Positions, inputs: dict) -> GatherPoint | None:
    """The first point at which the last layer alone agrees."""
    lead, calls, points = _lead(inputs), list[tuple[nn.Module, tuple, dict]](), list[GatherPoint]()

    def called(layer: nn.Module, args: tuple, kwargs: dict) -> None:
        if args and isinstance(args[0], Tensor) and args[0].dim() == 3 and args[0].shape[:2] == lead:
            calls.append((layer, args, kwargs))

    def finished(_module, _args, _output) -> None:  # here the parameters are still those of the run
        while handles:
            handles.pop().remove()
        if calls:
            layer, args, kwargs = calls[-1]
            found = _search_layer(layer, args, kwargs, positions, lead)
            number = sum(other is layer for other, _, _ in calls)
            points.extend([] if found is None else [replace(found, calls=number)])

    lists = [m for m in encoder(model).modules() if isinstance(m, nn.ModuleList)]
    layers = {layer: None for entries in lists for layer in entries}
    handles = [layer.register_forward_pre_hook(called, with_kwargs=True) for layer in layers]
    handles.append(model.register_forward_hook(finished))
    try:
        with torch.no_grad():
            forward(model, run, None, inputs)
    finally:
        for handle in handles:
            handle.remove()
    return points[0] if points else None


def _search_layer(
    layer: nn.Module, args: tuple, kwargs: dict, positions: Positions, lead: tuple[int, ...]
) -> GatherPoint | None:
    """`_search` in one call of the layer."""
    events: list[tuple[nn.Module, bool]] = []  # each start (True) and end of a module

    def started(module: nn.Module, _args) -> None:
        events.append((module, True))

    def ended(module: nn.Module, _args, _output) -> None:
        events.append((module, False))

    inner = [m for m in layer.modules() if m is not layer]
    handles = [m.register_forward_pre_hook(started) for m in inner] + [m.register_forward_hook(ended) for m in inner]
    try:
        states = _states(layer(*args, **kwargs))
    finally:
        for handle in handles:
            handle.remove()

    def agrees(point: GatherPoint) -> bool:
        for rows, columns in (positions, (positions[0][:0], positions[1][:0])):  # a batch may have no position
            try:
                with _LastLayer(point, (rows, columns), lead).hooks():
                    gathered = _states(layer(*args, **kwargs))
            except Exception:  # most wrong points end in shapes that do not fit
                return False
            if not _close(gathered, states[rows, columns].unsqueeze(0), TOLERANCE):
                return False
        return True

    if agrees(GatherPoint(layer, 1, layer, True, ())):  # its tokens do not look at each other here
        return None
    for i, (module, at_start) in enumerate(events):
        if events.count((module, True)) == 1:
            before = tuple(dict.fromkeys(m for m, start in events[: i + (not at_start)] if not start))
            point = GatherPoint(layer, 1, module, at_start, before)
            if agrees(point):
                return point
    return None


def _agrees(
    model: nn.Module,
    run: Callable[[Mapping[str, Tensor], dict], Any],
    parameters: Mapping[str, Tensor],
    positions: Positions,
    inputs: dict,
    point: GatherPoint,
) -> bool:
    """Whether the model's outputs and their gradients with the point are those without."""
    leaves = {n: p.detach().requires_grad_() for n, p in parameters.items() if p.is_floating_point()}
    state = {**parameters, **leaves}

    def outputs_and_gradients(point: GatherPoint | None) -> tuple[list[Tensor], list[Tensor]]:
        output = forward(model, lambda kwargs: run(state, kwargs), positions, inputs, point)
        outputs = [t for t in tree_leaves(output) if isinstance(t, Tensor)]
        generator, total = torch.Generator().manual_seed(0), outputs[0].new_zeros(())
        for t in outputs:
            if t.requires_grad:
                total = total + (t * torch.randn(t.shape, generator=generator).to(t)).sum()
        gradients = torch.autograd.grad(total, list(leaves.values()), allow_unused=True, materialize_grads=True)
        return [t.detach() for t in outputs], list(gradients)

    with torch.enable_grad():
        outputs, gradients = outputs_and_gradients(point)
        true_outputs, true_gradients = outputs_and_gradients(None)
    # The gradients of some parameters are nothing but rounding.
    largest = max(float(g.norm()) for g in true_gradients)
    return len(outputs) == len(true_outputs) and all(
        (
            *(_close(x, y, TOLERANCE) for x, y in zip(outputs, true_outputs, strict=True)),
            *(_close(x, y, GRADIENT_TOLERANCE, largest) for x, y in zip(gradients, true_gradients, strict=True)),
        )
    )


def _close(x: Tensor, y: Tensor, tolerance: float, scale: float = 0.0) -> bool:
    """Whether x is y up to a share of the norm of y, or of a thousandth of `scale`."""
    if x.shape != y.shape:
        return False
    return float((x.double() - y.double()).norm()) <= tolerance * (float(y.double().norm()) + 1e-3 * scale)
