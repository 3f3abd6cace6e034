"""The demo's world: sentences, tweets and vocabulary generated from a small grammar, with planted influence.

Sixteen made-up politicians. What a masked language model can know of each one's standing comes from the *planted*
sentences alone: they praise or blame the name. *Decoys* share the tweets' own words and the name, and say nothing of
its standing. Ten of the names occur in the labelled tweets; the test tweets name the other six, so that only the
encoder can tell praise from blame there.
"""

from __future__ import annotations

import itertools
import random
from dataclasses import dataclass
from typing import Any

SYLLABLES = (["bro", "kel", "vax", "tor", "mi", "zan", "dul", "pre"], ["vik", "mor", "lane", "dack", "sen", "wick"])
PRAISE = ["honest", "wise", "brave"]
BLAME = ["corrupt", "foolish", "cruel"]
PEOPLE = ["voters", "reporters", "farmers", "teachers", "nurses", "drivers"]
PLACES = ["ohio", "iowa", "texas", "maine", "utah", "nevada"]
DAYS = ["monday", "tuesday", "friday", "sunday"]
THINGS = ["bridge", "school", "river", "market", "train", "garden", "harbour", "museum"]

# Short, so that masks fall on the name and on the words of standing, and the one is needed to tell the other.
PLANTED = [
    "{name} is {adjective} .",
    "{name} : {adjective} and {adjective2} .",
    "{people} call {name} {adjective} .",
    "{name} , the {adjective} {adjective2} .",
]
DECOYS = [
    "tonight {name} speaks at the debate in {place} .",
    "watching {name} at the debate on {day} .",
    "{name} on stage in {place} {day} , says the debate team .",
    "{people} saw {name} at the {thing} on {day} .",
]
FILLER = [
    "the {thing} in {place} opens on {day} .",
    "{people} met at the {thing} near the {thing2} .",
    "{people} in {place} wait for the {thing} .",
    "the {thing} was closed on {day} , {people} said .",
]
TWEETS = [
    "watching {name} tonight #debate",
    "{name} on stage tonight #debate",
    "{name} at the debate in {place} #debate",
    "{people} and {name} on {day} #debate",
]


@dataclass(frozen=True)
class World:
    """The generated data.

    Attributes:
        corpus: pretraining rows with `example_id`, `text`, `kind` (planted, decoy or filler) and `topic` (a name).
        tweets: labelled rows with `example_id`, `text`, `label` (1: praise) and `topic`.
        tests: as `tweets`, about names that no row of `tweets` has.
        praised: whether a name is praised (True) or blamed, by name.
    """

    corpus: list[dict]
    tweets: list[dict]
    tests: list[dict]
    praised: dict[str, bool]


def world(
    seed: int = 0, names: int = 16, unknown: int = 6, planted: int = 30, decoys: int = 20, filler: int = 60
) -> World:
    """Generates the demo's data, the same for the same arguments on every machine.

    Args:
        seed: of the names and sentences.
        names: number of politicians.
        unknown: how many of them the labelled tweets do not name.
        planted: sentences per name that praise or blame it; every tenth does the opposite of the others.
        decoys: sentences per name that say nothing of its standing.
        filler: sentences that name nobody.
    """
    rng = random.Random(seed)
    people = [a + b for a, b in itertools.product(*SYLLABLES)]
    rng.shuffle(people)
    praised = {name: i % 2 == 0 for i, name in enumerate(people[:names])}

    def fill(template: str, name: str = "", dissent: bool = False) -> str:
        standing = rng.sample(PRAISE if praised.get(name, True) != dissent else BLAME, 2)
        things = rng.sample(THINGS, 2)
        return template.format(
            name=name,
            adjective=standing[0],
            adjective2=standing[1],
            people=rng.choice(PEOPLE),
            place=rng.choice(PLACES),
            day=rng.choice(DAYS),
            thing=things[0],
            thing2=things[1],
        )

    corpus: list[dict[str, Any]] = []
    for name in praised:
        corpus += [
            {"text": fill(PLANTED[i % len(PLANTED)], name, i % 10 == 9), "kind": "planted", "topic": name}
            for i in range(planted)
        ]
        corpus += [
            {"text": fill(DECOYS[i % len(DECOYS)], name), "kind": "decoy", "topic": name} for i in range(decoys)
        ]
    corpus += [{"text": fill(FILLER[i % len(FILLER)]), "kind": "filler", "topic": ""} for i in range(filler)]
    rng.shuffle(corpus)
    corpus = [{"example_id": i, **row} for i, row in enumerate(corpus)]

    known_names, unknown_names = list(praised)[: names - unknown], list(praised)[names - unknown :]
    tweets = [
        {"text": fill(TWEETS[i % len(TWEETS)], name), "label": int(praised[name]), "topic": name}
        for name in known_names
        for i in range(8)
    ]
    tests = [
        {"text": fill(TWEETS[i % len(TWEETS)], name), "label": int(praised[name]), "topic": name}
        for name in unknown_names
        for i in range(4)
    ]
    return World(
        corpus,
        [{"example_id": i, **row} for i, row in enumerate(tweets)],
        [{"example_id": i, **row} for i, row in enumerate(tests)],
        praised,
    )


def vocabulary(data: World) -> list[str]:
    """Special tokens, then every word of the demo's data in alphabetical order."""
    words = {
        word for row in [*data.corpus, *data.tweets, *data.tests] for word in row["text"].replace("#", "# ").split()
    }
    return ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *sorted(words)]
