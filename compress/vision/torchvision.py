"""The only place that imports torchvision: its models, presets and datasets."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, get_type_hints

from torch import library as operators
from torch import nn

from compress.errors import DataError, ModelError, near_matches, one_line
from compress.vision.preprocessing import Preprocessing


@functools.cache
def load_torchvision() -> tuple[ModuleType, Any]:
    """Import torchvision; the second value keeps alive the schemas that the import may need.

    A torchvision built for CUDA beside a CPU torch cannot load its compiled operators, and its
    import then fails with "operator torchvision::nms does not exist". Models, datasets and
    transforms use none of them, so naming the two operators that it registers shapes for is
    enough. Nothing is defined where the plain import works.
    """
    library = None
    try:
        import torchvision
    except RuntimeError as error:
        if "torchvision::" not in str(error):
            raise
        # torch leaves both methods untyped.
        library = operators.Library("torchvision", "FRAGMENT")
        for name in ("nms", "qnms"):
            schema = f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
            library.define(schema)
        import torchvision
    return torchvision, library


def torchvision_model_names() -> tuple[str, ...]:
    """Return the names of torchvision's classification models."""
    torchvision, _ = load_torchvision()
    return tuple(torchvision.models.list_models(module=torchvision.models))


def torchvision_model(name: str, **arguments: Any) -> nn.Module:
    """Build one of torchvision's classification models, with random weights unless asked.

    Raises:
        ModelError: An unknown name or argument, or weights that cannot be fetched.
    """
    torchvision, _ = load_torchvision()
    names = torchvision_model_names()
    if name not in names:
        raise ModelError(
            f"torchvision has no classification model {name!r}.{near_matches(name, names)} "
            f"It has {len(names)}, among them resnet18, mobilenet_v2 and vit_b_16."
        )
    if name in ("googlenet", "inception_v3"):
        # Their own initialisation takes a minute and warns; a checkpoint follows anyway.
        arguments.setdefault("init_weights", False)
    try:
        model: nn.Module = torchvision.models.get_model(name, **arguments)
    except OSError as error:  # urllib's errors are OSErrors
        raise ModelError(
            f"The weights {arguments.get('weights')!r} of torchvision's {name} could not be "
            f"fetched: {one_line(error)}. Download the file elsewhere and pass it as the "
            "checkpoint, with the model spec free of 'weights'."
        ) from error
    except Exception as error:
        raise ModelError(
            f"torchvision's {name} cannot be built with {arguments or 'its defaults'}: "
            f"{type(error).__name__}: {one_line(error)}.{_near_arguments(name, arguments)}"
        ) from error
    return model


def _near_arguments(name: str, arguments: Mapping[str, Any]) -> str:
    """Near matches of the arguments that a model does not take, read off the class it is of."""
    torchvision, _ = load_torchvision()
    builder = inspect.unwrap(torchvision.models.get_model_builder(name))
    made = get_type_hints(builder).get("return", builder)
    known = list(inspect.signature(made).parameters)
    return "".join(near_matches(a, known) for a in arguments if a not in known)


def torchvision_preset(name: str, image_size: int | None = None) -> Preprocessing:
    """Return the preprocessing of a torchvision model's default weights.

    Args:
        name: A name in `torchvision_model_names`.
        image_size: The side that the model was built for, where it takes no other (ViT); some
            default weights are for a larger one.
    """
    torchvision, _ = load_torchvision()
    preset = torchvision.models.get_model_weights(name).DEFAULT.transforms()
    resize, crop = preset.resize_size[0], preset.crop_size[0]
    if image_size is not None and image_size != crop:
        resize, crop = image_size, image_size
    return Preprocessing(
        mean=tuple(preset.mean),
        std=tuple(preset.std),
        resize=resize,
        crop=crop,
        interpolation=preset.interpolation.value,
        from_preset=True,
    )


def torchvision_dataset(name: str, **arguments: Any) -> Any:
    """Open one of torchvision's datasets, fetching it into ``root`` where it is not there yet.

    Returns:
        A ``torch.utils.data.Dataset`` of PIL images and labels.

    Raises:
        DataError: An unknown name or argument, or files that are absent and cannot be fetched.
    """
    torchvision, _ = load_torchvision()
    names = [
        n
        for n in torchvision.datasets.__all__
        if isinstance(getattr(torchvision.datasets, n), type)
    ]
    if name not in names:
        raise DataError(
            f"torchvision has no dataset {name!r}.{near_matches(name, names)} Pictures of your "
            "own go in as imagefolder:DIR, arrays as tensors:FILE.npz."
        )
    build = getattr(torchvision.datasets, name)
    root = arguments.get("root")
    remove_root = root is not None and not Path(str(root)).exists()
    try:
        try:
            return build(**arguments)
        except (RuntimeError, OSError) as error:
            if "download" not in str(error) or "download" in arguments:
                raise
            return build(**arguments, download=True)
    except (RuntimeError, OSError) as error:
        if remove_root:
            _remove_empty(Path(str(root)))
        raise DataError(
            f"The torchvision set {name} is not in root={root!r} and could not be fetched: "
            f"{one_line(error)}. Put its files there by hand, or pass the images as "
            "imagefolder:DIR, tensors:FILE.npz or idx:IMAGES.gz,LABELS.gz."
        ) from error
    except Exception as error:
        raise DataError(
            f"The torchvision set {name} cannot be opened with {arguments}: "
            f"{type(error).__name__}: {one_line(error)}."
        ) from error


def _remove_empty(root: Path) -> None:
    """Remove a folder tree that a failed download made and left without a file in it."""
    if root.is_dir() and not any(p.is_file() for p in root.rglob("*")):
        for folder in sorted((p for p in root.rglob("*") if p.is_dir()), reverse=True):
            folder.rmdir()
        root.rmdir()
