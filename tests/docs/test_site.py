"""The site of the documentation: links between its pages, doctests in its reference, what the reference covers."""

import pydoc
import re
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

import hf_msif

ROOT = Path(__file__).parents[2]


@pytest.fixture
def hooks(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "docs")
    import hooks

    return hooks


@pytest.mark.parametrize(
    ("source", "text", "in_the_site"),
    [
        ("README.md", "[a](docs/concepts.md#glossary)", "[a](concepts.md#glossary)"),
        ("README.md", "[a](#citation), [b](https://example.org/docs/faq.md)", None),
        ("README.md", "[a](docs/nothing.md)", None),
        ("docs/faq.md", "[a](../README.md#limits)", "[a](index.md#limits)"),
        ("docs/faq.md", "[a](report.md)", None),
        ("docs/tasks/find_poison.md", "[a](../../recipes/poison/README.md)", "[a](../recipes/poison.md)"),
        ("docs/tasks/find_poison.md", "[a](../../examples/own_solver.py)", "[a](../examples/own_solver.py.md)"),
        ("recipes/poison/README.md", "[a](../digits/README.md)", "[a](digits.md)"),
        ("recipes/poison/README.md", "[a](../../docs/faq.md)", "[a](../faq.md)"),
        ("CONTRIBUTING.md", "[a](docs/testing.md) and [b](LICENSE)", "[a](testing.md) and [b](LICENSE)"),
    ],
)
def test_links_of_the_repository_become_links_of_the_site(hooks, source, text, in_the_site):
    assert hooks.relinked(text, source, hooks.in_site(source)) == (in_the_site or text)


def test_no_two_files_are_one_page(hooks):
    pages = list(hooks.pages().values())
    assert len(set(pages)) == len(pages)


@pytest.mark.parametrize(
    ("html", "refused"),
    [
        ('<script src="https://cdn.example.org/a.js"></script>', True),
        ("<link rel=stylesheet href=//fonts.example.org/a.css>", True),
        ('<img alt="a" src="peers.png"><script src="assets/a.js"></script>', False),
        ('<a href="https://example.org">elsewhere</a>', False),
    ],
)
def test_a_page_that_loads_from_a_network_ends_the_build(hooks, html, refused):
    from mkdocs.exceptions import PluginError

    page = SimpleNamespace(file=SimpleNamespace(src_uri="faq.md"))
    if refused:
        with pytest.raises(PluginError, match=r"faq\.md loads .*example\.org"):
            hooks.on_post_page(html, page, None)
    else:
        assert hooks.on_post_page(html, page, None) is None


def test_doctests_are_fenced_where_they_stand(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "docs")
    import doctests

    docstring = "One.\n\n>>> f(\n...     1)\n2\n\nArgs:\n    x: a number.\n\n    >>> g()\n    3\n\nTwo >>> one."
    fenced = doctests.fenced(docstring)
    assert re.findall(r"^( *)```pycon\n(.*?)\n\1```$", fenced, re.MULTILINE | re.DOTALL) == [
        ("", ">>> f(\n...     1)\n2"),
        ("    ", "    >>> g()\n    3"),
    ]
    assert re.sub(r" *```(pycon)?\n", "", fenced + "\n") == docstring + "\n"


def test_the_reference_covers_what_users_import():
    """Each name of `from hf_msif import …` is on a page: by itself, or by the `__all__` of its wing."""
    documented = []
    for page in sorted((ROOT / "docs" / "reference").glob("*.md")):
        for identifier in re.findall(r"^::: (\S+)$", page.read_text(encoding="utf-8"), re.MULTILINE):
            thing = pydoc.locate(identifier)
            assert thing is not None, f"{page.name}: there is no {identifier}"
            documented += [thing]
            if isinstance(thing, ModuleType):
                documented += [getattr(thing, name) for name in getattr(thing, "__all__", [])]
    missing = [name for name in hf_msif._HOMES if all(getattr(hf_msif, name) is not thing for thing in documented)]
    assert not missing
