from __future__ import annotations

import os
from typing import Any

import headless_browser as chromium
import pytest


@pytest.fixture(scope="session")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Any:
    executable = chromium.find()
    if executable is None:
        pytest.skip(f"no browser found under the names {', '.join(chromium.NAMES)}")
    # Chromium's crash handler insists on a home it can write to.
    home = tmp_path_factory.mktemp("home")
    before = os.environ.get("HOME")
    os.environ["HOME"] = str(home)
    try:
        tab = chromium.Browser(executable, home / "profile")
    finally:
        if before is None:
            del os.environ["HOME"]
        else:
            os.environ["HOME"] = before
    yield tab
    tab.close()
