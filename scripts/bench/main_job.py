"""What the main job costs, side by side in one run, as ratios.

    python scripts/bench/main_job.py [--threads N] [--part NAME ...]

calibrate  output statistics of ResNet-50 (224x224, batch 16, CPU) against the plain forward passes
           over the same batches, in turns; at most 1.25
memory     peak memory of calibrating 2 and 6 batches, each in a process of its own; no growth
rewrite    choosing ranks of ResNet-50 by threshold and rewriting it; under 10 s
startup    ``compress --help``; under 0.5 s
"""

from __future__ import annotations

import argparse
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator

BATCH, SIDE = 16, 224
PARTS = ("calibrate", "memory", "rewrite", "startup")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--part", choices=PARTS, action="append")
    parser.add_argument("--peak", type=int, help=argparse.SUPPRESS)  # a child that measures memory
    options = parser.parse_args()
    if options.peak is not None:
        print(peak(options.peak, options.threads))
        return
    rows = []
    for part in options.part or PARTS:
        rows += {
            "calibrate": lambda: calibration(options.threads, options.rounds),
            "memory": lambda: memory(options.threads),
            "rewrite": lambda: rewriting(options.threads),
            "startup": startup,
        }[part]()
    print("| what | measured | target |\n| --- | ---: | ---: |")
    for row in rows:
        print("| " + " | ".join(row) + " |")


def network(threads: int):
    import torch

    from compress.models import build_model
    from compress.network import prepare

    torch.set_num_threads(threads)
    model = build_model("torchvision:resnet50").module
    return prepare(model, torch.rand(1, 3, SIDE, SIDE))


def images(batches: int) -> Iterator[tuple]:
    """Batches made when they are asked for, as a loader would."""
    import torch

    generator = torch.Generator().manual_seed(0)
    for _ in range(batches):
        yield torch.rand(BATCH, 3, SIDE, SIDE, generator=generator), torch.zeros(BATCH)


def calibration(threads: int, rounds: int) -> list[tuple[str, str, str]]:
    import torch

    from compress.calibrate import calibrate
    from compress.sites import evaluation_mode, run_model

    found = network(threads)
    batches = list(images(2))

    def forward() -> None:
        with torch.no_grad(), evaluation_mode(found.model):
            for inputs, _ in batches:
                run_model(found.model, inputs)

    def statistics_of() -> None:
        # Many more images to come, as in a run: each layer's sample budget is spread over them.
        calibrate(found.model, found.sites, batches, 750, schemes=("output",), weigh=False)

    def few() -> None:
        calibrate(found.model, found.sites, batches, 32, schemes=("output",), weigh=False)

    seconds = in_turns([forward, statistics_of, few], rounds)
    of_run, of_few = (
        statistics.median(t / f for t, f in zip(taken, seconds[0], strict=True))
        for taken in seconds[1:]
    )
    plain = statistics.median(seconds[0])
    what = f"calibration / forward passes, ResNet-50, 2 batches of {BATCH} ({plain:.2f} s)"
    return [
        (f"{what}, of 750 images", f"{of_run:.2f}", "1.25"),
        (f"{what}, of 32 images", f"{of_few:.2f}", "1.25"),
    ]


def in_turns(works: list[Callable[[], None]], rounds: int) -> list[list[float]]:
    """Seconds of each work in each round, the first round left out."""
    taken: list[list[float]] = [[] for _ in works]
    for number in range(rounds + 1):
        for times, work in zip(taken, works, strict=True):
            start = time.perf_counter()
            work()
            if number:
                times.append(time.perf_counter() - start)
    return taken


def peak(batches: int, threads: int) -> int:
    from compress.calibrate import calibrate

    found = network(threads)
    calibrate(
        found.model, found.sites, images(batches), batches * BATCH, schemes=("output",), weigh=False
    )
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def memory(threads: int) -> list[tuple[str, str, str]]:
    peaks = []
    for batches in (2, 6):
        command = [sys.executable, __file__, "--peak", str(batches), "--threads", str(threads)]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        peaks.append(int(done.stdout) / 1024)
    what = f"peak memory, 6 batches / 2 ({peaks[1]:.0f} / {peaks[0]:.0f} MiB)"
    return [(what, f"{peaks[1] / peaks[0]:.2f}", "1.0")]


def rewriting(threads: int) -> list[tuple[str, str, str]]:
    import torch

    from compress.calibrate import calibrate
    from compress.choose import make_plan
    from compress.config import RunConfig
    from compress.data import as_images, split
    from compress.progress import silent
    from compress.replace import fit_plan

    found = network(threads)
    inputs = torch.cat([x for x, _ in images(2)])
    statistics_ = calibrate(
        found.model, found.sites, [(inputs[:16], torch.zeros(16)), (inputs[16:], torch.zeros(16))],
        len(inputs), schemes=("output",), weigh=False,
    )  # fmt: skip
    config = RunConfig(threshold=1e-2, schemes=("output",), metric="mse", refit=False)
    start = time.perf_counter()
    plan = make_plan(found.model, found.sites, statistics_, config)
    planned = time.perf_counter()
    parts = split(as_images(inputs), len(inputs), 0)
    fit_plan(found, plan, statistics_, config, parts, BATCH, silent)
    done = time.perf_counter()
    rewritten = sum(c.rewritten for c in plan.choices)
    what = (
        f"plan and rewrite ResNet-50 by threshold ({rewritten} of {len(plan.choices)} layers; plan "
        f"{planned - start:.1f} s)"
    )
    return [(what, f"{done - start:.1f} s", "10 s")]


def startup() -> list[tuple[str, str, str]]:
    taken = []
    for _ in range(7):
        start = time.perf_counter()
        subprocess.run(
            [sys.executable, "-m", "compress.commands", "--help"], check=True, capture_output=True
        )
        taken.append(time.perf_counter() - start)
    return [("compress --help", f"{statistics.median(taken):.2f} s", "0.5 s")]


if __name__ == "__main__":
    main()
