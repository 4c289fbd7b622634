"""Tests that run a C++ compiler, which takes a minute in all: ./scripts/check does it."""

from __future__ import annotations

import os

import pytest

compiling = pytest.mark.skipif(
    "COMPRESS_COMPILE" not in os.environ,
    reason="compiles for a minute; ./scripts/check does it, or COMPRESS_COMPILE=1",
)
