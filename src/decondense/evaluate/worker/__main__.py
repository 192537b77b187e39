"""``python -m decondense.evaluate.worker OUT``."""

from __future__ import annotations

import sys
from pathlib import Path

from decondense.evaluate.worker.main import main

if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
