"""The kept weight of an over-parameterised layer: collapsed once, differentiable, never stale."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from compress.modules.overparam import (
    OverparamConv2d,
    OverparamLinear,
    to_overparam_state_dict,
)
from compress.modules.overparam import layer as layer_module

EXACT = {"rtol": 1e-9, "atol": 1e-9}
Layer = OverparamConv2d | OverparamLinear


def layers() -> list[Layer]:
    torch.manual_seed(0)
    made: list[Layer] = [
        OverparamLinear(3, 3, depth=3, batch_norm=True, dtype=torch.float64),
        OverparamConv2d(2, 2, [3, 1], bias=False, stride=2, dtype=torch.float64),
        OverparamConv2d(2, 2, 3, residual=True, residual_intervals=1, dtype=torch.float64),
    ]
    for made_layer in made:
        for p in made_layer.parameters():
            nn.init.uniform_(p, -1, 1)
    return [m.eval() for m in made]


def example(layer: Layer) -> Tensor:
    shape = (2, 3) if isinstance(layer, OverparamLinear) else (2, 2, 5, 5)
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


class Count:
    """How often a chain is collapsed."""

    def __init__(self) -> None:
        self.times = 0


@pytest.fixture
def count(monkeypatch: pytest.MonkeyPatch) -> Count:
    counted, compose = Count(), layer_module._compose

    def counting(*arguments: Any) -> Any:
        counted.times += 1
        return compose(*arguments)

    monkeypatch.setattr(layer_module, "_compose", counting)
    return counted


def expected(layer: Layer, x: Tensor) -> list[Tensor]:
    loss = layer.forward_expanded(x).square().sum()
    return list(torch.autograd.grad(loss, list(layer.parameters())))


def assert_gradients(layer: Layer, x: Tensor) -> None:
    found = torch.autograd.grad(layer(x).square().sum(), list(layer.parameters()))
    for one, other in zip(found, expected(layer, x), strict=True):
        torch.testing.assert_close(one, other, **EXACT)


@pytest.mark.parametrize("which", range(3))
def test_evaluation_with_gradients_collapses_once(which: int, count: Count) -> None:
    layer = layers()[which]
    x = example(layer)
    outputs = [layer(x) for _ in range(4)]
    assert count.times == 1
    assert all(y.requires_grad for y in outputs)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), outputs[0], rtol=0, atol=0)
    assert count.times == 1


@pytest.mark.parametrize("which", range(3))
def test_every_forward_has_a_backward_of_its_own(which: int) -> None:
    layer = layers()[which]
    x = example(layer)
    wanted = expected(layer, x)
    losses = [layer(x).square().sum() for _ in range(3)]
    parameters = list(layer.parameters())
    for loss in losses:  # each graph is freed by its backward, and no other's
        for one, other in zip(torch.autograd.grad(loss, parameters), wanted, strict=True):
            torch.testing.assert_close(one, other, **EXACT)
        with pytest.raises(RuntimeError, match="second time"):
            torch.autograd.grad(loss, parameters)
    loss = layer(x).square().sum()
    for _ in range(2):
        found = torch.autograd.grad(loss, parameters, retain_graph=True)
        for one, other in zip(found, wanted, strict=True):
            torch.testing.assert_close(one, other, **EXACT)
    (layer(x).square().sum() + layer(x).square().sum()).backward()
    for parameter, other in zip(parameters, wanted, strict=True):
        torch.testing.assert_close(parameter.grad, 2 * other, **EXACT)


@pytest.mark.parametrize("which", range(3))
def test_derivatives_of_the_kept_weight_of_second_order(which: int) -> None:
    layer = layers()[which]
    parameters = [p.detach().clone().requires_grad_() for p in layer.parameters()]
    names = [name for name, _ in layer.named_parameters()]
    x = example(layer)

    def run(*values: Tensor) -> Tensor:
        # The same tensors in both calls, so that the second finds the first's weight.
        for name, value in zip(names, values, strict=True):
            owner, _, leaf = name.rpartition(".")
            # A copy, because gradcheck writes through .data, which leaves no trace.
            layer.get_submodule(owner)._parameters[leaf] = value.clone()  # type: ignore[assignment]
        layer(x)
        kept = layer._kept
        output = layer(x)
        assert layer._kept is kept
        return output

    assert torch.autograd.gradcheck(run, parameters)
    assert torch.autograd.gradgradcheck(run, parameters)


def test_steps_in_evaluation_train_what_the_expanded_form_trains() -> None:
    for which in range(3):
        layer = layers()[which]
        twin = copy.deepcopy(layer)
        x = example(layer)
        one = torch.optim.SGD(layer.parameters(), lr=1e-3, momentum=0.5)
        other = torch.optim.SGD(twin.parameters(), lr=1e-3, momentum=0.5)
        for _ in range(4):
            one.zero_grad()
            other.zero_grad()
            for _ in range(2):  # accumulated over two batches, the second with the kept weight
                layer(x).square().sum().backward()
                twin.forward_expanded(x).square().sum().backward()
            one.step()
            other.step()
            torch.testing.assert_close(layer(x), twin.forward_expanded(x), **EXACT)


def test_a_factor_written_before_the_backward_is_refused_as_in_torch() -> None:
    layer = layers()[1]
    layer(example(layer))
    loss = layer(example(layer)).sum()
    with torch.no_grad():
        layer.layers[0].weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_statistics_may_be_updated_before_the_backward() -> None:
    layer = layers()[0]
    x = example(layer)
    wanted = expected(layer, x)
    layer(x)
    loss = layer(x).square().sum()
    layer.train()(x)
    for one, other in zip(torch.autograd.grad(loss, list(layer.parameters())), wanted, strict=True):
        torch.testing.assert_close(one, other, **EXACT)


def test_a_gradient_of_the_input_alone_collapses_nothing(count: Count) -> None:
    layer = layers()[2]
    x = example(layer).requires_grad_()
    layer(x)
    torch.autograd.grad(layer(x).sum(), x)
    assert count.times == 1


def test_factors_frozen_and_thawed_between_calls() -> None:
    layer = layers()[0].requires_grad_(False)
    x = example(layer)
    assert not layer(x).requires_grad
    kept = layer._kept
    layer.layers[1].bias.requires_grad_()
    (slope,) = torch.autograd.grad(layer(x).sum(), layer.layers[1].bias)
    assert layer._kept is kept
    assert slope.abs().max() > 0
    layer.requires_grad_()
    assert_gradients(layer, x)


def test_one_tensor_in_two_sublayers_gets_the_sum_once() -> None:
    layer = OverparamLinear(3, 3, bias=False, dtype=torch.float64).eval()
    layer.layers[1].weight = layer.layers[0].weight
    x = example(layer)
    for _ in range(2):
        (slope,) = torch.autograd.grad(layer(x).square().sum(), layer.layers[0].weight)
        (wanted,) = torch.autograd.grad(
            layer.forward_expanded(x).square().sum(), layer.layers[0].weight
        )
        torch.testing.assert_close(slope, wanted, **EXACT)


def test_transforms_neither_use_nor_leave_a_wrapped_weight() -> None:
    layer = layers()[1]
    x = example(layer)
    layer(x)
    kept = layer._kept
    jacobian = torch.func.jacrev(layer)(x)
    slope = torch.func.grad(lambda z: layer(z).square().sum())(x)
    _, tangent = torch.func.jvp(layer, (x,), (torch.ones_like(x),))
    batched = torch.func.vmap(layer)(x.unsqueeze(0))
    assert layer._kept is kept
    y = layer.forward_expanded(x)
    torch.testing.assert_close(batched[0], y, **EXACT)
    torch.testing.assert_close(tangent, jacobian.flatten(4).sum(-1), **EXACT)
    leaf = x.clone().requires_grad_()
    (wanted,) = torch.autograd.grad(layer.forward_expanded(leaf).square().sum(), leaf)
    torch.testing.assert_close(slope, wanted, **EXACT)
    params = {k: v.detach() for k, v in layer.named_parameters()}
    run = lambda p: torch.func.functional_call(layer, p, (x,)).square().sum()  # noqa: E731
    slopes = torch.func.grad(run)(params)
    for one, other in zip(slopes.values(), expected(layer, x), strict=True):
        torch.testing.assert_close(one, other, **EXACT)
    assert layer.requires_grad_(False)(x).equal(layer(x))


def test_forward_mode_through_the_factors() -> None:
    layer = layers()[1]
    x = example(layer)
    layer(x)
    params = {k: v.detach() for k, v in layer.named_parameters()}
    directions = {k: torch.ones_like(v) for k, v in params.items()}
    run = lambda p: torch.func.functional_call(layer, p, (x,)).square().sum()  # noqa: E731
    _, tangent = torch.func.jvp(run, (params,), (directions,))
    wanted = sum(slope.sum() for slope in expected(layer, x))
    torch.testing.assert_close(tangent, wanted, **EXACT)


@contextmanager
def unchanged(layer: Layer, x: Tensor) -> Iterator[None]:
    layer(x)
    yield
    torch.testing.assert_close(layer(x), layer.forward_expanded(x), **EXACT)


@pytest.mark.parametrize("which", range(3))
def test_copies_pickles_and_moves_keep_no_weight(which: int) -> None:
    layer = layers()[which]
    x = example(layer)
    layer(x)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), copy.copy(layer)):
        assert other._kept is None
        assert torch.equal(other(x), layer(x))
        assert_gradients(other, x)
    with unchanged(layer, x):
        layer.half().double()
    with unchanged(layer, x):
        layer.layers.float().double()
    with unchanged(layer, x), torch.inference_mode():
        layer.layers[0].weight.mul_(2)
    with torch.inference_mode():
        y = layer(x)
    torch.testing.assert_close(layer(x), y, rtol=0, atol=0)
    assert_gradients(layer, x)


def test_an_edited_weight_is_not_kept() -> None:
    layer = layers()[1]
    x = example(layer)
    with torch.no_grad():
        y = layer(x)
        layer.weight.mul_(3)  # of what was made, and not of the factors
        torch.testing.assert_close(layer(x), y, **EXACT)
    layer.weight.detach().mul_(3)
    torch.testing.assert_close(layer(x), y, **EXACT)


def test_storage_given_again_is_not_taken_for_the_old_one() -> None:
    layer = layers()[1]
    weight = layer.layers[0].weight
    x = example(layer)
    for step in range(20):
        with torch.no_grad():
            layer(x)
        weight.data = torch.zeros(1, dtype=torch.float64)  # frees the storage
        weight.data = torch.full((2, 2, 3, 3), float(step), dtype=torch.float64)
        with torch.no_grad():
            torch.testing.assert_close(layer(x), layer.forward_expanded(x), **EXACT)


@pytest.mark.parametrize("gradients", [True, False])
def test_statistics_that_a_training_forward_moved_are_seen(gradients: bool) -> None:
    """torch moves running statistics without raising their versions."""
    layer = layers()[0]
    x = example(layer)
    with torch.set_grad_enabled(gradients):
        before = layer(x)
        layer.train()(x + 1)
        layer.eval()
        torch.testing.assert_close(layer(x), layer.forward_expanded(x), **EXACT)
        assert not torch.allclose(layer(x), before)


@pytest.mark.parametrize("mode", [{"fused": True}, {"foreach": True}, {"foreach": False}])
@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW])
def test_optimisers_of_any_kind_are_noticed_in_evaluation(kind: Any, mode: dict[str, bool]) -> None:
    """Fused ones change values without raising versions."""
    layer, x = layers()[1], example(layers()[1])
    optimiser = kind(layer.parameters(), lr=0.1, **mode)
    for _ in range(2):
        layer(x).square().sum().backward()
        with torch.no_grad():
            layer(x)  # kept after the backward, before the step
        optimiser.step()
        with torch.no_grad():
            torch.testing.assert_close(layer(x), layer.forward_expanded(x), **EXACT)


def test_a_changed_mode_and_a_collapse_look_at_the_factors_again() -> None:
    """Also where a write could not be seen, as through ``data``."""
    layer, x = layers()[1], example(layers()[1])
    with torch.no_grad():
        before = layer(x)
        layer.layers[0].weight.data.mul_(2)
        torch.testing.assert_close(layer.collapse()(x), 2 * before, **EXACT)
        layer.layers[0].weight.data.mul_(2)
        theirs = to_overparam_state_dict(layer)
        torch.testing.assert_close(theirs["weight"], layer.collapse().weight, **EXACT)
        layer.layers[0].weight.data.mul_(2)
        torch.testing.assert_close(layer.eval()(x), 8 * before, **EXACT)


def test_a_forward_may_be_run_again_by_a_checkpoint() -> None:
    for layer in layers():
        x = example(layer).requires_grad_()
        wanted = torch.autograd.grad(layer.forward_expanded(x).square().sum(), layer.parameters())
        for _ in range(2):
            loss = checkpoint(layer, x, use_reentrant=False).square().sum()
            found = torch.autograd.grad(loss, layer.parameters())
            torch.testing.assert_close(found, wanted, **EXACT)
            with torch.no_grad():
                layer.layers[0].weight.mul_(1)  # raises its version


@pytest.mark.parametrize("gradients", [True, False])
def test_what_is_done_to_a_weight_that_was_given_out_does_not_reach_the_layer(
    gradients: bool,
) -> None:
    layer = layers()[0]
    x = example(layer)
    before = layer(x).detach()
    with torch.set_grad_enabled(gradients):
        weight, bias = layer.weight, layer.bias
        assert bias is not None
        weight.data.zero_()
        bias.data.zero_()
    torch.testing.assert_close(layer(x).detach(), before, rtol=0, atol=0)
