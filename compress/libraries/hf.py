"""``hf:FOLDER``: the vision networks of transformers, as a folder's ``config.json`` describes them.

The file is somebody else's. Only classes of the installed package are used, whatever the file says
of code of its own (``auto_map``), of kernels, or of backbones on a hub; nothing is fetched.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from compress.errors import DataError, ModelError, near_matches, one_line
from compress.libraries.record import Convert, FromLibrary, Library, quiet, require, without_memory
from compress.untrusted import Unreadable, read_json
from compress.vision.preprocessing import Preprocessing, Size

CONFIG_FILE = "config.json"
PICTURES_FILE = "preprocessor_config.json"
# A network may take as much memory without further ado ...
_FREE_BYTES = 8 * 2**30
# ... and beyond it this multiple of the weights beside its description.
_LARGEST_FACTOR = 8
_WEIGHTS = ("*.safetensors", "*.bin")
# Each would have code fetched, or looked up outside the package.
_LEFT_OUT = frozenset((
    "auto_map", "attn_implementation", "_attn_implementation", "_attn_implementation_internal",
    "_attn_implementation_autoset", "experts_implementation", "_experts_implementation",
    "use_kernels", "quantization_config", "torch_dtype", "dtype", "transformers_version",
    "_name_or_path", "name_or_path", "checkpoint_path", "cache_dir", "pretrained", "pretrained_cfg",
    "pretrained_cfg_overlay",
))  # fmt: skip
_NAMES_A_NETWORK = ("backbone", "architecture")
_FILTERS = {0: "nearest", 2: "bilinear", 3: "bicubic"}  # Pillow's numbers


def _build(folder: str, arguments: dict[str, Any]) -> FromLibrary:
    transformers = require("transformers", "transformers", "Models of hf:")
    place = Path(folder)
    raw = _read(place / CONFIG_FILE)
    try:
        with quiet(), _offline():
            network = _network_class(transformers, raw, place)
            config = _configuration(transformers, raw, place, arguments)
            with without_memory():
                size = _bytes_of(network(config))
            _check_size(size, place)
            module = network(_configuration(transformers, raw, place, arguments))
    except ModelError:
        raise
    except Exception as error:
        raise ModelError(
            f"{place / CONFIG_FILE} describes no network that the installed transformers can "
            f"build{f' with {arguments}' if arguments else ''}: {type(error).__name__}: "
            f"{one_line(error)[:500]}."
        ) from error
    shape = _input_shape(config)
    return FromLibrary(module, _preset(place, shape), shape, _converter(network, config, place))


def _converter(network: Any, config: Any, place: Path) -> Convert:
    """Return what renames a checkpoint's entries as transformers does when it loads one.

    Layers have other names in newer versions than in published checkpoints.
    """

    def convert(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        try:
            with quiet(), _offline():
                made, found = network.from_pretrained(
                    None,
                    config=copy.deepcopy(config),
                    state_dict=dict(state),
                    output_loading_info=True,
                )
        except Exception as error:
            raise ModelError(
                f"transformers cannot load the checkpoint into the {network.__name__} that "
                f"{place / CONFIG_FILE} describes: {type(error).__name__}: "
                f"{one_line(error)[:500]}."
            ) from error
        missing = set(found["missing_keys"])
        entries = {n: t for n, t in made.state_dict().items() if n not in missing}
        return entries | {n: state[n] for n in found["unexpected_keys"] if n in state}

    return convert


def _read(path: Path) -> dict[str, Any]:
    """Read a JSON file that describes something.

    Raises:
        ModelError: It is not there, not a regular file, or no JSON object.
    """
    try:
        if path.exists() and not path.is_file():
            raise ModelError(f"{path} is not a regular file.")
        found = read_json(path)
    except OSError as error:
        raise ModelError(
            f"{path} cannot be read: {error.strerror}; hf:FOLDER takes a folder with the "
            f"{CONFIG_FILE} of a network of transformers."
        ) from error
    except Unreadable as error:
        raise ModelError(f"{path} is damaged: {error}; fetch it again.") from error
    if not isinstance(found, dict):
        raise ModelError(f"{path} holds no JSON object; fetch it again.")
    return found


def _network_class(transformers: Any, raw: Mapping[str, Any], place: Path) -> Any:
    """The class that ``architectures`` names, of the installed package.

    Raises:
        ModelError: It names none, or one of code of its own, or one that takes no pictures.
    """
    names = raw.get("architectures")
    name = names[0] if isinstance(names, list) and names else None
    if not isinstance(name, str) or not name.isidentifier():
        raise ModelError(
            f"{place / CONFIG_FILE} does not say which class the network is of; add "
            '"architectures": ["ViTForImageClassification"], or another.'
        )
    known = [n for n in dir(transformers) if "For" in n or n.endswith(("Model", "Backbone"))]
    found = getattr(transformers, name, None) if name in known else None
    if not isinstance(found, type) or not issubclass(found, transformers.PreTrainedModel):
        own = (
            " It names code of its own in auto_map, which is not run." if "auto_map" in raw else ""
        )
        raise ModelError(
            f"The installed transformers ({transformers.__version__}) has no network {name!r}, "
            f"which {place / CONFIG_FILE} asks for.{own}{near_matches(name, known)}"
        )
    if getattr(found, "main_input_name", "") != "pixel_values":
        raise ModelError(f"{name} of {place / CONFIG_FILE} takes no pictures, but other inputs.")
    return found


def _configuration(
    transformers: Any, raw: Mapping[str, Any], place: Path, arguments: Mapping[str, Any]
) -> Any:
    """The configuration as transformers has it, from what is harmless in the file."""
    kind = raw.get("model_type")
    known = transformers.CONFIG_MAPPING
    if not isinstance(kind, str) or kind not in known:
        raise ModelError(
            f"The installed transformers ({transformers.__version__}) does not know the model "
            f"type {str(kind)[:60]!r} of {place / CONFIG_FILE}."
            f"{near_matches(str(kind), list(known.keys()))}"
        )
    config = known[kind].from_dict(_harmless(raw, place / CONFIG_FILE))
    for name, value in arguments.items():
        if name.startswith("_") or not hasattr(config, name):
            fields = list(config.to_dict())
            raise ModelError(
                f"The configuration of hf:{place} has no {name!r}.{near_matches(name, fields)}"
            )
        setattr(config, name, value)
    return config


def _harmless(value: Any, path: Path) -> Any:
    """Return a configuration without what would fetch or run anything.

    Raises:
        ModelError: It names another network that would have to be fetched.
    """
    if isinstance(value, list):
        return [_harmless(each, path) for each in value]
    if not isinstance(value, dict):
        return value
    for key in _NAMES_A_NETWORK:
        name = value.get(key)
        fetched = key == "backbone" and not _of_timm(value)
        if isinstance(name, str) and (fetched or not set(name).isdisjoint("/\\:")):
            raise ModelError(
                f"{path} names the network {name[:60]!r} as its {key}, which would be fetched; "
                'put what describes it into the file itself, as "backbone_config".'
            )
    kept = {k: _harmless(v, path) for k, v in value.items() if k not in _LEFT_OUT}
    if kept.get("use_pretrained_backbone"):
        kept["use_pretrained_backbone"] = False
    return kept


def _of_timm(value: Mapping[str, Any]) -> bool:
    return bool(value.get("use_timm_backbone")) or value.get("model_type") == "timm_backbone"


def _bytes_of(module: nn.Module) -> int:
    return sum(t.numel() * 4 for t in (*module.parameters(), *module.buffers()))


def _check_size(size: int, place: Path) -> None:
    """Compare the network with the weights that lie beside its description.

    Raises:
        ModelError: It is out of proportion.
    """
    files = (file for pattern in _WEIGHTS for file in place.glob(pattern))
    held = sum(file.stat().st_size for file in files if file.is_file())
    if size > max(_FREE_BYTES, _LARGEST_FACTOR * held):
        raise ModelError(
            f"{place / CONFIG_FILE} describes a network of {size / 2**30:,.0f} GiB, and the "
            f"weights beside it have {held / 2**30:,.1f} GiB; fetch both again."
        )


@contextmanager
def _offline() -> Iterator[None]:
    """Let the hub's client fetch nothing, and transformers print nothing.

    The client looks at its constant before every request.
    """
    constants = require("huggingface_hub", "transformers", "Models of hf:").constants
    said = require("transformers", "transformers", "Models of hf:").utils.logging
    before = constants.HF_HUB_OFFLINE
    bars, words = said.is_progress_bar_enabled(), said.get_verbosity()
    constants.HF_HUB_OFFLINE = True
    said.disable_progress_bar()
    said.set_verbosity_error()
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before
        said.set_verbosity(words)
        if bars:
            said.enable_progress_bar()


def _input_shape(config: Any) -> tuple[int, ...] | None:
    size, channels = getattr(config, "image_size", None), getattr(config, "num_channels", 3)
    sides = (size, size) if isinstance(size, int) else size
    if not isinstance(sides, list | tuple) or len(sides) != 2 or not isinstance(channels, int):
        return None
    if not all(isinstance(n, int) and n > 0 for n in sides):
        return None
    return (channels, *sides)


def _preset(place: Path, shape: tuple[int, ...] | None) -> Preprocessing | None:
    """What ``preprocessor_config.json`` says, as far as `Preprocessing` can say it.

    Raises:
        ModelError: The file is damaged.
    """
    path = place / PICTURES_FILE
    if not path.exists():
        return None
    raw = _read(path)
    resize, crop = _sides(raw)
    if shape is not None and crop is None and isinstance(resize, int) and shape[1] == shape[2]:
        crop = shape[1]
    scaled = raw.get("do_rescale", True) is not False
    mean, std = raw.get("image_mean"), raw.get("image_std")
    normalised = raw.get("do_normalize", True) and _numbers(mean) and _numbers(std)
    if not scaled or (mean is not None and not normalised and raw.get("do_normalize", True)):
        return None
    try:
        return Preprocessing(
            mean=tuple(map(float, mean)) if normalised and mean else (),
            std=tuple(map(float, std)) if normalised and std else (),
            resize=resize,
            crop=crop,
            interpolation=_FILTERS.get(raw.get("resample", 2), "bilinear"),
            channels=len(mean) if normalised and mean and len(mean) in (1, 3) else 3,
            from_preset=True,
        )
    except DataError as error:
        raise ModelError(f"{path} cannot be used: {error}") from error


def _numbers(value: Any) -> bool:
    return isinstance(value, list) and all(
        isinstance(n, int | float) and math.isfinite(n) for n in value
    )


# From this size on, ConvNeXT's pictures are brought to exactly it, and nothing is cut.
WARPED = 384


def _sides(raw: Mapping[str, Any]) -> tuple[Size | None, Size | None]:
    """What pictures are resized to, the shorter side or both, and the size of the crop."""
    resize = _size(raw.get("size")) if raw.get("do_resize", True) else None
    crop = _size(raw.get("crop_size")) if raw.get("do_center_crop") else None
    share = raw.get("crop_pct")
    kind = raw.get("image_processor_type") or raw.get("feature_extractor_type") or ""
    warps = str(kind).startswith("ConvNext") and isinstance(share, float)
    if warps and isinstance(resize, int) and resize >= WARPED:
        return (resize, resize), None
    if isinstance(resize, int) and isinstance(share, float) and 0.1 < share < 1 and crop is None:
        # ConvNeXT's way: what is called the size is that of the crop.
        return int(resize / share), resize
    if isinstance(crop, tuple) and crop[0] == crop[1]:
        crop = crop[0]
    return resize, crop


def _size(value: Any) -> Size | None:
    """A size as the processors of transformers write it: a number, a shorter side, or both."""
    if isinstance(value, dict) and "shortest_edge" not in value:
        height, width = _side(value.get("height")), _side(value.get("width"))
        return None if height is None or width is None else (height, width)
    return _side(value.get("shortest_edge") if isinstance(value, dict) else value)


def _side(value: Any) -> int | None:
    return value if type(value) is int and 0 < value <= 1 << 14 else None


HF = Library(
    "hf",
    "hf:path/to/folder",
    _build,
    sized_by_arguments=False,
    place=lambda name: name,
    checkpoint=lambda name: name,
)
