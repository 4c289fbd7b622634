"""`FlatModule` against `torch.func.functional_call`, loops and autograd."""

from __future__ import annotations

import copy
import io
import pickle
import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from module_trees import sample, trees
from torch import Tensor, nn
from torch.func import functional_call, grad, jvp, vmap
from torch.nn.utils import parameters_to_vector

from compress.modules.flat import FlatModule
from compress.vision.torchvision import torchvision_model

EXACT = {"rtol": 1e-9, "atol": 1e-9}


class Tied(nn.Module):
    """A scalar, an embedding-like tie and a buffer that is replaced, not written."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(1.5))
        self.first = nn.Linear(4, 4)
        self.second = nn.Linear(4, 4, bias=False)
        self.second.weight = self.first.weight
        self.calls: Tensor
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor, shift: float = 0.0) -> Tensor:
        self.calls = self.calls + 1
        return self.scale * self.second(torch.tanh(self.first(x))) + shift


def convnet() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Tanh(), nn.Dropout(0.0), nn.Flatten(),
        nn.Linear(4 * 16, 5),
    ).double()  # fmt: skip


def image(seed: int = 0, count: int = 4) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 3, 6, 6, generator=generator, dtype=torch.float64)


def vector_of(flat: FlatModule, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return 0.3 * torch.randn(flat.param_numel, generator=generator, dtype=torch.float64)


@settings(derandomize=True, deadline=None, max_examples=40)
@given(trees())
def test_any_tree_equals_functional_call(model: nn.Module) -> None:
    reference, victim = copy.deepcopy(model), copy.deepcopy(model)
    names = dict(reference.named_parameters())
    expected_vector = torch.cat([torch.zeros(0), *[p.detach().reshape(-1) for p in names.values()]])
    flat = FlatModule(model)
    assert torch.equal(flat.flat_param, expected_vector)
    assert tuple(flat.parameters()) == (flat.flat_param,)
    x = sample()
    torch.testing.assert_close(flat(x), reference(x), **EXACT)
    vector = (flat.flat_param.detach() + 0.1).requires_grad_()
    output = flat(x, flat_param=vector)
    # functional_call does not restore modules that are used twice; the victim is used once.
    expected = functional_call(victim, flat.unflatten(vector), (x,))
    torch.testing.assert_close(output, expected, **EXACT)
    if names:
        (slope,) = torch.autograd.grad(output.square().sum(), vector, allow_unused=True)
        (wanted,) = torch.autograd.grad(expected.square().sum(), vector, allow_unused=True)
        slope = torch.zeros_like(vector) if slope is None else slope
        wanted = torch.zeros_like(vector) if wanted is None else wanted
        torch.testing.assert_close(slope, wanted, **EXACT)
    again = copy.deepcopy(flat)
    torch.testing.assert_close(again(x), flat(x), rtol=0, atol=0)
    assert pickle.loads(pickle.dumps(flat))(x).equal(flat(x))
    fresh = FlatModule(copy.deepcopy(reference))
    fresh.load_state_dict({k: v * 1.0 for k, v in reference.state_dict().items()})
    for name, value in fresh.module_state_dict().items():
        assert torch.equal(value, reference.state_dict()[name])


@pytest.mark.parametrize("training", [True, False])
def test_batch_norm_in_train_and_eval(training: bool) -> None:
    model, x = convnet().train(training), image()
    reference = copy.deepcopy(model)
    flat = FlatModule(model)
    assert flat.training is training
    torch.testing.assert_close(flat(x), reference(x), **EXACT)
    for one, other in zip(model.buffers(), reference.buffers(), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)
    vector = vector_of(flat).requires_grad_()
    buffers = {k: v.clone() for k, v in reference.named_buffers()}
    expected = functional_call(reference, flat.unflatten(vector) | buffers, (x,))
    by_name = {k: v.clone() for k, v in flat.named_buffers()}
    for passed in (by_name, [b.clone() for b in flat.buffers()]):
        own = [b.clone() for b in flat.buffers()]
        output = flat(x, flat_param=vector, buffers=passed)
        torch.testing.assert_close(output, expected, **EXACT)
        values = passed.values() if isinstance(passed, dict) else passed
        for value, wanted in zip(values, buffers.values(), strict=True):
            torch.testing.assert_close(value, wanted, **EXACT)
        for kept, before in zip(flat.buffers(), own, strict=True):
            assert torch.equal(kept, before)
    left_out = {"1.running_mean": torch.zeros(4, dtype=torch.float64)}
    flat(x, buffers=left_out)
    assert left_out["1.running_mean"].any() == training
    for kept, before in zip(flat.buffers(), own, strict=True):
        assert torch.equal(kept, before)


def test_the_vector_and_the_module_are_one() -> None:
    model = Tied().double()
    flat = FlatModule(model)
    assert flat.param_numel == 1 + 16 + 4
    assert list(flat.shapes) == ["scale", "first.weight", "first.bias"]
    assert flat.shapes["scale"] == ()
    assert torch.equal(flat.flat_param, parameters_to_vector(model.parameters()))
    with torch.no_grad():
        flat.flat_param[0] = 7
        model.second.weight[0, 0] = 9
    assert model.scale.item() == 7
    assert flat.flat_param[1].item() == 9
    flat(torch.ones(2, 4, dtype=torch.float64)).sum().backward()
    assert flat.flat_param.grad is not None
    torch.optim.SGD(flat.parameters(), lr=0.1).step()
    assert torch.equal(flat.flat_param, parameters_to_vector(model.parameters()))
    flat.flat_param = nn.Parameter(vector_of(flat))
    assert torch.equal(flat.flat_param, parameters_to_vector(model.parameters()))
    views = flat.unflatten(flat.flat_param)
    assert views["first.weight"].data_ptr() == flat.flat_param[1:].data_ptr()
    assert model.first.weight is model.second.weight


def test_a_module_that_is_used_twice_is_as_it_was_afterwards() -> None:
    layer = nn.Linear(3, 3)
    model = nn.Sequential(layer, nn.Tanh(), layer)
    weight = layer.weight
    flat = FlatModule(model)
    x = torch.randn(2, 3)
    expected = functional_call(copy.deepcopy(model), flat.unflatten(flat.flat_param * 2), (x,))
    torch.testing.assert_close(flat(x, flat_param=flat.flat_param * 2), expected)
    assert layer.weight is weight
    buffers = [b.clone() for b in FlatModule(nn.Sequential(nn.BatchNorm1d(3))).buffers()]
    norm = nn.BatchNorm1d(3)
    twice = FlatModule(nn.Sequential(norm, norm))
    own = norm.running_mean
    twice(x, buffers=buffers)
    assert norm.running_mean is own
    assert buffers[2].item() == 2


def test_keyword_arguments_and_replaced_buffers() -> None:
    flat = FlatModule(Tied())
    x = torch.ones(1, 4)
    torch.testing.assert_close(flat(x, shift=2.0), flat(x) + 2)
    assert flat.module.calls.item() == 2


@pytest.mark.parametrize("module", [nn.ReLU(), nn.Sequential(), nn.BatchNorm1d(4, affine=False)])
def test_modules_without_parameters(module: nn.Module) -> None:
    flat = FlatModule(module)
    x = torch.randn(3, 4)
    assert flat.param_numel == 0
    assert torch.equal(flat.eval()(x, flat_param=torch.zeros(0)), module(x))
    assert tuple(flat.parameters()) == (flat.flat_param,)


def test_frozen_parameters_do_not_move() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2)).double()
    model[0].weight.requires_grad_(False)
    before = model[0].weight.clone()
    flat = FlatModule(model)
    assert torch.equal(flat.flat_param, parameters_to_vector(model.parameters()))
    optimiser = torch.optim.SGD(flat.parameters(), lr=0.1, weight_decay=0.5)
    x = torch.randn(4, 3, dtype=torch.float64)
    for _ in range(3):
        optimiser.zero_grad()
        flat(x).square().sum().backward()
        optimiser.step()
    assert torch.equal(model[0].weight, before)
    changed = torch.nn.functional.linear(x, before, model[0].bias)
    torch.testing.assert_close(flat(x), model[1](changed), **EXACT)
    assert not torch.equal(flat.unflatten(flat.flat_param)["0.weight"], before)
    copied = FlatModule(copy.deepcopy(model))
    with torch.no_grad():
        copied.module[0].weight.zero_()
    copied.load_state_dict(flat.state_dict())
    torch.testing.assert_close(copied(x), flat(x), rtol=0, atol=0)
    copied.load_state_dict(model.state_dict())
    assert torch.equal(copied.unflatten(copied.flat_param)["0.weight"], before)
    all_frozen = FlatModule(nn.Linear(2, 2).requires_grad_(False))
    assert not all_frozen.flat_param.requires_grad


def test_derivatives_of_any_order() -> None:
    flat = FlatModule(nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 1)).double())
    x = torch.randn(2, 2, dtype=torch.float64)
    vector = vector_of(flat).requires_grad_()
    run = lambda v: flat(x, flat_param=v)  # noqa: E731
    assert torch.autograd.gradcheck(run, (vector,))
    assert torch.autograd.gradgradcheck(run, (vector,))
    loss = lambda v: run(v).square().sum()  # noqa: E731
    tangent = vector_of(flat, 2)
    first = torch.autograd.grad(loss(vector), vector)[0]
    torch.testing.assert_close(grad(loss)(vector.detach()), first, **EXACT)
    torch.testing.assert_close(
        jvp(loss, (vector.detach(),), (tangent,))[1], first @ tangent, **EXACT
    )
    by_name = lambda p: functional_call(flat.module, p, (x,)).square().sum()  # noqa: E731
    named = grad(by_name)(flat.unflatten(vector.detach()))
    torch.testing.assert_close(torch.cat([g.flatten() for g in named.values()]), first, **EXACT)


def test_five_meta_learning_steps_equal_torch_func() -> None:
    """MAML with an inner step and five outer ones, BatchNorm in training, against `torch.func`."""
    model = convnet()
    x, target = image(), torch.tensor([0, 1, 2, 3])
    names = {k: v.detach().clone() for k, v in model.named_parameters()}
    fresh = {k: v.clone() for k, v in model.named_buffers()}
    flat = FlatModule(copy.deepcopy(model))

    def outer_named(params: dict[str, Tensor], buffers: dict[str, Tensor]) -> Tensor:
        def inner(p: dict[str, Tensor], b: dict[str, Tensor]) -> Tensor:
            return F.cross_entropy(functional_call(model, {**p, **b}, (x,)), target)

        slopes = grad(inner)(params, buffers)
        return inner({k: p - 0.1 * slopes[k] for k, p in params.items()}, buffers)

    vector = flat.flat_param.detach().clone().requires_grad_()
    for _ in range(5):
        loss = F.cross_entropy(flat(x, flat_param=vector), target)
        (slope,) = torch.autograd.grad(loss, vector, create_graph=True)
        outer = F.cross_entropy(flat(x, flat_param=vector - 0.1 * slope), target)
        (step,) = torch.autograd.grad(outer, vector)
        vector = (vector - 0.2 * step).detach().requires_grad_()
        slopes = grad(outer_named)(names, {k: v.clone() for k, v in fresh.items()})
        names = {k: v - 0.2 * slopes[k] for k, v in names.items()}
        expected = torch.cat([v.flatten() for v in names.values()])
        torch.testing.assert_close(vector.detach(), expected, **EXACT)
    assert flat.module[1].num_batches_tracked.item() == 10


def test_meta_learning_on_resnet18() -> None:
    """The original's example on small images, with BatchNorm's running statistics in training."""
    torch.manual_seed(0)
    flat = FlatModule(torchvision_model("resnet18"))

    def maml_loss(param: Tensor, x: Tensor, lr: float = 0.01) -> Tensor:
        loss = torch.norm(flat(x, flat_param=param))
        (slope,) = torch.autograd.grad(loss, param, create_graph=True)
        return torch.norm(flat(x, flat_param=param - lr * slope))

    trained = torch.randn(flat.param_numel).mul_(0.001).requires_grad_()
    loss = maml_loss(trained, torch.randn(2, 3, 32, 32))
    (slope,) = torch.autograd.grad(loss, trained)
    assert slope.shape == (flat.param_numel,)
    assert slope.isfinite().all()
    assert slope.abs().max() > 0
    assert flat.module.bn1.num_batches_tracked.item() == 2


@pytest.mark.parametrize("training", [True, False])
def test_vmap_over_vectors_equals_a_loop(training: bool) -> None:
    flat = FlatModule(convnet()).train(training)
    x = image()
    vectors = torch.stack([vector_of(flat, seed) for seed in range(3)])
    stacked = {k: torch.stack([v] * 3) for k, v in flat.named_buffers()}
    batched = vmap(lambda v, b: flat(x, flat_param=v, buffers=b))(vectors, stacked)
    for index in range(3):
        buffers = {k: v.clone() for k, v in flat.named_buffers()}
        expected = flat(x, flat_param=vectors[index], buffers=buffers)
        torch.testing.assert_close(batched[index], expected, **EXACT)
        for name, value in buffers.items():
            torch.testing.assert_close(stacked[name][index], value, **EXACT)
    if not training:
        torch.testing.assert_close(vmap(lambda v: flat(x, flat_param=v))(vectors), batched)
    slopes = vmap(
        grad(lambda v, b: flat(x, flat_param=v, buffers=b).square().sum()), randomness="same"
    )(vectors, {k: torch.stack([v] * 3) for k, v in flat.named_buffers()})
    assert slopes.shape == vectors.shape


def test_compile() -> None:
    flat = FlatModule(convnet()).eval()
    compiled = torch.compile(flat, backend="eager")
    x, vector = image(), vector_of(flat)
    torch.testing.assert_close(compiled(x), flat(x), **EXACT)
    torch.testing.assert_close(compiled(x, flat_param=vector), flat(x, flat_param=vector), **EXACT)


class Fails(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        raise RuntimeError(f"no forward for {tuple(x.shape)}")


def test_a_failed_forward_changes_nothing() -> None:
    counter = Tied()
    model = nn.Sequential(nn.BatchNorm1d(4), counter, Fails())
    flat = FlatModule(model)
    before = copy.deepcopy(dict(flat.state_dict()))
    parameters = list(model.parameters())
    given = {k: v.clone() for k, v in flat.named_buffers()}
    passed = {k: v.clone() for k, v in given.items()}
    for options in ({}, {"flat_param": flat.flat_param + 1}, {"buffers": passed}):
        with pytest.raises(RuntimeError, match="no forward"):
            flat(torch.randn(3, 4), **options)
    for name, value in flat.state_dict().items():
        assert torch.equal(value, before[name])
    assert all(one is other for one, other in zip(parameters, model.parameters(), strict=True))
    for name, value in passed.items():
        assert torch.equal(value, given[name])
    assert not counter.calls.any()


def test_dtype_device_and_copies() -> None:
    flat = FlatModule(convnet())
    model, x = flat.module, image()
    assert flat.to(torch.float32) is flat
    assert flat.flat_param.dtype == model[0].weight.dtype == torch.float32
    assert model[1].running_mean.dtype == torch.float32
    assert model[0].weight.data_ptr() == flat.flat_param.data_ptr()
    assert flat(x.float()).dtype == torch.float32
    flat.double().eval()
    assert not model[1].training
    assert flat.train() is flat
    assert model[1].training
    flat.eval()
    size = len(pickle.dumps(flat))
    assert size < 8 * flat.param_numel + 20_000
    for other in (copy.deepcopy(flat), pickle.loads(pickle.dumps(flat))):
        assert torch.equal(other(x), flat(x))
        with torch.no_grad():
            other.flat_param.zero_()
        assert not other.module[0].weight.any()
        assert flat.flat_param.any()
        assert tuple(other.parameters()) == (other.flat_param,)
    meta = copy.deepcopy(flat).to("meta")
    assert meta.module[0].weight.is_meta
    assert meta(x.to("meta")).shape == (4, 5)
    assert "param_numel=" in repr(flat)
    outer = nn.Sequential(flat)
    assert list(outer.parameters()) == [flat.flat_param]
    file = io.BytesIO()
    torch.save(outer.state_dict(), file)
    file.seek(0)
    twin = nn.Sequential(FlatModule(convnet())).eval()
    with torch.no_grad():
        twin[0].flat_param.zero_()
    twin.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(twin(x), flat(x))
    inner = FlatModule(nn.Linear(2, 2))
    nested = FlatModule(nn.Sequential(inner))
    with torch.no_grad():
        nested.flat_param.zero_()
    assert not inner.module.weight.any()


def test_state_dicts_both_ways() -> None:
    model = convnet()
    state = copy.deepcopy(model.state_dict())
    flat = FlatModule(convnet())
    with torch.no_grad():
        flat.flat_param.zero_()
    flat.load_state_dict(state)
    assert list(flat.module_state_dict()) == list(state)
    for name, value in flat.module_state_dict().items():
        assert torch.equal(value, state[name])
    convnet().load_state_dict(flat.module_state_dict())
    own = flat.state_dict()
    assert list(own) == ["flat_param", "module.1.running_mean", "module.1.running_var",
                         "module.1.num_batches_tracked"]  # fmt: skip
    del state["0.bias"]
    state["5.weight"] = torch.zeros(2, 2)
    before = flat.flat_param.clone()
    with pytest.raises(RuntimeError, match=r"5.weight has shape \(2, 2\).*0.bias is missing"):
        flat.load_state_dict(state)
    assert torch.equal(flat.flat_param, before)
    with pytest.raises(ValueError, match="assign=True"):
        flat.load_state_dict(own, assign=True)
    broken = {**own, "module.1.extra": torch.zeros(1)}
    with pytest.raises(RuntimeError, match=r"module\.1\.extra"):
        nn.Sequential(flat).load_state_dict({f"0.{k}": v for k, v in broken.items()})


def test_trace() -> None:
    flat = FlatModule(convnet()).eval()
    x, vector = image(), vector_of(flat)
    expected = flat(x), flat(x, flat_param=vector)
    buffers = [b + 1 for b in flat.buffers()]
    shifted = flat(x, buffers=buffers)
    assert flat.trace(x) is flat
    assert flat.is_traced
    assert flat.param_numel == vector.numel()
    for _ in range(2):
        torch.testing.assert_close(flat(x), expected[0], **EXACT)
        torch.testing.assert_close(flat(x, flat_param=vector), expected[1], **EXACT)
    torch.testing.assert_close(flat(x, buffers=buffers), shifted, **EXACT)
    more = image(3, 7)
    torch.testing.assert_close(flat(more), flat.module(more), **EXACT)
    (slope,) = torch.autograd.grad(flat(x).sum(), flat.flat_param)
    assert slope.abs().max() > 0
    with pytest.raises(ValueError, match="traced with 1 positional inputs; it got 2"):
        flat(x, x)
    assert not copy.deepcopy(flat).is_traced
    assert not flat.to(torch.float64).is_traced
    with pytest.raises(TypeError, match="not a int"):
        flat.trace((3,))  # type: ignore[arg-type]


def test_trace_keeps_the_training_and_the_evaluation_form() -> None:
    model = convnet()
    model[3].p = 0.5
    flat, twin = FlatModule(model), copy.deepcopy(model)
    x = image()
    before = copy.deepcopy(flat.state_dict())
    state = torch.get_rng_state()
    flat.trace(x)
    assert torch.equal(torch.get_rng_state(), state)
    assert flat.training
    assert all(m.training for m in model.modules())
    for name, value in flat.state_dict().items():  # the statistics of BatchNorm too
        assert torch.equal(value, before[name])
    for mode in (True, False, True, False):
        flat.train(mode)
        twin.train(mode)
        torch.manual_seed(3)
        y = flat(x)
        torch.manual_seed(3)
        torch.testing.assert_close(y, twin(x), **EXACT)
        for one, other in zip(model.buffers(), twin.buffers(), strict=True):
            torch.testing.assert_close(one, other, **EXACT)
    flat.train()
    twin.train()
    model[1].eval()  # neither of the traced forms
    twin[1].eval()
    model[3].p = twin[3].p = 0.0
    torch.testing.assert_close(flat(x), twin(x), **EXACT)


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.layer(x) * y


class Draws(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) * torch.rand(3)


def test_trace_takes_lists_and_checks() -> None:
    flat = FlatModule(TwoInputs())
    x, y = torch.randn(2, 3), torch.randn(2, 3)
    expected = flat(x, y)
    assert torch.equal(flat.trace([x, y])(x, y), expected)
    assert torch.equal(flat.trace((x, y))(x, y), expected)
    drawing = FlatModule(Draws())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        drawing.trace([x])
    told = [str(w.message) for w in caught if w.category is torch.jit.TracerWarning]
    assert any("does not match the corresponding output" in message for message in told)
    unchecked = FlatModule(Draws()).trace([x], check_trace=False)
    assert unchecked.is_traced
    with pytest.raises(TypeError, match="check_input"):
        flat.trace(x, check_input=True)  # type: ignore[call-arg]


def test_a_form_that_cannot_be_traced() -> None:
    flat = FlatModule(nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))).eval()
    one = torch.randn(1, 3)
    with pytest.warns(UserWarning, match="its training form, which will run untraced: Expected"):
        flat.trace(one)
    assert torch.equal(flat(one), flat.module(one))
    more = torch.randn(4, 3)
    expected = copy.deepcopy(flat.module).train()(more)
    torch.testing.assert_close(flat.train()(more), expected)
    replacing = FlatModule(Tied())
    with pytest.raises(ValueError, match="its forward replaces calls"):
        replacing.trace(torch.ones(1, 4))
    assert not replacing.is_traced


def test_tied_and_frozen_under_trace() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3)).double()
    model[1].weight = model[0].weight
    model[0].bias.requires_grad_(False)
    flat = FlatModule(model)
    x = torch.randn(2, 3, dtype=torch.float64)
    vector = vector_of(flat)
    expected = flat(x, flat_param=vector)
    flat.trace(x)
    torch.testing.assert_close(flat(x, flat_param=vector), expected, **EXACT)
    assert model[1].weight is model[0].weight


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"flat_param": torch.zeros(7)}, r"flat_param of 6 entries.* got a vector of shape \(7,\)"),
        ({"flat_param": torch.zeros(2, 3)}, r"shape \(2, 3\)"),
        ({"flat_param": torch.zeros(6).double()}, r"torch.float32 on cpu.*dtype torch.float64"),
        ({"flat_param": torch.zeros(6, device="meta")}, "on cpu; it got one on meta"),
        ({"buffers": [torch.zeros(2)]}, "has 3 buffers; it got 1"),
        ({"buffers": {"1.running_men": torch.zeros(2)}}, r"Did you mean '1.running_mean'"),
        ({"buffers": {"1.running_mean": torch.zeros(3)}}, r"'1.running_mean' as \(\(2,\)"),
        ({"buffers": {"1.running_mean": torch.zeros(2).double()}}, r"torch.float64"),
        ({"buffers": {"1.running_mean": torch.zeros(2, device="meta")}}, "'meta'"),
    ],
)
def test_wrong_vectors_and_buffers_say_what_was_expected(options: Any, words: str) -> None:
    flat = FlatModule(nn.Sequential(nn.Linear(1, 2, bias=False), nn.BatchNorm1d(2)))
    before = copy.deepcopy(flat.state_dict())
    with pytest.raises(ValueError, match=words) as caught:
        flat(torch.zeros(3, 1), **options)
    assert "Sequential" in str(caught.value)
    for name, value in flat.state_dict().items():
        assert torch.equal(value, before[name])


def test_modules_that_one_vector_cannot_hold() -> None:
    mixed = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2).double())
    before = [p.data_ptr() for p in mixed.parameters()]
    with pytest.raises(ValueError, match=r"torch.float32: 0.weight, 0.bias; torch.float64: 1.w"):
        FlatModule(mixed)
    assert [p.data_ptr() for p in mixed.parameters()] == before
    with pytest.raises(ValueError, match="2 devices"):
        FlatModule(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2, device="meta")))
    with pytest.raises(ValueError, match="lazy parameter 'weight'"):
        FlatModule(nn.LazyLinear(3))
    with pytest.raises(TypeError, match="not a function"):
        FlatModule(lambda x: x)  # type: ignore[arg-type]
    flat = FlatModule(nn.Linear(2, 2))
    with pytest.raises(TypeError, match="got a list"):
        flat(torch.zeros(1, 2), flat_param=[0.0])
    with pytest.raises(ValueError, match="expects a flat_param of 6"):
        flat.flat_param = nn.Parameter(torch.zeros(5))
    with pytest.raises(ValueError, match="expects a flat_param of 6"):
        flat.unflatten(torch.zeros(5))
