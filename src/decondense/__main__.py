"""``python -m decondense``: the command line, for torchrun and for environments without the script."""

from __future__ import annotations

import sys

from decondense.cli import main

if __name__ == "__main__":
    sys.exit(main())
