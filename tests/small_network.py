"""A small network on disk with images that it mostly reads right, for tests of whole commands."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

SOURCE = '''
from torch import nn


def build():
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 12, 3, stride=2), nn.ReLU(),
        nn.Conv2d(12, 12, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(12 * 16, 6),
    )


def brightness(model, batches):
    """A metric of a user's own: the mean output, higher is better."""
    total = count = 0
    for images, _ in batches:
        output = model(images)
        total, count = total + float(output.detach().sum()), count + output.numel()
    return total / count
'''


def write_network(folder: Path, seed: int = 0) -> dict[str, str]:
    """Write code, weights and images; return the settings that name them.

    A tenth of the labels differ from what the network says, so that its accuracy is near 90%.
    """
    folder.mkdir(exist_ok=True)
    code = folder / "net.py"
    code.write_text(SOURCE)
    spec = importlib.util.spec_from_file_location("net", code)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = module.build().eval()
        for name, count in (("data", 160), ("test", 120)):
            images = torch.randn(count, 1, 10, 10)
            # Smooth images: neighbouring pixels are alike, so that spectra fall off.
            images = torch.nn.functional.avg_pool2d(images, 3, 1, 1) * 3
            with torch.no_grad():
                logits = model(images)
                if name == "data":
                    # Centred on the images, else a random network says one class to all.
                    model[-1].bias -= logits.mean(0)
                    logits = model(images)
            labels = logits.argmax(1)
            labels[::10] = (labels[::10] + 1) % 6
            np.savez(folder / f"{name}.npz", images=images.numpy(), labels=labels.numpy())
    save_file(model.state_dict(), folder / "weights.safetensors")
    return {
        "checkpoint": str(folder / "weights.safetensors"),
        "model": f"{code}:build",
        "data": f"tensors:{folder / 'data.npz'}",
        "test": f"tensors:{folder / 'test.npz'}",
    }
