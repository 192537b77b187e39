from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

# One thread a worker: the tests run side by side, and the last bits depend on the number of threads. Set before torch.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def python_docs_cache(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Path], None]:
    """Gives a cache the documents of the standard library: seconds to read, and the same for all tests of a run."""
    from once import once

    from decondense.corpora.embedded import python_docs

    made = once(tmp_path_factory, "python-docs", lambda folder: python_docs("standard_library", cache=folder))

    def give(cache: Path) -> None:
        shutil.copytree(made, cache, dirs_exist_ok=True)

    return give


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real data sets for tests that can use them; such tests skip where the folder is not at hand."""
    path = Path(os.environ.get("DECONDENSE_TEST_DATA", ROOT.parent / "shared" / "data"))
    if not path.is_dir():
        pytest.skip(f"no test data at {path}; set DECONDENSE_TEST_DATA")
    return path
