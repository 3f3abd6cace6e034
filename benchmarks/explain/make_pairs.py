"""Four pairs of checkpoints that know nothing of hf_msif, made with `transformers` and `peft` alone by plain Trainers.

    python benchmarks/explain/make_pairs.py --sentences news.en.heldout.txt --tweets Sentiment.csv
    msif explain --pretrained runs/pairs/bert/pretrained --finetuned runs/pairs/bert/finetuned \\
        --corpus runs/pairs/sentences.txt --finetuning-data runs/pairs/tweets.csv --text "..."

| pair | pretrained | finetuned |
| --- | --- | --- |
| bert | a BERT of 4 layers from nothing, 500 sentences | all weights; the Trainer's output folder as it is |
| lora | that of bert, which is made before | LoRA on queries and values, saved by PEFT |
| llama | a Llama of 2 layers from nothing | all weights |
| minilm | MiniLM's published weights, pretrained for 60 more steps | the head, the encoder frozen |

Data: download news.en.heldout.txt from statmt.org/lm-benchmark, and Sentiment.csv from Kaggle
(crowdflower/first-gop-debate-twitter-sentiment).
"""

from __future__ import annotations

import argparse
import csv
import random
from pathlib import Path
from typing import Any

import torch
import transformers
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForMaskedLM,
    DataCollatorForLanguageModeling,
    DataCollatorWithPadding,
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainingArguments,
)

LABELS = ("Negative", "Positive")
CLASSES = {
    "num_labels": 2,
    "id2label": dict(enumerate(LABELS)),
    "label2id": {name: i for i, name in enumerate(LABELS)},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sentences", type=Path, default=Path("data/one_billion_word/news.en.heldout.txt"))
    parser.add_argument("--tweets", type=Path, default=Path("data/gop_debate/Sentiment.csv"))
    parser.add_argument("--tokenizer", default="google-bert/bert-base-uncased", help="Hub id or folder")
    parser.add_argument("--minilm", default="sentence-transformers/all-MiniLM-L6-v2", help="Hub id or folder")
    parser.add_argument("--pairs", nargs="+", default=list(PAIRS), choices=list(PAIRS))
    parser.add_argument("--output", type=Path, default=Path("runs/pairs"))
    args = parser.parse_args()
    transformers.logging.set_verbosity_error()
    args.output.mkdir(parents=True, exist_ok=True)
    sentences, tweets = write_data(args)
    for name in args.pairs:
        transformers.set_seed(0)
        PAIRS[name](args, args.output / name, sentences, tweets)
        print(f"{name}: {args.output / name}")


def write_data(args: argparse.Namespace) -> tuple[list[str], list[dict[str, str]]]:
    """500 sentences and 400 tweets, half of them positive, as files that a user would have."""
    lines = [line.strip() for line in args.sentences.read_text(encoding="utf-8").splitlines()]
    sentences = random.Random(0).sample([line for line in lines if 8 <= len(line.split()) <= 24], 500)
    (args.output / "sentences.txt").write_text("\n".join(sentences) + "\n", encoding="utf-8")
    with args.tweets.open(encoding="utf-8", newline="") as file:
        by_text = {row["text"]: row["sentiment"] for row in csv.DictReader(file)}
    tweets = []
    for label in LABELS:
        texts = sorted(text for text, sentiment in by_text.items() if sentiment == label)
        tweets += [{"text": text, "sentiment": label} for text in random.Random(0).sample(texts, 200)]
    random.Random(0).shuffle(tweets)
    with (args.output / "tweets.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, ["text", "sentiment"])
        writer.writeheader()
        writer.writerows(tweets)
    return sentences, tweets


def trained(
    model: Any, tokenizer: Any, rows: list[dict[str, Any]], collator: Any, folder: Path, **settings: Any
) -> None:
    """Trains by a plain Trainer, and saves the model with its tokenizer."""
    columns = [{**tokenizer(row["text"], truncation=True, max_length=64), **row} for row in rows]
    data = Dataset.from_list([{k: v for k, v in row.items() if k != "text"} for row in columns])
    arguments = TrainingArguments(str(folder), report_to=[], save_strategy="no", use_cpu=True, **settings)
    trainer = Trainer(model, arguments, data_collator=collator, train_dataset=data, processing_class=tokenizer)
    trainer.train()
    trainer.save_model()


def pretrained(model: Any, tokenizer: Any, sentences: list[str], folder: Path, masked: bool, **settings: Any) -> None:
    collator = DataCollatorForLanguageModeling(tokenizer, mlm=masked)
    trained(model, tokenizer, [{"text": text} for text in sentences], collator, folder, **settings)


def finetuned(model: Any, tokenizer: Any, tweets: list[dict[str, str]], folder: Path, **settings: Any) -> None:
    rows = [{"text": tweet["text"], "labels": LABELS.index(tweet["sentiment"])} for tweet in tweets]
    trained(model, tokenizer, rows, DataCollatorWithPadding(tokenizer), folder, num_train_epochs=5, **settings)


def bert(args: argparse.Namespace, folder: Path, sentences: list[str], tweets: list[dict[str, str]]) -> None:
    tokenizer = AutoTokenizer.from_pretrained(args.tokenizer, model_max_length=128)
    sizes = {"hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 512}
    model = BertForMaskedLM(BertConfig(vocab_size=len(tokenizer), max_position_embeddings=128, **sizes))
    settings = {"num_train_epochs": 10, "learning_rate": 1e-3, "per_device_train_batch_size": 32}
    pretrained(model, tokenizer, sentences, folder / "pretrained", masked=True, **settings)
    model = AutoModelForSequenceClassification.from_pretrained(folder / "pretrained", **CLASSES)
    finetuned(model, tokenizer, tweets, folder / "finetuned", learning_rate=2e-4)


def lora(args: argparse.Namespace, folder: Path, sentences: list[str], tweets: list[dict[str, str]]) -> None:
    base = folder.parent / "bert" / "pretrained"
    tokenizer = AutoTokenizer.from_pretrained(base)
    model = AutoModelForSequenceClassification.from_pretrained(base, **CLASSES)
    saved = ["pooler", "classifier"]  # a masked-LM BERT has no pooler: without this, PEFT would not save it either
    settings = LoraConfig(task_type="SEQ_CLS", r=8, target_modules=["query", "value"], modules_to_save=saved)
    finetuned(get_peft_model(model, settings), tokenizer, tweets, folder / "finetuned", learning_rate=2e-3)


def llama(args: argparse.Namespace, folder: Path, sentences: list[str], tweets: list[dict[str, str]]) -> None:
    tokenizer = AutoTokenizer.from_pretrained(args.tokenizer, model_max_length=128)
    sizes = {"hidden_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 256}
    ends = {"pad_token_id": tokenizer.pad_token_id, "bos_token_id": None, "eos_token_id": tokenizer.sep_token_id}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), max_position_embeddings=128, **sizes, **ends))
    settings = {"num_train_epochs": 10, "learning_rate": 2e-3, "per_device_train_batch_size": 32}
    pretrained(model, tokenizer, sentences, folder / "pretrained", masked=False, **settings)
    model = AutoModelForSequenceClassification.from_pretrained(folder / "pretrained", **CLASSES)
    finetuned(model, tokenizer, tweets, folder / "finetuned", learning_rate=5e-4)


def minilm(args: argparse.Namespace, folder: Path, sentences: list[str], tweets: list[dict[str, str]]) -> None:
    tokenizer = AutoTokenizer.from_pretrained(args.minilm)
    model = AutoModelForMaskedLM.from_pretrained(args.minilm)
    settings = {"max_steps": 60, "learning_rate": 1e-4, "per_device_train_batch_size": 16}
    pretrained(model, tokenizer, sentences, folder / "pretrained", masked=True, **settings)
    model = AutoModelForSequenceClassification.from_pretrained(folder / "pretrained", **CLASSES)
    model.base_model.requires_grad_(False)
    for module in (model.classifier, model.base_model.pooler):
        module.requires_grad_(True)
    finetuned(model, tokenizer, tweets, folder / "finetuned", learning_rate=2e-3)


PAIRS = {"bert": bert, "lora": lora, "llama": llama, "minilm": minilm}


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
