"""Which layers are found, how often they run, and why some are kept."""

from __future__ import annotations

import copy
from fractions import Fraction

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import compress
from compress.errors import ModelError
from compress.network.baseline import prepare
from compress.network.sites import Call, LayerSite, find_sites
from compress.network.tracing import trace
from compress.running.forward import evaluation_mode, forward_hooks, frozen, run_model
from compress.running.modules import module_names


class Network(nn.Module):
    """Layers that are shared, tied, subclassed, never called, hooked, or in odd places."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(8, 3)  # called last, declared first
        self.stem = nn.Conv2d(3, 4, 3, stride=2, padding=1)
        self.block = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.ReLU(inplace=True))
        self.alias = self.block[0]
        self.special = Special(4, 8, 1)
        self.unused = nn.Linear(5, 4)
        self.read = nn.Linear(8, 8)
        self.tied = nn.Linear(8, 8)
        self.tied.weight = self.read.weight
        self.dropout = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.special(self.alias(self.block(self.stem(x)))).mean((2, 3))
        x = self.read(x) + self.tied(x)
        return self.head(self.dropout(x))


class Special(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def found(model: nn.Module, x: Tensor) -> dict[str, LayerSite]:
    return {site.name: site for site in find_sites(model, x)}


def test_layers_in_order_of_execution_with_reasons() -> None:
    model, x = Network(), torch.randn(1, 3, 9, 9)
    sites = find_sites(model, x)
    assert [site.name for site in sites] == [
        "stem", "block.0", "special", "read", "tied", "head", "unused"
    ]  # fmt: skip
    skips = {site.name: site.skip for site in sites}
    assert skips["stem"] is skips["block.0"] is skips["head"] is None
    for name, words in {
        "special": ("subclass of Conv2d", "Special"),
        "read": ("tied to tied",),
        "tied": ("tied to read",),
        "unused": ("never called",),
    }.items():
        reason = skips[name]
        assert reason is not None
        assert all(word in reason for word in words)


def test_a_shared_module_is_one_site_with_every_call() -> None:
    model, x = Network(), torch.randn(1, 3, 9, 9)
    site = found(model, x)["block.0"]
    assert site.aliases == ("block.0", "alias")
    assert site.calls == (Call((5, 5), Fraction(1)),) * 2
    assert site.positions == 50
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.alias(model.block[0](torch.randn(1, 4, 5, 5)))
    assert site.macs * 2 == counter.get_total_flops()
    assert site.params == 4 * 4 * 9 + 4


def test_macs_of_all_called_layers_are_torchs() -> None:
    model, x = Network(), torch.randn(1, 3, 11, 8)
    model.special = nn.Conv2d(4, 8, 1)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(x)
    assert sum(site.macs for site in find_sites(model, x)) * 2 == counter.get_total_flops()


def test_the_model_is_left_as_it_was() -> None:
    model, x = Network(), torch.randn(1, 3, 9, 9)
    model.block.eval()
    state, random = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    flags = [module.training for module in model.modules()]
    find_sites(model, x)
    assert torch.equal(torch.get_rng_state(), random)
    assert [module.training for module in model.modules()] == flags
    assert not any(module._forward_hooks for module in model.modules())
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("kind", ["forward", "pre"])
def test_layers_with_hooks_are_kept(kind: str) -> None:
    model, x = Network(), torch.randn(1, 3, 9, 9)
    calls = []
    if kind == "forward":
        model.stem.register_forward_hook(lambda *_: calls.append(1))
    else:
        model.stem.register_forward_pre_hook(lambda *_: calls.append(1))
    reason = found(model, x)["stem"].skip
    assert calls
    assert reason is not None
    assert "hooks" in reason
    assert len(model.stem._forward_hooks) + len(model.stem._forward_pre_hooks) == 1


def test_weights_behind_a_parametrisation_are_kept() -> None:
    model, x = Network(), torch.randn(1, 3, 9, 9)
    torch.nn.utils.parametrizations.weight_norm(model.stem)
    reason = found(model, x)["stem"].skip
    assert reason is not None
    assert "subclass of Conv2d" in reason


def test_a_layer_of_very_many_outputs_is_kept() -> None:
    model = nn.Sequential(nn.Linear(4, 8192, bias=False), nn.Linear(8192, 8193, bias=False))
    few, many = find_sites(model, torch.randn(1, 4))
    assert few.skip is None
    assert many.skip is not None
    assert "its 8,193 outputs are more than 8,192" in many.skip


def test_the_callers_reasons_come_first() -> None:
    model, x = Network(), torch.randn(1, 3, 9, 9)
    sites = find_sites(model, x, keep=lambda module: "mine" if module is model.stem else None)
    assert sites[0].skip == "mine"
    assert sites[0].schemes == ()
    assert sites[1].schemes == ("output", "input", "two_sided", "spatial")


def test_the_model_may_itself_be_the_layer() -> None:
    (site,) = find_sites(nn.Linear(4, 3, bias=False), torch.randn(1, 7, 4))
    assert site.name == ""
    assert site.kind == "Linear"
    assert not site.biased
    assert site.calls == (Call((7, 1), Fraction(1)),)
    assert site.macs == 7 * 12
    assert site.params == 12
    assert site.schemes == ("output",)


def test_a_layer_on_windows_folded_into_the_batch() -> None:
    class Windows(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(6, 5)

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x.reshape(-1, 4, 6)).sum()

    (site,) = find_sites(Windows(), torch.randn(1, 12, 6))
    assert site.calls == (Call((4, 1), Fraction(3)),)
    assert site.positions == 12
    assert site.macs == 12 * 30


@pytest.mark.parametrize(
    ("layer", "x", "shape"),
    [
        (nn.Conv2d(4, 6, (1, 3), stride=(1, 2)), torch.zeros(1, 4, 5, 5), "4→6 1x3 s1x2"),
        (nn.Conv2d(4, 6, 3, stride=2, groups=2), torch.zeros(1, 4, 5, 5), "4→6 3x3 s2 g2"),
        (nn.Conv1d(4, 6, 3, stride=2), torch.zeros(1, 4, 5), "4→6 1x3 s2"),
        (nn.Conv3d(4, 6, 3, (1, 2, 2)), torch.zeros(1, 4, 5, 5, 5), "4→6 3x3x3 s1x2x2"),
        (nn.Conv3d(4, 6, 3, 2, groups=2), torch.zeros(1, 4, 5, 5, 5), "4→6 3x3x3 s2 g2"),
        (nn.Linear(4, 6), torch.zeros(1, 4), "4→6"),
    ],
)
def test_shapes_in_short(layer: nn.Module, x: Tensor, shape: str) -> None:
    assert find_sites(layer, x)[0].shape == shape


def test_all_names_of_every_module() -> None:
    model = Network()
    names = module_names(model)
    assert names[model] == ("",)
    assert names[model.alias] == ("block.0", "alias")
    assert set(names) == set(model.modules())


def test_buffers_flags_and_random_state_come_back_even_after_an_error() -> None:
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("calls", torch.zeros(1))
            self.register_buffer("nothing", None)
            self.register_buffer("last", torch.zeros(2))
            self.layer = nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            self.last = torch.rand(2)
            return F.batch_norm(self.layer(x), None, None, training=True)

    model = Counting()
    model.layer.eval()
    calls, state = model.calls, torch.get_rng_state()

    def failing() -> None:
        with evaluation_mode(model):
            assert not model.training
            model(torch.randn(4, 3))
            assert float(model.calls) == 1
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        failing()
    assert torch.equal(torch.get_rng_state(), state)
    assert model.calls is calls
    assert float(calls) == 0
    assert not model.last.any()
    assert model.training
    assert not model.layer.training


def test_hooks_and_gradients_come_back_after_an_error() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[0].bias.requires_grad_(False)

    def failing() -> None:
        with frozen(model), forward_hooks({model[0]: lambda *_: None}):
            assert model[0]._forward_hooks
            assert not any(p.requires_grad for p in model.parameters())
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        failing()
    assert [p.requires_grad for p in model.parameters()] == [True, False, True, True]
    assert not model[0]._forward_hooks


def test_outputs_without_a_tensor() -> None:
    class Names(nn.Module):
        def forward(self, x: Tensor) -> dict[str, list[str]]:
            return {"names": [str(x.dtype)]}

    with pytest.raises(ModelError, match="returned dict"):
        run_model(Names(), torch.rand(1))


def test_a_forward_that_fails_says_what_it_was_given() -> None:
    with pytest.raises(ModelError, match=r"\(1, 4, 8, 8\).*channels") as caught:
        run_model(nn.Conv2d(3, 4, 3), torch.zeros(1, 4, 8, 8))
    assert "\n" not in str(caught.value)
    with pytest.raises(ModelError):
        find_sites(Network(), torch.zeros(1, 2, 8, 8))


def test_a_layer_called_by_keyword_is_one_like_any_other() -> None:
    class ByKeyword(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)
            self.norm = nn.BatchNorm2d(4)
            self.head = nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(input=self.norm(input=self.conv(input=x)).mean((2, 3)))

    model, x = ByKeyword().eval(), torch.randn(1, 3, 8, 8)
    conv, head = find_sites(model, x)
    assert conv.skip is head.skip is None
    assert (conv.macs, head.macs) == (36 * 4 * 27, 8)
    graph = trace(model, x)
    assert graph is not None
    called = [node for node in graph.nodes if node.op == "call_module"]
    assert [len(node.args) for node in called] == [1, 1, 1]
    assert not any(node.kwargs for node in called)


def test_a_fixed_filter_without_parameters_is_kept() -> None:
    blur = nn.Conv2d(3, 3, 3, groups=3, padding=1, bias=False)
    weight = blur.weight.data
    del blur.weight
    blur.register_buffer("weight", weight)
    model = nn.Sequential(blur, nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 2, 1)).eval()
    sites = {s.name: s for s in prepare(model, torch.rand(1, 3, 8, 8)).sites}
    assert sites["0"].skip is not None
    assert sites["1"].skip is None


def test_a_layer_that_nothing_reached_on_the_first_image_is_kept() -> None:
    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.experts = nn.ModuleList([nn.Linear(6, 6) for _ in range(2)])
            self.head = nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            out, mine = torch.zeros_like(x), x[:, 0] > 0
            for expert, rows in zip(self.experts, (mine, ~mine), strict=True):
                out[rows] = expert(x[rows])
            return self.head(out)

    sites = {s.name: s for s in prepare(Experts().eval(), torch.ones(1, 6)).sites}
    assert sites["experts.0"].skip is None
    assert "nothing reached it" in str(sites["experts.1"].skip)
    images = torch.randn(64, 6, generator=torch.Generator().manual_seed(0))
    found = compress.compress_model(Experts(), images, params=0.8)
    assert found.result.cost.compressed.params <= 0.8 * found.result.cost.folded.params
