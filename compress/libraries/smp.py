"""``smp:NAME``: the networks of segmentation_models_pytorch, with random weights."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from torch import nn

from compress.errors import ModelError, near_matches, one_line
from compress.libraries.record import FromLibrary, Library, plain_arguments, quiet, require
from compress.libraries.timm import check_timm_name

_SIDE = 256  # a multiple of 32, which all of them take
_PACKAGE = "segmentation_models_pytorch"
_OF_TIMM = "tu-"


def _networks(package: Any) -> dict[str, Any]:
    """The networks by the names of their classes."""
    found = inspect.getmembers(package, inspect.isclass)
    return {
        name: each
        for name, each in found
        if issubclass(each, nn.Module) and "encoder_name" in inspect.signature(each).parameters
    }


def _build(name: str, arguments: dict[str, Any]) -> FromLibrary:
    package = require(_PACKAGE, "smp", "Models of smp:")
    networks = _networks(package)
    if name not in networks:
        raise ModelError(
            f"segmentation_models_pytorch has no network {name!r}.{near_matches(name, networks)} "
            f"It has {', '.join(networks)}."
        )
    given = _full_names(name, arguments)
    default = inspect.signature(networks[name]).parameters["encoder_name"].default
    encoder = str(given.get("encoder_name", default))
    _check_encoder(package, encoder)
    taken = inspect.signature(networks[name]).parameters.values()
    known = [each.name for each in taken if each.kind is not each.VAR_KEYWORD]
    unknown = [a for a in given if a not in known]
    if unknown and not encoder.startswith(_OF_TIMM):  # all others pass over what they do not know
        raise ModelError(
            f"smp:{name} takes no {', '.join(unknown)}.{near_matches(unknown[0], known)} It takes "
            f"{', '.join(known)}."
        )
    try:
        with quiet():
            module = networks[name](**{"encoder_weights": None, **given})
    except OSError as error:
        raise ModelError(
            f"The weights {given.get('encoder_weights')!r} of the encoder of smp:{name} could not "
            f"be fetched: {one_line(error)}. Leave encoder_weights out: the weights come from the "
            "checkpoint."
        ) from error
    except Exception as error:
        raise ModelError(
            f"smp:{name} cannot be built with {given or 'its defaults'}: "
            f"{type(error).__name__}: {one_line(error)}."
        ) from error
    channels = given.get("in_channels", 3)
    return FromLibrary(module, None, (int(channels), _SIDE, _SIDE))


def _full_names(name: str, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Put ``encoder_name`` for its short form ``encoder``."""
    given = dict(arguments)
    if "encoder" in given:
        if "encoder_name" in given:
            raise ModelError(f"smp:{name} is given both encoder and encoder_name; give one.")
        given["encoder_name"] = given.pop("encoder")
    return given


def _check_encoder(package: Any, encoder: str) -> None:
    """Refuse an encoder that is not installed; those of timm could else be fetched by their name.

    Raises:
        ModelError: There is none of this name.
    """
    if encoder.startswith(_OF_TIMM):
        check_timm_name(encoder.removeprefix(_OF_TIMM), _OF_TIMM)
        return
    known = package.encoders.get_encoder_names()
    if encoder not in known:
        raise ModelError(
            f"segmentation_models_pytorch has no encoder {encoder!r}."
            f"{near_matches(encoder, known)} It has {len(known)}, among them resnet34, and those "
            f"of timm as {_OF_TIMM}NAME."
        )


def _risk(arguments: Mapping[str, Any]) -> str:
    if "encoder_weights" in arguments:
        return "may download weights"
    return plain_arguments(arguments)


SMP = Library("smp", "smp:Unet?encoder=resnet34&classes=3", _build, _risk)
