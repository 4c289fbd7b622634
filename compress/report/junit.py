"""Reports as JUnit XML, so that continuous integration shows each limit as a test."""

from __future__ import annotations

import re
from xml.etree import ElementTree

from compress.report.build import Report, accuracy_sentence, cost_sentence
from compress.report.gates import gate_sentence
from compress.result import GateResult

# Characters that XML 1.0 cannot hold at all, not even escaped.
_ILLEGAL = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def render_junit(report: Report) -> str:
    """Return a run's or a comparison's limits as JUnit XML: one suite a run, one case a limit.

    A run without a test set has a skipped case that says so.
    """
    runs = report["runs"] if report["kind"] == "several" else [{"name": "compress", **report}]
    root = ElementTree.Element("testsuites", name="compress report")
    for run in runs:
        _suite(root, run)
    ElementTree.indent(root)
    return '<?xml version="1.0" encoding="UTF-8"?>\n' + ElementTree.tostring(root, "unicode") + "\n"


def _suite(root: ElementTree.Element, run: Report) -> None:
    gates = run["gates"]
    tested = run["result"]["test"] is not None
    name = _clean(run["name"])
    suite = ElementTree.SubElement(
        root,
        "testsuite",
        name=name,
        tests=str(len(gates) + 1),
        failures=str(sum(not g["passed"] for g in gates)),
        errors="0",
        skipped=str(int(not tested)),
    )
    case = ElementTree.SubElement(suite, "testcase", classname=name, name="verified on a test set")
    if not tested:
        ElementTree.SubElement(case, "skipped", message="There is no test set: unverified.")
    out = ElementTree.SubElement(case, "system-out")
    out.text = _clean(f"{accuracy_sentence(run)} {cost_sentence(run)}")
    for gate in gates:
        sentence = _clean(gate_sentence(GateResult(**gate)))
        case = ElementTree.SubElement(suite, "testcase", classname=name, name=_clean(gate["name"]))
        if gate["passed"]:
            ElementTree.SubElement(case, "system-out").text = sentence
        else:
            failure = ElementTree.SubElement(case, "failure", message=sentence, type="LimitBroken")
            failure.text = sentence


def _clean(value: str) -> str:
    return _ILLEGAL.sub("\N{REPLACEMENT CHARACTER}", value)
