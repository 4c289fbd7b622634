"""What the vector and the wrapped module share: gradients, methods, and threads that use both."""

from __future__ import annotations

import copy
import gc
import pickle
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector
from torch.utils.checkpoint import checkpoint

from compress.modules.flat import FlatModule

EXACT = {"rtol": 1e-9, "atol": 1e-9}


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2)).double()


def sample(seed: int = 0) -> Tensor:
    return torch.randn(4, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def gradient(model: nn.Module, x: Tensor) -> Tensor:
    """The gradient of the sum of squares, by name, from a copy that nothing wraps."""
    twin = network()
    twin.load_state_dict(model.state_dict())
    slopes = torch.autograd.grad(twin(x).square().sum(), list(twin.parameters()))
    return torch.cat([s.flatten() for s in slopes])


def one_gradient(flat: FlatModule, wanted: Tensor | None) -> None:
    """The vector's gradient and the parameters' are ``wanted``."""
    whole = flat.flat_param.grad
    parts = [p.grad for p in flat.module.parameters()]
    if wanted is None:
        assert whole is None
        assert all(part is None for part in parts)
        return
    assert whole is not None
    torch.testing.assert_close(whole, wanted, **EXACT)
    found = torch.cat([part.flatten() for part in parts if part is not None])
    torch.testing.assert_close(found, wanted, **EXACT)


def test_a_backward_through_either_reaches_both() -> None:
    net = network()
    flat = FlatModule(net)
    x, y = sample(0), sample(1)
    first, second = gradient(net, x), gradient(net, y)
    net(x).square().sum().backward()
    one_gradient(flat, first)
    flat(y).square().sum().backward()
    one_gradient(flat, first + second)
    net(x).square().sum().backward()
    one_gradient(flat, 2 * first + second)


Clear = Callable[[FlatModule], Any]
CLEARS: dict[str, Clear] = {
    "flat.zero_grad": lambda flat: flat.zero_grad(),
    "flat.zero_grad in place": lambda flat: flat.zero_grad(set_to_none=False),
    "net.zero_grad": lambda flat: flat.module.zero_grad(),
    "net.zero_grad in place": lambda flat: flat.module.zero_grad(set_to_none=False),
    "the vector's optimiser": lambda flat: torch.optim.SGD(flat.parameters()).zero_grad(),
    "the module's optimiser": lambda flat: torch.optim.SGD(flat.module.parameters()).zero_grad(),
}


@pytest.mark.parametrize("clear", CLEARS)
@pytest.mark.parametrize("first", ["flat", "net"])
@pytest.mark.parametrize("second", ["flat", "net"])
def test_clearing_either_clears_both(clear: str, first: str, second: str) -> None:
    flat = FlatModule(network())
    ways: dict[str, nn.Module] = {"flat": flat, "net": flat.module}
    x, y = sample(0), sample(1)
    wanted = gradient(flat.module, y)
    ways[first](x).square().sum().backward()
    CLEARS[clear](flat)
    ways[second](y).square().sum().backward()
    one_gradient(flat, wanted)
    flat.zero_grad()
    one_gradient(flat, None)


@pytest.mark.parametrize("optimised", ["flat", "net", "before"])
@pytest.mark.parametrize("run", ["flat", "net"])
@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW])
def test_an_optimiser_over_either_trains_both(optimised: str, run: str, kind: Any) -> None:
    net, twin = network(), network()
    early = kind(net.parameters(), lr=0.01)
    flat = FlatModule(net)
    optimiser = early
    if optimised != "before":
        owner: nn.Module = flat if optimised == "flat" else net
        optimiser = kind(owner.parameters(), lr=0.01)
    expected = kind(twin.parameters(), lr=0.01)
    module: nn.Module = flat if run == "flat" else net
    for step in range(4):
        for one, model in ((optimiser, module), (expected, twin)):
            one.zero_grad()
            model(sample(step)).square().sum().backward()
            one.step()
        wanted = parameters_to_vector(twin.parameters())
        torch.testing.assert_close(flat.flat_param, wanted, **EXACT)
        torch.testing.assert_close(parameters_to_vector(net.parameters()), wanted, **EXACT)


def test_gradients_that_were_there_or_are_assigned() -> None:
    net = network()
    x = sample()
    wanted = gradient(net, x)
    net(x).square().sum().backward()
    flat = FlatModule(net)
    one_gradient(flat, wanted)
    net[0].weight.grad = torch.ones_like(net[0].weight)
    flat(x).square().sum().backward()
    assigned = torch.cat([torch.ones(15).double(), wanted[15:]])
    one_gradient(flat, assigned + wanted)
    net[0].weight.grad = None
    flat(x).square().sum().backward()
    one_gradient(flat, torch.cat([wanted[:15], assigned[15:] + 2 * wanted[15:]]))
    flat.flat_param.grad = torch.ones(flat.param_numel, dtype=torch.float64)
    net(x).square().sum().backward()
    one_gradient(flat, 1 + wanted)
    flat.to(torch.float32).to(torch.float64)
    net(x).square().sum().backward()
    assert net[2].bias.grad.data_ptr() == flat.flat_param.grad[-2:].data_ptr()


def test_a_part_that_was_cleared_follows_whatever_the_next_pass_reaches() -> None:
    net = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2))
    flat = FlatModule(net)
    x = torch.ones(1, 2)
    flat(x).sum().backward()
    torch.optim.SGD(net[2].parameters(), 0.1).zero_grad()
    net[0](x).sum().backward()
    assert net[2].bias.grad is None
    assert flat.flat_param.grad is not None
    assert not flat.flat_param.grad[-6:].any()


def test_filling_with_zeros_reaches_gradients_that_were_assigned() -> None:
    net = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    flat = FlatModule(net)
    x = torch.ones(1, 2)
    flat(x).sum().backward()
    net[1].bias.grad = torch.full((2,), 100.0)
    flat.zero_grad(set_to_none=False)
    assert flat.flat_param.grad is not None
    assert not flat.flat_param.grad.any()
    assert net[1].bias.grad.abs().sum() == 0
    flat(x).sum().backward()
    assert flat.flat_param.grad[-2:].tolist() == net[1].bias.grad.tolist() == [1.0, 1.0]


def test_parts_of_a_module_and_frozen_parameters() -> None:
    net = network()
    net[0].bias.requires_grad_(False)
    flat = FlatModule(net)
    net[0](sample()).sum().backward()
    whole = flat.flat_param.grad
    assert whole is not None
    assert whole[:15].any()
    assert not whole[15:].any()
    assert net[0].bias.grad is None
    assert net[2].weight.grad is None


@pytest.mark.filterwarnings("ignore:Using backward\\(\\) with create_graph=True:UserWarning")
@pytest.mark.parametrize("run", ["flat", "net"])
def test_gradients_with_a_graph(run: str) -> None:
    flat = FlatModule(network())
    module: nn.Module = flat if run == "flat" else flat.module
    x = sample()
    module(x).square().sum().backward(create_graph=True)
    whole = flat.flat_param.grad
    assert whole is not None
    one_gradient(flat, gradient(flat.module, x))
    leaves = [flat.flat_param] if run == "flat" else list(flat.module.parameters())
    second = torch.autograd.grad(whole.square().sum(), leaves, retain_graph=True)
    found = torch.cat([s.flatten() for s in second])
    vector = flat.flat_param.detach().requires_grad_()

    def slope(v: Tensor) -> Tensor:
        loss = flat(x, flat_param=v).square().sum()
        return torch.autograd.grad(loss, v, create_graph=True)[0]

    (wanted,) = torch.autograd.grad(slope(vector).square().sum(), vector)
    torch.testing.assert_close(found, wanted, **EXACT)
    flat.zero_grad()


def test_sparse_gradients_of_the_module() -> None:
    net = nn.Embedding(4, 2, sparse=True)
    flat = FlatModule(net)
    net(torch.tensor([1, 1])).sum().backward()
    assert flat.flat_param.grad is not None
    assert flat.flat_param.grad.tolist() == [0, 0, 2, 2, 0, 0, 0, 0]


def test_what_becomes_of_the_module_and_its_copies() -> None:
    net = network()
    x = sample()
    wanted = gradient(net, x)
    flat = FlatModule(net)
    for other in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        other(x).square().sum().backward()
        assert flat.flat_param.grad is None
    for twin in (copy.deepcopy(flat), pickle.loads(pickle.dumps(flat))):
        twin.module(x).square().sum().backward()
        one_gradient(twin, wanted)
        assert flat.flat_param.grad is None
    again = FlatModule(net)  # the first vector is no longer the module's
    net(x).square().sum().backward()
    one_gradient(again, wanted)
    assert flat.flat_param.grad is None
    flat.flat_param = nn.Parameter(again.flat_param.detach().clone())
    flat.module(x).square().sum().backward()
    assert flat.flat_param.grad is not None
    del flat, again
    gc.collect()
    net.zero_grad()
    net(x).square().sum().backward()
    torch.testing.assert_close(
        torch.cat([p.grad.flatten() for p in net.parameters() if p.grad is not None]), wanted
    )


class Coder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(3, 3)
        self.norm = nn.BatchNorm1d(3)

    def encode(self, x: Tensor) -> Tensor:
        return torch.tanh(self.inner(x))

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.encode(x))


def test_other_methods_run_on_another_vector() -> None:
    flat = FlatModule(Coder().double())
    net: Any = flat.module
    weight = net.inner.weight
    x = sample()
    own = net.encode(x)
    vector = torch.randn(flat.param_numel, dtype=torch.float64, requires_grad=True)
    parts = flat.unflatten(vector)
    expected = torch.tanh(x @ parts["inner.weight"].T + parts["inner.bias"])
    with flat.unflattened(vector) as module:
        assert module is net
        output = net.encode(x)
        torch.testing.assert_close(output, expected, **EXACT)
        whole = flat(x)
        assert not torch.allclose(flat(x, flat_param=flat.flat_param), whole)
        with flat.unflattened(2 * vector):
            assert not torch.equal(net.encode(x), output)
        assert torch.equal(net.encode(x), output)
    torch.testing.assert_close(whole, flat(x, flat_param=vector), **EXACT)
    (slope,) = torch.autograd.grad(output.sum(), vector)
    (wanted,) = torch.autograd.grad(expected.sum(), vector)
    torch.testing.assert_close(slope, wanted, **EXACT)
    assert net.inner.weight is weight
    assert torch.equal(net.encode(x), own)
    buffers = {name: value.clone() for name, value in flat.named_buffers()}
    kept = net.norm.running_mean.clone()
    with pytest.raises(RuntimeError, match="shapes"), flat.unflattened(vector, buffers):
        net.encode(net(x).T)  # fails after BatchNorm has written its statistics
    assert buffers["norm.running_mean"].any()
    assert torch.equal(net.norm.running_mean, kept)
    assert net.inner.weight is weight
    assert torch.equal(net.encode(x), own)
    with (
        pytest.raises(ValueError, match="expects a flat_param of 18"),
        flat.unflattened(vector[1:]),
    ):
        pass


@pytest.mark.parametrize("way", ["flat_param", "unflattened"])
def test_threads_with_vectors_of_their_own(way: str) -> None:
    """Four threads meet inside every forward, as long as nothing keeps them apart."""

    class Meets(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(3, 3)
            self.second = nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            y = torch.tanh(self.first(x))
            inside.append(threading.get_ident())
            meeting.wait(0.02)  # gives the others the time to come in
            return self.second(y)

    inside: list[int] = []
    meeting = threading.Event()
    net = Meets().double()
    flat = FlatModule(net)
    before = list(net.parameters())
    x = sample()
    vectors = [
        torch.randn(
            flat.param_numel, dtype=torch.float64, generator=torch.Generator().manual_seed(i)
        )
        for i in range(4)
    ]

    def by_hand(vector: Tensor) -> Tensor:
        parts = flat.unflatten(vector)
        y = torch.tanh(x @ parts["first.weight"].T + parts["first.bias"])
        return y @ parts["second.weight"].T + parts["second.bias"]

    def work(vector: Tensor) -> list[Tensor]:
        outputs = []
        for _ in range(3):
            leaf = vector.clone().requires_grad_()
            if way == "flat_param":
                output = flat(x, flat_param=leaf)
            else:
                with flat.unflattened(leaf) as module:
                    output = module(x)
            output.square().sum().backward()
            assert leaf.grad is not None
            outputs += [output.detach(), leaf.grad]
        return outputs

    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(work, vectors))
    assert len(inside) == 12
    for vector, outputs in zip(vectors, found, strict=True):
        leaf = vector.clone().requires_grad_()
        expected = by_hand(leaf)
        (slope,) = torch.autograd.grad(expected.square().sum(), leaf)
        for output, gradient_found in zip(outputs[::2], outputs[1::2], strict=True):
            torch.testing.assert_close(output, expected, **EXACT)
            torch.testing.assert_close(gradient_found, slope, **EXACT)
    assert all(a is b for a, b in zip(before, net.parameters(), strict=True))
    assert torch.equal(flat.flat_param, parameters_to_vector(net.parameters()))


class Checkpointed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(lambda z: torch.tanh(self.inner(z)).square(), x, use_reentrant=False)


def test_checkpoints_are_recomputed_inside_the_block() -> None:
    flat = FlatModule(Checkpointed().double())
    x = sample()
    vector = torch.randn(flat.param_numel, dtype=torch.float64, requires_grad=True)
    parts = flat.unflatten(vector)
    expected = torch.tanh(x @ parts["inner.weight"].T + parts["inner.bias"]).square().sum()
    (wanted,) = torch.autograd.grad(expected, vector)
    with flat.unflattened(vector) as module:
        (slope,) = torch.autograd.grad(module(x).sum(), vector)
    torch.testing.assert_close(slope, wanted, **EXACT)


def test_a_submodule_that_was_put_in_afterwards_runs_on_the_vector() -> None:
    net = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 1))
    flat = FlatModule(net)
    other = nn.Linear(2, 1)
    kept = {name: value.detach().clone() for name, value in other.named_parameters()}
    x, vector = torch.randn(4, 3), torch.randn(flat.param_numel)
    expected = flat(x, flat_param=vector)
    net[1] = other
    assert torch.equal(flat(x, flat_param=vector), expected)
    assert all(torch.equal(value, kept[name]) for name, value in other.named_parameters())
