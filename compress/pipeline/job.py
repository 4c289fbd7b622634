"""What one run works on, put together once."""

from __future__ import annotations

import dataclasses
import itertools
import os
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from compress.calibrate.collect import calibrate
from compress.calibrate.file import CalibrationKey, read_calibration, write_calibration
from compress.calibrate.recipe import Recipe
from compress.calibrate.removal import readers_of
from compress.calibrate.statistics import Calibration, Source, misfits
from compress.config import RunConfig
from compress.data import ImageSet, Loader
from compress.data.held import ReadOnce, hold, hold_split
from compress.data.varied import VariedImages
from compress.errors import CalibrationError
from compress.files import check_file
from compress.fit.layers import Fitter
from compress.inputs.checkpoint.reading import listed
from compress.inputs.functions import loss_function, metric_function
from compress.inputs.load import Inputs, batch_size_for
from compress.measure.accuracy import Yardstick
from compress.network.baseline import Network, copied_model, prepare
from compress.pipeline.evidence import evidence_of
from compress.pipeline.trials import try_out, weighing
from compress.pipeline.variation import varied
from compress.plan import NARROWER
from compress.progress import Track, silent
from compress.result import SplitRecord
from compress.running.structure import placed


def _on_device(model: nn.Module, device: str) -> nn.Module:
    """The model where it is to run: a copy if it is elsewhere, as that is its owner's."""
    wanted = torch.empty(0, device=device).device
    tensors = itertools.chain(model.parameters(), model.buffers())
    return model if all(t.device == wanted for t in tensors) else copied_model(model).to(device)


@dataclass(frozen=True)
class Job:
    """A network to compress, its images, and how.

    Attributes:
        inputs: The trained network and its images.
        config: Rules, overrides, limits.
        network: The dense baseline.
        loader: How images reach it.
        track: Progress.
        varied: The images to fit on with changed copies of them; None where there are no copies.
        further: Batches that a refit may learn from too; None if there are none.
    """

    inputs: Inputs
    config: RunConfig
    network: Network
    loader: Loader
    track: Track = silent
    varied: VariedImages | None = None
    further: ReadOnce | None = None

    @classmethod
    def open(cls, inputs: Inputs, config: RunConfig, track: Track = silent) -> Job:
        """Prepare a network.

        Raises:
            ModelError: The network cannot be copied, does not run on the example, or gives NaN; or
                what the test set or the user's own loss and measure need is not there.
        """
        example = placed(inputs.example, config.device)
        sets = [s for s in (inputs.split.fit, inputs.test) if s is not None]
        evidence = evidence_of(sets, example, config)
        network = prepare(_on_device(inputs.model, config.device), example, evidence)
        loader = Loader(
            batch_size_for(config, example), config.workers, network.device, network.memory_format
        )
        try_out(network, inputs, loader, config)
        job = cls(inputs, config, network, loader, track)
        return job._weighed() if job._asks_for_targets else job

    @property
    def _asks_for_targets(self) -> bool:
        """Whether the loss may fail at the targets, which is to be known before images are read."""
        return loss_function(self.config, self.network.reading) is not None

    def _weighed(self) -> Job:
        """Return the job with errors weighed as far as gradients tell what they cost.

        Raises:
            ModelError: The user's own loss fails.
            GradientError: It has no gradients.
        """
        network, config = weighing(self.network, self.inputs, self.loader, self.config)
        return dataclasses.replace(self, network=network, config=config)

    def with_images(self) -> Job:
        """Return the job with its images decoded and held, as far as memory is set aside for them.

        Where there are few, they are varied; see `compress.pipeline.variation`.

        Raises:
            DataError: An image cannot be read, or two differ in shape.
        """
        split = hold_split(self.inputs.split, self.loader, self.track)
        test = self.inputs.test and hold(self.inputs.test, self.loader, self.track)
        more = ReadOnce(self.loader.batches(split.further)) if split.further else None
        job = dataclasses.replace(
            self, inputs=dataclasses.replace(self.inputs, split=split, test=test), further=more
        )
        if job._asks_for_targets:  # which changed pictures do not have
            return job
        job = job._weighed()
        if not self.config.augment:
            return job
        found = varied(split.fit, job.network, self.loader, self.config.seed)
        return dataclasses.replace(job, varied=found)

    @property
    def learned_from(self) -> ImageSet:
        """What statistics are taken from, and layers fitted to."""
        return self.inputs.split.fit if self.varied is None else self.varied

    @property
    def unread(self) -> tuple[str, ...]:
        """A warning where the further images ended before one that cannot be read."""
        if self.further is None or not self.further.unread:
            return ()
        return (
            "Of further images, the joint refit learned only from those before one that it could "
            f"not use: {self.further.unread}",
        )

    def split_record(self) -> SplitRecord:
        """Which images served for what, as the report keeps it."""
        record = self.inputs.split_record()
        if self.varied is None:
            return record
        return dataclasses.replace(record, augmentation=self.varied.kind, copies=self.varied.copies)

    def recipe(self, schemes: tuple[str, ...]) -> Recipe:
        """Which statistics the configuration asks for, with some schemes in play."""
        config = self.config
        return Recipe(
            schemes=schemes,
            weigh=config.metric == "loss",
            pool=config.pools,
            loss=loss_function(config, self.network.reading),
            samples_per_dimension=config.samples_per_dimension,
            seed=config.seed,
            reading=self.network.reading,
            readers=readers_of(self.network) if set(schemes) & set(NARROWER) else frozenset(),
            in_place=self.network.in_place,
        )

    @property
    def yardstick(self) -> Yardstick:
        """What networks are compared by."""
        return Yardstick(
            self.loader, metric_function(self.config), self.track, self.network.reading
        )

    @property
    def fitter(self) -> Fitter:
        """What plans are carried out with."""
        recipe = self.recipe(self.config.schemes_in_play)
        config = self.config
        split = dataclasses.replace(self.inputs.split, fit=self.learned_from)
        return Fitter(
            self.network, split, self.loader, recipe, config.refit, self.track, self.further or ()
        )

    def calibrate(self, schemes: tuple[str, ...]) -> Calibration:
        """Statistics of the fit images that some schemes need: from the file, or measured.

        Raises:
            CalibrationError: The file is damaged, or made from something else.
            ArtefactError: The file cannot be written.
        """
        path = Path(self.config.calibration) if self.config.calibration else None
        fit, key = self.learned_from, self.calibration_key(schemes)
        if path is not None and os.path.exists(path):
            return self._fitting(read_calibration(path, key)).to(self.network.device)
        if path is not None:
            check_file(path, "calibration")
        calibration = self._measured(fit, schemes)
        if path is not None:
            write_calibration(path, calibration, key)
        return calibration

    def _fitting(self, calibration: Calibration) -> Calibration:
        wrong = misfits(self.network, calibration)
        if wrong:
            raise CalibrationError(
                f"The calibration {self.config.calibration} lacks statistics that fit the layers "
                f"{listed(wrong)}; delete it to calibrate anew."
            )
        return calibration

    def _measured(self, fit: ImageSet, schemes: tuple[str, ...]) -> Calibration:
        network, loaded = self.network, self.loader.batches(fit)
        source = Source(len(fit), fit.fingerprint, self.inputs.sha256, network.memory_format)
        tracked = self.track(loaded, "calibrate", len(loaded))
        return calibrate(network.model, network.sites, tracked, source, self.recipe(schemes))

    def calibration_key(self, schemes: tuple[str, ...]) -> CalibrationKey:
        """What statistics for some schemes depend on, by which a file of them is recognised."""
        config = self.config
        statistics = (*schemes, "pooled") if config.pools else schemes
        return CalibrationKey(
            self.inputs.sha256,
            self.learned_from.fingerprint,
            {
                "metric": config.metric,
                "seed": config.seed,
                "samples_per_dimension": config.samples_per_dimension,
                "statistics": sorted(statistics),
                "loss_fn": config.loss_fn,
                "outputs": self.network.reading.kind,
                **({"task": config.task} if config.task else {}),
            },
        )
