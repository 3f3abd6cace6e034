"""Feeds mutated files to the readers of configurations, markers, manifests and queries; whatever they are given, they
accept it or refuse it in one sentence.

    python benchmarks/fuzz.py                         # 20,000 inputs, about two minutes on one core
    python benchmarks/fuzz.py --inputs 1000000 --seed 1

Input number n of a seed is the same on every machine. A file that a reader takes is changed in its bytes (cut,
spliced, overwritten) or in its structure (entries removed, renamed, nested, replaced by values of every kind). Most
queries get a checksum that fits what they hold, as somebody would give them who knows how it is made. Refused means
`InputError` of one line; any other exception, an endless message, or more than `SECONDS` of CPU time for one input
ends the run with exit code 1, the number of the input and the input itself.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import copy
import json
import random
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hf_msif import InputError
from hf_msif.engine import folders
from hf_msif.engine.files import read_json
from hf_msif.engine.hashing import digest
from hf_msif.influence import saved_query
from hf_msif.project import config

SECONDS, LONGEST = 2, 3000  # of CPU time for one input; characters of a sentence

CONFIGURATION = {
    "run_dir": "runs/x",
    "tokenizer": "words",
    "stages": {
        "pretraining": {
            "task": "masked-lm",
            "data": {"path": "text", "data_files": ["a.txt"]},
            "training": {"seed": 1},
        },
        "head": {"task": "sequence-classification", "data": {"path": "csv", "data_files": "b", "label_column": "l"}},
    },
    "test": {"ids": [1, "a"], "aggregate": "none"},
    "dampings": [0.1, 1],
}
MARKER = {
    "format": 1,
    "kind": "query",
    "names": ["query.json", "part-[0-9]*"],
    "facts": {"files": {"a": [[1, 2, "x"]]}},
}
MANIFEST = {"format": 1, "the query": "0" * 64, "the ranked stage": "pretraining", "seed": 0, "dtype": None}
STAGE = {"solve": {"solver": "cg", "damping": 0.1}, "text": "x", "link": "implicit", "N": 9.0, "examples": 3}
QUERY = {
    "format": saved_query.FORMAT,
    "tests": [{"example_id": 1, "text": "we won", "label": 0}],
    "aggregate": None,
    "losses": [0.7],
    "stages": {"pretraining": {**STAGE, "objective": {"class": "MaskedLM"}, "noise": None}},
    "depends_on": {"pretraining": {"the model": "0" * 64}},
    "tensors": "0" * 64,
}
# What stands in the place of a value, and what is spliced into a text.
JUNK: list[Any] = [None, True, -1, 0, 10**30, 1e308, float("nan"), "", "x" * 300, "\0", "\udc80", "é"]
JUNK += [[], {}, [[]], {"a": {}}, [1, "a", None], {"": 1}, {"format": 2}, "null", "1e5", "~", "../..", "*", "**"]
SPLICES = [b"\0", b"\xff", b"[" * 50, b"{" * 50, b"]", b"}", b'"', b"'", b"\\ud800", b"&a ", b"*a", b"<<: ", b": "]
SPLICES += [b"!!python/name:os ", b"!!set ", b"- ", b"? ", b"\n", b"\t", b"---\n", b"%YAML 9\n", b"9" * 60, b".inf"]
SPLICES += [b"NaN", b"#", b"|\n", b">\n", b"\xef\xbb\xbf"]


def main(argv: list[str] | None = None) -> int:
    """Runs the fuzzing; returns the exit code."""
    reader = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    reader.add_argument("--inputs", type=int, default=20_000)
    reader.add_argument("--seed", type=int, default=0)
    reader.add_argument("--first", type=int, default=0, help="number of the first input")
    settings = reader.parse_args(argv)
    signal.signal(signal.SIGVTALRM, _late)
    counts: collections.Counter[str] = collections.Counter()
    started = time.process_time()
    with tempfile.TemporaryDirectory() as folder:
        readers = _readers(Path(folder))
        for number in range(settings.first, settings.first + settings.inputs):
            name, content, outcome = one(readers, settings.seed, number)
            if outcome not in ("accepted", "refused"):
                print(f"input {number} of seed {settings.seed}, {name}: {outcome}\n{content!r}", file=sys.stderr)
                return 1
            counts[f"{name} {outcome}"] += 1
    seconds = time.process_time() - started
    rate = round(settings.inputs / seconds)
    print(json.dumps({"inputs": settings.inputs, "seconds": round(seconds, 1), "per_second": rate, **counts}))
    return 0


Reader = tuple[dict[str, Any], Path, Callable[[Path], object]]


def _readers(folder: Path) -> dict[str, Reader]:
    """Name → what a good file holds, where it lies, and what reads it."""
    return {
        "configuration": (CONFIGURATION, folder / "c.yaml", config.load),
        "marker": (MARKER, folder / folders.MARKER, lambda path: folders.read_marker(path.parent)),
        "manifest": (MANIFEST, folder / "manifest.json", lambda path: read_json(path, dict[str, Any], "delete it")),
        "query": (QUERY, folder / "query.json", lambda path: saved_query.read(path.parent)),
    }


def one(readers: dict[str, Reader], seed: int, number: int) -> tuple[str, bytes, str]:
    """The reader's name, the input, and what came of it: "accepted", "refused", or what went wrong."""
    chance = random.Random(f"{seed}/{number}")
    name = chance.choice(list(readers))
    good, path, read = readers[name]
    content = mutated(good, chance, sealed=name == "query" and chance.random() < 0.7)
    path.write_bytes(content)
    signal.setitimer(signal.ITIMER_VIRTUAL, SECONDS)
    try:
        read(path)
        return name, content, "accepted"
    except InputError as error:
        text = str(error)
        is_sentence = "\n" not in text and len(text) < LONGEST and text.endswith(".")
        return name, content, "refused" if is_sentence else f"no sentence: {text!r}"
    except Exception as error:
        return name, content, f"{type(error).__name__}: {error}"
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)


def _late(*_) -> None:
    raise TimeoutError(f"more than {SECONDS} s")


def mutated(good: dict[str, Any], chance: random.Random, sealed: bool) -> bytes:
    """A file, changed in its structure, then in its bytes; `sealed`: with a checksum that fits its structure."""
    value: Any = copy.deepcopy(good)
    for _ in range(chance.choice([0, 1, 1, 2, 4])):
        value = _other_structure(value, chance)
    if sealed and isinstance(value, dict):
        with contextlib.suppress(Exception):  # what cannot be digested has none
            value["sha256"] = digest({key: item for key, item in value.items() if key != "sha256"})
    content = json.dumps(value, ensure_ascii=False).encode("utf-8", "surrogatepass")
    for _ in range(0 if sealed and chance.random() < 0.9 else chance.choice([0, 0, 1, 2, 5])):
        content = _other_bytes(content, chance)
    return content


def _other_structure(value: Any, chance: random.Random) -> Any:
    """One change somewhere in nested mappings and lists."""
    places = list(_places(value))
    if not places or chance.random() < 0.03:
        return copy.deepcopy(chance.choice(JUNK))  # a later change is made in it
    holder, key = chance.choice(places)
    junk = copy.deepcopy(chance.choice(JUNK))
    kind = chance.randrange(5)
    if kind == 0:
        del holder[key]
    elif kind == 1 and isinstance(holder, dict):
        holder[chance.choice(["zz", "", "format", "0", "\udc80", str(key)[:-1]])] = holder.pop(key)
    elif kind == 2:
        holder[key] = [holder[key]] if chance.random() < 0.5 else {"zz": holder[key]}
    elif kind == 3 and isinstance(holder, list):
        holder.insert(key, junk)
    else:
        holder[key] = junk
    return value


def _places(value: Any):
    """(mapping or list, key) of every value below."""
    if isinstance(value, dict | list):
        for key, item in list(value.items() if isinstance(value, dict) else enumerate(value)):
            yield value, key
            yield from _places(item)


def _other_bytes(content: bytes, chance: random.Random) -> bytes:
    start = chance.randrange(len(content) + 1)
    end = min(len(content), start + chance.randrange(1, 20))
    return chance.choice(
        [
            content[:start],
            content[:start] + content[end:],
            content[:end] + content[start:],
            content[:start] + chance.choice(SPLICES) + content[start:],
            content[:start] + bytes([chance.randrange(256)]) + content[start + 1 :],
            content[:start] + chance.randbytes(chance.randrange(1, 8)) + content[end:],
        ]
    )


if __name__ == "__main__":
    sys.exit(main())
