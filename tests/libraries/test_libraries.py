"""Networks of optional libraries; what needs a library skips where it is not installed."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import Result
from stopwatch import stop_the_clock
from torch import nn
from workbench import command, paragraph

import compress
from compress.config import make_config
from compress.errors import ArtefactError, CheckpointError, ModelError
from compress.inputs.load import checkpoint_beside, input_paths, load_model
from compress.inputs.models import MODEL_FORMS, build_model
from compress.libraries import LIBRARIES, library_of
from compress.libraries.record import require, without_memory
from compress.trust import model_risk, require_trusted_model
from compress.vision.torchvision import load_torchvision

PACKAGES = {
    "timm": ("timm", "timm"),
    "smp": ("segmentation_models_pytorch", "smp"),
    "hf": ("transformers", "transformers"),
    "onnx": ("onnx", "onnx"),
}


def library(prefix: str) -> Any:
    """Import the package behind a prefix, or skip."""
    package, extra = PACKAGES[prefix]
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed")
    load_torchvision()
    return require(package, extra, prefix)


@pytest.fixture(autouse=True)
def no_stopwatch(monkeypatch: pytest.MonkeyPatch) -> None:
    stop_the_clock(monkeypatch)


def same(one: torch.Tensor, other: torch.Tensor) -> None:
    torch.testing.assert_close(one, other, rtol=0, atol=1e-5)


# --- All of them -------------------------------------------------------------------------------


def test_every_library_is_named_where_specs_are_explained() -> None:
    from compress.commands.group import cli

    [told] = [p.help for p in cli.commands["run"].params if p.name == "model"]  # type: ignore[attr-defined]
    for each in LIBRARIES:
        assert f"{each.prefix}:" in MODEL_FORMS
        assert f"{each.prefix}:" in told
        assert library_of(each.example.partition("?")[0]) is not None
    assert library_of("package.module:factory") is None
    assert library_of("timm.py:factory") is None
    assert library_of("timm") is None


@pytest.mark.parametrize("prefix", PACKAGES)
def test_a_missing_package_names_its_extra(
    prefix: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    package, extra = PACKAGES[prefix]
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ModelError, match=rf"need the package .*pip install 'compress\[{extra}\]'"):
        build_model(f"{prefix}:{tmp_path}")
    assert f"\n{extra} = [" in Path("pyproject.toml").read_text()


def test_a_prefix_with_a_slip() -> None:
    with pytest.raises(ModelError, match=r"no module 'tim' .*Did you mean 'timm'"):
        build_model("tim:resnet18")


@pytest.mark.parametrize(
    "spec",
    [
        "timm:resnet18?num_classes=10",
        "timm:resnet18?global_pool=avg",
        "smp:Unet?encoder=resnet34&classes=3",
        "smp:Unet?encoder=resnet18&decoder_channels=[64,32,16,8,4]",
        "hf:somewhere",
        "onnx:net.onnx",
    ],
)
def test_harmless_specs(spec: str) -> None:
    assert model_risk(spec) == ""


@pytest.mark.parametrize(
    ("spec", "part"),
    [
        ("smp:Unet?encoder_weights=imagenet", "download"),
        ("timm:resnet18?a=../x", "passes"),
        ("timm:resnet18?a='https://x.y'", "passes"),
        ("timm:resnet18?num_classes=1000000000", "passes"),
        ("smp:Unet?decoder_channels=[1,[2]]", "passes"),
        (f"smp:Unet?decoder_channels=[{'1,' * 17}]", "passes"),
        ("hf:x?a=[{b=1}]", "passes"),
        ("timm.py:net", "runs the code"),
        ("timm", "runs the code"),
    ],
)
def test_specs_that_need_trust(spec: str, part: str) -> None:
    assert part in model_risk(spec)


def test_a_network_of_very_many_modules_is_not_built() -> None:
    with pytest.raises(ValueError, match="more than 20,000 modules"):
        with without_memory():
            nn.Sequential(*(nn.ReLU() for _ in range(20_001)))
    with without_memory():
        assert nn.Linear(1 << 20, 1 << 20).weight.is_meta
        assert [x.item() for x in torch.linspace(0, 1, 3)] == [0, 0.5, 1]
        with pytest.raises(ValueError, match="steps"):
            torch.linspace(0, 1, 1 << 40)
    nn.Sequential(*(nn.ReLU() for _ in range(20_001)))  # and all is as before


# --- timm and segmentation_models_pytorch ------------------------------------------------------


def test_timm_by_name() -> None:
    timm = library("timm")
    built = build_model("timm:vit_tiny_patch16_224?num_classes=7")
    theirs = timm.create_model("vit_tiny_patch16_224", num_classes=7).eval()
    theirs.load_state_dict(built.module.state_dict())
    images = torch.randn(1, 3, 224, 224)
    same(built.module(images), theirs(images))
    assert built.input_shape == (3, 224, 224)
    assert built.preset is not None
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(theirs))
    resize, crop, *_ = transform.transforms
    assert (built.preset.resize, built.preset.crop) == (resize.size, crop.size[0])
    assert built.preset.mean == (0.5, 0.5, 0.5)
    assert build_model("timm:vit_tiny_patch16_224?img_size=64").input_shape == (3, 64, 64)
    grey = build_model("timm:resnet18?in_chans=1")
    assert (grey.input_shape, grey.preset) == ((1, 224, 224), None)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("timm:resnet188", "no network 'resnet188'. Did you mean 'resnet18'"),
        ("timm:hf-hub:some/one", "no network 'hf-hub:some/one'"),
        ("timm:local-dir:x", "no network"),
        ("timm:resnet18?pretrained=true", "random weights, without pretrained"),
        ("timm:resnet18?checkpoint_path=x.pt", "without checkpoint_path"),
        ("timm:resnet18?pretrained_cfg_overlay=x", "without pretrained_cfg_overlay"),
        ("timm:resnet18?clases=3", "unexpected keyword argument 'clases'"),
        ("timm:resnet18.nonsense", "cannot be built|no network"),
    ],
)
def test_timm_that_cannot_be_built(spec: str, message: str) -> None:
    library("timm")
    with pytest.raises(ModelError, match=message) as caught:
        build_model(spec)
    assert "\n" not in str(caught.value)


def test_smp_by_name() -> None:
    smp = library("smp")
    built = build_model("smp:FPN?encoder=resnet18&classes=3")
    theirs = smp.FPN(encoder_name="resnet18", encoder_weights=None, classes=3).eval()
    theirs.load_state_dict(built.module.state_dict())
    images = torch.randn(1, 3, 64, 64)
    same(built.module(images), theirs(images))
    assert (built.input_shape, built.preset) == ((3, 256, 256), None)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("smp:Unett", "no network 'Unett'. Did you mean 'Unet'"),
        ("smp:from_pretrained", "no network"),
        ("smp:Unet?encoder=resnet188", "no encoder 'resnet188'. Did you mean 'resnet18'"),
        ("smp:Unet?encoder=tu-hf-hub:some/one", "timm has no network"),
        ("smp:Unet?encoder=resnet18&encoder_name=resnet18", "both encoder and encoder_name"),
        ("smp:Unet?encoder=resnet18&clases=3", "takes no clases. Did you mean 'classes'"),
        ("smp:Unet?encoder=resnet18&encoder_depth=9", "cannot be built"),
    ],
)
def test_smp_that_cannot_be_built(spec: str, message: str) -> None:
    library("smp")
    with pytest.raises(ModelError, match=message) as caught:
        build_model(spec)
    assert "\n" not in str(caught.value)


def test_files_cannot_ask_these_libraries_for_huge_networks() -> None:
    library("timm")
    for spec in ("timm:resnet18?num_classes=9", "timm:swin_tiny_patch4_window7_224?num_classes=9"):
        require_trusted_model(spec, "It", ModelError)
    with pytest.raises(ArtefactError, match=r"asks for a network of [\d,]+ GiB"):
        require_trusted_model("timm:vit_tiny_patch16_224?embed_dim=999999", "It", ArtefactError)


# --- transformers ------------------------------------------------------------------------------

VIT = {
    "model_type": "vit", "architectures": ["ViTForImageClassification"], "hidden_size": 32,
    "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64, "image_size": 32,
    "patch_size": 8, "num_labels": 3,
}  # fmt: skip


def described(folder: Path, **changes: Any) -> str:
    """A folder that describes a network; changes of None take keys away."""
    folder.mkdir(exist_ok=True)
    tree = {k: v for k, v in {**VIT, **changes}.items() if v is not None}
    (folder / "config.json").write_text(json.dumps(tree))
    return f"hf:{folder}"


@pytest.fixture
def vit(tmp_path: Path) -> tuple[Path, Any]:
    """A folder as transformers saves it, and the network in it."""
    transformers = library("hf")
    torch.manual_seed(0)
    network = transformers.ViTForImageClassification(transformers.ViTConfig(**VIT)).eval()
    network.save_pretrained(tmp_path / "vit")
    (tmp_path / "vit" / "preprocessor_config.json").write_text(
        json.dumps({
            "size": {"shortest_edge": 36}, "crop_size": {"height": 32, "width": 32},
            "do_center_crop": True, "image_mean": [0.5, 0.4, 0.3], "image_std": [0.5, 0.5, 0.5],
            "resample": 3,
        })
    )  # fmt: skip
    return tmp_path / "vit", network


def test_a_folder_of_transformers(vit: tuple[Path, Any]) -> None:
    folder, theirs = vit
    spec = f"hf:{folder}"
    images = torch.randn(2, 3, 32, 32)
    expected = theirs(images).logits
    for checkpoint in (folder, folder / "model.safetensors"):
        config = make_config({"model": spec, "checkpoint": str(checkpoint)})
        module, _, _, preset = load_model(config)
        same(module(images).logits, expected)
    assert build_model(spec).input_shape == (3, 32, 32)
    assert (preset.resize, preset.crop, preset.interpolation) == (36, 32, "bicubic")
    assert preset.mean == (0.5, 0.4, 0.3)
    assert str(folder) in input_paths(config)
    assert checkpoint_beside(spec) == str(folder)
    assert build_model(f"{spec}?num_labels=9").module(images).logits.shape == (2, 9)


def test_another_networks_weights(vit: tuple[Path, Any]) -> None:
    folder, _ = vit
    torch.save(nn.Linear(2, 2).state_dict(), folder / "other.pt")
    config = make_config({"model": f"hf:{folder}", "checkpoint": str(folder / "other.pt")})
    with pytest.raises(CheckpointError, match=r"missing from the checkpoint.*unknown to the model"):
        load_model(config)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architectures": None}, "does not say which class"),
        ({"architectures": ["os.system"]}, "does not say which class"),
        ({"architectures": ["ViTForImageClasification"]}, "Did you mean 'ViTForImageClass"),
        (
            {"architectures": ["Mine"], "auto_map": {"AutoModel": "m.Mine"}},
            "auto_map, which is not",
        ),
        ({"architectures": ["BertModel"], "model_type": "bert"}, "takes no pictures"),
        ({"model_type": "vitt"}, "model type 'vitt'.*Did you mean 'vit'"),
        ({"model_type": 3}, "does not know the model type"),
        ({"hidden_act": "os.system"}, "describes no network"),
        ({"hidden_size": "x"}, "describes no network"),
        ({"hidden_size": 10**7}, r"a network of [\d,]+ GiB"),
        ({"num_hidden_layers": 10**9}, "more than 20,000 modules"),
        ({"backbone": "some/one"}, "names the network 'some/one' as its backbone"),
        ({"backbone_config": {"backbone": "x"}}, "names the network 'x' as its backbone"),
        ({"architecture": "local-dir:x"}, "names the network 'local-dir:x'"),
    ],
)
def test_descriptions_that_build_nothing(tmp_path: Path, changes: Any, message: str) -> None:
    library("hf")
    with pytest.raises(ModelError, match=message) as caught:
        build_model(described(tmp_path / "x", **changes))
    assert "\n" not in str(caught.value)


def test_folders_that_describe_nothing(tmp_path: Path) -> None:
    library("hf")
    with pytest.raises(ModelError, match=r"config\.json cannot be read: No such file"):
        build_model(f"hf:{tmp_path}")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ModelError, match="is damaged"):
        build_model(f"hf:{tmp_path}")
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(ModelError, match="no JSON object"):
        build_model(f"hf:{tmp_path}")


def test_keys_that_would_fetch_are_left_out(tmp_path: Path) -> None:
    library("hf")
    asked = {"attn_implementation": "some/kernel", "_attn_implementation": "some/kernel"}
    spec = described(tmp_path / "x", **asked, quantization_config={"quant_method": "x"})
    assert build_model(spec).module(torch.zeros(1, 3, 32, 32)).logits.shape == (1, 3)


# --- ONNX --------------------------------------------------------------------------------------


def exported(folder: Path, name: str = "/0/Conv", **saving: Any) -> tuple[str, nn.Module]:
    """A network as an ONNX file, written node by node; also the network in torch."""
    onnx = library("onnx")
    if importlib.util.find_spec("onnx2torch") is None:
        pytest.skip("onnx2torch is not installed")
    helper, arrays = onnx.helper, onnx.numpy_helper
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3),
    ).eval()  # fmt: skip
    stored = [arrays.from_array(t.numpy(), n) for n, t in network.state_dict().items()]
    window = {"kernel_shape": [3, 3], "pads": [1, 1, 1, 1]}
    nodes = [
        helper.make_node("Conv", ["x", "0.weight", "0.bias"], ["a"], name=name, **window),
        helper.make_node("Relu", ["a"], ["b"], name="relu"),
        helper.make_node("Conv", ["b", "2.weight", "2.bias"], ["c"], name="forward", **window),
        helper.make_node("Relu", ["c"], ["d"], name="relu"),
        helper.make_node("GlobalAveragePool", ["d"], ["e"]),
        helper.make_node("Flatten", ["e"], ["f"], axis=1),
        helper.make_node("Gemm", ["f", "6.weight", "6.bias"], ["y"], name="fc", transB=1),
    ]
    ends = [
        helper.make_tensor_value_info(n, 1, ["n", *s]) for n, s in (("x", (1, 8, 8)), ("y", (3,)))
    ]
    graph = helper.make_graph(nodes, "g", ends[:1], ends[1:], stored)
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    path = str(folder / "net.onnx")
    onnx.save_model(made, path, **saving)
    return path, network


def test_an_onnx_file(tmp_path: Path) -> None:
    path, network = exported(tmp_path)
    built = build_model(f"onnx:{path}")
    images = torch.randn(4, 1, 8, 8)
    same(built.module(images), network(images))
    assert built.input_shape == (1, 8, 8)
    names = {n for n, m in built.module.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)}
    assert names == {"0_Conv", "forward_2", "fc"}
    again = build_model(f"onnx:{path}").module
    torch.testing.assert_close(again.state_dict(), built.module.state_dict(), rtol=0, atol=0)
    config = make_config({"model": f"onnx:{path}", "checkpoint": path})
    assert input_paths(config).count(path) == 2
    module, sha256, dtype, _ = load_model(config)
    same(module(images), network(images))
    assert (len(sha256), dtype) == (64, torch.float32)
    with pytest.raises(CheckpointError, match="none of whose weights can be picked"):
        load_model(config.replace(prefix="x"))
    with pytest.raises(CheckpointError, match=f"pass --model onnx:{path}"):
        load_model(config.replace(model="torchvision:resnet18"))


def test_names_in_an_onnx_file_are_no_code(tmp_path: Path) -> None:
    trap = tmp_path / "sprung"
    # Without dots, which onnx2torch replaces.
    call = f"__import__('os')\\x2emkdir('{trap}')"
    evil = f'x")(input_1) if exec("{call}") else getattr(self, "x'
    path, network = exported(tmp_path, evil)
    images = torch.randn(4, 1, 8, 8)
    same(build_model(f"onnx:{path}").module(images), network(images))
    assert not trap.exists()
    # The same file without plain names, to see that the trap works.
    onnx, convert = library("onnx"), require("onnx2torch", "onnx", "onnx").convert
    model = onnx.load(path)
    model.graph.node[2].name = "other"
    graph = convert(model)
    with pytest.raises(Exception):  # noqa: B017, PT011 - whatever the broken code raises
        graph(images)
    assert trap.exists()


def test_weights_beside_an_onnx_file(tmp_path: Path) -> None:
    saving = {"save_as_external_data": True, "location": "net.data", "size_threshold": 0}
    path, network = exported(tmp_path, **saving)
    config = make_config({"model": f"onnx:{path}", "checkpoint": path})
    module, before, _, _ = load_model(config)
    images = torch.randn(4, 1, 8, 8)
    same(module(images), network(images))
    data = tmp_path / "net.data"
    content = bytearray(data.read_bytes())
    content[0] ^= 1
    data.write_bytes(content)
    assert load_model(config)[1] != before
    data.unlink()
    with pytest.raises(ModelError, match=r"net\.data'?, which is not there"):
        build_model(f"onnx:{path}")
    onnx = library("onnx")
    model = onnx.load(path, load_external_data=False)
    for entry in model.graph.initializer[0].external_data:
        if entry.key == "location":
            entry.value = "../net.data"
    Path(path).write_bytes(model.SerializeToString())
    with pytest.raises(ModelError, match="only files beside it are read"):
        build_model(f"onnx:{path}")


@pytest.mark.parametrize("content", [b"", b"x", b"\x08\x07", bytes(range(256))])
def test_files_that_are_no_onnx(tmp_path: Path, content: bytes) -> None:
    library("onnx")
    (tmp_path / "a.onnx").write_bytes(content)
    with pytest.raises(ModelError, match=r"a\.onnx is (damaged|no ONNX)"):
        build_model(f"onnx:{tmp_path / 'a.onnx'}")
    with pytest.raises(ModelError, match="cannot be read"):
        build_model(f"onnx:{tmp_path / 'b.onnx'}")
    with pytest.raises(ModelError, match="not a regular file"):
        build_model(f"onnx:{tmp_path}")
    with pytest.raises(ModelError, match="takes no arguments"):
        build_model(f"onnx:{tmp_path / 'a.onnx'}?a=1")


def test_an_operation_that_cannot_be_rebuilt(tmp_path: Path) -> None:
    path, _ = exported(tmp_path)
    onnx = library("onnx")
    model = onnx.load(path)
    model.graph.node[1].op_type = "NonZero"
    model.graph.node[1].domain = "some.where"
    model.opset_import.append(onnx.helper.make_opsetid("some.where", 1))
    Path(path).write_bytes(model.SerializeToString())
    with pytest.raises(ModelError, match="onnx2torch cannot rebuild"):
        build_model(f"onnx:{path}")


# --- Whole runs --------------------------------------------------------------------------------


def run_and_return(spec: str, folder: Path, channels: int, side: int) -> Result:
    """Compress a network that brings its weights, and look at the result in every way."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 255, (24, channels, side, side)).astype(np.uint8)
    np.savez(folder / "images.npz", images=images, labels=np.arange(24) % 3)
    data, out = f"tensors:{folder / 'images.npz'}", str(folder / "out")
    given = ("--data", data, "--test", data)
    place = checkpoint_beside(spec)
    done = command("run", "--model", spec, *given, "--macs", "0.7", "--no-refit", "--output", out)
    assert done.exit_code == 0, done.stderr
    model = compress.load(out)
    assert isinstance(model, nn.Module)
    for words in (
        ("verify", out, "--checkpoint", place, "--test", data),
        ("evaluate", out, "--test", data),
        ("evaluate", place, "--model", spec, "--test", data),
        ("report", out, "--output", str(folder / "reported")),
        ("apply", str(folder / "out" / "plan.json"), "--checkpoint", place, *given, "--no-refit",
         "--output", str(folder / "applied")),
    ):  # fmt: skip
        result = command(*words)
        assert result.exit_code == 0, (words, result.stderr)
    return command("run", "--model", spec, *given, "--macs", "0.7", "--output", place, "--force")


def test_a_whole_run_on_an_onnx_file(tmp_path: Path) -> None:
    path, _ = exported(tmp_path)
    assert path in paragraph(run_and_return(f"onnx:{path}", tmp_path, 1, 8), 3)


def test_a_whole_run_on_a_folder_of_transformers(vit: tuple[Path, Any], tmp_path: Path) -> None:
    folder, _ = vit
    (folder / "preprocessor_config.json").unlink()
    assert str(folder) in paragraph(run_and_return(f"hf:{folder}", tmp_path, 3, 32), 3)


@pytest.mark.parametrize(
    ("raw", "sizes"),
    [
        ({"size": {"height": 32, "width": 48}}, ((32, 48), None)),
        ({"size": 40, "crop_size": 32, "do_center_crop": True}, (40, 32)),
        (
            {"size": {"shortest_edge": 36}, "crop_size": {"height": 30, "width": 40},
             "do_center_crop": True},
            (36, (30, 40)),
        ),
        ({"size": {"shortest_edge": 32}, "crop_pct": 0.5}, (64, 32)),
        (
            {"size": {"shortest_edge": 384}, "crop_pct": 0.875,
             "image_processor_type": "ConvNextImageProcessor"},
            ((384, 384), None),
        ),
        (
            {"size": {"shortest_edge": 224}, "crop_pct": 0.875,
             "feature_extractor_type": "ConvNextFeatureExtractor"},
            (256, 224),
        ),
        ({"size": {"height": 32, "width": "no"}}, (None, None)),
        ({"size": {"height": 32, "width": 48}, "do_resize": False}, (None, None)),
    ],
)  # fmt: skip
def test_sizes_of_transformers_processors(raw: dict[str, Any], sizes: Any) -> None:
    from compress.libraries.hf import _sides

    assert _sides(raw) == sizes


@pytest.mark.parametrize(("mode", "resize"), [("center", 36), ("squash", (36, 36))])
def test_pictures_of_timm_are_cut_or_squashed(mode: str, resize: Any) -> None:
    from compress.libraries.timm import _pictures

    data = {
        "input_size": (3, 32, 32), "mean": (0.5,) * 3, "std": (0.5,) * 3, "crop_pct": 0.875,
        "crop_mode": mode, "interpolation": "bicubic",
    }  # fmt: skip
    shape, found = _pictures(data, {})
    assert shape == (3, 32, 32)
    assert found is not None
    assert (found.resize, found.crop) == (resize, 32)
