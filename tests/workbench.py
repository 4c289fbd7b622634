"""A tiny trained network and images on disk, and the command line run on them."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from click.testing import CliRunner, Result
from networks.tiny import tiny
from places import NETWORKS
from safetensors.torch import save_file

from compress.commands.group import cli

SOURCE = NETWORKS / "tiny.py"
SPEC = f"{SOURCE}:tiny"


def made_images(count: int, classes: int = 3, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Images uint8 ``[N, 8, 8]`` whose class is where they are bright; labels in turn."""
    rng = np.random.default_rng(seed)
    labels = np.arange(count) % classes
    images = rng.integers(0, 90, (count, 8, 8))
    for index, label in enumerate(labels):
        images[index, :, 3 * label : 3 * label + 2] += 120
    return images.astype(np.uint8), labels


def trained(seed: int = 0) -> torch.nn.Module:
    """The tiny network, fitted to `made_images` in a second."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = tiny()
        model.train()
        images, labels = made_images(96, seed=7)
        inputs = torch.tensor(images).unsqueeze(1).float() / 255
        targets = torch.tensor(labels)
        optimiser = torch.optim.Adam(model.parameters(), 0.02)
        for _ in range(60):
            optimiser.zero_grad()
            torch.nn.functional.cross_entropy(model(inputs), targets).backward()
            optimiser.step()
        for parameter in model.parameters():
            parameter.grad = None
        return model.eval()


@dataclass(frozen=True)
class Workbench:
    """Where the files of a test lie.

    Attributes:
        folder: Holds ``weights.safetensors``, ``train.npz`` and ``test.npz``.
    """

    folder: Path

    @classmethod
    def make(cls, folder: Path, model: torch.nn.Module) -> Workbench:
        """Write the files."""
        save_file(model.state_dict(), folder / "weights.safetensors")
        for name, count, seed in (("train", 48, 1), ("test", 24, 2)):
            images, labels = made_images(count, seed=seed)
            np.savez(folder / f"{name}.npz", images=images, labels=labels)
        return cls(folder)

    @property
    def checkpoint(self) -> str:
        return str(self.folder / "weights.safetensors")

    @property
    def train(self) -> str:
        return f"tensors:{self.folder / 'train.npz'}"

    @property
    def test(self) -> str:
        return f"tensors:{self.folder / 'test.npz'}"

    def output(self, name: str = "out") -> Path:
        return self.folder / name

    def run(self, *flags: str, **replaced: str | None) -> Result:
        """Run ``compress run`` with everything named; flags replace or take away (None)."""
        values: dict[str, str | None] = {
            "model": SPEC,
            "data": self.train,
            "test": self.test,
            "output": str(self.output()),
            **replaced,
        }
        checkpoint = values.pop("checkpoint", self.checkpoint)
        named = [part for k, v in values.items() if v is not None for part in (f"--{k}", v)]
        return command("run", *([checkpoint] if checkpoint else []), *named, *flags)

    def report(self, name: str = "out") -> dict[str, Any]:
        """The report of a result."""
        report: dict[str, Any] = json.loads((self.output(name) / "report.json").read_text())
        return report

    def leftovers(self) -> list[str]:
        """Names in the folder that are none of the inputs."""
        inputs = {"weights.safetensors", "weights.pt", "train.npz", "test.npz"}
        return sorted(p.name for p in self.folder.iterdir() if p.name not in inputs)


def command(*arguments: str) -> Result:
    """Run the command line in this process; `stdout`, `stderr` and `exit_code` tell."""
    return CliRunner().invoke(cli, arguments, catch_exceptions=False)


def paragraph(result: Result, code: int) -> str:
    """Check that a command failed as it should, and return what it said.

    One paragraph on stderr, nothing on stdout, no traceback, the exit code.
    """
    assert result.exit_code == code, (result.exit_code, result.stdout, result.stderr)
    assert result.stdout == ""
    text = result.stderr.strip()
    assert "Traceback" not in text
    assert text.startswith("Error: ")
    assert "\n" not in text
    return text
