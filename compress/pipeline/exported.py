"""What is asked of an export, and what came of it."""

from __future__ import annotations

from dataclasses import dataclass

from compress.deploy.file import Form
from compress.pipeline.int8 import Int8
from compress.pipeline.parity import OutputCheck
from compress.result import EndMetric
from compress.timing.runtimes import RuntimeSeconds


@dataclass(frozen=True)
class Request:
    """What is asked of an export beside the configuration.

    Attributes:
        form: The kind of file.
        tolerance: The largest difference of an output, relative to its largest value; None for one
            by the type that is computed in.
        original: The checkpoint that a result was made from, to be timed beside it; ``""`` for
            none.
        int8: Whether the file computes in eight bits.
        trust_code: As `load_result`.
    """

    form: Form
    tolerance: float | None = None
    original: str = ""
    int8: bool = False
    trust_code: bool = False


@dataclass(frozen=True)
class Exported:
    """A file that was written, and what it was checked by.

    Attributes:
        file: Where it is.
        target: ``"onnx"``, ``"pt2"`` or ``"aoti"``.
        bytes: Its size.
        opset: The version of ONNX's operators; None for a program.
        batch: The batch size that it takes; None for any.
        inputs: The names of its inputs.
        outputs: Its outputs in float, compared with those in torch.
        images: On how many images.
        tolerance: What `OutputCheck.largest` may be.
        agreement: The share of the same predictions there, by the file as it is; None without
            predictions.
        test: The end metric in torch (before) and of the file (after); None without a test set.
        beside_original: The same with the original (before); None where none was given.
        times: Of torch, and of all runtimes that are installed and take the file.
        threads: That they computed with.
        warnings: What the user should know.
        int8: What eight bits did; None in float.
    """

    file: str
    target: str
    bytes: int
    opset: int | None
    batch: int | None
    inputs: tuple[str, ...]
    outputs: tuple[OutputCheck, ...]
    images: int
    tolerance: float
    agreement: float | None
    test: EndMetric | None
    beside_original: EndMetric | None
    times: tuple[RuntimeSeconds, ...]
    threads: int
    warnings: tuple[str, ...]
    int8: Int8 | None = None
