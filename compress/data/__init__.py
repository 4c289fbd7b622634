"""From a data spec to images: reading, checking, splitting and batching them."""

from compress.data.datasets import Arity
from compress.data.images import ImageSet, Source, check_channels, check_labels
from compress.data.loading import (
    Batches,
    Loader,
    Split,
    batches,
    draw,
    first_inputs,
    in_whole_batches,
    split,
)
from compress.data.sources import DATA_FORMS, Given, as_images, open_dataset
from compress.vision.preprocessing import Preprocessing

__all__ = [
    "DATA_FORMS",
    "Arity",
    "Batches",
    "Given",
    "ImageSet",
    "Loader",
    "Preprocessing",
    "Source",
    "Split",
    "as_images",
    "batches",
    "check_channels",
    "check_labels",
    "draw",
    "first_inputs",
    "in_whole_batches",
    "open_dataset",
    "split",
]
