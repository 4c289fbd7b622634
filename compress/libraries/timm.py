"""``timm:NAME``: the networks of timm, PyTorch Image Models, with random weights."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from compress.errors import ModelError, near_matches, one_line
from compress.libraries.record import FromLibrary, Library, quiet, require
from compress.vision.preprocessing import Preprocessing

_FILTERS = ("bilinear", "bicubic", "nearest")
# Each of them fetches something, or reads a file that names code.
_FETCHING = ("pretrained", "checkpoint_path", "cache_dir")


def timm_names() -> tuple[str, ...]:
    """Return the names of timm's networks, without the tags of their weights.

    Raises:
        ModelError: timm is not installed.
    """
    return tuple(require("timm", "timm", "Models of timm:").list_models())


def check_timm_name(name: str, front: str = "") -> None:
    """Refuse what is no network of timm's own, such as one on a hub.

    Args:
        name: With or without the tag of its weights: ``resnet50``, ``resnet50.a1_in1k``.
        front: What stands before the name in the spec.

    Raises:
        ModelError: There is none of this name.
    """
    known = timm_names()
    bare = name.partition(".")[0]
    if bare not in known:
        near = near_matches(bare, known)
        raise ModelError(
            f"timm has no network {front + name!r}.{near} It has {len(known)}, among them "
            "resnet50, convnext_tiny and vit_small_patch16_224."
        )


def _build(name: str, arguments: dict[str, Any]) -> FromLibrary:
    timm = require("timm", "timm", "Models of timm:")
    check_timm_name(name)
    fetching = [a for a in arguments if a.startswith(_FETCHING)]
    if fetching:
        raise ModelError(
            f"timm:{name} is built with random weights, without {', '.join(fetching)}: fetch the "
            "weights yourself, and pass the file as the checkpoint."
        )
    try:
        with quiet():
            module = timm.create_model(name, pretrained=False, **arguments)
            shape, preset = _pictures(timm.data.resolve_model_data_config(module), arguments)
    except ModelError:
        raise
    except Exception as error:
        tags = [n for n in timm.list_pretrained() if n.startswith(f"{name.partition('.')[0]}.")]
        near = near_matches(name, tags) if "." in name else ""
        raise ModelError(
            f"timm's {name} cannot be built with {arguments or 'its defaults'}: "
            f"{type(error).__name__}: {one_line(error)}.{near}"
        ) from error
    return FromLibrary(module, preset, shape)


def _pictures(
    data: Mapping[str, Any], arguments: Mapping[str, Any]
) -> tuple[tuple[int, ...], Preprocessing | None]:
    """The shape of an input and the preprocessing, from what timm says of both."""
    channels, height, width = (int(n) for n in data["input_size"])
    channels = int(arguments.get("in_chans", channels))
    asked = arguments.get("img_size")
    if asked is not None:
        height, width = (int(n) for n in (asked if isinstance(asked, list) else (asked, asked)))
    shape = (channels, height, width)
    if height != width or channels != 3 or len(data["mean"]) != channels:
        return shape, None
    interpolation = str(data["interpolation"])
    side = math.floor(height / float(data["crop_pct"]))
    return shape, Preprocessing(
        mean=tuple(float(n) for n in data["mean"]),
        std=tuple(float(n) for n in data["std"]),
        # Squashed, whatever their aspect ratio, or else by the shorter side.
        resize=(side, side) if data.get("crop_mode") == "squash" else side,
        crop=height,
        interpolation=interpolation if interpolation in _FILTERS else "bilinear",
        channels=channels,
        from_preset=True,
    )


TIMM = Library("timm", "timm:convnext_tiny?num_classes=10", _build)
