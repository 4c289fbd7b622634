"""What a run needs at its end, tried on a few images before any work is done."""

from __future__ import annotations

import math
from contextlib import ExitStack
from dataclasses import replace

import torch
from torch import Tensor, nn

from compress.calibrate.collect import INSTEAD, NO_EFFECT
from compress.calibrate.fisher import Objective
from compress.config import RunConfig
from compress.data import ImageSet, Loader, check_labels
from compress.errors import CompressError, ConfigError, GradientError, ModelError
from compress.inputs.functions import Metric, loss_function, metric_function
from compress.inputs.load import Inputs
from compress.measure.accuracy import custom_value, require_labels, require_ranked
from compress.measure.by_task import ByTask, has_targets, require_targets
from compress.network.baseline import Network
from compress.rules.target_drop import TARGET_DROP
from compress.running.forward import (
    backward,
    changes_allowed,
    evaluation_mode,
    forward_hooks,
    frozen,
    gradients_begin,
    run_with_gradients,
)
from compress.running.structure import floating, tensors, with_gradients
from compress.tasks import TaskMeasure

# What to do where the accuracy of a search cannot be measured.
SEARCHED = (
    "--target-drop goes by it, whatever --metric-fn measures: name a --task, or give a budget such "
    "as --macs and hold the result to --max-drop."
)
# Images that a measure of the user's own is tried on, spread over the set.
TRIED = 32
# Images that the gradients of the outputs' own loss are tried on.
TRIED_FOR_GRADIENTS = 8


def try_out(network: Network, inputs: Inputs, loader: Loader, config: RunConfig) -> None:
    """Measure as the run will, on a few images.

    Raises:
        ConfigError: A limit is set on what only a test set tells, and there is none.
        ModelError: Accuracy cannot be measured, the user's own measure fails, or what a task is
            measured by is not installed or does not fit the outputs.
        DataError: Targets cannot be put into one batch, or are not those of the task; or the test
            set's labels do not fit the outputs.
    """
    for name, flag in (("max_drop", "--max-drop"), ("min_agreement", "--min-agreement")):
        if inputs.test is None and getattr(config, name) is not None:
            raise ConfigError(f"{flag} holds the result to a test set: pass one with --test.")
    metric = metric_function(config)
    if config.rule == TARGET_DROP.name and not isinstance(metric, TaskMeasure):
        require_ranked(network.reading, SEARCHED)
    if isinstance(metric, TaskMeasure):
        _try_task(ByTask(metric, loader, reading=network.reading), network, inputs, config)
    elif metric is not None:
        images = inputs.test if inputs.test is not None else inputs.split.fit
        _try_metric(metric, network.original, images, loader)
    elif inputs.test is not None or config.task:
        require_ranked(network.reading)
        if inputs.test is not None:
            require_labels(inputs.test)
            check_labels(inputs.test, network.reading.scores(network.result).shape[1])


def weighing(
    network: Network, inputs: Inputs, loader: Loader, config: RunConfig
) -> tuple[Network, RunConfig]:
    """Find out how gradients come; weigh errors plainly, with a warning, where none do.

    Raises:
        ModelError: The user's own loss fails.
        GradientError: It has no gradients.
    """
    if config.metric != "loss":
        return network, config
    own, images = bool(config.loss_fn), inputs.split.fit
    try:
        problem = _try_loss(network, images, loader, config)
    except (GradientError, ModelError):
        network = replace(network, in_place=True)
        try:
            problem = _try_loss(network, images, loader, config)
        except (GradientError, ModelError) as error:
            if own:
                raise
            # A forward that fails without gradients too does so again, and ends the run.
            problem = error.problem if isinstance(error, GradientError) else str(error)
            network = replace(network, in_place=False)
    if own or not problem:  # one's own may be without effect on a few images
        return network, config
    warning = f"{problem} Errors were weighed plainly instead, as with --metric mse."
    return replace(network, warnings=(*network.warnings, warning)), config.replace(metric="mse")


def _try_task(by_task: ByTask, network: Network, inputs: Inputs, config: RunConfig) -> None:
    task, searched = by_task.measure.task, inputs.split.validation
    by_task.measure.scorer(network.reading, ())  # before anything: is what it needs installed?
    if config.rule == TARGET_DROP.name and len(searched):
        require_targets(task, searched)
    known = has_targets(task, inputs.split.fit)
    images = inputs.split.fit if inputs.test is None and known else inputs.test
    if images is None:
        return
    few = _spread(images)
    try:
        by_task.scored(network.original, few, "try").values()
    except CompressError:
        if len(few) == len(images):
            raise
        # A measure may need more, such as an image with something to find.
        by_task.scored(network.original, images, "try").values()


def _spread(images: ImageSet) -> ImageSet:
    step = max(len(images) // TRIED, 1)
    return images.subset(range(0, len(images), step)[:TRIED])


def _try_metric(metric: Metric, model: nn.Module, images: ImageSet, loader: Loader) -> None:
    few = _spread(images)
    try:
        custom_value(metric, model, loader.batches(few))
    except CompressError:
        if len(few) == len(images):
            raise
        # A measure may need more, such as images of every class.
        custom_value(metric, model, loader.batches(images))


def _try_loss(network: Network, images: ImageSet, loader: Loader, config: RunConfig) -> str:
    """Take the gradients of the loss on a few images; say what is wrong with them, if anything."""
    model = network.model
    loss = loss_function(config, network.reading)
    # A loss of targets asks something of whole batches.
    whole = loss is not None or images.source.collates
    most = loader.batch_size if whole else TRIED_FOR_GRADIENTS
    few = images.subset(range(min(len(images), most)))
    batches = list(loader.placed(few)) * 2  # what stays of one may be in the way of the next
    objective = Objective(2 * len(few), config.seed, loss, network.reading)
    layers = [model.get_submodule(site.name) for site in network.sites if site.skip is None]
    sums: list[float] = []

    def watch(_: nn.Module, __: tuple[Tensor, ...], output: Tensor) -> None:
        if output.requires_grad:
            output.register_hook(lambda g: sums.append(float(g.double().abs().sum())))

    hooks = forward_hooks(dict.fromkeys(layers, watch))
    with evaluation_mode(model), frozen(model), hooks, torch.enable_grad(), ExitStack() as stack:
        for inputs, targets in batches:
            if len(floating(inputs)) < len(tensors(inputs)):
                stack.enter_context(gradients_begin(model))
            with changes_allowed(in_place=network.in_place):
                result = run_with_gradients(model, with_gradients(inputs))
                backward(objective(result, targets), INSTEAD)
    if not all(map(math.isfinite, sums)):
        return "The gradients of the loss are NaN or infinite."
    return "" if any(sums) or not layers else NO_EFFECT
