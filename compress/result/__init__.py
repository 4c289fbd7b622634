"""What a run found out, as plain data: every number a report shows, JSON both ways.

Units: accuracies, agreement, confidences and ECE are fractions from 0 to 1; drops and changes are
percentage points (a positive drop is a loss, a positive change a gain); times are seconds; KL is
in nats; MACs are multiply-accumulates per image. Whatever a failed or unverified run lacks is
None or empty. JSON has no NaN: a number that is not finite is written as null.
"""

from compress.result.encoding import from_dict, from_json, plain_data, to_dict, to_json
from compress.result.layers import LayerErrors, LayerResult, MeasuredError
from compress.result.metrics import (
    CalibrationBin,
    ClassResult,
    CustomMetric,
    EndMetric,
    Example,
    Flip,
    Interval,
    OutputChange,
)
from compress.result.progressive import Progressive, ProgressivePoint
from compress.result.recovery import Recovery, RecoveryCheck
from compress.result.runs import (
    RESULT_FORMAT,
    Cost,
    CostSummary,
    Deployed,
    GateResult,
    Latency,
    Result,
    SplitRecord,
    SweepPoint,
    SweepResult,
    Versions,
)

__all__ = [
    "RESULT_FORMAT",
    "CalibrationBin",
    "ClassResult",
    "Cost",
    "CostSummary",
    "CustomMetric",
    "Deployed",
    "EndMetric",
    "Example",
    "Flip",
    "GateResult",
    "Interval",
    "Latency",
    "LayerErrors",
    "LayerResult",
    "MeasuredError",
    "OutputChange",
    "Progressive",
    "ProgressivePoint",
    "Recovery",
    "RecoveryCheck",
    "Result",
    "SplitRecord",
    "SweepPoint",
    "SweepResult",
    "Versions",
    "from_dict",
    "from_json",
    "plain_data",
    "to_dict",
    "to_json",
]
