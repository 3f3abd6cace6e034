"""Writes the key reference of docs/command_line.md from the configuration's schema.

python docs/generate.py
"""

from __future__ import annotations

from pathlib import Path

PAGE = Path(__file__).with_name("command_line.md")
BEGIN = "<!-- docs/generate.py writes what follows from hf_msif/project/schema.py: edit the texts there. -->\n"
END = "<!-- End of what docs/generate.py writes. -->\n"
HEADER = ["", "| key | meaning | value | default |", "| --- | --- | --- | --- |"]


def reference() -> str:
    """Every key of the configuration, one table per section, from what `msif COMMAND -h` prints."""
    from hf_msif.project.config import help_text

    lines = ["### At the top level", *HEADER]
    key = ""
    for line in help_text(width=10**6).splitlines():
        if line.startswith("  --"):
            key = line.strip().removeprefix("--")
        elif line.startswith("  "):
            meaning, value, default = line.strip().rsplit("; ", 2)
            default = default.removeprefix("default: ")
            default = default if default == "required" else f"`{default}`"
            lines.append("| " + " | ".join([f"`{key}`", _cell(meaning), _cell(value), default]) + " |")
        elif line:
            section, meaning = line.split(": ", 1)
            lines += ["", f"### `{section}`", "", " ".join(meaning.split()), *HEADER]
    return "\n".join(lines) + "\n"


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def renewed(page: str) -> str:
    """The page with its reference written anew."""
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise ValueError(f"{PAGE} lacks one of the two comments that enclose the reference.")
    return f"{before}{BEGIN}\n{reference()}\n{END}{after}"


if __name__ == "__main__":
    PAGE.write_text(renewed(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
