"""Classes and functions of your own, named in a configuration as `mypackage.mymodule:Name`."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import os
import sys
import typing
from collections.abc import Callable
from typing import Any

from ..errors import InputError, first_line

DOTTED = r"^[A-Za-z_][\w.]*:[A-Za-z_]\w*$"


def is_dotted(name: str) -> bool:
    """Whether a value of the configuration has the form "module:Name".

    >>> is_dotted("mypackage.mymodule:MyObjective"), is_dotted("masked-lm")
    (True, False)
    """
    return ":" in name


def imported(name: str, key: str, kind: type | None = None) -> Any:
    """What "module:Name" names. Modules in the working directory are found, as they are by `python -m`.

    Args:
        name: the module and a name in it, separated by a colon.
        key: the configuration key that holds it, for messages.
        kind: the class of which it must be a subclass; `object`: any class; None: anything that can be called.

    Raises:
        InputError: the module does not exist or cannot be imported, or has no such name, or that is something else.
    """
    module_name, _, attribute = name.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        absent = isinstance(error, ModuleNotFoundError) and f"{module_name}.".startswith(f"{error.name}.")
        why = f"there is no module {error.name!r}" if absent else f"importing it failed ({first_line(error)})"
        raise InputError(
            f"{key} is {name!r}, but {why}; expected module:Name of a module that is installed or lies below the "
            f"working directory {os.getcwd()!r}."
        ) from error
    if not hasattr(module, attribute):
        raise InputError(
            f"{key} is {name!r}, but the module {module_name!r} has no {attribute!r}; expected one of its names."
        )
    value = getattr(module, attribute)
    if kind is None:
        fits, expected = callable(value), "a class or a function"
    else:
        fits = isinstance(value, type) and issubclass(value, kind)
        expected = "a class" if kind is object else f"a subclass of {kind.__name__}"
    if not fits:
        what = f"the class {attribute}" if isinstance(value, type) else f"of type {type(value).__name__}"
        raise InputError(f"{key} is {name!r}, which is {what}; expected {expected}.")
    missing = sorted(getattr(value, "__abstractmethods__", ()))
    if missing:
        raise InputError(f"{key} is {name!r}, whose method {missing[0]!r} is not written; expected all of {missing}.")
    return value


def parameters(kind: Callable) -> dict[str, Any]:
    """The names that a class or a function takes, each with its type; `Any` where none is annotated.

    >>> def polish(model, tol: float = 0.1): ...
    >>> parameters(polish)
    {'model': typing.Any, 'tol': <class 'float'>}
    """
    annotated: Any = kind
    if dataclasses.is_dataclass(kind):
        names = [field.name for field in dataclasses.fields(kind) if field.init]
    else:
        listed = inspect.signature(kind).parameters.values()
        names = [p.name for p in listed if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
        annotated = annotated.__init__ if isinstance(kind, type) else kind
    try:
        hints = typing.get_type_hints(annotated)
    except NameError:  # a type that is imported for type checkers alone
        hints = {}
    return {name: hints.get(name, Any) for name in names}
