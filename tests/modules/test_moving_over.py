"""Code and state dicts of the two originals: their READMEs' usage runs with another import."""

from __future__ import annotations

import copy
import importlib.util
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import compress.modules.hypernet as hl
from compress.modules.flat import FlatModule, from_reparam_state_dict, to_reparam_state_dict
from compress.modules.overparam import (
    OverparamConv2d,
    OverparamLinear,
    collapse,
    from_overparam_state_dict,
    overparameterize,
    to_overparam_state_dict,
)
from compress.vision.torchvision import torchvision_model

EXACT = {"rtol": 1e-9, "atol": 1e-9}
BENCH = Path(__file__).resolve().parents[2] / "scripts" / "bench" / "modules.py"


@pytest.fixture(scope="module")
def originals() -> Any:
    """The plain re-statements of both algorithms, which the benchmark compares with."""
    spec = importlib.util.spec_from_file_location("bench_modules", BENCH)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["bench_modules"] = module
    spec.loader.exec_module(module)
    return module


OURS = "compress.modules"
IMPORTS = {
    "from torchreparam import ReparamModule": f"from {OURS}.flat import ReparamModule",
    "from overparam import OverparamLinear": f"from {OURS}.overparam import OverparamLinear",
    "from overparam import OverparamConv2d": f"from {OURS}.overparam import OverparamConv2d",
    "from overparam.utils import overparameterize":
        f"from {OURS}.overparam import overparameterize",
}  # fmt: skip

# The usage that each block of the READMEs shows, restated; 64 pixels in place of 224, and the CPU.
REPARAM = [
    """
import torch, torchvision
import torch.nn.functional as F
from torchreparam import ReparamModule
device = torch.device("cpu")
net = torchvision.models.resnet18().to(device)
reparam_net = ReparamModule(net)
print(f"{reparam_net.param_numel} parameters")
assert tuple(reparam_net.parameters()) == (reparam_net.flat_param,)
image = torch.randn(2, 3, 64, 64, device=device)
assert torch.equal(net(image)[0, 746], reparam_net(image)[0, 746])
reparam_net = reparam_net.trace(image)
def maml_loss(reparam_net, theta_0, inner_train, inner_val, num_gd_steps=5, lr=0.01):
    data, label = inner_train
    theta = theta_0
    for _ in range(num_gd_steps):
        loss = F.cross_entropy(reparam_net(data, flat_param=theta), label)
        gtheta, = torch.autograd.grad(loss, theta, create_graph=True)
        theta = theta - lr * gtheta
    data, label = inner_val
    return F.cross_entropy(reparam_net(data, flat_param=theta), label)
theta_0 = torch.randn_like(reparam_net.flat_param).mul_(0.001).requires_grad_()
inner_train = torch.randn(2, 3, 64, 64), torch.randint(low=0, high=1000, size=(2,))
inner_val = torch.randn(5, 3, 64, 64), torch.randint(low=0, high=1000, size=(5,))
l = maml_loss(reparam_net, theta_0, inner_train, inner_val, num_gd_steps=2)
l.backward()
assert theta_0.grad.isfinite().all()
""",
    """
out = reparam_net(image, flat_param=theta_0, buffers=tuple(b.clone() for b in net.buffers()))
assert out.shape == (2, 1000)
""",
]
OVERPARAM = [
    """
import torch
from overparam import OverparamLinear
layer = OverparamLinear(16, 32, width=1, depth=2)
x = torch.randn(1, 16)
assert layer(x).shape == (1, 32)
""",
    """
from overparam import OverparamConv2d
import numpy as np
kernel_sizes = [5, 3, 1]
""",
    """
padding = max((np.sum(kernel_sizes) - len(kernel_sizes) + 1) // 2, 0)
layer = OverparamConv2d(2, 4, kernel_sizes=[5, 3, 1], padding=padding, depth=len(kernel_sizes))
print(layer.kernel_size)
assert layer.kernel_size == (7, 7)
x = torch.randn(1, 2, 9, 9)
""",
    """
layer.train()
y = layer(x)
expanded = y
""",
    """
layer.eval()
y = layer(x)
assert torch.allclose(y, expanded, atol=1e-4)
""",
    """
print(layer.weight)
print(layer.bias)
""",
    """
import torchvision.models as models
from overparam.utils import overparameterize
model = models.resnet18()
model = overparameterize(model, depth=2)
assert type(model.fc) is OverparamLinear
with torch.device("meta"):  # as the README has it, without its minutes of decompositions
    model = models.alexnet()
model = overparameterize(model, depth=2)
assert type(model.classifier[1]) is OverparamLinear
""",
    """
layer = OverparamConv2d(32, 32, kernel_sizes=3, padding=1, depth=2, batch_norm=True)
""",
    """
layer = OverparamConv2d(32, 32, kernel_sizes=3, padding=1, depth=2,
                        residual=True, residual_intervals=2)
""",
    """
layer = OverparamConv2d(32, 32, kernel_sizes=3, padding=1, depth=2,
                        residual=True, residual_intervals=[1, 2, 3])
""",
    """
layer = OverparamConv2d(32, 32, kernel_sizes=3, padding=1, depth=2,
                        batch_norm=True, residual=True, residual_intervals=2)
assert layer(torch.randn(2, 32, 5, 5)).shape == (2, 32, 5, 5)
""",
]


@pytest.fixture(autouse=True, scope="module")
def _torchvision() -> None:
    """Make ``import torchvision`` work where its compiled operators are missing."""
    torchvision_model("resnet18")


def run(block: str, names: dict[str, Any]) -> None:
    for theirs, ours in IMPORTS.items():
        block = block.replace(theirs + "\n", ours + "\n")
    exec(compile(block, "README", "exec"), names)


def test_the_reparam_readme_runs(capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(0)
    names: dict[str, Any] = {}
    for block in REPARAM:
        run(block, names)
    assert "11689512 parameters" in capsys.readouterr().out


def test_the_overparam_readme_runs(capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(0)
    names: dict[str, Any] = {}
    for block in OVERPARAM:
        if "[1, 2, 3]" in block:
            with pytest.warns(UserWarning, match=r"\[3\] are longer than its depth 2"):
                run(block, names)
        else:
            run(block, names)
    assert "(7, 7)" in capsys.readouterr().out


def settled(layer: nn.Module) -> nn.Module:
    for module in layer.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            module.running_mean.uniform_(-1, 1)  # type: ignore[union-attr]
            module.running_var.uniform_(0.5, 2)  # type: ignore[union-attr]
            nn.init.uniform_(module.weight, 0.5, 2)
        elif isinstance(module, nn.Conv2d | nn.Linear) and module.bias is not None:
            nn.init.uniform_(module.bias, -1, 1)
    return layer


@pytest.mark.parametrize("batch_norm", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("intervals", [None, 1, 2, -1, [1, 3]])
@pytest.mark.parametrize(("kernels", "padding"), [([3, 1, 1], 1), ([3, 3, 1], 2), ([1, 5, 3], 1)])
def test_state_dicts_of_the_authors_layers(
    originals: Any, kernels: list[int], padding: int, intervals: Any, bias: bool, batch_norm: bool
) -> None:
    torch.manual_seed(0)
    options: dict[str, Any] = {
        "padding": padding, "bias": bias, "batch_norm": batch_norm,
        "residual": intervals is not None, "residual_intervals": intervals or 2,
        "dtype": torch.float64,
    }  # fmt: skip
    theirs = settled(originals.their_conv(OverparamConv2d(4, 4, kernels, **options)))
    ours = nn.Sequential(OverparamConv2d(4, 4, kernels, **options))
    x = torch.randn(3, 4, 9, 9, dtype=torch.float64)
    wrapped = nn.Sequential(theirs).eval()
    ours.load_state_dict(from_overparam_state_dict(wrapped.state_dict()))
    torch.testing.assert_close(ours.eval()(x), wrapped(x), **EXACT)
    torch.testing.assert_close(ours.train()(x), wrapped.train()(x), **EXACT)
    back = settled(originals.their_conv(OverparamConv2d(4, 4, kernels, **options)))
    back.eval()
    wrapped = nn.Sequential(back)
    wrapped.load_state_dict(to_overparam_state_dict(ours.eval()))
    torch.testing.assert_close(wrapped(x), ours(x), **EXACT)  # with the weight that was loaded
    torch.testing.assert_close(wrapped.eval()(x), ours(x), **EXACT)


def test_entries_of_other_modules_stay() -> None:
    model = nn.Sequential(nn.Linear(3, 3), OverparamLinear(3, 3, bias=False))
    theirs = to_overparam_state_dict(model)
    assert set(theirs) == {
        "0.weight", "0.bias", "1.layer_dict.0.0.weight", "1.layer_dict.1.0.weight", "1.weight",
        "1.bias",
    }  # fmt: skip
    assert not theirs["1.bias"].any()
    ours = from_overparam_state_dict(theirs)
    assert set(ours) == set(model.state_dict())
    for name, value in model.state_dict().items():
        assert torch.equal(ours[name], value)
    alone = OverparamLinear(3, 3)
    assert set(from_overparam_state_dict(to_overparam_state_dict(alone))) == set(alone.state_dict())


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(2.0))
        self.first = nn.Linear(3, 4)
        self.norm = nn.BatchNorm1d(4)
        self.last = nn.Linear(4, 4, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * self.last(torch.tanh(self.norm(self.first(x))))


def test_state_dicts_of_reparam_module(originals: Any) -> None:
    torch.manual_seed(0)
    net = settled(Net()).eval()
    x = torch.randn(5, 3)
    theirs = originals.TheirFlat(copy.deepcopy(net))
    with torch.no_grad():
        theirs.flat_param.normal_()
    model = copy.deepcopy(net)
    model.first.weight.requires_grad_(False)
    flat = FlatModule(model)
    state = theirs.state_dict()
    traced = {**state, **{f"_traced_self.{name}": value for name, value in state.items()}}
    flat.load_state_dict(from_reparam_state_dict(traced, flat))
    torch.testing.assert_close(flat(x), theirs(x))
    with torch.no_grad():
        model.first.weight.add_(1)  # a frozen parameter, which is not in the vector
        model.last.weight.add_(1)
    assert list(to_reparam_state_dict(flat)) == list(state)
    theirs.load_state_dict(to_reparam_state_dict(flat))
    torch.testing.assert_close(theirs(x), flat(x))
    with pytest.raises(ValueError, match="no flat_param"):
        from_reparam_state_dict(net.state_dict(), flat)
    with pytest.raises(ValueError, match="expects a flat_param of"):
        from_reparam_state_dict({"flat_param": torch.zeros(3)}, flat)


def test_the_restated_originals_compute_what_ours_do(originals: Any) -> None:
    """What the benchmark compares gives the same numbers, so the work compared is the same."""
    torch.manual_seed(0)
    body = nn.Sequential(nn.Conv2d(3, 4, 3, 2, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3))
    ours = overparameterize(body.double(), overparam="conv", init="fresh")
    theirs = originals.with_their_convolutions(ours)
    x = torch.randn(2, 3, 9, 9, dtype=torch.float64)
    torch.testing.assert_close(ours(x), theirs(x), **EXACT)
    torch.testing.assert_close(ours.eval()(x), theirs.eval()(x), **EXACT)
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    flat, their_flat = FlatModule(copy.deepcopy(net)), originals.TheirFlat(net)
    vector = torch.randn(flat.param_numel, dtype=torch.float64)
    rows = torch.randn(2, 3, dtype=torch.float64)
    for given in (None, vector):
        torch.testing.assert_close(
            flat(rows, flat_param=given), their_flat(rows, flat_param=given), **EXACT
        )


def test_numbers_and_arrays_of_numpy_are_taken() -> None:
    layer = OverparamLinear(2, 2, negative_slope=np.float32(0.5))  # type: ignore[arg-type]
    assert layer.negative_slope == 0.5
    assert hl.HyperConv2d(1, 4, np.array([3, 5])).kernel_size == (3, 5)  # type: ignore[arg-type]


def test_an_input_without_a_name_is_refused() -> None:
    hypernet = hl.Hypernet({"angle": (2,)}, {"w": (3,)}, [4])
    with pytest.raises(TypeError, match=r"by name, such as angle=\.\.\."):
        hypernet(torch.rand(2))


def test_an_optimiser_of_chains_that_are_collapsed_in_place_is_pointed_out() -> None:
    model = nn.Sequential(OverparamLinear(2, 2), nn.Linear(2, 2))
    optimiser = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.warns(UserWarning, match="holds 4 parameters of layers that are replaced"):
        collapse(model, inplace=True)
    del optimiser
