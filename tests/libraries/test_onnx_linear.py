"""Products with stored matrices in ONNX files, compared with onnx's own reference."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from workbench import command

from compress.inputs.models import build_model

STEPS, WIDTH = 6, 8


@pytest.fixture(name="onnx")
def _onnx() -> Any:
    if importlib.util.find_spec("onnx2torch") is None:
        pytest.skip("onnx2torch is not installed")
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnx.reference")  # not imported with the package
    return onnx


def written(onnx: Any, folder: Path, nodes: list[tuple[Any, ...]], outputs: int) -> tuple[str, Any]:
    """A file with nodes ``(type, inputs, output)``, and the reference that runs it."""
    helper, random = onnx.helper, np.random.default_rng(0)
    shapes = {"w": (WIDTH, 12), "b": (12,), "v": (12, WIDTH), "t": (12, WIDTH), "c": (1, 1, 12)}
    shapes |= {"h": (WIDTH, 3), "g": (3,), "left": (STEPS, STEPS), "many": (2, WIDTH, 12)}
    read = {name for _, inputs, _ in nodes for name in inputs}
    arrays = {n: random.normal(size=s).astype(np.float32) for n, s in shapes.items() if n in read}
    axes = {"ReduceMean": {"axes": [1]}}
    made = [helper.make_node(kind, [*read], [to], **axes.get(kind, {})) for kind, read, to in nodes]
    if "k" in read:
        value = onnx.numpy_helper.from_array(random.normal(size=(12, WIDTH)).astype(np.float32))
        made.insert(0, helper.make_node("Constant", [], ["k"], value=value))
    ends = [
        helper.make_tensor_value_info("x", 1, ["n", STEPS, WIDTH]),
        helper.make_tensor_value_info(nodes[-1][2], 1, ["n", *[None] * (outputs - 1)]),
    ]
    stored = [onnx.numpy_helper.from_array(array, name) for name, array in arrays.items()]
    graph = helper.make_graph(made, "g", ends[:1], ends[1:], stored)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    path = str(folder / "net.onnx")
    onnx.save_model(model, path)
    return path, onnx.reference.ReferenceEvaluator(model)


BIASED = [("MatMul", "xw", "y"), ("Add", "yb", "z")]
CASES: dict[str, tuple[list[tuple[Any, ...]], list[bool]]] = {
    # The nodes, and for each linear layer that they become whether it has a bias.
    "with a bias": (BIASED, [True]),
    "bias first": ([("MatMul", "xw", "y"), ("Add", "by", "z")], [True]),
    "without a bias": ([("MatMul", "xw", "y"), ("Relu", "y", "z")], [False]),
    "two layers": ([*BIASED, ("Relu", "z", "r"), ("MatMul", "rv", "o")], [True, False]),
    "a node's weight": ([*BIASED, ("MatMul", "zk", "o")], [True, False]),
    "a transposed weight": ([("Transpose", "t", "s"), ("MatMul", "xs", "y"), ("Add", "yb", "z")],
                            [True]),
    "a product read twice": ([("MatMul", "xw", "y"), ("Add", "yb", "z"), ("Mul", "yz", "o")],
                             [False]),
    "a sum with itself": ([("MatMul", "xw", "y"), ("Add", "yy", "z")], [False]),
    "a bias of three axes": ([("MatMul", "xw", "y"), ("Add", "yc", "z")], [False]),
    "a difference": ([("MatMul", "xw", "y"), ("Sub", "yb", "z")], [False]),
    "a stored matrix on the left": ([("MatMul", ("left", "x"), "y")], []),
    "a matrix for each of the batch": ([("MatMul", "xw", "y"), ("MatMul", ("x", "many"), "u"),
                                        ("Add", "yu", "z")], [False]),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_products_become_linear_layers(case: str, onnx: Any, tmp_path: Path) -> None:
    nodes, biased = CASES[case]
    path, reference = written(onnx, tmp_path, nodes, 3)
    module = build_model(f"onnx:{path}").module
    layers = [each for each in module.modules() if isinstance(each, nn.Linear)]
    assert [layer.bias is not None for layer in layers] == biased
    x = np.random.default_rng(1).normal(size=(2, STEPS, WIDTH)).astype(np.float32)
    (expected,) = reference.run(None, {"x": x})
    with torch.no_grad():
        found = module(torch.from_numpy(x))
    torch.testing.assert_close(found, torch.tensor(expected), rtol=1e-5, atol=1e-5)
    # Nothing is stored twice: what a layer has taken over is no longer kept beside it.
    stored = sum(t.numel() for t in module.state_dict().values())
    file = onnx.load(path)
    constants = [a.t for node in file.graph.node for a in node.attribute if a.HasField("t")]
    assert stored == sum(np.prod(t.dims) for t in [*file.graph.initializer, *constants])


def test_a_stored_matrix_that_two_products_share(onnx: Any, tmp_path: Path) -> None:
    nodes = [("MatMul", "xw", "y"), ("Add", "yb", "z"), ("MatMul", "xw", "u"), ("Add", "zu", "o")]
    path, reference = written(onnx, tmp_path, nodes, 3)
    module = build_model(f"onnx:{path}").module
    assert sum(isinstance(each, nn.Linear) for each in module.modules()) == 2
    x = np.random.default_rng(1).normal(size=(2, STEPS, WIDTH)).astype(np.float32)
    with torch.no_grad():
        found = module(torch.from_numpy(x))
    expected = torch.tensor(reference.run(None, {"x": x})[0])
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_a_run_rewrites_products_with_stored_matrices(onnx: Any, tmp_path: Path) -> None:
    nodes = [
        *BIASED, ("Relu", "z", "r"), ("MatMul", "rv", "o"), ("ReduceMean", "o", "m"),
        ("Flatten", "m", "f"), ("MatMul", "fh", "l"), ("Add", "lg", "e"),
    ]  # fmt: skip
    path, _ = written(onnx, tmp_path, nodes, 2)
    rng = np.random.default_rng(2)
    inputs = rng.normal(size=(48, STEPS, WIDTH)).astype(np.float32)
    np.savez(tmp_path / "data.npz", inputs=inputs, labels=np.arange(48) % 3)
    out = tmp_path / "out"
    done = command(
        "run", "--model", f"onnx:{path}", "--data", f"tensors:{tmp_path / 'data.npz'}",
        "--macs", "0.7", "--no-latency", "--output", str(out),
    )  # fmt: skip
    assert done.exit_code == 0, done.stderr
    result = json.loads((out / "report.json").read_text())["result"]
    kinds = {layer["name"]: layer["kind"] for layer in result["layers"]}
    assert list(kinds.values()) == ["Linear"] * 3
    assert result["cost"]["compressed"]["macs"] <= 0.7 * result["cost"]["folded"]["macs"]
