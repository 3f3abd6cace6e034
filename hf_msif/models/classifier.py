"""A feed-forward classifier on the mean embedding of any encoder: the finetuning model of the paper's §4.5."""

from __future__ import annotations

import copy
import inspect
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoModelForSequenceClassification, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import SequenceClassifierOutput

from ..errors import InputError


def mean_state(states: Tensor, attention_mask: Tensor | None) -> Tensor:
    """The mean of `states` (B, T, d) over the tokens whose `attention_mask` (B, T) is 1, or over all without a mask.

    Returns:
        (B, d), in the dtype of `states`; zeros for a row without a real token.

    >>> mean_state(torch.tensor([[[1.0], [3.0], [9.0]]]), torch.tensor([[1, 1, 0]]))
    tensor([[2.]])
    """
    if attention_mask is None:
        return states.mean(1)
    weights = attention_mask.to(states).unsqueeze(-1)
    return (states * weights).sum(1) / weights.sum(1).clamp(min=1)


class FeedForwardClassifierConfig(PretrainedConfig):
    """Configuration of `FeedForwardClassifier`.

    Args:
        encoder: configuration of the encoder (a `PretrainedConfig` or its dict).
        hidden_size: units of the hidden layer; the paper uses 64.
        kwargs: of `PretrainedConfig`, e.g. `num_labels`.
    """

    model_type = "feed_forward_classifier"
    sub_configs = {"encoder": AutoConfig}  # noqa: RUF012  (transformers' own convention)

    def __init__(self, encoder: PretrainedConfig | dict | None = None, hidden_size: int = 64, **kwargs):
        if isinstance(encoder, dict):
            settings = dict(encoder)
            encoder = AutoConfig.for_model(settings.pop("model_type"), **settings)
        self.encoder = encoder
        self.hidden_size = hidden_size
        super().__init__(**kwargs)


class FeedForwardClassifier(PreTrainedModel):
    """logits = W₂ tanh(W₁ h + b₁) + b₂, where h is the mean of the encoder's last hidden states over the real tokens.

    Tokens are real where `attention_mask` is 1; without a mask all are. `input_ids` of shape (B, T) become `logits`
    of shape (B, num_labels).
    """

    config_class = FeedForwardClassifierConfig
    base_model_prefix = "encoder"
    _supports_sdpa = True

    def __init__(self, config: FeedForwardClassifierConfig):
        super().__init__(config)
        self.encoder = AutoModel.from_config(config.encoder)
        if getattr(self.encoder, "pooler", None) is not None:  # the mean does not use it, so it would never be trained
            self.encoder.pooler = None
        self.hidden = nn.Linear(self.encoder.config.hidden_size, config.hidden_size)
        self.classifier = nn.Linear(config.hidden_size, cast(int, config.num_labels))
        self.post_init()

    @classmethod
    def from_encoder(
        cls, pretrained: PreTrainedModel, hidden_size: int = 64, **settings: Any
    ) -> FeedForwardClassifier:
        """A new head on a copy of the encoder of a pretrained model.

        Args:
            pretrained: e.g. a masked or causal LM, with or without a head. It is not modified and shares no memory
                with the classifier.
            hidden_size: units of the hidden layer.
            settings: of `FeedForwardClassifierConfig`, e.g. `num_labels`.

        Returns:
            The classifier in evaluation mode, in the dtype of `pretrained`, but at least float32.

        Raises:
            InputError: `pretrained` is an encoder-decoder, takes no attention mask, or is not what
                `AutoModel.from_config` builds from its configuration.
        """
        kind = type(pretrained.base_model)
        if getattr(pretrained.config, "is_encoder_decoder", False):
            raise InputError(f"{kind.__name__} is an encoder-decoder; FeedForwardClassifier needs an encoder alone.")
        if "attention_mask" not in inspect.signature(kind.forward).parameters:
            raise InputError(
                f"{kind.__name__} takes no attention_mask: its output for a sentence would depend on the padding. Use "
                "an encoder that takes one."
            )
        dtype = torch.promote_types(pretrained.dtype, torch.float32)
        encoder = copy.deepcopy(pretrained.config)
        encoder.dtype = dtype
        model = cls(FeedForwardClassifierConfig(encoder, hidden_size, dtype=dtype, **settings))
        model.to(dtype)  # type: ignore[arg-type]  # transformers wraps `to` in something that loses its self
        missing, unexpected = model.encoder.load_state_dict(pretrained.base_model.state_dict(), strict=False)
        unknown = [name for name in unexpected if "pooler" not in name.split(".")]
        if missing or unknown:
            raise InputError(
                f"{kind.__name__} is not the encoder that AutoModel makes of its configuration: the tensor "
                f"{[*missing, *unknown][0]!r} is in one of them only."
            )
        return model.eval()

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, **inputs) -> SequenceClassifierOutput:
        accepted = inspect.signature(self.encoder.forward).parameters
        if "token_type_ids" not in accepted:
            inputs.pop("token_type_ids", None)
        if "use_cache" in accepted:  # nothing is generated, and RWKV's state, written in place, has no gradient
            inputs = {"use_cache": False, **inputs}
        states = self.encoder(input_ids=input_ids, attention_mask=attention_mask, **inputs).last_hidden_state
        mean = mean_state(states, attention_mask)
        return SequenceClassifierOutput(logits=self.classifier(torch.tanh(self.hidden(mean))))


AutoConfig.register(FeedForwardClassifierConfig.model_type, FeedForwardClassifierConfig)
AutoModelForSequenceClassification.register(FeedForwardClassifierConfig, FeedForwardClassifier)
