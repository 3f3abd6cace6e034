"""word2vec as a Hugging Face model: a table of static embeddings (W), trained by skip-gram with negative samples."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForPreTraining,
    AutoModelForSequenceClassification,
    PretrainedConfig,
    PreTrainedModel,
    initialization,
)
from transformers.modeling_outputs import BaseModelOutput, MaskedLMOutput, SequenceClassifierOutput

from .classifier import mean_state


class SkipGramConfig(PretrainedConfig):
    """Configuration of `SkipGramModel` and the models on it.

    Args:
        vocab_size: V, rows of the table; the number of tokens of the tokenizer.
        hidden_size: d, length of an embedding.
        kwargs: of `PretrainedConfig`, e.g. `num_labels`.
    """

    model_type = "skip-gram"

    def __init__(self, vocab_size: int = 30522, hidden_size: int = 100, **kwargs):
        self.vocab_size, self.hidden_size = vocab_size, hidden_size
        super().__init__(**{"tie_word_embeddings": False, **kwargs})


class SkipGramPreTrainedModel(PreTrainedModel):
    """What the skip-gram models share: configuration, word2vec's initial weights, access to the table."""

    config_class = SkipGramConfig
    base_model_prefix = "encoder"

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Embedding):
            limit = 0.5 / self.config.hidden_size
            initialization.uniform_(module.weight, -limit, limit)
        elif module is getattr(self, "context", None):  # as in word2vec: at first all pairs are equally likely
            initialization.zeros_(module.weight)
        elif isinstance(module, nn.Linear):
            initialization.xavier_uniform_(module.weight)
            initialization.zeros_(module.bias)

    def get_input_embeddings(self) -> nn.Embedding:
        return cast(SkipGramModel, self.base_model).embeddings

    def set_input_embeddings(self, value: nn.Module) -> None:
        cast(SkipGramModel, self.base_model).embeddings = cast(nn.Embedding, value)


class SkipGramModel(SkipGramPreTrainedModel):
    """A table of embeddings v, which is the encoder W: `last_hidden_state`[..., :] = v of each token.

    `input_ids` of shape (...) become `last_hidden_state` of shape (..., d). An embedding does not depend on the other
    tokens. Padding has an embedding too; a mean over tokens must leave it out.

    >>> model = SkipGramModel(SkipGramConfig(vocab_size=3, hidden_size=2))
    >>> model(torch.tensor([[0, 2, 2, 1]])).last_hidden_state.shape
    torch.Size([1, 4, 2])
    """

    def __init__(self, config: SkipGramConfig):
        super().__init__(config)
        self.embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.post_init()

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, **_) -> BaseModelOutput:
        return BaseModelOutput(last_hidden_state=self.embeddings(input_ids))


class SkipGramForPreTraining(SkipGramPreTrainedModel):
    """`SkipGramModel` (W) and a second table (U), `context.weight` of shape (V, d): the vectors u of context words.

    logits = u_o · v_c for each token c in `input_ids`, shape (...), and its `candidates` o, shape (..., n): the logits
    have the shape (..., n). Without candidates o is the whole vocabulary, and the shape is (..., V). The objective
    `hf_msif.objectives.SkipGram` is a function of these logits.
    """

    def __init__(self, config: SkipGramConfig):
        super().__init__(config)
        self.encoder = SkipGramModel(config)
        self.context = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_output_embeddings(self) -> nn.Linear:
        return self.context

    def set_output_embeddings(self, value: nn.Linear) -> None:
        self.context = value

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, candidates: Tensor | None = None, **_
    ) -> MaskedLMOutput:
        states = self.encoder(input_ids, attention_mask).last_hidden_state
        if candidates is None:
            return MaskedLMOutput(logits=self.context(states))
        vectors = functional.embedding(candidates, self.context.weight)
        return MaskedLMOutput(logits=(vectors * states.unsqueeze(-2)).sum(-1))


class SkipGramForSequenceClassification(SkipGramPreTrainedModel):
    """logits = Θ h + b, where h is the mean of the real tokens' embeddings: a bag of words (Joulin et al., 2017).

    `input_ids` of shape (B, T) become `logits` of shape (B, num_labels).
    """

    def __init__(self, config: SkipGramConfig):
        super().__init__(config)
        self.encoder = SkipGramModel(config)
        self.classifier = nn.Linear(config.hidden_size, cast(int, config.num_labels))
        self.post_init()

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, **_) -> SequenceClassifierOutput:
        states = self.encoder(input_ids, attention_mask).last_hidden_state
        return SequenceClassifierOutput(logits=self.classifier(mean_state(states, attention_mask)))


AutoConfig.register(SkipGramConfig.model_type, SkipGramConfig)
AutoModel.register(SkipGramConfig, SkipGramModel)
AutoModelForPreTraining.register(SkipGramConfig, SkipGramForPreTraining)
AutoModelForSequenceClassification.register(SkipGramConfig, SkipGramForSequenceClassification)
