"""Numbers as a reader wants them: fixed places, real minus signs, and a dash for the unknown."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from compress.plan import DENSE

MINUS = "\N{MINUS SIGN}"
TIMES = "\N{MULTIPLICATION SIGN}"
ARROW = "\N{RIGHTWARDS ARROW}"
UNKNOWN = "\N{EN DASH}"
_SCALES = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))
_RUNTIMES = {
    "compile": "torch.compile",
    "onnxruntime": "ONNX Runtime",
    "openvino": "OpenVINO",
}


def percent(fraction: float | None, places: int = 2) -> str:
    """``0.8752`` as ``"87.52%"``."""
    return UNKNOWN if fraction is None else f"{100 * fraction:.{places}f}%"


def signed(value: float | None, places: int = 2) -> str:
    """A change with its sign, ``"−1.12"`` or ``"+0.30"``; what rounds to zero has none."""
    if value is None:
        return UNKNOWN
    text = f"{abs(value):.{places}f}"
    if float(text) == 0.0:
        return text
    return (MINUS if value < 0 else "+") + text


def count(value: float | None) -> str:
    """``40551424`` as ``"40.55 M"``; numbers below ten thousand in full."""
    if value is None:
        return UNKNOWN
    if abs(value) < 10_000:
        return f"{value:,.0f}"
    for scale, letter in _SCALES:
        if abs(value) >= scale:
            return f"{value / scale:.2f} {letter}"
    raise AssertionError(f"no scale for {value}")


def whole(value: int | None) -> str:
    """``40551424`` as ``"40,551,424"``."""
    return UNKNOWN if value is None else f"{value:,}"


def size(value: float | None) -> str:
    """Bytes as ``"1.08 MB"`` (powers of ten)."""
    if value is None:
        return UNKNOWN
    return f"{value:,.0f} B" if value < 10_000 else f"{count(value)}B"


def ratio(value: float | None) -> str:
    """``0.5`` as ``"×0.50"``."""
    return UNKNOWN if value is None else f"{TIMES}{value:.2f}"


def seconds(value: float | None) -> str:
    """A time with the unit that fits it."""
    if value is None:
        return UNKNOWN
    if value >= 120:
        return f"{value / 60:.1f} min"
    if value >= 1:
        return f"{value:.2f} s"
    return f"{value * 1e3:.2f} ms" if value >= 1e-3 else f"{value * 1e6:.1f} µs"


def runtime(name: str) -> str:
    """A runtime as its makers write it."""
    return _RUNTIMES.get(name, name)


def number(value: float | None, digits: int = 3) -> str:
    """A number of any magnitude to a few significant digits."""
    if value is None:
        return UNKNOWN
    return f"{value:.{digits}g}".replace("-", MINUS)


def measured(value: float | None, unit: str = "") -> str:
    """A measure in its unit: a fraction as percent, and anything else as the number it is."""
    if unit == "fraction":
        return percent(value)
    return number(value, 5) + (f" {unit}" if unit and value is not None else "")


def change(value: float | None, unit: str, places: int = 2) -> str:
    """A change of a measure: of a fraction in points, else in its unit."""
    if value is None:
        return UNKNOWN
    return f"{signed(value, places)} {'points' if unit == 'fraction' else unit}".rstrip()


def probability(p: float | None) -> str:
    """A p-value as ``"p = 0.031"`` or ``"p < 0.001"``."""
    if p is None:
        return UNKNOWN
    return "p < 0.001" if p < 1e-3 else f"p = {p:.3f}"


def ranks(values: Any) -> str:
    """Ranks of a layer as ``"8"`` or ``"8 × 16"``."""
    return f" {TIMES} ".join(str(v) for v in values) if values else UNKNOWN


def widths(values: Any) -> str:
    """The inputs and outputs of a layer as ``"24→48"``."""
    return ARROW.join(str(v) for v in values) if values else UNKNOWN


def sizes(layer: Mapping[str, Any]) -> str:
    """Say what is left of a layer: of its rank ``"8 of 16"``, of its width ``"24→48 of 24→96"``."""
    said = []
    if layer["ranks"]:
        said.append(f"{ranks(layer['ranks'])} of {whole(layer['full_rank'])}")
    if layer["width"]:
        # A shape begins with the inputs and outputs of the whole layer.
        before = str(layer["shape"]).split(" ")[0] or UNKNOWN
        said.append(f"{widths(layer['width'])} of {before}")
    return ", ".join(said) or UNKNOWN


def sizes_heading(layers: Iterable[Mapping[str, Any]]) -> str:
    """What a column of `sizes` is called."""
    return "rank or width" if any(layer["width"] for layer in layers) else "rank"


def treatment(scheme: str, of_rank: Any, width: Any) -> str:
    """Say what happens to a layer: ``"output 12"``, ``"narrow 24→48"`` or both, ``"kept"``."""
    if scheme == DENSE:
        return "kept"
    said = [ranks(of_rank)] if of_rank or not width else []
    said += [widths(width)] if width else []
    return f"{scheme.replace('_', '-')} {', '.join(said)}"


def plural(n: int, noun: str, many: str = "") -> str:
    """``"1 image"``, ``"1,200 images"``."""
    return f"{n:,} {noun if n == 1 else many or noun + 's'}"


def varied(split: Mapping[str, Any]) -> str:
    """Say how images to fit to were varied; empty where they were not."""
    copies = split.get("copies", 0)  # older reports do not say
    if not copies:
        return ""
    how = "mirrored and shifted" if split["augmentation"] == "moved" else split["augmentation"]
    return f"each of the fit images also {plural(copies, 'time')} {how}"


def why(layer: Mapping[str, Any]) -> str:
    """Say why a layer was treated as it was, and whether a dense one was refitted all the same."""
    refitted = layer.get("refitted") and layer["scheme"] == DENSE
    return f"{layer['reason']}; its weights were refitted" if refitted else str(layer["reason"])
