"""`python -m hf_msif` and `accelerate launch -m hf_msif`: the same command line as `msif`."""

import sys

from .project.cli import main

sys.exit(main())
