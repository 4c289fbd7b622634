"""What is left of a BatchNorm when its normalisation is folded."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from compress.network.baseline import prepare
from compress.network.norms import after_norm


class Fused(nn.BatchNorm2d):
    """As timm's: a norm, a dropout that is the identity, an activation."""

    def __init__(self, channels: int, act: nn.Module) -> None:
        super().__init__(channels)
        self.drop, self.act = nn.Identity(), act

    def forward(self, x: Tensor) -> Tensor:
        given = (self.running_mean, self.running_var, self.weight, self.bias)
        return self.act(self.drop(F.batch_norm(x, *given, False, 0.0, self.eps)))


class Super(Fused):
    def forward(self, x: Tensor) -> Tensor:
        return self.act(nn.BatchNorm2d.forward(self, x))


class Twice(Super):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class Before(Super):
    def forward(self, x: Tensor) -> Tensor:
        return nn.BatchNorm2d.forward(self, self.act(x))


class Adds(Super):
    def forward(self, x: Tensor, other: Tensor) -> Tensor:  # type: ignore[override]  # on purpose
        return super().forward(x) + other


class Unknown(nn.BatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).relu()


def statistics(norm: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, tensor in norm.state_dict().items():
            if tensor.is_floating_point():
                tensor.copy_(torch.rand(tensor.shape, generator=generator) + 0.1 * len(name))
    return norm.eval()


@pytest.mark.parametrize("kind", [Fused, Super])
@pytest.mark.parametrize("act", [nn.ReLU(inplace=True), nn.SiLU(), nn.Identity(), nn.PReLU(6)])
def test_an_activation_inside_is_what_is_left(kind: type[Fused], act: nn.Module) -> None:
    norm = statistics(kind(6, act))
    rest = after_norm(norm)
    assert rest is act or (isinstance(act, nn.Identity) and len(list(rest.children())) == 0)


@pytest.mark.parametrize(
    "norm",
    [
        Twice(6, nn.ReLU()),
        Before(6, nn.ReLU()),
        Adds(6, nn.ReLU()),
        Unknown(6),
        nn.BatchNorm2d(6, track_running_stats=False),
        nn.InstanceNorm2d(6, track_running_stats=True),
    ],
    ids=lambda n: type(n).__name__,
)
def test_what_does_anything_else_is_not_folded(norm: nn.Module) -> None:
    assert after_norm(statistics(norm)) is None


@pytest.mark.parametrize("norm", [nn.BatchNorm1d(4), nn.BatchNorm2d(4)])
def test_of_a_plain_norm_nothing_is_left(norm: nn.Module) -> None:
    assert isinstance(after_norm(statistics(norm)), nn.Identity)


def test_networks_of_such_norms_are_folded_and_keep_their_function() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 6, 3, bias=False), Fused(6, nn.SiLU()),
        nn.Conv2d(6, 6, 3, bias=False), Super(6, nn.PReLU(6)),
        nn.Conv2d(6, 6, 3, bias=False), Twice(6, nn.ReLU()),
    ).eval()  # fmt: skip
    statistics(model)
    x = torch.rand(2, 3, 12, 12)
    with torch.no_grad():
        before = model(x)
    network = prepare(model, x[:1])
    assert [(p.layer, p.norm) for p in network.folded] == [("0", "1"), ("2", "3")]
    assert isinstance(network.model[1], nn.SiLU)
    with torch.no_grad():
        torch.testing.assert_close(network.model(x), before, rtol=1e-4, atol=1e-5)


def test_a_norm_with_something_inside_that_takes_other_shapes_has_no_rest() -> None:
    class Excited(nn.BatchNorm2d):
        def __init__(self, channels: int) -> None:
            super().__init__(channels)
            self.fc = nn.Linear(channels, channels)

        def forward(self, x: Tensor) -> Tensor:
            gate = self.fc(x.mean((2, 3))).sigmoid()
            return super().forward(x) * gate[:, :, None, None]

    assert after_norm(Excited(4).eval()) is None
    model = nn.Sequential(nn.Conv2d(3, 4, 3), Excited(4), nn.Flatten(), nn.Linear(64, 2)).eval()
    assert prepare(model, torch.randn(1, 3, 6, 6)).graph is not None
