"""Train the width-32 network on the first 8,000 MNIST test images, for the regression runs.

    python scripts/train_mnist.py --mnist DIR --output mnist-width32.safetensors

DIR holds ``t10k-images-idx3-ubyte.gz`` and ``t10k-labels-idx1-ubyte.gz``. The last 2,000 images
are held out and measured. The same seed, machine and thread count give the same bytes.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from safetensors.torch import save
from train_digits import train, wrong

from compress.data import Preprocessing, open_dataset
from compress.demo_data.network import width32
from compress.files import write_atomically


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mnist", type=Path, required=True, help="folder with the t10k files")
    parser.add_argument("--output", type=Path, required=True, help="the checkpoint to write")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--epochs", type=int, default=5)
    options = parser.parse_args()
    images = options.mnist / "t10k-images-idx3-ubyte.gz"
    spec = f"idx:{images},{options.mnist / 't10k-labels-idx1-ubyte.gz'}"
    train_set = open_dataset(f"{spec}?start=0&stop=8000", Preprocessing())
    test_set = open_dataset(f"{spec}?start=8000", Preprocessing())
    torch.manual_seed(options.seed)
    model = width32()
    train(model, train_set, options.epochs, options.seed)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(options.output, save(model.state_dict()))
    missed = wrong(model, test_set)
    print(f"last 2,000: {missed} wrong, {100 - 100 * missed / len(test_set):.2f}%")


if __name__ == "__main__":
    main()
