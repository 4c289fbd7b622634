"""Where the tests find the repository's own files."""

from __future__ import annotations

from pathlib import Path

TESTS = Path(__file__).resolve().parent
ROOT = TESTS.parent
DOCS = ROOT / "docs"
NETWORKS = TESTS / "networks"
