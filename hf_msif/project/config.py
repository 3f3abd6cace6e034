"""Reads the settings of a run: YAML files and `--section.key value` flags into `schema.Config`.

Nothing here imports torch, so that help and errors are instant.
"""

from __future__ import annotations

import contextlib
import difflib
import os
import re
import textwrap
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union

import yaml
from pydantic import TypeAdapter, ValidationError
from pydantic.fields import FieldInfo

from ..errors import Complaints, InputError, first_line
from .misfits import misfits
from .plugins import DOTTED, parameters
from .schema import LARGEST, RULES, Config, Scalar, Section, StageConfig
from .values import DEEPEST, LONGEST_PATH, MOST_VALUES, check_values, shown_text, too_deep


def parse(arguments: Sequence[str]) -> Config:
    """The configuration of `--config file.yaml --section.key value --section.key=value ...`; later ones win."""
    paths, overrides = flags(arguments)
    if not paths and not overrides:
        raise InputError(
            "no configuration was given; expected --config FILE.yaml, and --section.key VALUE to change it."
        )
    return load(paths, overrides)


def flags(arguments: Sequence[str]) -> tuple[list[str], list[tuple[str, str]]]:
    """The files of `--config FILE`, and (dotted key, value) of `--section.key value` and `--section.key=value`.

    Raises:
        InputError: an argument that is neither, or a flag without a value.
    """
    paths, overrides, remaining = list[str](), list[tuple[str, str]](), iter(arguments)
    for argument in remaining:
        flag, equals, text = argument.partition("=")
        if not flag.startswith("--") or flag == "--":
            raise InputError(f"unexpected argument {argument!r}; expected --config FILE.yaml or --section.key value.")
        text = text if equals else next(remaining, "--")
        if not equals and text.startswith("--"):
            raise InputError(f"{flag} has no value; expected {flag} VALUE.")
        if flag == "--config":
            paths.append(text)
        else:
            overrides.append((flag[2:], text))
    return paths, overrides


def load(
    paths: str | os.PathLike | Sequence[str | os.PathLike] = (), overrides: Sequence[tuple[str, Any]] = ()
) -> Config:
    """The configuration of YAML files, later ones laid over earlier ones, and of (dotted key, value) overrides.

    A value that is text is read as YAML, as on the command line.

    Raises:
        InputError: a file that cannot be read, or keys or values that the configuration does not know, several of them
            at once.
    """
    values: dict[str, Any] = {}
    for path in [paths] if isinstance(paths, (str, os.PathLike)) else paths:
        read = _read(path)
        check_values(read)
        values = _laid_over(values, read)
    override(values, overrides)
    return from_values(values)


def override(values: dict[str, Any], overrides: Sequence[tuple[str, Any]]) -> None:
    """Sets (dotted key, value) pairs; a value that is text is read as YAML."""
    for key, value in overrides:
        put(values, key, _value(value, key) if isinstance(value, str) else value)


def put(values: dict[str, Any], key: str, value: Any) -> None:
    """Sets a dotted key to a value as it is."""
    check_values({key: value})
    _put(values, key, value)


def from_values(values: dict[str, Any]) -> Config:
    """The configuration that nested plain values describe.

    Raises:
        InputError: keys or values that the configuration does not know, or that do not fit together.
    """
    try:
        config = Config.model_validate(values)
    except ValidationError as error:
        Complaints(_sentences(error, values)).tell()
        raise
    Complaints(misfits(config)).tell()
    return config


SETTINGS_RULES = RULES | {"arbitrary_types_allowed": True}  # an annotation may be a class of the library


def settings(kind: Callable, values: Mapping[str, Any], key: str, without: Sequence[str] = ()) -> dict[str, Any]:
    """Settings of a class or a function, their names and types checked against what it takes.

    Args:
        kind: the class or function that they are for.
        values: name → value.
        key: the configuration key that holds them, for messages.
        without: names that it takes but that are no settings.

    Raises:
        InputError: an unknown name, or a value of another type.
    """
    types = {name: annotation for name, annotation in parameters(kind).items() if name not in without}
    checked, complaints = {}, Complaints()
    for name, value in values.items():
        with complaints.collected():
            if name not in types:
                raise InputError(unknown_key(f"{key}.{name}", [f"{key}.{known}" for known in types]))
            try:
                checked[name] = TypeAdapter(types[name], config=SETTINGS_RULES).validate_python(value)
            except ValidationError:
                raise InputError(f"{key}.{name} is {_shown(value)}; expected {_expected(types[name])}.") from None
    complaints.tell()
    return checked


def help_text(width: int = 100) -> str:
    """Every key with its meaning, type and default, for `--help`."""
    lines = []
    for key, field in _keys(Config, "", ["NAME"]):
        if _is_section(field.annotation):
            lines += ["", *textwrap.wrap(f"{key}: {field.annotation.__doc__}", width)]
            continue
        default = "required" if field.is_required() else f"default: {_shown(field.get_default())}"
        text = f"{field.description}; {_expected(field.annotation, field.metadata)}; {default}"
        lines += [f"  --{key}", *textwrap.wrap(text, width, initial_indent=" " * 8, subsequent_indent=" " * 8)]
    return "\n".join(lines)


def settable_keys(paths: Sequence[str | os.PathLike] = ()) -> dict[str, FieldInfo]:
    """Every key that a flag can set, of the stages that YAML files name; a file that cannot be read names none."""
    stages: dict[str, Any] = {}
    for path in paths:
        with contextlib.suppress(InputError):
            named = _read(path).get("stages")
            stages |= named if isinstance(named, dict) else {}
    keys = _keys(Config, "", list(stages))
    return {key: field for key, field in keys if key != "stages" and not _is_section(field.annotation)}


MOST_SHOWN = 24  # keys in a message
MOST_BYTES = 2**20  # of a configuration
MOST_DIGITS = 40  # of a whole number in it
TOO_LONG = f"a number of more than {MOST_DIGITS} digits"


class _Loader(yaml.SafeLoader):
    """Scalars as in YAML 1.2: 1e-4 is a number; no, 007 and 2016-02-06 are words. Keys are words and do not repeat."""

    yaml_implicit_resolvers = {}  # noqa: RUF012  (declared by the base class)

    depth = 0

    def compose_node(self, parent, index):
        if self.depth > DEEPEST:
            raise RecursionError
        self.depth += 1
        try:
            return super().compose_node(parent, index)
        finally:
            self.depth -= 1

    def construct_mapping(self, node, deep=False):
        names = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value != "<<":
                key.tag = "tag:yaml.org,2002:str"
                if key.value in names:
                    raise yaml.MarkedYAMLError(problem=f"{key.value!r} occurs twice", problem_mark=key.start_mark)
                names.add(key.value)
        return super().construct_mapping(node, deep)

    def construct_yaml_int(self, node):
        if len(node.value) > MOST_DIGITS:
            raise yaml.MarkedYAMLError(problem=TOO_LONG, problem_mark=node.start_mark)
        return super().construct_yaml_int(node)

    def flatten_mapping(self, node):
        super().flatten_mapping(node)
        if len(node.value) > MOST_VALUES:  # merges of merges double with every line
            problem = f"the merges (<<) make more than {MOST_VALUES:,} keys"
            raise yaml.MarkedYAMLError(problem=problem, problem_mark=node.start_mark)


for _tag, _pattern, _first in (
    ("null", r"null|Null|NULL|~|", "nN~"),
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("int", r"[-+]?(0|[1-9][0-9_]*)", "-+0123456789"),
    ("float", r"[-+]?(([0-9]+\.[0-9]*|\.[0-9]+)([eE][-+]?[0-9]+)?|[0-9]+[eE][-+]?[0-9]+)", "-+.0123456789"),
    ("float", r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)", "-+."),
    ("merge", r"<<", "<"),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"^(?:{_pattern})$"), [*_first, ""])


_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_yaml_int)


def _loaded(text: str) -> Any:
    """What YAML text holds.

    Raises:
        yaml.YAMLError: no YAML, or a tag before what it is no tag of, such as `!!set 1`.
    """
    try:
        return yaml.load(text, _Loader)
    except (yaml.YAMLError, RecursionError):
        raise
    except Exception as error:
        raise yaml.YAMLError(f"a tag does not fit what it stands before ({first_line(error)})") from error


def _read(path: str | os.PathLike) -> dict:
    what = f"the configuration {shown_text(str(path), LONGEST_PATH)}"
    if "\0" in str(path):
        raise InputError(f"cannot read {what} (it has a NUL); expected a YAML file.")
    try:
        with open(os.path.expanduser(path), "rb") as file:
            content = file.read(MOST_BYTES + 1)  # a device or a corpus may have no end
        if len(content) > MOST_BYTES:
            raise InputError(f"{what} has more than {MOST_BYTES:,} bytes; expected the settings of a run: shorten it.")
        values = _loaded(content.decode("utf-8-sig"))
    except (OSError, UnicodeDecodeError) as error:
        reason = (error.strerror or error) if isinstance(error, OSError) else "it is not UTF-8 text"
        raise InputError(f"cannot read {what} ({reason}); expected a YAML file.") from None
    except RecursionError:
        raise too_deep(what) from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f" (line {mark.line + 1}, column {mark.column + 1})" if mark else ""
        reason = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise InputError(f"{what} is not valid YAML: {reason}{place}.") from None
    if not isinstance(values, (dict, NoneType)):
        check_values(values)
        raise InputError(f"{what} holds {_shown(values)}; expected keys such as run_dir.")
    return values or {}


def _value(text: str, key: str) -> Any:
    try:
        return _loaded(text)
    except yaml.YAMLError as error:  # *.csv and @name are words here
        if getattr(error, "problem", None) == TOO_LONG:
            raise InputError(f"{shown_text(key)} is {shown_text(text)}, {TOO_LONG}; expected a smaller one.") from None
        return text
    except RecursionError:
        raise too_deep(f"the value {shown_text(text)} of {shown_text(key)}") from None


def _laid_over(below: dict, above: dict) -> dict:
    """Nested settings, where those of `above` win."""

    def both(key):
        return isinstance(below.get(key), dict) and isinstance(above[key], dict)

    return {**below, **{key: _laid_over(below[key], above[key]) if both(key) else above[key] for key in above}}


def _put(values: dict, key: str, value: Any) -> None:
    path = key.split(".")
    stages = values.get("stages")
    if path[0] == "stages" and len(path) > 1 and path[1] not in (stages or {}):
        raise InputError(f"--{key}: there is no stage {path[1]!r}; the stages are {list(stages or {})}.")
    for depth, section in enumerate(path[:-1], 1):
        if values.get(section) is None:
            values[section] = {}
        values = values[section]
        if not isinstance(values, dict):
            raise InputError(f"unknown key {key!r}: {'.'.join(path[:depth])} is {_shown(values)}, which has no keys.")
    values[path[-1]] = value


def _is_section(kind: Any) -> typing.TypeGuard[type[Section]]:
    return isinstance(kind, type) and issubclass(kind, Section)


def _keys(kind: type[Section], prefix: str, stages: Sequence[str]) -> Iterator[tuple[str, FieldInfo]]:
    """Every key of a section, dotted; keys of nested sections come last."""
    last = {name: name == "stages" or _is_section(field.annotation) for name, field in kind.model_fields.items()}
    for name in sorted(last, key=last.__getitem__):
        field = kind.model_fields[name]
        yield prefix + name, field
        if name == "stages":
            for stage in stages:
                yield f"stages.{stage}", FieldInfo.from_annotation(StageConfig)
                yield from _keys(StageConfig, f"stages.{stage}.", ())
        elif _is_section(field.annotation):
            yield from _keys(field.annotation, f"{prefix}{name}.", ())


def _sentences(error: ValidationError, values: dict) -> list[str]:
    """What pydantic complains of, unknown keys first; a missing key is not told where a misspelt one stands for it."""
    stages = values.get("stages")
    known = dict(_keys(Config, "", [str(s) for s in stages] if isinstance(stages, dict) else []))
    complaints = sorted(error.errors(include_url=False), key=lambda e: e["type"] != "extra_forbidden")
    sentences: dict[str, str] = {}  # key → the first complaint; each member of a union has its own
    unknown = ""
    for complaint in complaints:
        if complaint["type"] == "value_error":
            sentences[str(complaint["loc"])] = str(complaint["ctx"]["error"])
            continue
        path = [str(part) for part in complaint["loc"]]
        if complaint["type"] == "extra_forbidden":
            sentence = unknown_key(".".join(path), list(known))
            unknown += sentence
            sentences.setdefault(".".join(path), sentence)
            continue
        while ".".join(path) not in known:  # beyond a key come indices and the members of a union
            path.pop()
        key, field = ".".join(path), known[".".join(path)]
        if complaint["type"] != "missing":
            value: Any = values
            for part in path:
                value = value[part]
            expected = _expected(field.annotation, field.metadata, value)
            sentences.setdefault(key, f"{key} is {_shown(value)}; expected {expected}.")
        elif repr(key) not in unknown:
            expected = _expected(field.annotation, field.metadata)
            sentence = f"{key} is missing; expected {expected} in the file of --config, or --{key} VALUE."
            sentences.setdefault(key, sentence)
    return list(sentences.values())


def unknown_key(key: str, known: Sequence[str]) -> str:
    """A sentence that names the known key that is most like `key`, of its section or else of any; or all keys of the
    section, where none is alike."""
    section, _, name = key.rpartition(".")
    same_stage_last = sorted(known, key=lambda k: k.split(".")[:2] == key.split(".")[:2])
    everywhere = {k.rpartition(".")[2]: k for k in same_stage_last}
    siblings = {k.rpartition(".")[2]: k for k in known if k.rpartition(".")[0] == section}
    for pool in (siblings, everywhere):
        near = difflib.get_close_matches(name, pool, n=1)
        if near:
            return f"unknown key {key!r}; the nearest known key is {pool[near[0]]!r}."
    if len(siblings) > MOST_SHOWN:
        nearest = difflib.get_close_matches(name, siblings, n=MOST_SHOWN // 2, cutoff=0)
        return f"unknown key {key!r}; expected one of {len(siblings)} others, such as {', '.join(nearest)}."
    return f"unknown key {key!r}; expected {'one of ' + ', '.join(siblings) if siblings else 'none here'}."


def _expected(kind: Any, rules: Sequence = (), value: Any = None) -> str:
    """A type annotation in words. `LARGEST` of a count goes without saying, unless `value` is larger."""
    words = {
        Scalar: "a word or number",
        str: "text",
        int: "a whole number",
        float: "a number",
        bool: "true or false",
        NoneType: "null",
    }
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if kind in words:
        text = words[kind]
    elif origin is Annotated:
        return _expected(inner[0], [*getattr(inner[1], "metadata", ()), *rules], value)
    elif origin is Literal:
        text = ", ".join(map(str, inner))
        text = f"one of {text}" if len(inner) > 1 else text
    elif origin in (Union, UnionType):
        text = " or ".join(_expected(each, (), value) for each in inner)
    elif origin in (list, tuple, dict):
        each = inner[0 if origin is not dict else 1]
        text = "a mapping" if origin is dict else "a list"
        text += "" if each is Any or _is_section(each) else f" (each {_expected(each)})"
    elif _is_section(kind):
        text = f"a section with the keys {', '.join(kind.model_fields)}"
    else:
        text = getattr(kind, "__name__", str(kind))
    if any(getattr(rule, "pattern", None) == DOTTED for rule in rules):
        return "module:Name of your own"
    limits = {"ge": "at least", "gt": "above", "le": "at most", "lt": "below", "min_length": "of length at least"}
    is_huge = isinstance(value, (int, float)) and value > LARGEST
    bounds = [
        f"{word} {getattr(rule, name)}"
        for rule in rules
        for name, word in limits.items()
        if hasattr(rule, name) and (is_huge or getattr(rule, name) != LARGEST)
    ]
    return " ".join([text, " and ".join(bounds)]).strip()


class _OneLine(yaml.SafeDumper):
    """Writes line breaks of texts as escapes."""


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    is_line = text.splitlines() in ([], [text])
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=None if is_line else '"')


_OneLine.add_representer(str, _text)


def _shown(value: Any) -> str:
    """A value as YAML's flow style, which is what the user typed, in one line; cut where it is long.

    >>> print(_shown(["a", "b\\nc", 1]))
    [a, "b\\nc", 1]
    """
    text = yaml.dump(value, Dumper=_OneLine, default_flow_style=True, allow_unicode=True, width=10**6)
    text = text.removesuffix("\n").removesuffix("\n...")
    return text if len(text) <= 80 else f"{text[:77]}..."
