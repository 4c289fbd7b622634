"""The schema of ``report.json``, derived from the records themselves so that it cannot lag.

``schema.json`` beside this file is the same in writing; ``python -m compress.report.schema``
prints it anew.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import types
import typing
from pathlib import Path
from typing import Any

from compress.report.build import REPORT_FORMAT
from compress.result import GateResult, Result, SweepResult

Schema = dict[str, Any]

SCHEMA_FILE = Path(__file__).with_name("schema.json")
_NUMBER: Schema = {"type": ["number", "null"]}
_STRING: Schema = {"type": "string"}
_COUNT: Schema = {"type": "integer", "minimum": 0}


def report_schema() -> Schema:
    """Return the JSON Schema (draft 2020-12) of every kind of report."""
    records: Schema = {}
    result = _of(Result, records)
    sweep = _of(SweepResult, records)
    gates = _array(_of(GateResult, records))
    common = {
        "format": {"const": REPORT_FORMAT},
        "verdict": {"enum": ["passed", "failed", "unverified"]},
        "notes": _array(_STRING),
    }
    run = {
        **common,
        "kind": {"const": "run"},
        "headline": {"$ref": "#/$defs/Headline"},
        "gates": gates,
        "baseline": {"anyOf": [{"$ref": "#/$defs/Baseline"}, {"type": "null"}]},
        "result": result,
    }
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "compress report",
        "description": "Accuracies are fractions, drops percentage points, times seconds.",
        "oneOf": [
            _object(run),
            _object({**common, "kind": {"const": "sweep"}, "sweep": sweep}),
            _object(
                {
                    **common,
                    "kind": {"const": "several"},
                    "runs": {**_array(_object({"name": _STRING, **run})), "minItems": 2},
                }
            ),
        ],
        "$defs": {**records, "Headline": _headline(), "Baseline": _baseline()},
    }


def _headline() -> Schema:
    numbers = (
        "before", "after", "drop", "drop_low", "drop_high",
        "macs_ratio", "params_ratio", "bytes_ratio", "latency_ratio",
    )  # fmt: skip
    return _object(
        {
            "set": {"enum": ["test", "validation", None]},
            "images": {"type": ["integer", "null"]},
            "metric": _STRING,
            "unit": _STRING,
            "lower_is_better": {"type": "boolean"},
            **dict.fromkeys(numbers, _NUMBER),
            "latency_batch": {"type": ["integer", "null"]},
            "rewritten": _COUNT,
            "kept": _COUNT,
        }
    )


def _baseline() -> Schema:
    row = {
        "key": _STRING,
        "label": _STRING,
        "unit": {"enum": ["points", "fraction", "ratio", "number"]},
        "before": _NUMBER,
        "now": _NUMBER,
        "change": _NUMBER,
        "better": {"type": ["boolean", "null"]},
    }
    width = {"anyOf": [_array({"type": "integer"}), {"type": "null"}]}
    treatment = {"scheme": _STRING, "ranks": _array(_COUNT), "width": width}
    layer = {"name": _STRING} | {
        f"{key}_{when}": kind for key, kind in treatment.items() for when in ("before", "now")
    }
    classes = {"name": _STRING, "before": _NUMBER, "now": _NUMBER, "change": _NUMBER}
    return _object(
        {
            "name": _STRING,
            "rows": _array(_object(row)),
            "layers": _array(_object(layer)),
            "classes": _array(_object(classes)),
        }
    )


def _object(properties: Schema) -> Schema:
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }


def _array(items: Schema) -> Schema:
    return {"type": "array", "items": items}


def _of(kind: Any, records: Schema) -> Schema:
    """Return the schema of an annotated type; records go into ``records`` once, by name."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        inner = next(k for k in arguments if k is not type(None))
        return {"anyOf": [_of(inner, records), {"type": "null"}]}
    if dataclasses.is_dataclass(kind):
        return _record(kind, records)
    if origin is tuple:
        return _array(_of(arguments[0], records))
    if origin is dict:
        return {"type": "object", "additionalProperties": _of(arguments[1], records)}
    # A float that is not finite is written as null.
    plain = {float: _NUMBER, int: {"type": "integer"}, str: _STRING, bool: {"type": "boolean"}}
    return plain.get(kind, {})


def _record(kind: Any, records: Schema) -> Schema:
    name = kind.__name__
    if name not in records:
        records[name] = {}
        hints = typing.get_type_hints(kind)
        fields = {f.name: _of(hints[f.name], records) for f in dataclasses.fields(kind)}
        summary = (kind.__doc__ or "").split("\n\n")[0]
        records[name] = {"description": " ".join(summary.split()), **_object(fields)}
    return {"$ref": f"#/$defs/{name}"}


def schema_text() -> str:
    """Return the schema as it stands in ``schema.json``."""
    return json.dumps(report_schema(), indent=1, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    sys.stdout.write(schema_text())
