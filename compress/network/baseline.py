"""The dense baseline: the user's model made plain, with norms folded and layers found."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, fx, nn

from compress.errors import ModelError
from compress.linalg.schemes import LONGEST_PATCH, too_long
from compress.modules.attention import attention_names, reads_child_weights, unpack
from compress.network.baking import Baked, Baker, copied
from compress.network.channels import ChannelMap, read_channels
from compress.network.counting import macs_by_module
from compress.network.folding import FoldedPair, fold_batch_norms
from compress.network.recurrent import RecurrentLayer, recurrent_layers
from compress.network.sites import LayerSite, find_sites
from compress.network.standin import without_read_layers
from compress.network.tracing import ends_in_sigmoid, trace
from compress.network.trial_cuts import without_noticed
from compress.running.finite import check_finite
from compress.running.formats import formats_of
from compress.running.forward import evaluation_mode, require_parameters, run_model
from compress.running.modules import cast
from compress.running.outputs import Reading, listed_by_image, read_outputs
from compress.running.structure import count, expanded, floating, like_weights, main_tensor
from compress.tasks import TASKS, read_for


@dataclass(frozen=True)
class Network:
    """A network ready to be compressed.

    Attributes:
        original: The model as given, in float32 and eval mode; never changed.
        model: Its copy with weights and layers made plain, attention unpacked and norms folded:
            the dense baseline.
        graph: The baseline's graph, or None where it cannot be traced.
        sites: The baseline's layers, in order of execution.
        folded: Which norms went into which layers.
        unpacked: Names of the attention modules that were rebuilt of linear layers.
        baked: What computed its weights, or padded, in its own way, and was made plain.
        example: One image's inputs ``[1, ...]``: a tensor, or a structure of several.
        result: What the baseline's forward returns for it.
        reading: What the outputs stand for.
        memory_formats: Those that its forward takes: ``"contiguous"`` always, and
            ``"channels_last"`` unless a ``view`` or the like stands in the way.
        warnings: What the user should know.
        macs: Of the whole baseline, per image.
        elsewhere: MACs of what is none of the layers, by module.
        recurrent: Its recurrent layers, which are kept.
        in_place: Whether its forward changes values in place that gradients need, as found out by
            taking some.
    """

    original: nn.Module
    model: nn.Module
    graph: fx.Graph | None
    sites: tuple[LayerSite, ...]
    folded: tuple[FoldedPair, ...]
    unpacked: tuple[str, ...]
    baked: Baked
    example: Any
    result: Any
    reading: Reading
    memory_formats: tuple[str, ...]
    warnings: tuple[str, ...]
    macs: int = 0
    elsewhere: Mapping[str, int] = field(default_factory=dict)
    recurrent: tuple[RecurrentLayer, ...] = ()
    in_place: bool = False

    @cached_property
    def channels(self) -> ChannelMap:
        """Its channels, as far as they can be taken out."""
        found = read_channels(self.model, self.graph, self.sites, self.example)
        return without_noticed(self.model, self.graph, self.sites, found, self.example)

    @property
    def params(self) -> int:
        """Parameters of the whole baseline."""
        return sum(p.numel() for p in self.model.parameters())

    @property
    def device(self) -> torch.device:
        """Where the network is."""
        return main_tensor(self.example).device

    @property
    def memory_format(self) -> str:
        """What the baseline is calibrated in: on a CPU channels_last is a third faster."""
        last = self.device.type == "cpu" and "channels_last" in self.memory_formats
        return "channels_last" if last else "contiguous"

    @property
    def refit_path(self) -> str:
        """What a refit goes along: the ``"graph"``, or without one the ``"modules"``."""
        return "modules" if self.graph is None else "graph"

    def site(self, name: str) -> LayerSite:
        """The site of a name."""
        return next(s for s in self.sites if s.name == name)


@dataclass(frozen=True)
class Evidence:
    """What is known of a network beyond its example.

    Attributes:
        targets: What a data set says of some images.
        batch: Returns inputs of these images; asked only where several outputs have to be told
            apart.
        sizes: Inputs of one image each, of other sizes than the example's, that it also takes.
        task: The task that the user names, which says what the outputs are; empty for none.
    """

    targets: Sequence[Any] = ()
    batch: Callable[[], Any] | None = None
    sizes: Sequence[Any] = ()
    task: str = ""


def prepare(model: nn.Module, example: Any, evidence: Evidence = Evidence()) -> Network:
    """Make the dense baseline of a model.

    Args:
        model: The user's model; it is left as it was.
        example: One image's inputs with the batch axis.
        evidence: What else is known, on the example's device.

    Raises:
        ModelError: The model cannot be copied, does not run on the example, or gives NaN.
    """
    require_parameters(model)
    original = copied_model(model).float().eval()
    before = _output(original, example)
    check_finite(
        original, example, before, "on the first image, before anything was changed",
        "check the checkpoint and the normalisation (--mean, --std)",
    )  # fmt: skip
    warnings = []
    baker = Baker(example, before, original)
    baseline, baked, unpacked = _made_plain(original, baker)
    graph = trace(baseline, example, evidence.sizes)
    if graph is None:
        warnings.append(
            "The model's forward cannot be traced, so only norms that directly follow a layer in "
            "an nn.Sequential were folded, and a refit goes layer by layer only, not jointly."
        )
    with torch.no_grad():
        pairs = fold_batch_norms(baseline, graph)
    if not baker.gives(baseline):
        # Folding is exact where the graph is right; a forward that bypasses its modules is not.
        baseline, baked, unpacked = copied(original), Baked(), ()
        pairs, graph = (), None
        warnings.append(
            "Folding the norms changed the outputs, so they were left in place, and a refit goes "
            "layer by layer only, not jointly."
        )
    if pairs:
        graph = trace(baseline, example, evidence.sizes)
    if baked.fixed:
        warnings.append(_fixed_padding(baked.fixed, example))
    sites = find_sites(baseline, example, keep=_Kept(baseline, baked))
    sites = without_read_layers(baseline, sites, example)
    long = [s.name for s in sites if s.skip is None and too_long(s.geometry) is not None]
    if long:
        warnings.append(
            f"Patches of more than {LONGEST_PATCH:,} numbers take only the output scheme "
            f"({', '.join(long[:5])}{', ...' if len(long) > 5 else ''})."
        )
    formats = formats_of(baseline, example)
    sigmoid = graph is not None and ends_in_sigmoid(baseline, graph)
    reading = _read(original, (example, before), evidence, sigmoid=sigmoid)
    if reading.kind == "answers" and reading.ranked:
        warnings.append(
            "The network ends in a sigmoid, so its outputs are several yes-or-no answers: accuracy "
            "takes the largest of them. Pass --metric-fn and --loss-fn for what they stand for."
        )
    by_module = macs_by_module(baseline, example)
    layers = {alias for site in sites for alias in site.aliases}
    return Network(
        original, baseline, graph, sites, pairs, unpacked, baked, example, before, reading, formats,
        tuple(warnings),
        macs=sum(by_module.values()),
        elsewhere={name: macs for name, macs in by_module.items() if name not in layers},
        recurrent=recurrent_layers(baseline, example, by_module),
    )  # fmt: skip


def _read(
    original: nn.Module, first: tuple[Any, Any], evidence: Evidence, *, sigmoid: bool
) -> Reading:
    """Decide what the outputs stand for, by the images that the targets belong to."""
    example, alone = first
    result, one = alone, floating(alone)
    beside, listed = frozenset[str](), False
    asked = evidence.batch if len(one) > 1 or evidence.task in TASKS else None
    # A network that takes one image at a time has shown what it gives for one.
    with contextlib.suppress(ModelError):
        several = expanded(example, 2) if asked is None else asked()
        found = _output(original, several)
        beside = _beside_images(one, floating(found), count(several))
        listed = listed_by_image(alone, found, count(several))
        result = result if asked is None else found
    if evidence.task in TASKS:
        return read_for(TASKS[evidence.task], result, evidence.targets, sigmoid=sigmoid)
    if listed:
        return Reading((), "all of the result, as it lists what was found in each image", False)
    return read_outputs(result, evidence.targets, sigmoid=sigmoid, beside=beside)


def _beside_images(
    one: Mapping[str, Tensor], several: Mapping[str, Tensor], images: int
) -> frozenset[str]:
    """Paths of outputs whose first axis is not that of images, as of a recurrent layer's states."""
    lengths = {path: (_length(t), _length(one.get(path))) for path, t in several.items()}
    return frozenset(path for path, found in lengths.items() if found != (images, 1))


def _length(output: Tensor | None) -> int:
    return 0 if output is None or output.dim() == 0 else len(output)


def _made_plain(original: nn.Module, baker: Baker) -> tuple[nn.Module, Baked, tuple[str, ...]]:
    """Return a copy with weights and layers made plain and attention unpacked, and what was."""
    baseline, weights = baker.weights(copied(original))
    unpacked = attention_names(baseline)
    baseline = unpack(baseline, unpacked)
    baseline, baked = baker.layers(baseline)
    return baseline, replace(baked, weights=weights), unpacked


def _fixed_padding(names: tuple[str, ...], example: Any) -> str:
    size = "x".join(map(str, main_tensor(example).shape[2:]))
    return (
        f"The padding of {', '.join(names[:5])}{', ...' if len(names) > 5 else ''} depends on the "
        f"size of the images and was fixed for {size}: give the result images of that size."
    )


def check_runs_in(model: nn.Module, example: Any, dtype: torch.dtype) -> None:
    """Check that a model runs in the type that its checkpoint has and its result will have.

    Raises:
        ModelError: Its forward fails in that type, or overflows.
    """
    if dtype == torch.float32:
        return
    name = str(dtype).removeprefix("torch.")
    remedy = "convert the checkpoint to float32"
    converted = cast(copied(model), dtype)
    given = like_weights(example, next(converted.parameters()))
    try:
        output = _output(converted, given)
    except ModelError as error:
        raise ModelError(
            f"The checkpoint is {name} and its result would be too, but the model does not run in "
            f"that type ({error.__cause__}); {remedy}, or let the forward make its own tensors in "
            "the type of its input."
        ) from error
    check_finite(converted, given, output, f"in {name}, the checkpoint's type", remedy)


def copied_model(model: nn.Module) -> nn.Module:
    """Return a copy of the user's model.

    Raises:
        ModelError: It cannot be copied.
    """
    modules = model.named_modules()
    scripted = [name or "all" for name, m in modules if isinstance(m, torch.jit.ScriptModule)]
    if scripted:
        raise ModelError(
            f"The model holds TorchScript modules ({', '.join(scripted[:5])}), whose layers cannot "
            "be looked at; pass it as it was before torch.jit.script or torch.jit.trace."
        )
    try:
        return copied(model)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # what a module holds may refuse to be copied in any way
        raise ModelError(
            f"The model cannot be copied ({type(error).__name__}: {' '.join(str(error).split())}); "
            "let it hold no open files, locks, or activations of an earlier forward."
        ) from error


def _output(model: nn.Module, example: Any) -> Any:
    # Entered anew each time: a forward that draws random numbers draws the same ones.
    with torch.no_grad(), evaluation_mode(model):
        return run_model(model, example)


class _Kept:
    """Reasons to keep layers whose parent reads their weight without calling them."""

    def __init__(self, model: nn.Module, baked: Baked) -> None:
        self.reasons = dict(baked.reasons)
        for name, parent in model.named_modules():
            for child in reads_child_weights(parent):
                self.reasons[parent.get_submodule(child)] = (
                    f"its parent {name or type(parent).__name__} reads its weight directly"
                )

    def __call__(self, module: nn.Module) -> str | None:
        return self.reasons.get(module)
