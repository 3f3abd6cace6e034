"""ELMo (Peters et al., 2018): a bidirectional language model over characters, and a classifier on its layers."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any, Self, cast

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel, initialization
from transformers.modeling_outputs import BaseModelOutput, ModelOutput, SequenceClassifierOutput

from ...errors import InputError
from .configuration import ElmoConfig
from .layers import CharacterEncoder, LstmLayer, Packing, ScalarMix, exact_losses, sampled_losses


@dataclass
class BidirectionalLMOutput(ModelOutput):
    """Output of `ElmoForBidirectionalLM` for the M pairs of neighbouring real tokens of a batch, row by row.

    Attributes:
        loss: mean of `losses`, a scalar.
        logits: (2, M, V). [0, m] predicts the right token of pair m from all tokens before it; [1, m] predicts the
            left token from all tokens after it.
        losses: (2, M), −log p of these tokens.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    losses: Tensor | None = None


class ElmoPreTrainedModel(PreTrainedModel):
    """What the ELMo models share: configuration, initial weights, reading published weights, carried state."""

    config_class = ElmoConfig
    base_model_prefix = "elmo"
    main_input_name = "input_ids"

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, (nn.Linear, nn.Conv1d)):
            initialization.normal_(module.weight, std=module.weight[0].numel() ** -0.5)
            if module.bias is not None and not getattr(module.bias, "_is_hf_initialized", False):
                where, value = getattr(module, "initial_bias", (slice(None), 0.0))
                module.bias.zero_()[where] = value
        elif isinstance(module, nn.Embedding):
            initialization.uniform_(module.weight, -1.0, 1.0)
            if not getattr(module.weight, "_is_hf_initialized", False):
                module.weight[module.padding_idx] = 0
        elif isinstance(module, ScalarMix):
            initialization.zeros_(module.scores)
            initialization.ones_(module.gamma)

    def _mask(self, input_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
        """Whether each token is real, bool (B, T)."""
        expected = self.config.max_characters
        if input_ids.dim() != 3 or input_ids.shape[2] != expected:
            raise InputError(
                f"input_ids have the shape {tuple(input_ids.shape)}; expected (sentences, tokens, {expected}) "
                "character ids, as ElmoTokenizer makes them."
            )
        return input_ids[:, :, 0] != 0 if attention_mask is None else attention_mask.bool()

    def reset_states(self) -> None:
        """Deletes the state that a stateful model carries from batch to batch."""
        cast(ElmoModel, self.base_model)._carried = {}

    @classmethod
    def from_allennlp(cls, options_file: str | os.PathLike, weight_file: str | os.PathLike, **settings: Any) -> Self:
        """Reads a published model from the files that AllenNLP and bilm-tf write.

        Args:
            options_file: JSON, e.g. `elmo_2x4096_512_2048cnn_2xhighway_options.json`.
            weight_file: HDF5, e.g. `elmo_2x4096_512_2048cnn_2xhighway_weights.hdf5`: the encoder W.
            settings: of `ElmoConfig`, e.g. `stateful` or `num_labels`; for `ElmoForBidirectionalLM` also
                `softmax_file` (HDF5): the published U.

        Returns:
            The model in evaluation mode, float32. Without `softmax_file` U is random, with a warning.

        Raises:
            InputError: a file cannot be read, or does not hold such a model.
        """
        from .allennlp import build

        return build(cls, options_file, weight_file, **settings)


class ElmoModel(ElmoPreTrainedModel):
    """A character CNN and a stack of LSTMs for each direction; this is the encoder W.

    Args:
        config: an `ElmoConfig`.
        add_scalar_mix: return a `ScalarMix` of all layers instead of the last layer. Language modelling reads the
            last layer, so that stages do not share the mix.
    """

    def __init__(self, config: ElmoConfig, add_scalar_mix: bool = False):
        super().__init__(config)
        self.characters = CharacterEncoder(config)
        self.forward_layers, self.backward_layers = (
            nn.ModuleList(LstmLayer(config) for _ in range(config.num_hidden_layers)) for _ in range(2)
        )
        self.dropout = nn.Dropout(config.dropout)
        self.scalar_mix = ScalarMix(config) if add_scalar_mix else None
        self._carried: dict[str, tuple[Tensor, Tensor]] = {}
        self.post_init()

    def get_input_embeddings(self) -> nn.Embedding:
        return self.characters.embedding

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.characters.embedding = cast(nn.Embedding, value)

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, output_hidden_states: bool = False, **_
    ) -> BaseModelOutput:
        """
        Args:
            input_ids: (B, T, max_characters) character ids.
            attention_mask: (B, T), 1 for real tokens, which come first; None: a token is padding if its first
                character is 0.
            output_hidden_states: also return all layers; the first has the word vectors, once per direction.

        Returns:
            `last_hidden_state` (B, T, 2 · projection): the last layer, forward then backward half, or the scalar mix
            of all layers; zero on padding. `hidden_states`: a tuple of such tensors, or None.

        Raises:
            InputError: `input_ids` has another shape, or there is padding before or inside a sentence.
        """
        mask = self._mask(input_ids, attention_mask)
        packing = Packing.of(mask)
        words = self.characters(input_ids.flatten(0, 1)[packing.forward])
        forward = self._stack("forward", words, packing)
        backward = [h[packing.turned] for h in self._stack("backward", words[packing.turned], packing)]
        indices = range(len(forward)) if output_hidden_states or self.scalar_mix is not None else [-1]
        layers = tuple(self._unpacked(torch.cat([forward[i], backward[i]], 1), packing, mask.shape) for i in indices)
        last = self.scalar_mix(layers) if self.scalar_mix is not None else layers[-1]
        return BaseModelOutput(last_hidden_state=last, hidden_states=layers if output_hidden_states else None)

    def _stack(self, direction: str, x: Tensor, packing: Packing) -> list[Tensor]:
        """The packed hidden states (N, projection) of one direction: the words, then each layer's output."""
        states = [x]
        for depth, layer in enumerate(getattr(self, f"{direction}_layers")):
            key, start = f"{direction}.{depth}", None
            if self.config.stateful:
                start = self._start(key, packing, x)
            out, end = layer(self.dropout(x), packing.sizes, start)
            if self.config.stateful:
                self._carry(key, packing, end)
            x = out + x if depth and self.config.use_skip_connections else out
            states.append(x)
        return [*states[:-1], self.dropout(x)]

    @staticmethod
    def _unpacked(packed: Tensor, packing: Packing, shape: torch.Size) -> Tensor:
        """Packed states (N, d) as a batch (B, T, d), zero on padding."""
        padded = torch.cat([packed, packed.new_zeros(1, packed.shape[1])])
        return padded[packing.place].view(*shape, -1)

    def _start(self, key: str, packing: Packing, like: Tensor) -> tuple[Tensor, Tensor]:
        """The carried (h, c) from which each row of the batch continues, in packed order; zeros for new rows."""
        rows = len(packing.order)
        sizes = (self.config.projection_size, self.config.cell_size)
        carried = self._carried.get(key, [like.new_zeros(0, size) for size in sizes])
        h, c = (
            torch.cat([state, state.new_zeros(max(0, rows - len(state)), state.shape[1])])[packing.order]
            for state in carried
        )
        return h, c

    def _carry(self, key: str, packing: Packing, end: tuple[Tensor, Tensor]) -> None:
        """Stores the final (h, c) of each row of the batch; further rows of an earlier batch keep their state."""
        batch_order, carried = packing.order.argsort(), self._carried.get(key)
        ends = [state.detach()[batch_order] for state in end]
        if carried is not None:
            ends = [torch.cat([new, old[len(new) :]]) for new, old in zip(ends, carried, strict=True)]
        self._carried[key] = (ends[0], ends[1])


class ElmoForBidirectionalLM(ElmoPreTrainedModel):
    """`ElmoModel` (W) and one softmax over words for both directions (U).

    Its losses are −log p(next word) and −log p(previous word).
    """

    def __init__(self, config: ElmoConfig):
        super().__init__(config)
        self.elmo = ElmoModel(config)
        self.lm_head = nn.Linear(config.projection_size, config.vocab_size)
        self.post_init()

    def get_output_embeddings(self) -> nn.Linear:
        return self.lm_head

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        output_logits: bool | None = None,
        **_,
    ) -> BidirectionalLMOutput:
        """
        Args:
            input_ids: (B, T, max_characters) character ids.
            attention_mask: (B, T), 1 for real tokens, which come first; None: a token is padding if its first
                character is 0.
            labels: (B, T) word ids of the tokens, as `ElmoTokenizer(..., return_labels=True)` makes them; None: the
                output has logits only.
            output_logits: True: logits only. False: losses only, computed in chunks whose logits are not kept. None:
                both. In training with `sampled_softmax` there are losses only.

        Raises:
            InputError: a label is no word id of the model.
        """
        mask = self._mask(input_ids, attention_mask)
        states, width = self.elmo(input_ids, mask).last_hidden_state, self.config.projection_size
        rows, left = (mask[:, 1:] & mask[:, :-1]).nonzero(as_tuple=True)
        states = torch.stack([states[rows, left, :width], states[rows, left + 1, width:]])
        sampled = self.training and self.config.sampled_softmax
        if labels is None:
            return BidirectionalLMOutput(logits=self.lm_head(states))
        targets = torch.stack([labels[rows, left + 1], labels[rows, left]])
        if targets.numel() and not 0 <= int(targets.min()) <= int(targets.max()) < self.config.vocab_size:
            raise InputError(
                f"labels run from {int(targets.min())} to {int(targets.max())}, but the model predicts "
                f"{self.config.vocab_size:,} words: set vocab_size to the number of words of the tokenizer."
            )
        if output_logits and not sampled:
            return BidirectionalLMOutput(logits=self.lm_head(states))
        logits = None
        if sampled:
            losses = sampled_losses(self.lm_head, states.flatten(0, 1), targets.flatten(), sampled)
        elif output_logits is False:
            losses = exact_losses(self.lm_head, states.flatten(0, 1), targets.flatten())
        else:
            logits = self.lm_head(states)
            losses = functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
        return BidirectionalLMOutput(losses.mean(), logits, losses.view_as(targets))


class ElmoForSequenceClassification(ElmoPreTrainedModel):
    """logits = W₂ tanh(W₁ h + b₁) + b₂, where h is the mean of the scalar mix over the words of a sentence.

    `ElmoModel` is W; the mix and the classifier are Θ. The tokens that mark the ends of a sentence are not words. The
    logits have the shape (B, num_labels).
    """

    def __init__(self, config: ElmoConfig):
        super().__init__(config)
        self.elmo = ElmoModel(config)
        self.scalar_mix = ScalarMix(config)
        self.hidden = nn.Linear(config.hidden_size, config.classifier_hidden_size)
        self.classifier = nn.Linear(config.classifier_hidden_size, cast(int, config.num_labels))
        self.post_init()

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, labels: Tensor | None = None, **_
    ) -> SequenceClassifierOutput:
        mask = self._mask(input_ids, attention_mask)
        layers = self.elmo(input_ids, mask, output_hidden_states=True).hidden_states
        # The words are the tokens that have a token on both sides.
        words = functional.pad(mask[:, 2:], (1, 1)).to(layers[0]).unsqueeze(-1)
        means = tuple((layer * words).sum(1) / words.sum(1).clamp(min=1) for layer in layers)
        logits = self.classifier(torch.tanh(self.hidden(self.scalar_mix(means))))
        loss = None if labels is None else functional.cross_entropy(logits, labels)
        return SequenceClassifierOutput(loss=loss, logits=logits)
