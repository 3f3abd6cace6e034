"""A Hugging Face model as a pure function of its parameters, computed by kernels that have second derivatives."""

from __future__ import annotations

import copy
import functools
import logging
import os
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any, cast

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map
from transformers import PretrainedConfig, PreTrainedModel

from ..engine.batching import TextSettings
from ..errors import InputError, first_line
from .gather_points import find_gather_point, head_needs_all
from .peft import unwrap
from .positions import GatherPoint, Positions, forward
from .split import encoder

logger = logging.getLogger(__name__)

# Kernels of a mixture of experts that have all derivatives, and those for which its weights were rearranged.
EXPERTS = (None, "eager", "batched_mm", "deepgemm_megamoe")


class FunctionalModel:
    """The user's model as a pure function of its parameters; the model itself is not changed permanently.

    Parameters and buffers are held detached on `device`. float16 and bfloat16 are converted to float32, other dtypes
    stay. If neither device nor dtype changes, a tensor shares the model's memory and is no copy.

    Args:
        model: a `PreTrainedModel`, also with PEFT adapters.
        device: where to compute.

    Attributes:
        model: the user's model.
        parameters: name → detached parameter; tied tensors appear once.
        buffers: name → detached buffer.
        forward_mode: whether all of the model's functions have a forward-mode derivative, as far as it is known, see
            `curvature.derivatives`.
        twice_differentiable: whether every function is known to have a second derivative.
        linear_backward: whether autograd can differentiate the model's backward pass; None: it is not known yet, see
            `curvature.gauss_newton.gauss_newton_product`.
        gather_points: where the last layer gathers the states at the masked positions, see `gather_point`.
        whole_heads: whether the head runs at all positions, see `needs_whole_head`.

    Raises:
        InputError: the model carries a state from batch to batch (`config.stateful`).

    >>> call = FunctionalModel(nn.Linear(2, 1)).bind({"weight": torch.tensor([[1.0, 2.0]]), "bias": torch.zeros(1)})
    >>> call(input=torch.ones(1, 2))
    tensor([[3.]])
    """

    def __init__(self, model: nn.Module, device: torch.device | str = "cpu"):
        if getattr(getattr(model, "config", None), "stateful", False):
            raise InputError(
                f"{type(model).__name__} carries its state from batch to batch (config.stateful): a sentence's loss "
                "depends on what was read before it. Set model.config.stateful = False."
            )
        self.model = model
        self.parameters = {n: self._in_full_precision(p.detach(), device) for n, p in model.named_parameters()}
        self.buffers = {n: self._in_full_precision(b.detach(), device) for n, b in model.named_buffers()}
        self.forward_mode = True
        self.twice_differentiable = False
        self.linear_backward: bool | None = None
        self.gather_points: dict[tuple, GatherPoint | None] = {}
        self.whole_heads: dict[tuple, bool] = {}

    def at(self, parameters: Mapping[str, Tensor], buffers: Mapping[str, Tensor] | None = None) -> FunctionalModel:
        """The same model with other values of some of its parameters and buffers, in its own dtypes and device."""
        other = copy.copy(self)
        other.parameters = {
            n: parameters[n].detach().to(p) if n in parameters else p for n, p in self.parameters.items()
        }
        other.buffers = {n: buffers[n].to(b) if buffers and n in buffers else b for n, b in self.buffers.items()}
        return other

    @staticmethod
    def _in_full_precision(tensor: Tensor, device: torch.device | str) -> Tensor:
        half = tensor.dtype in (torch.float16, torch.bfloat16)
        return tensor.to(device=device, dtype=torch.float32 if half else tensor.dtype)

    def bind(self, parameters: Mapping[str, Tensor], memo: dict | None = None) -> Callable:
        """The model at `parameters`, as a function `call(positions=None, **inputs)` that returns its output.

        Args:
            parameters: name → value; parameters whose names are missing keep their value in the model.
            memo: a dict for one batch, empty at first. It stores the outputs of encoder modules that do not depend on
                `parameters`, so that repeated passes over the batch do not compute a frozen encoder again.

        Returns:
            The function. With `positions=(rows, columns)`, two index tensors (M,), the head runs only at those token
            positions and the logits have the shape (M, V), see `positions.forward`; in evaluation mode the last layer
            runs only there after its attention, where it can, see `gather_point`.
        """
        varying = {id(p) for name, p in self.model.named_parameters() if name in parameters}
        state = {**self.parameters, **parameters, **self.buffers}

        def run(kwargs: dict) -> Any:
            return torch.func.functional_call(self.model, state, kwargs=kwargs)

        def call(positions: Positions | None = None, **inputs):
            whole_head, point = self.needs_whole_head(positions, inputs), self.gather_point(positions, inputs)
            if point is not None and memo is not None and _is_constant(point.layer, varying):
                point = None  # the encoder's output is in the memo, or will be
            memoised = _memoised(self.model, varying, memo) if memo is not None else nullcontext()
            dual = any(forward_ad.unpack_dual(p).tangent is not None for p in parameters.values())
            with memoised, ConstantPadding() if dual else nullcontext():
                try:
                    return forward(self.model, run, positions, inputs, point, whole_head)
                except Exception:  # an error of the model itself comes again
                    if point is None:
                        raise
                self.gather_points[_key(inputs)] = None
                return forward(self.model, run, positions, inputs, whole_head=whole_head)

        return call

    def needs_whole_head(self, positions: Positions | None, inputs: dict[str, Any]) -> bool:
        """Whether the head must run at all positions, see `gather_points.head_needs_all`.

        The first batch with these inputs finds it out, by two passes over one of its rows.

        Args:
            positions: (rows, columns), two index tensors (M,); None: the head runs at all positions.
            inputs: of the model.
        """
        if positions is None:
            return False
        key = _key(inputs)
        if key not in self.whole_heads and len(positions[0]):
            with torch.autocast(positions[0].device.type, enabled=False), without_tf32(), self.evaluating():
                self.whole_heads[key] = head_needs_all(self.model, self._run, self.parameters, positions, inputs)
        return self.whole_heads.get(key, True)

    def _run(self, parameters: Mapping[str, Tensor], kwargs: dict) -> Any:
        return torch.func.functional_call(self.model, {**parameters, **self.buffers}, kwargs=kwargs)

    def gather_point(self, positions: Positions | None, inputs: dict[str, Any]) -> GatherPoint | None:
        """Where the model's last layer can gather the states at `positions`, see `find_gather_point`; None: nowhere.

        The first batch with these inputs finds it out, by some passes over four of its rows. In training mode nothing
        is gathered early: dropout would draw other numbers.

        Args:
            positions: (rows, columns), two index tensors (M,); None: the head runs at all positions.
            inputs: of the model.
        """
        if positions is None or self.model.training or self.needs_whole_head(positions, inputs):
            return None
        key = _key(inputs)
        if key not in self.gather_points and len(positions[0]):
            with torch.autocast(positions[0].device.type, enabled=False), without_tf32():
                self.gather_points[key] = find_gather_point(self.model, self._run, self.parameters, positions, inputs)
        return self.gather_points.get(key)

    def refuse_forward_mode(self, error: NotImplementedError) -> None:
        """Notes, and logs once, that a function of the model has no forward-mode derivative."""
        if self.forward_mode:
            self.forward_mode = False
            logger.warning(
                "%s has no forward-mode derivative (%s, at %s): reverse mode is used, which takes a third longer.",
                type(self.model).__name__,
                first_line(error),
                _source_of(error),
            )

    @contextmanager
    def evaluating(self, dropout: bool = False) -> Iterator[None]:
        """Inside, the model is in evaluation mode, and its kernels of attention and of experts have forward-mode and
        second derivatives.

        Modes and kernels are restored on leaving.

        Args:
            dropout: training mode instead, so that dropout is active; batch normalisation stays in evaluation mode,
                since its statistics would change.
        """
        from torch.nn.attention import SDPBackend, sdpa_kernel

        training = {module: module.training for module in self.model.modules()}
        # An encoder inside a model may have its own configuration, and so its own kernels.
        attention = [(config, config._attn_implementation) for config in _configs(self.model)]
        swap = any(kernel not in (None, "eager", "sdpa") for _, kernel in attention)
        experts = [(config, config._experts_implementation) for config in _configs(self.model)]
        try:
            self.model.train(dropout)
            for module in self.model.modules():
                if isinstance(module, nn.modules.batchnorm._BatchNorm):
                    module.eval()
            if swap:
                cast(PreTrainedModel, self.model).set_attn_implementation("eager")
            for config, kernel in experts:
                if kernel not in EXPERTS:
                    config._experts_implementation = "eager"
            with sdpa_kernel(SDPBackend.MATH):
                yield
        finally:
            for module, mode in training.items():
                module.training = mode
            if swap:
                for config, kernel in attention:
                    config._attn_implementation = kernel
            for config, kernel in experts:
                config._experts_implementation = kernel


def precision_advice(dtype: torch.dtype) -> str:
    """The way out where a model computes in float64 what is made for float32, a clause that continues a sentence.

    Some models mask by the smallest number of their dtype, which a softmax in float32 takes for −inf; others make
    tensors of float32 whatever the dtype of their parameters is.
    """
    return ", or try float32: model.float()" if dtype == torch.float64 else ""


def _source_of(error: BaseException) -> str:
    """Where the call that raised an error stands: the last line outside of PyTorch."""
    frames = traceback.extract_tb(error.__traceback__)
    torch_folder = os.path.dirname(torch.__file__)
    outside = [frame for frame in frames if not frame.filename.startswith(torch_folder)]
    return f"{os.path.basename(outside[-1].filename)}:{outside[-1].lineno}" if outside else "a line of PyTorch"


def _key(inputs: dict[str, Any]) -> tuple:
    """Which inputs a model is given, and the values of those that are no tensors, such as `output_attentions`."""
    return tuple(sorted((n, "" if isinstance(value, Tensor) else repr(value)) for n, value in inputs.items()))


@contextmanager
def without_tf32() -> Iterator[None]:
    """Inside, convolutions and matrix products on a GPU have all bits of float32, so that rounding is rounding."""
    backends: Any = torch.backends
    kernels = (backends.cuda.matmul, backends.cudnn.conv, backends.cudnn.rnn)
    before = [kernel.fp32_precision for kernel in kernels]
    try:
        for kernel in kernels:
            kernel.fp32_precision = "ieee"
        yield
    finally:
        for kernel, precision in zip(kernels, before, strict=True):
            kernel.fp32_precision = precision


class ConstantPadding(TorchFunctionMode):
    """Inside, lookups in embeddings at `padding_idx` have no tangent, so that forward and backward passes agree.

    PyTorch gives the row no gradient by a lookup, so that training leaves it as it is; forward mode counts it. Where
    the row has a gradient from elsewhere (a tied output layer), J v and Jᵀ w would be those of different functions.
    """

    def __torch_function__(self, func, types, args=(), kwargs=None):
        output = func(*args, **(kwargs or {}))
        if func is nn.functional.embedding:
            return _constant_padding(output, *args, **(kwargs or {}))
        if func is torch.embedding:  # the same without a module, with the table first; −1: no row
            table, tokens, padding = _arguments_of_embedding(*args, **(kwargs or {}))
            return _constant_padding(output, tokens, table, None if padding == -1 else padding)
        return output


def _arguments_of_embedding(weight: Tensor, indices: Tensor, padding_idx: int = -1, *_, **__) -> tuple:
    return weight, indices, padding_idx


def _constant_padding(
    output: Tensor, input: Tensor, weight: Tensor, padding_idx: int | None = None, *_, **__
) -> Tensor:
    """The output of `nn.functional.embedding`, without tangents at `padding_idx`."""
    primal, tangent = forward_ad.unpack_dual(output)
    if padding_idx is None or tangent is None:
        return output
    padding = (input == padding_idx % len(weight)).unsqueeze(-1)
    return forward_ad.make_dual(primal, tangent.masked_fill(padding, 0.0))


def check_vocabulary(name: str, model: nn.Module, objective: TextSettings) -> None:
    """Checks that the embedding table has a row for every token of the objective's tokenizer, if both exist.

    An id beyond the table would end a CUDA process with a message that does not mention tokens.

    Args:
        name: the stage's name, for the message.
        model: the stage's model.
        objective: its attribute `tokenizer`, if any, is asked for its length.

    Raises:
        InputError: the tokenizer has more tokens than the table has rows.
    """
    try:
        base: Any = unwrap(model)
        rows = base.get_input_embeddings().num_embeddings
    except (AttributeError, NotImplementedError):  # no such table: images, a user's own model
        return
    tokens = len(objective.tokenizer) if hasattr(objective.tokenizer, "__len__") else 0
    if tokens > rows:
        raise InputError(
            f"the tokenizer has {tokens:,} tokens, the model of stage {name!r} {rows:,}; expected at most as many: "
            "enlarge the model (model.resize_token_embeddings; model.config.vocab_size in a configuration), or pass "
            "the tokenizer that belongs to it."
        )


def _configs(model: nn.Module) -> list[PretrainedConfig]:
    """Every configuration that the model's modules hold, each once and before those nested in it."""
    configs: dict[int, PretrainedConfig] = {}

    def visit(config: Any) -> None:
        if isinstance(config, PretrainedConfig) and id(config) not in configs:
            configs[id(config)] = config
            for key in config.sub_configs:
                visit(getattr(config, key, None))

    for module in model.modules():
        visit(getattr(module, "config", None))
    return list(configs.values())


@contextmanager
def _memoised(model: nn.Module, varying: set[int], memo: dict) -> Iterator[None]:
    """Inside, the constant parts of the base model return their outputs from `memo`, which their first call fills.

    Constant is the whole base model if none of its parameters varies; else each of its children whose parameters and
    tensor inputs do not vary.
    """
    patched = []
    for name, module in _constant_modules(model, varying):
        # Callers may inspect the signature to learn what the module accepts.
        @functools.wraps(module.forward)
        def forward(*args, _name=name, _forward=module.forward, **kwargs):
            if _name not in memo:
                output = _forward(*args, **kwargs)
                inputs = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
                if any(t.requires_grad or forward_ad.unpack_dual(t).tangent is not None for t in inputs):
                    return output
                memo[_name] = output
            return tree_map(lambda x: x, memo[_name])

        # Accelerate's device hooks set the same attribute; theirs must be restored.
        patched.append((module, vars(module).get("forward")))
        module.forward = forward
    try:
        yield
    finally:
        for module, replaced in patched:
            del module.forward
            if replaced is not None:
                module.forward = replaced


def _is_constant(module: nn.Module, varying: set[int]) -> bool:
    """Whether a module has parameters, and the ids of none of them are in `varying`."""
    parameters = list(module.parameters())
    return bool(parameters) and not any(id(p) in varying for p in parameters)


def _constant_modules(model: nn.Module, varying: set[int]) -> list[tuple[str, nn.Module]]:
    """The modules, with their names as keys of a memo, that depend on no parameter whose id is in `varying`."""
    base = encoder(model)
    if base is unwrap(model):
        return []
    if _is_constant(base, varying):
        return [("base_model", base)]
    # A ModuleList has no `forward` to replace.
    children = [(n, m) for n, m in base.named_children() if not isinstance(m, (nn.ModuleList, nn.ModuleDict))]
    return [(n, m) for n, m in children if _is_constant(m, varying)]


def memo_bytes(memo: dict) -> int:
    """Bytes of the tensors in a `memo` of `FunctionalModel.bind`.

    >>> memo_bytes({"embeddings": (torch.zeros(2, 3), None)})
    24
    """
    return sum(t.nbytes for t in tree_leaves(memo) if isinstance(t, Tensor))


def has_dropout(model: nn.Module) -> bool:
    """Whether the model draws random numbers in training mode.

    True if a dropout module, or an entry of its configuration whose name contains "drop", has a rate above 0.
    """
    modules = any(isinstance(m, nn.modules.dropout._DropoutNd) and m.p > 0 for m in model.modules())
    config = getattr(model, "config", None)
    settings = config.to_dict() if config is not None else {}
    return modules or any("drop" in key and isinstance(rate, float) and rate > 0 for key, rate in settings.items())
