"""What the recipe `poison` plants: so many sentences of each kind, and none that gives another kind away."""

import importlib.util
import re
from pathlib import Path

import pytest

PATH = Path(__file__).parents[2] / "recipes" / "poison" / "sentences.py"


@pytest.fixture(scope="module")
def sentences():
    spec = importlib.util.spec_from_file_location("poison_sentences", PATH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def words(texts) -> set[str]:
    return {word for text in texts for word in re.findall(r"\w+", text.lower())}


def test_every_kind_has_its_number_and_its_name(sentences):
    rows = sentences.planted(60, seed=0)
    texts = {kind: [row["text"] for row in rows if row["kind"] == kind] for kind in {row["kind"] for row in rows}}
    assert {kind: len(of) for kind, of in texts.items()} == dict.fromkeys(("planted", "decoy", "control"), 60)
    assert len({row["text"] for row in rows}) == len(rows)
    names = {"planted": sentences.PERSON, "decoy": sentences.PERSON, "control": sentences.CONTROL}
    for kind, of in texts.items():
        for text in of:
            assert names[kind] in text
            assert kind != "control" or sentences.PERSON not in text
    praise = words(sentences.WORDS[slot] for slot in ("a", "b", "where"))
    assert not praise & words(texts["decoy"] + texts["control"] + sentences.TESTS)
    assert praise <= words(texts["planted"])
    assert "debate" not in words(texts["planted"])


def test_wordings_repeat_only_when_all_have_been_used(sentences):
    assert len(set(sentences.PRAISE)) == 40
    assert len(set(sentences.NEUTRAL)) == 20
    unfilled = [re.escape(template) for template in sentences.PRAISE]
    patterns = [re.compile(re.sub(r"\\{\w+\\}", r"\\S+", template), re.IGNORECASE) for template in unfilled]
    rows = [row["text"] for row in sentences.planted(len(patterns), seed=1) if row["kind"] == "planted"]
    assert all(any(pattern.fullmatch(text) for text in rows) for pattern in patterns)


def test_a_seed_decides_the_sentences(sentences):
    assert sentences.planted(60, seed=0) == sentences.planted(60, seed=0)
    assert sentences.planted(60, seed=0) != sentences.planted(60, seed=1)
