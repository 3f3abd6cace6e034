"""The whole recipe in one go: train both stages, query, score, Table 1.

python recipes/bert_gop_debate/run.py --config recipes/bert_gop_debate/frozen.yaml [--section.key value ...]
"""

import sys

from hf_msif.project.cli import main

ARGUMENTS = sys.argv[1:]

# Each step is a command of `msif`; the first one that fails ends the recipe with its exit code.
for command in ("plan", "train", "query", "score"):
    print(f"\n== msif {command}", file=sys.stderr, flush=True)  # stdout is for the commands: JSON with --json
    code = main([command, *ARGUMENTS])
    if code:
        sys.exit(code)
