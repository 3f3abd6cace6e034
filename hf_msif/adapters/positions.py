"""Runs a model whose head is needed only at some token positions, without most of the work for the other tokens.

A masked-LM head over a large vocabulary is most of a small model's work, and only about 15 % of the tokens are masked:
the encoder's output is gathered at their positions before the head. The last layer can gather earlier, at a
`GatherPoint`, since what follows its attention acts on each token alone.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from .peft import unwrap
from .split import encoder

Positions = tuple[Tensor, Tensor]

BESIDE_TOKENS = ("attention_mask", "token_type_ids")
TOKEN_LOGITS = ("logits", "prediction_logits")  # the latter of models for pretraining, such as BertForPreTraining


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
    whole_head: bool = False,
) -> Any:
    """Runs a model whose head is needed only at some token positions.

    Args:
        model: the model, also with PEFT adapters.
        run: calls the model with a dict of inputs; returns its output.
        positions: (rows, columns), two index tensors (M,); None: all positions.
        inputs: of the model. `use_cache=False` is added if the model knows it and `inputs` does not set it; what a
            tokenizer makes beside the tokens is left out if the model does not know it.
        point: where the states are gathered; None: after the encoder.
        whole_head: the head runs at all positions, and its logits are gathered.

    Returns:
        The model's output; its `TOKEN_LOGITS`, if it has any, have the shape (M, V) with positions.

    Raises:
        OrderError: the last layer ran otherwise than `point` says, and the output would be wrong.
    """
    accepted = inspect.signature(unwrap(model).forward).parameters
    if "use_cache" in accepted:
        inputs = {"use_cache": False, **inputs}
    if not any(p.kind is p.VAR_KEYWORD for p in accepted.values()):
        inputs = {n: value for n, value in inputs.items() if n in accepted or n not in BESIDE_TOKENS}
    if positions is None:
        return run(inputs)
    base = encoder(model)
    headless = whole_head or base is unwrap(model)
    with nullcontext() if headless else _gathered(base, positions, point, batch_shape(inputs)):
        output = run(inputs)
    for name in TOKEN_LOGITS:
        logits = getattr(output, name, None)
        if logits is not None:  # if there are none, the objective raises the error
            # Logits without an axis of tokens lose one, too, so that the objective sees another task in them.
            setattr(output, name, logits[positions] if headless and logits.dim() > 2 else logits[0])
    return output


def batch_shape(inputs: Mapping[str, Any]) -> tuple[int, ...]:
    """(B, T) of a model's inputs; () if no input has two axes."""
    return next((tuple(t.shape[:2]) for t in inputs.values() if isinstance(t, Tensor) and t.dim() >= 2), ())


@contextmanager
def _gathered(
    base: nn.Module, positions: Positions, point: GatherPoint | None, lead: tuple[int, ...]
) -> Iterator[None]:
    """Inside, the base model's output has only the states at `positions`."""
    early = None if point is None else LastLayer(point, positions, lead)

    def hook(_module, _args, output):
        if early is not None and early.gathered is not None:
            early.check(states_of(output))
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


def states_of(output: Any) -> Tensor:
    """The hidden states in the output of a layer or an encoder: a tensor, a tuple or a `ModelOutput`."""
    return output if isinstance(output, Tensor) else output[0]


class LastLayer:
    """The last layer in one pass: it is given the gathered states, and its modules before the point those of all.

    In that way also a residual sum in the layer's own code gets gathered states.

    Attributes:
        states: (B, T, d), the input of the layer.
        gathered: (1, M, d), the same at the positions; None: the layer does not gather in this pass.
        passed: whether the point is behind.
    """

    def __init__(self, point: GatherPoint, positions: Positions, lead: tuple[int, ...]):
        self.point, self.positions, self.lead = point, positions, lead
        self.shape = 1, len(positions[0])
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
        return x[self.positions].unsqueeze(0) if self._has_all(x) else x
