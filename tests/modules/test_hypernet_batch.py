"""`per_sample`: a main network with its own weights for every sample of a batch."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from compress.modules.hypernet import HyperModule, Hypernet, hypernetize, per_sample


def convnet(norm: Any = nn.BatchNorm2d) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 6, 3), norm(6), nn.ReLU(), nn.Conv2d(6, 4, 3, groups=2), norm(4),
        nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(16, 3),
    ).double()  # fmt: skip


def images(batch: int = 5) -> Tensor:
    return torch.randn(batch, 2, 8, 8, generator=torch.Generator().manual_seed(3)).double()


def batched(main: HyperModule, batch: int = 5) -> dict[str, Tensor]:
    torch.manual_seed(1)
    shapes = main.external_shapes()
    net = Hypernet({"h": (2,)}, shapes, [4], dtype=torch.float64)
    return {n: v.detach().requires_grad_() for n, v in net(h=torch.rand(batch, 2).double()).items()}


def test_every_sample_meets_its_own_weights() -> None:
    main = hypernetize(convnet(), parameters="all").eval()
    values, x = batched(main), images()
    outputs = per_sample(main, values, x)
    assert outputs.shape == (5, 3)
    for index in range(5):
        with main.using_externals({name: value[index] for name, value in values.items()}):
            torch.testing.assert_close(outputs[index], main(x[index : index + 1])[0])
    assert not any(slot.is_set for slot in main.externals())
    outputs.sum().backward()
    assert all(value.grad is not None for value in values.values())


def test_groups_shared_values_and_values_set_before() -> None:
    main = hypernetize(convnet(), parameters="all").eval()
    values = batched(main)
    values["7.bias"] = values["7.bias"][0]
    main.set_externals({"1.weight": values.pop("1.weight")[2]})
    x = torch.randn(5, 7, 2, 8, 8).double()
    outputs = per_sample(main, values, x, grouped=True)
    assert outputs.shape == (5, 7, 3)
    for index in range(5):
        own = {n: v if n == "7.bias" else v[index] for n, v in values.items()}
        with main.using_externals(own):
            torch.testing.assert_close(outputs[index], main(x[index]))
    shared = {n: v if n == "7.bias" else v[0] for n, v in values.items()}
    with main.using_externals(shared):
        torch.testing.assert_close(per_sample(main, shared, x[:, 0]), main(x[:, 0]))


@pytest.mark.parametrize("momentum", [0.1, 0.3, None])
@pytest.mark.parametrize("external", [True, False])
@pytest.mark.parametrize("affine", [True, False])
def test_batch_normalisation_in_training(momentum: Any, external: bool, affine: bool) -> None:
    """With equal weights for all samples it is the ordinary network, statistics and gradients."""
    plain = convnet(lambda n: nn.BatchNorm2d(n, momentum=momentum, affine=affine))
    chosen = list(plain) if external else [plain[0], plain[3], plain[7]]
    main, values = hypernetize(plain, modules=chosen, return_values=True, inplace=False)
    leaves = {n: v.expand(5, *v.shape).clone().requires_grad_() for n, v in values.items()}
    x = images()
    for _ in range(2):
        expected, got = plain(x), per_sample(main, leaves, x)
        torch.testing.assert_close(got, expected)
    for name, buffer in plain.named_buffers():
        torch.testing.assert_close(main.get_buffer(name), buffer)
    weight = torch.randn(5, 3).double()
    (expected * weight).sum().backward()
    (got * weight).sum().backward()
    for name, leaf in leaves.items():
        assert leaf.grad is not None
        torch.testing.assert_close(leaf.grad.sum(0), plain.get_parameter(name).grad)
    assert all("forward" not in vars(module) for module in main.modules())


def test_batch_statistics_of_different_weights_and_groups() -> None:
    """By an oracle that normalises all samples together, layer by layer."""
    torch.manual_seed(0)
    norm = nn.BatchNorm1d(4).double()
    main = hypernetize(nn.Sequential(nn.Linear(3, 4).double(), norm), modules=["0"])
    weight, bias = torch.randn(5, 4, 3).double(), torch.randn(5, 4).double()
    x = torch.randn(5, 6, 3).double()
    got = per_sample(main, {"0.weight": weight, "0.bias": bias}, x, grouped=True)
    flat = (torch.einsum("boi,bni->bno", weight, x) + bias[:, None]).reshape(30, 4)
    torch.testing.assert_close(got, norm(flat).reshape(5, 6, 4))
    torch.testing.assert_close(main[1].running_var, norm.running_var)
    main.eval()
    frozen = copy.deepcopy(main.state_dict())
    per_sample(main, {"0.weight": weight, "0.bias": bias}, x, grouped=True)
    assert all(torch.equal(value, frozen[name]) for name, value in main.state_dict().items())


def test_batch_statistics_without_running_ones() -> None:
    plain = convnet(lambda n: nn.BatchNorm2d(n, track_running_stats=False)).eval()
    main, values = hypernetize(plain, parameters="all", return_values=True, inplace=False)
    torch.testing.assert_close(per_sample(main, values, images()), plain(images()))


def test_dropout_draws_for_every_sample() -> None:
    main = hypernetize(
        nn.Sequential(nn.Linear(64, 64, bias=False), nn.Dropout(0.5)), parameters="all"
    )
    outputs = per_sample(main, {"0.weight": torch.eye(64)}, torch.ones(4, 64))
    assert len({tuple(row.tolist()) for row in outputs}) == 4


def test_modules_are_left_as_they_were_after_an_error() -> None:
    main = hypernetize(convnet(), parameters="all")
    with pytest.raises(RuntimeError, match="channels"):
        per_sample(main, batched(main), torch.randn(5, 3, 8, 8).double())
    assert all("forward" not in vars(module) for module in main.modules())
    assert not any(slot.is_set for slot in main.externals())


def test_what_does_not_fit_is_refused() -> None:
    main = hypernetize(convnet(), parameters="all")
    values, x = batched(main), images()
    without = {name: value for name, value in values.items() if name != "0.bias"}
    for bad, inputs, words in (
        ({**values, "0.wieght": x}, (x,), "no external parameter '0.wieght'. Did you mean"),
        ({**values, "0.bias": torch.zeros(7)}, (x,), r"'0.bias' has shape \(6,\) or \('B', 6\)"),
        (without, (x,), r"no value for 1 .*: 0\.bias"),
        (values, (), "needs at least one input"),
        (values, (x[:4],), "different batch sizes: .*'input 0': 4"),
        (values, (torch.tensor(1.0),), r"input 0 has shape \(\), no batch"),
    ):
        with pytest.raises(ValueError, match=words):
            per_sample(main, bad, *inputs)
    one = hypernetize(nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3)), modules=["0"])
    single = {n: torch.rand(1, *s) for n, s in one.external_shapes().items()}
    with pytest.raises(ValueError, match="more than one value per channel"):
        per_sample(one, single, torch.rand(1, 2))
    synced = hypernetize(nn.Sequential(nn.Linear(2, 3), nn.SyncBatchNorm(3)), modules=["0"])
    with pytest.raises(ValueError, match="SyncBatchNorm '1'"):
        per_sample(synced, single, torch.rand(1, 2))


def test_a_batch_of_inputs_trains_with_batch_normalisation() -> None:
    torch.manual_seed(0)
    main = hypernetize(convnet(), modules=["0", "1"])
    net = Hypernet({"h": (2,)}, main.external_shapes(), [8], dtype=torch.float64)
    optimiser = torch.optim.Adam([*net.parameters(), *main.parameters()], lr=3e-2)
    h, x, y = torch.rand(5, 2).double(), images(), torch.tensor([0, 1, 2, 1, 0])
    losses = []
    for _ in range(30):
        loss = nn.functional.cross_entropy(per_sample(main, net(h=h), x), y)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.2 * losses[0]
