"""Reports as one self-contained HTML file: styles, scripts, data and pictures inside it.

The page runs no script but its own: a content security policy names their digests, so that a class
name, a path or a layer's name that holds HTML stays text even if escaping were to fail.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib import resources
from typing import Any

import jinja2
from markupsafe import Markup

from compress.report import build, deployed, gates, points, progressive, rows, text
from compress.report.build import Report
from compress.report.plots import CLASSES_DRAWN, plot_data
from compress.result import GateResult, plain_data
from compress.untrusted import visible

# In this order: the plotting library, what it stands on first, then the page's own script.
SCRIPTS = ("vendor/d3-7.9.2.min.js", "vendor/plot-0.6.17.umd.min.js", "assets/report.js")
# Labels and PNG images, side by side.
Panels = tuple[tuple[str, bytes], ...]
_FLIPS_FIRST, _FLIPS_DRAWN = 18, 90
_TEMPLATES = {"run": "run.html.j2", "sweep": "points.html.j2", "several": "points.html.j2"}


@dataclass(frozen=True)
class Pictures:
    """Small PNG images to be shown inside a page, by index in the set compared.

    Attributes:
        thumbnails: Of the images that flipped.
        panels: Of the examples: what goes in, what came out before and after, and what changed.
    """

    thumbnails: Mapping[int, bytes] = field(default_factory=dict)
    panels: Mapping[int, Panels] = field(default_factory=dict)


def render_html(report: Report, pictures: Pictures | None = None) -> str:
    """Return a report of any kind as one HTML page that needs no network.

    Args:
        report: What `build_report`, `build_sweep_report` or `build_comparison` returned.
        pictures: Images to show; none by default.
    """
    metric, where = build.end_metric(report) if report["kind"] == "run" else (None, "")
    scripts, pictures = [_asset(name) for name in SCRIPTS], pictures or Pictures()
    page = _environment().get_template(_TEMPLATES[report["kind"]])
    return page.render(
        report=report,
        metric=metric,
        where=where,
        rows=rows,
        points=points,
        progressive=progressive,
        deployed=deployed,
        text=text,
        build=build,
        gate_sentence=lambda gate: gates.gate_sentence(GateResult(**gate)),
        thumbnails={i: _data_uri(png) for i, png in pictures.thumbnails.items()},
        panels={
            i: [(label, _data_uri(png)) for label, png in shown]
            for i, shown in pictures.panels.items()
        },
        flips_first=_FLIPS_FIRST,
        flips_drawn=_FLIPS_DRAWN,
        classes_drawn=CLASSES_DRAWN,
        style=Markup(_asset("assets/report.css")),
        scripts=[Markup(code) for code in scripts],
        policy=_policy(scripts),
        data=Markup(embed(plot_data(report))),
    )


def embed(data: Any) -> str:
    """Return data as JSON that is safe inside a script element.

    ``<``, ``>`` and ``&`` are written as escapes, so that no string can end the element.
    """
    encoded = json.dumps(plain_data(data), separators=(",", ":"), allow_nan=False)
    for character in "<>&":
        encoded = encoded.replace(character, f"\\u{ord(character):04x}")
    return encoded


def _policy(scripts: list[str]) -> str:
    digests = " ".join(
        "'sha256-" + base64.b64encode(hashlib.sha256(code.encode()).digest()).decode() + "'"
        for code in scripts
    )
    return f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src {digests}"


def _data_uri(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode()


@cache
def _asset(name: str) -> str:
    return resources.files("compress.report").joinpath(name).read_text(encoding="utf-8")


def _shown(value: Any) -> Any:
    """Write out control characters of text from outside; what is markup already is this page's."""
    if isinstance(value, str) and not isinstance(value, Markup):
        return visible(value, keep="\n\t")
    return value


@cache
def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("compress.report"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
        finalize=_shown,
    )
    environment.filters |= {
        name: getattr(text, name)
        for name in (
            "percent", "signed", "measured", "change", "count", "whole", "size", "ratio",
            "seconds", "number", "probability", "plural",
        )
    }  # fmt: skip
    return environment
