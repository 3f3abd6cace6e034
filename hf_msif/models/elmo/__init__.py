"""ELMo as a `PreTrainedModel`: configuration, tokenizer, models, and a reader of the published weights."""

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForPreTraining,
    AutoModelForSequenceClassification,
    AutoTokenizer,
)

from .configuration import ElmoConfig
from .modeling import BidirectionalLMOutput, ElmoForBidirectionalLM, ElmoForSequenceClassification, ElmoModel
from .tokenization import ElmoTokenizer

__all__ = [
    "BidirectionalLMOutput",
    "ElmoConfig",
    "ElmoForBidirectionalLM",
    "ElmoForSequenceClassification",
    "ElmoModel",
    "ElmoTokenizer",
]

AutoConfig.register(ElmoConfig.model_type, ElmoConfig)
AutoModel.register(ElmoConfig, ElmoModel)
AutoModelForPreTraining.register(ElmoConfig, ElmoForBidirectionalLM)
AutoModelForSequenceClassification.register(ElmoConfig, ElmoForSequenceClassification)
AutoTokenizer.register(ElmoConfig, tokenizer_class=ElmoTokenizer)
