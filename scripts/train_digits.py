"""Make the demo's assets: the digits as arrays and the width-32 network trained on them.

    python scripts/train_digits.py --data     # the arrays, from scikit-learn (not needed to train)
    python scripts/train_digits.py            # the checkpoint, from the arrays

The same seed, machine and thread count give the same bytes.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save
from torch import Tensor, nn
from tqdm import tqdm

from compress.data import ImageSet, Preprocessing, batches, open_dataset
from compress.demo_data.network import width32
from compress.files import write_atomically

DEMO = Path(__file__).resolve().parents[1] / "compress" / "demo_data"
TEST_IMAGES = 360


def inputs_and_labels(images: ImageSet) -> tuple[Tensor, Tensor]:
    """Return a whole set at once, ``[N, 1, 28, 28]`` and ``[N]``."""
    pairs = list(batches(images, 500))
    return torch.cat([x for x, _ in pairs]), torch.cat([y for _, y in pairs])


def train(model: nn.Module, images: ImageSet, epochs: int, seed: int, shift: int = 2) -> None:
    """Train with Adam on a one-cycle schedule, images shifted by up to ``shift`` pixels."""
    inputs, labels = inputs_and_labels(images)
    generator = torch.Generator().manual_seed(seed)
    size, batch = len(inputs), 64
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=3e-3, total_steps=epochs * (size // batch)
    )
    side = inputs.shape[-1]
    padded = F.pad(inputs, (shift,) * 4)
    model.train()
    for _ in tqdm(range(epochs), unit="epoch"):
        order = torch.randperm(size, generator=generator)
        for chosen in order[: size // batch * batch].split(batch):
            top, left = torch.randint(0, 2 * shift + 1, (2,), generator=generator).tolist()
            shifted = padded[chosen, :, top : top + side, left : left + side]
            loss = F.cross_entropy(model(shifted), labels[chosen], label_smoothing=0.05)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    model.eval()


def wrong(model: nn.Module, images: ImageSet) -> int:
    """Count the images that the model gets wrong."""
    inputs, labels = inputs_and_labels(images)
    with torch.no_grad():
        return int((model(inputs).argmax(1) != labels).sum())


def write_digits(seed: int) -> None:
    """Write the arrays, split by a seeded permutation; pixels 0 to 16 become 0 to 255."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = np.round(digits.images * 255 / 16).astype(np.uint8)[:, None]
    order = np.random.default_rng(seed).permutation(len(images))
    for name, chosen in (("test", order[:TEST_IMAGES]), ("train", order[TEST_IMAGES:])):
        path = DEMO / f"digits-{name}.npz"
        np.savez_compressed(path, images=images[chosen], labels=digits.target[chosen])
        print(f"{path.name}: {len(chosen)} images, {path.stat().st_size} bytes")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", action="store_true", help="write the arrays instead")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--output", type=Path, default=DEMO / "digits-width32.safetensors")
    options = parser.parse_args()
    if options.data:
        write_digits(options.seed)
        return
    torch.manual_seed(options.seed)
    model = width32()
    enlarged = Preprocessing(resize=28)
    train_set = open_dataset(f"tensors:{DEMO / 'digits-train.npz'}", enlarged)
    test_set = open_dataset(f"tensors:{DEMO / 'digits-test.npz'}", enlarged)
    train(model, train_set, options.epochs, options.seed)
    write_atomically(options.output, save(model.state_dict()))
    for name, images in (("train", train_set), ("test", test_set)):
        missed = wrong(model, images)
        print(f"{name}: {missed} of {len(images)} wrong, {100 - 100 * missed / len(images):.2f}%")


if __name__ == "__main__":
    main()
