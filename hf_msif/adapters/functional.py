"""A Hugging Face model as a function of its parameters, which it leaves alone; by kernels with second derivatives."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map
from transformers import PretrainedConfig

from ..errors import InputError
from .peft import unwrapped
from .split import encoder


class FunctionalModel:
    """The user's model as a pure function of its parameters; nothing about the model is changed for good.

    Parameters and buffers are held detached on `device`, in float32 at least: a bfloat16 checkpoint is raised, float64
    is kept. Where neither device nor dtype changes they are the model's own memory, not a copy.
    """

    def __init__(self, model: nn.Module, device: torch.device | str = "cpu"):
        if getattr(getattr(model, "config", None), "stateful", False):
            raise InputError(
                f"{type(model).__name__} carries its state from batch to batch (config.stateful): a sentence's loss "
                "depends on what was read before it. Set model.config.stateful = False."
            )
        self.model = model
        self.parameters = {n: self._raise(p.detach(), device) for n, p in model.named_parameters()}
        self.buffers = {n: self._raise(b.detach(), device) for n, b in model.named_buffers()}

    @staticmethod
    def _raise(tensor: Tensor, device: torch.device | str) -> Tensor:
        low = tensor.dtype in (torch.float16, torch.bfloat16)
        return tensor.to(device=device, dtype=torch.float32 if low else tensor.dtype)

    def bind(self, parameters: Mapping[str, Tensor], memo: dict | None = None) -> Callable:
        """`call(**inputs)`: the model at `parameters` (names that are missing keep their value).

        With `positions=(rows, columns)` the head runs only at those token positions, see `forward`. `memo` keeps the
        outputs of encoder modules that do not depend on `parameters`, so that repeated passes over the same batch do
        not pay for a frozen encoder again.
        """
        varying = set(parameters)
        state = {**self.parameters, **parameters, **self.buffers}

        def call(positions: tuple[Tensor, Tensor] | None = None, **inputs):
            with _memoised(self.model, varying, memo) if memo is not None else nullcontext():
                return forward(
                    self.model,
                    lambda kwargs: torch.func.functional_call(self.model, state, kwargs=kwargs),
                    positions,
                    inputs,
                )

        return call

    @contextmanager
    def evaluating(self, dropout: bool = False) -> Iterator[None]:
        """Evaluation mode (training mode with `dropout`, but for batch normalisation, whose statistics would move) and
        attention kernels that have forward-mode and second derivatives; restored on leaving."""
        from torch.nn.attention import SDPBackend, sdpa_kernel

        training = {module: module.training for module in self.model.modules()}
        # An encoder inside of a model may have a configuration, and so kernels, of its own.
        attention = [(config, config._attn_implementation) for config in _configs(self.model)]
        swap = any(kernel not in (None, "eager", "sdpa") for _, kernel in attention)
        try:
            self.model.train(dropout)
            for module in self.model.modules():
                if isinstance(module, nn.modules.batchnorm._BatchNorm):
                    module.eval()
            if swap:
                self.model.set_attn_implementation("eager")
            with sdpa_kernel(SDPBackend.MATH):
                yield
        finally:
            for module, mode in training.items():
                module.training = mode
            if swap:
                for config, kernel in attention:
                    config._attn_implementation = kernel


def check_vocabulary(name: str, model: nn.Module, objective: Any) -> None:
    """An id beyond the embedding table ends a CUDA process without a word about tokens."""
    try:
        rows = unwrapped(model).get_input_embeddings().num_embeddings
    except (AttributeError, NotImplementedError):  # no such table: images, models of the user's own
        return
    tokens = len(objective.tokenizer) if hasattr(objective.tokenizer, "__len__") else 0
    if tokens > rows:
        raise InputError(
            f"the tokenizer has {tokens:,} tokens, the model of stage {name!r} {rows:,}; expected at most as many: "
            "enlarge the model (model.resize_token_embeddings; model.config.vocab_size in a configuration), or give "
            "the tokenizer that belongs to it."
        )


def _configs(model: nn.Module) -> list[PretrainedConfig]:
    """Every configuration that the model's modules hold, each once and before those nested in it."""
    found: dict[int, PretrainedConfig] = {}

    def visit(config: Any) -> None:
        if isinstance(config, PretrainedConfig) and id(config) not in found:
            found[id(config)] = config
            for key in config.sub_configs:
                visit(getattr(config, key, None))

    for module in model.modules():
        visit(getattr(module, "config", None))
    return list(found.values())


def forward(
    model: nn.Module, run: Callable[[dict], Any], positions: tuple[Tensor, Tensor] | None, inputs: dict[str, Any]
) -> Any:
    """`run(inputs)` of a model whose head is wanted only at the token `positions` (rows, columns); None: at all.

    With positions the logits have shape (M, V): the encoder's output is gathered before the head, since a masked-LM
    head over a large vocabulary is most of a small model's work and only about 15 % of the tokens are masked.
    """
    if "use_cache" in inspect.signature(unwrapped(model).forward).parameters:
        inputs = {"use_cache": False, **inputs}
    if positions is None:
        return run(inputs)
    base = encoder(model)
    headless = base is unwrapped(model)
    with _gathered(base, positions) if not headless else nullcontext():
        output = run(inputs)
    if getattr(output, "logits", None) is not None:  # a model without a head is the objective's to refuse
        output.logits = output.logits[positions] if headless else output.logits[0]
    return output


@contextmanager
def _gathered(base: nn.Module, positions: tuple[Tensor, Tensor]) -> Iterator[None]:
    def hook(_module, _args, output):
        # One row of M tokens: heads are position-wise and keep their three-dimensional view.
        if isinstance(output, tuple):
            return (output[0][positions].unsqueeze(0), *output[1:])
        output.last_hidden_state = output.last_hidden_state[positions].unsqueeze(0)
        return output

    handle = base.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def _memoised(model: nn.Module, varying: set[str], memo: dict) -> Iterator[None]:
    """Replays the outputs of the base model's constant parts from `memo`, and records them where it is empty.

    Constant: the whole base model, or those of its children whose parameters and tensor inputs do not vary.
    """
    patched = []
    for name, module in _constant_modules(model, varying):
        # Callers may ask the signature what the module takes.
        @functools.wraps(module.forward)
        def forward(*args, _name=name, _forward=module.forward, **kwargs):
            if _name not in memo:
                output = _forward(*args, **kwargs)
                inputs = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
                if any(
                    t.requires_grad or torch.autograd.forward_ad.unpack_dual(t).tangent is not None for t in inputs
                ):
                    return output
                memo[_name] = output
            return tree_map(lambda x: x, memo[_name])

        # Accelerate's device hooks are such an attribute too, which must outlive ours.
        patched.append((module, vars(module).get("forward")))
        module.forward = forward
    try:
        yield
    finally:
        for module, own in patched:
            del module.forward
            if own is not None:
                module.forward = own


def _constant_modules(model: nn.Module, varying: set[str]) -> list[tuple[str, nn.Module]]:
    varied = {id(p) for name, p in model.named_parameters() if name in varying}

    def constant(module: nn.Module) -> bool:
        parameters = list(module.parameters())
        return bool(parameters) and not any(id(p) in varied for p in parameters)

    base = encoder(model)
    if base is unwrapped(model):
        return []
    if constant(base):
        return [("base_model", base)]
    # A ModuleList has no forward of its own to replay.
    children = [(n, m) for n, m in base.named_children() if not isinstance(m, (nn.ModuleList, nn.ModuleDict))]
    return [(n, m) for n, m in children if constant(m)]


def memo_bytes(memo: dict) -> int:
    """Memory held by a memo of `FunctionalModel.bind`."""
    return sum(t.numel() * t.element_size() for t in tree_leaves(memo) if isinstance(t, Tensor))


def has_dropout(model: nn.Module) -> bool:
    """Whether the model draws random numbers in training mode: in modules, or by rates in its configuration."""
    modules = any(isinstance(m, nn.modules.dropout._DropoutNd) and m.p > 0 for m in model.modules())
    rates = getattr(model, "config", None)
    rates = rates.to_dict() if rates is not None else {}
    return modules or any("drop" in key and isinstance(p, float) and p > 0 for key, p in rates.items())
