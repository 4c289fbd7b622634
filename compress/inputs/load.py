"""Reading what a run is given: checkpoint, model, images; checked before any work is done."""

from __future__ import annotations

import dataclasses
import hashlib
import inspect
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from compress.config import RunConfig
from compress.data import Arity, ImageSet, Preprocessing, Split, check_channels, open_dataset, split
from compress.errors import CheckpointError, ConfigError, DataError, ModelError
from compress.inputs.checkpoint.loading import load_into
from compress.inputs.checkpoint.reading import (
    Checkpoint,
    Pick,
    checkpoint_sha256,
    files_of,
    read_checkpoint,
    weights_of,
)
from compress.inputs.checkpoint.shards import sha256_of
from compress.inputs.models import BuiltModel, build_model
from compress.layers import kind_of
from compress.libraries import Library, library_of
from compress.result import SplitRecord
from compress.running.forward import (
    evaluation_mode,
    require_parameters,
    require_tensors,
    run_model,
)
from compress.running.structure import batched, like_weights, main_tensor
from compress.specs import split_spec

# Pixels a default batch holds: 16 images of 224 x 224, and at most 64 smaller ones.
BATCH_PIXELS = 16 * 224 * 224
LARGEST_BATCH = 64


@dataclass(frozen=True)
class Inputs:
    """A trained network and its images.

    Attributes:
        model: The network with its trained weights, float32, eval mode.
        spec: The spec it was built from; ``""`` for one that a program passed in.
        source: The checkpoint's path; ``""`` likewise.
        sha256: Hash of the checkpoint, or of the weights.
        dtype: The floating type of the source, which the result is saved in.
        split: Images to fit and to validate on.
        test: Held-out images, or None.
        warnings: What the user should know.
        images: All images that the split was drawn from, where they are known.
    """

    model: nn.Module
    spec: str
    source: str
    sha256: str
    dtype: torch.dtype
    split: Split
    test: ImageSet | None
    warnings: tuple[str, ...] = ()
    images: ImageSet | None = None

    @property
    def example(self) -> Any:
        """The inputs of the first image to fit on, ``[1, ...]``."""
        return batched(self.split.fit[0][0])

    def split_record(self) -> SplitRecord:
        """The split as the report keeps it."""
        record = self.split.record
        return SplitRecord(
            seed=record["seed"],
            fit_images=record["fit"],
            validation_images=record["validation"],
            fit_indices_sha256=record["indices_sha256"],
        )


def load_network(config: RunConfig) -> Inputs:
    """Read everything that a configuration names.

    Raises:
        ConfigError: Something needed is not named.
        CheckpointError, ModelError, DataError: Something named cannot be used.
    """
    for name, meaning in (
        ("checkpoint", "the trained weights"),
        ("model", "how the network is built"),
        ("data", "images to calibrate on"),
    ):
        if not getattr(config, name):
            raise ConfigError(f"No {name} given ({meaning}); pass it, or set it with --config.")
    model, spec_hash, dtype, preprocessing = load_model(config)
    images = open_images(config.data, config, model, preprocessing)
    test = open_images(config.test, config, model, preprocessing) if config.test else None
    parts = split(images, config.calibration_images, config.seed)
    warnings = []
    if test is not None and test.fingerprint == images.fingerprint:
        warnings.append(
            "The test images are the calibration images, so the verification says nothing about "
            "unseen ones."
        )
    return Inputs(
        model, config.model, config.checkpoint, spec_hash, dtype, parts, test, tuple(warnings),
        images,
    )  # fmt: skip


def input_paths(config: RunConfig) -> list[str]:
    """The files and folders that a configuration reads, which no output may replace."""
    paths = [config.checkpoint, config.class_map, config.calibration, config.latency_table]
    if config.checkpoint.endswith(".json") or os.path.isdir(config.checkpoint):
        paths += map(str, files_of(Path(config.checkpoint)))
    library = _library(config.model)
    if library is not None:
        paths.append(library[0].place(library[1]))
    for spec, error in (
        (config.model, ModelError),
        (config.data, DataError),
        (config.test, DataError),
    ):
        kind, _, place = split_spec(spec, error)[0].partition(":")
        if kind in ("imagefolder", "tensors", "idx"):
            paths += place.split(",") if kind == "idx" else [place]
        elif kind.endswith(".py"):
            paths.append(kind)
    return [path for path in paths if path]


def image_folders(config: RunConfig) -> list[str]:
    """The folders whose every picture a configuration reads."""
    heads = [split_spec(spec, DataError)[0] for spec in (config.data, config.test)]
    found = [head.partition(":") for head in heads]
    return [place for kind, _, place in found if kind == "imagefolder"]


def open_images(
    spec: str, config: RunConfig, model: nn.Module, preprocessing: Preprocessing
) -> ImageSet:
    """Open the images of a spec as a model takes them, and check their channels."""
    channels = _image_channels(model)
    if preprocessing.channels is None and not preprocessing.mean and channels in (1, 3):
        preprocessing = dataclasses.replace(preprocessing, channels=channels)
    images = open_dataset(spec, preprocessing, config.class_map, arity_of(model))
    try:
        if channels is not None:
            check_channels(images, channels)
    except DataError:
        # The first convolution is not always the one that sees the image: a head may be registered
        # first, or pixels folded into channels.
        if not _runs(model, images):
            raise
    return images


def _runs(model: nn.Module, images: ImageSet) -> bool:
    example = like_weights(batched(images[0][0]), next(model.parameters()))
    try:
        with torch.no_grad(), evaluation_mode(model):
            run_model(model, example)
    except ModelError:
        return False
    return True


def load_model(config: RunConfig) -> tuple[nn.Module, str, torch.dtype, Preprocessing]:
    """Build the model and load the checkpoint; also its hash, dtype and preprocessing."""
    built, checkpoint = load_trained(config)
    return built.module, checkpoint.sha256, checkpoint.dtype, preprocessing_of(config, built.preset)


def load_trained(config: RunConfig) -> tuple[BuiltModel, Checkpoint]:
    """Build the model and load the checkpoint into it.

    Raises:
        CheckpointError, ModelError: One of them cannot be used, or they do not belong together.
    """
    own = _own_files(config)
    if own:
        built = build_model(config.model)
        require_parameters(built.module)
        return built, weights_of(built.module, own, built.dtype)
    checkpoint = read_checkpoint(config.checkpoint, pick_of(config))
    built = build_model(config.model)
    require_parameters(built.module)
    if built.convert is not None and checkpoint.state.keys() != built.module.state_dict().keys():
        checkpoint = dataclasses.replace(checkpoint, state=built.convert(checkpoint.state))
    load_into(built.module, checkpoint)
    return built, checkpoint


def pick_of(config: RunConfig) -> Pick:
    """Which entries of the checkpoint the user picks."""
    return Pick(config.checkpoint_key, config.prefix)


def source_sha256(config: RunConfig) -> str:
    """Hash of the checkpoint that a configuration names, as results record it.

    Raises:
        OSError: A file cannot be read.
        CheckpointError, ModelError: It consists of several files, and these cannot be found.
    """
    own = _own_files(config)
    return sha256_of(own) if own else checkpoint_sha256(config.checkpoint, pick_of(config))


def weight_files(config: RunConfig) -> tuple[Path, ...]:
    """The files that the weights lie in, all shards; none where no checkpoint is named.

    Raises:
        CheckpointError, ModelError: It consists of several files, and these cannot be found.
    """
    if not config.checkpoint:
        return ()
    return _own_files(config) or files_of(Path(config.checkpoint))


def checkpoint_beside(spec: str) -> str:
    """Where the weights of a model spec lie, if it says so itself; else ``""``."""
    found = _library(spec)
    return "" if found is None else found[0].checkpoint(found[1])


def _library(spec: str) -> tuple[Library, str] | None:
    return library_of(split_spec(spec, ModelError)[0]) if spec else None


def _own_files(config: RunConfig) -> tuple[Path, ...]:
    """The files of weights that the model spec brings along, where they are the checkpoint.

    Raises:
        CheckpointError: Entries of them are picked, which is not possible.
    """
    found = _library(config.model)
    if found is None or not found[0].brings_weights:
        return ()
    library, name = found
    if not _same_file(config.checkpoint, name):
        return ()
    if pick_of(config):
        raise CheckpointError(
            f"The checkpoint {name} holds one network, none of whose weights can be picked: leave "
            "out --checkpoint-key and --prefix."
        )
    return library.files(name)


def _same_file(one: str, other: str) -> bool:
    try:
        return os.path.samefile(one, other)
    except OSError:
        return one == other  # reading it says what is wrong with it


def preprocessing_of(config: RunConfig, preset: Preprocessing | None) -> Preprocessing:
    """The user's preprocessing, on top of the model's own preset where it has one."""
    given = {
        name: getattr(config, name)
        for name in ("mean", "std", "resize", "crop")
        if getattr(config, name)
    }
    if preset is not None and not given:
        return preset
    base = preset or Preprocessing()
    if isinstance(config.resize, tuple):
        # An exact size: the preset would cut its own square from it, or find none in it.
        given.setdefault("crop", None)
    return dataclasses.replace(base, **given, from_preset=False)


def _image_channels(model: nn.Module) -> int | None:
    """The channels that the first convolution takes; None for a model without one."""
    for module in model.modules():
        kind = kind_of(module)
        if kind is not None and kind.name == "Conv2d":
            return kind.geometry(module).in_channels
    return None


def arity_of(model: nn.Module) -> Arity:
    """How many inputs a forward takes by position."""
    try:
        parameters = inspect.signature(model.forward).parameters.values()
    except (TypeError, ValueError):  # a forward without a signature
        return Arity()
    by_position = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    needed = max(sum(p.kind in by_position and p.default is p.empty for p in parameters), 1)
    if any(p.kind == p.VAR_POSITIONAL for p in parameters):
        return Arity(needed, sys.maxsize)
    optional = sum(p.kind in by_position and p.default is None for p in parameters)
    return Arity(needed, needed + optional)


def batch_size_for(config: RunConfig, example: Any) -> int:
    """The configured batch size, or one that suits the image size."""
    if config.batch_size is not None:
        return config.batch_size
    image = main_tensor(example)
    pixels = image.shape[-1] * (image.shape[-2] if image.dim() > 3 else 1)
    return max(1, min(LARGEST_BATCH, BATCH_PIXELS // max(pixels, 1)))


def weights_hash(model: nn.Module) -> str:
    """Fingerprint of a model's parameters and buffers."""
    require_tensors(model)
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        digest.update(name.encode())
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        digest.update(flat.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def require(images: ImageSet | None, flag: str) -> ImageSet:
    """Return the images or raise `DataError` naming the flag that brings them."""
    if images is None:
        raise DataError(f"No images given; pass --{flag}.")
    return images
