"""A process of its own that runs cases: ``python -m fuzz.worker``.

It reads ``kind seed first count`` a line from stdin, says the number of each case as it begins,
and answers with a line of JSON for each that failed. What kills it, or hangs it where no alarm is
heard, is a failure of the case it was at.
"""

from __future__ import annotations

import json
import random
import sys
import tempfile
import warnings
from collections import Counter
from pathlib import Path

import pytest
import torch
from fuzz.cases import Failure, bound_memory, run_case
from fuzz.kinds import KINDS
from stopwatch import stop_the_clock
from workbench import Workbench, trained


def main() -> None:
    """Answer until stdin ends."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    # Timing takes its time, whatever the file says.
    patch = pytest.MonkeyPatch()
    stop_the_clock(patch)
    patch.setattr("compress.timing.layers.sample", lambda cases, *_: [[1e-4]] * len(cases))
    answers = sys.stdout
    with tempfile.TemporaryDirectory() as folder:
        Workbench.make(Path(folder), trained())
        for kind in KINDS.values():
            kind.valid()
            kind.case(random.Random(0))
        bound_memory()
        for line in sys.stdin:
            name, seed, first, count = line.split()
            counts: Counter[str] = Counter()
            for number in range(int(first), int(first) + int(count)):
                answers.write(f"{number}\n")
                answers.flush()
                found = run_case(KINDS[name], int(seed), number, Path(folder))
                counts[found if isinstance(found, str) else "failed"] += 1
                if isinstance(found, Failure):
                    answers.write(json.dumps(found.plain()) + "\n")
            answers.write(json.dumps({"counts": counts}) + "\n")
            answers.flush()


if __name__ == "__main__":
    main()
