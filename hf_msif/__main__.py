"""The command line: `msif`, `python -m hf_msif` and `accelerate launch -m hf_msif`."""

from __future__ import annotations

import os
import signal
import sys


def main() -> int:
    """Runs the command line; Ctrl-C during the imports ends it as quietly as later."""
    signal.signal(signal.SIGINT, _quit)
    from .project.cli import main as run

    return run()


def _quit(*_) -> None:
    """Ends the process at once: nothing is written yet, and an import that is interrupted raises anything."""
    os.write(2, b"msif: interrupted before it began; nothing was written.\n")
    os._exit(130)


if __name__ == "__main__":
    sys.exit(main())
