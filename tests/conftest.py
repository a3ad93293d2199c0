"""Fixtures and environment of all tests: quiet libraries, no network, a cache folder of the session."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
sys.path.insert(0, str(Path(__file__).parent))
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # A shell ignores SIGINT in background jobs; tests that interrupt a process need the signal.
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session", autouse=True)
def quiet_transformers() -> None:
    """Disables progress bars."""
    if "transformers" in sys.modules:
        sys.modules["transformers"].logging.disable_progress_bar()


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Puts tokenised corpora into a folder of the test session, not into the user's cache."""
    monkeypatch.setenv("PONDERA_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
