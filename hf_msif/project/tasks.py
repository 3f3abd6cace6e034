"""Tasks: which objective a stage has, which models it takes, and what its rows hold. Imports no torch.

A new task is one line of `TASKS`, and its objective. A task of your own is "mypackage.mymodule:MyObjective"; what the
table says of other tasks, class attributes of `objectives.Objective` say of it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from ..errors import InputError
from .plugins import imported, is_dotted, parameters


@dataclass(frozen=True)
class Task:
    """What a configuration knows of a task.

    Args:
        objective: its class, as "module:Name".
        auto_class: the class of transformers that loads and makes its models.
        content: what a row holds; "words": a text as a list of words.
        label_kind: "class": a row has a label, and a new model's head has one output per class; "classes": a list of
            them; "number": a number, and a head with one output; None: no labels.
        columns: further columns that a row needs.
        problem_type: of a new model's configuration.
        needs_tokenizer: whether it reads tokens.
        inherits_head: whether a stage goes on with the head of the stage before, where both have the same model class.
    """

    objective: str
    auto_class: str
    content: Literal["text", "image", "words"] = "text"
    label_kind: Literal["class", "classes", "number"] | None = None
    columns: tuple[str, ...] = ()
    problem_type: str | None = None
    needs_tokenizer: bool = True
    inherits_head: bool = True

    def objective_class(self, key: str) -> type:
        """The objective's class, imported; `key` is the configuration key of the task, for messages."""
        from ..objectives import Objective

        return imported(self.objective, key, Objective)


_CLASSES: dict[str, Any] = {"label_kind": "class", "inherits_head": False}
_IMAGES: dict[str, Any] = {"content": "image", "needs_tokenizer": False}

TASKS = {
    "masked-lm": Task("hf_msif.objectives:MaskedLM", "AutoModelForMaskedLM"),
    "causal-lm": Task("hf_msif.objectives:CausalLM", "AutoModelForCausalLM"),
    "sequence-to-sequence": Task("hf_msif.objectives:Seq2SeqLM", "AutoModelForSeq2SeqLM", columns=("target",)),
    "masked-lm-next-sentence": Task(
        "hf_msif.objectives:NextSentenceMaskedLM",
        "AutoModelForPreTraining",
        columns=("text_pair", "next_sentence_label"),
    ),
    "replaced-tokens": Task("hf_msif.objectives:ReplacedTokenDetection", "AutoModelForPreTraining"),
    "bidirectional-lm": Task("hf_msif.objectives:BidirectionalLM", "AutoModelForPreTraining"),
    "skip-gram": Task("hf_msif.objectives:SkipGram", "AutoModelForPreTraining"),
    "sequence-classification": Task(
        "hf_msif.objectives:SequenceClassification", "AutoModelForSequenceClassification", **_CLASSES
    ),
    "token-classification": Task(
        "hf_msif.objectives:TokenClassification",
        "AutoModelForTokenClassification",
        content="words",
        **_CLASSES | {"label_kind": "classes"},
    ),
    "multi-label-classification": Task(
        "hf_msif.objectives:MultiLabel",
        "AutoModelForSequenceClassification",
        problem_type="multi_label_classification",
        **_CLASSES | {"label_kind": "classes"},
    ),
    "regression": Task(
        "hf_msif.objectives:Regression",
        "AutoModelForSequenceClassification",
        problem_type="regression",
        **_CLASSES | {"label_kind": "number"},
    ),
    "image-classification": Task(
        "hf_msif.objectives:ImageClassification", "AutoModelForImageClassification", **_CLASSES, **_IMAGES
    ),
}


def task_of(name: str, key: str) -> Task:
    """The task of that name, or of the objective "module:Name", which is imported.

    Raises:
        InputError: `name` names no objective, or one without `auto_class`; `key` is where it stands.
    """
    if not is_dotted(name):
        return TASKS[name]
    from ..objectives import Objective

    objective = imported(name, key, Objective)
    if objective.auto_class is None:
        raise InputError(
            f"{key} is {name!r}, which does not say what models it takes; expected a class attribute such as "
            "auto_class = 'AutoModelForSequenceClassification'."
        )
    return Task(
        name,
        objective.auto_class,
        content="image" if objective.text_column is None else "words" if objective.words else "text",
        label_kind=objective.label_kind,
        columns=objective.columns,
        problem_type=objective.problem_type,
        needs_tokenizer="tokenizer" in parameters(objective),
        inherits_head=objective.label_kind is None,
    )
