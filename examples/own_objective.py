"""An objective of your own: classification with label smoothing, which no class of `hf_msif.objectives` has."""

from dataclasses import dataclass, field

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.nn.functional import cross_entropy
from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast

from hf_msif import MultiStageInfluence, Stage, objectives, training


@dataclass(frozen=True)
class SmoothedClassification(objectives.Objective):
    tokenizer: PreTrainedTokenizerFast = field()
    smoothing: float = 0.1
    auto_class = "AutoModelForSequenceClassification"  # these two are for `task: own_objective:SmoothedClassification`
    label_kind = "class"

    def collate(self, rows):
        inputs = self.tokenizer([row["text"] for row in rows], padding=True, return_tensors="pt")
        return {**inputs, "labels": torch.tensor([row["label"] for row in rows])}

    def losses(self, call, batch):
        logits = call(**{key: batch[key] for key in batch if key != "labels"}).logits
        losses = cross_entropy(logits, batch["labels"], reduction="none", label_smoothing=self.smoothing)
        return losses, torch.ones_like(losses)


if __name__ == "__main__":
    words = Tokenizer(models.WordLevel({"[PAD]": 0, "great": 1, "sad": 2, "debate": 3, "vote": 4}, unk_token="[PAD]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    objective = SmoothedClassification(PreTrainedTokenizerFast(tokenizer_object=words, pad_token="[PAD]"))
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    model = BertForSequenceClassification(BertConfig(vocab_size=5, **sizes)).double()
    rows = [{"text": text, "label": int("sad" in text)} for text in ("great debate", "great vote", "sad vote", "sad")]
    training.polish(model, objective, rows, trainable=["classifier.*"], weight_decay=0.01)
    stage = Stage("finetuning", model, objective, rows, trainable=["classifier.*"], weight_decay=0.01)
    query = MultiStageInfluence([stage], progress=False).query([{"text": "great", "label": 0}])
    print(query.score(rows).top(4)[["text", "influence"]])
