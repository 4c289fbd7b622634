"""Files in memory: what they are computed in, and which runtimes take them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from compiling import compiling
from torch import nn

from compress.deploy.file import COMPILED, ONNX, PROGRAM, Form, make_file
from compress.deploy.runtimes import SESSIONS
from compress.errors import ModelError


def network(dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16, 5)).to(dtype)


@pytest.mark.parametrize(
    ("dtype", "target"),
    [(torch.float16, ONNX), (torch.float16, PROGRAM), (torch.bfloat16, PROGRAM),
     (torch.float64, PROGRAM)],
)  # fmt: skip
def test_files_compute_in_the_network_s_own_type(dtype: torch.dtype, target: str) -> None:
    model = network(dtype).eval()
    inputs = torch.randn(3, 3, 4, 4).to(dtype)
    made = make_file(model, inputs, Form(target), {})
    with torch.no_grad():
        expected, found = model(inputs), made.network(inputs)
    assert found.dtype == dtype
    torch.testing.assert_close(found, expected, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_types_that_onnx_runtime_lacks_are_refused(dtype: torch.dtype) -> None:
    with pytest.raises(ModelError, match=r"weights are \w+, .*--to pt2"):
        make_file(network(dtype), torch.randn(2, 3, 4, 4).to(dtype), Form(ONNX), {})


def test_a_runtime_that_does_not_take_the_file_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: bytes) -> None:
        raise ModelError("OpenVINO does not take the network: it is too new.")

    monkeypatch.setattr("compress.deploy.file.installed", lambda _: True)
    monkeypatch.setitem(SESSIONS, "openvino", refuse)
    made = make_file(network(torch.float32), torch.randn(2, 3, 4, 4), Form(ONNX), {})
    networks, problems = made.on_runtimes()
    assert list(networks) == ["onnxruntime"]
    assert problems == ("OpenVINO does not take the network: it is too new.",)


@compiling
def test_a_compiled_program_runs_where_this_package_is_not_installed(tmp_path: Path) -> None:
    model, inputs = nn.Linear(4, 3).eval(), torch.randn(5, 4)  # compiling takes its time
    made = make_file(model, inputs[:2], Form(COMPILED), {"compress": "the manifest"})
    with torch.no_grad():
        expected = model(inputs)
    torch.testing.assert_close(made.network(inputs), expected)
    program = tmp_path / "net.pt2"
    program.write_bytes(made.content)
    torch.save((inputs, expected), tmp_path / "tensors.pt")
    code = (
        "import torch\n"
        "import sys; sys.modules['compress'] = None\n"
        f"inputs, expected = torch.load({str(tmp_path / 'tensors.pt')!r}, weights_only=True)\n"
        f"program = torch._inductor.aoti_load_package({str(program)!r})\n"
        "torch.testing.assert_close(program(inputs), expected)\n"
        "assert program.get_metadata()['compress'] == 'the manifest'\n"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
