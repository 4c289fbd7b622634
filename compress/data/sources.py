"""Opening a data spec: folders of pictures, torchvision's sets, users' Datasets and arrays."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from compress.data.arrays import array_source, open_idx, open_tensors
from compress.data.datasets import Arity, DatasetSource
from compress.data.images import ImageSet, OneByOne, Source
from compress.data.targets import UNLABELLED
from compress.data.walking import Walk, entries
from compress.errors import DataError, near_matches, printable
from compress.specs import call_factory, split_spec
from compress.untrusted import Unreadable, parse_json, read_text
from compress.vision import pictures
from compress.vision.preprocessing import Preprocessing
from compress.vision.torchvision import torchvision_dataset

# What a program may pass for images; see `as_images`.
Given = ImageSet | Dataset[Any] | DataLoader[Any] | Tensor | tuple[Any, Tensor]

DATA_FORMS = (
    "imagefolder:DIR, torchvision:CIFAR10?root=DIR&train=true, tensors:FILE.npz, "
    "idx:IMAGES.gz,LABELS.gz, package.module:factory or path/to/file.py:factory"
)
WHOLE_BYTES = 512 * 2**20  # folders beyond this are fingerprinted by size and both ends of files
_END_BYTES = 4096


def open_dataset(
    spec: str, preprocessing: Preprocessing, class_map: str = "", arity: Arity = Arity()
) -> ImageSet:
    """Open the images that a spec names.

    ``?start=`` and ``?stop=`` take a slice of imagefolder, torchvision, tensors and idx sets.

    Args:
        spec: One of `DATA_FORMS`.
        preprocessing: How images become inputs.
        class_map: A file with class names in the model's order, a JSON list or one name a line,
            where the set's own order differs.
        arity: How many inputs the network takes by position, of each item of a user's Dataset.

    Raises:
        DataError: The spec is malformed, or what it names is absent, empty or damaged.
    """
    head, arguments = split_spec(spec, DataError)
    kind, _, place = head.partition(":")
    source: Source
    bounds: dict[str, Any] = {}
    wanted = preprocessing.channels or len(preprocessing.mean) or None
    if kind in ("imagefolder", "tensors", "idx", "torchvision"):
        bounds = {k: arguments.pop(k) for k in ("start", "stop") if k in arguments}
        if arguments and kind != "torchvision":
            wrong = next(iter(arguments))
            raise DataError(
                f"{kind} sets take no argument {wrong!r}.{near_matches(wrong, ('start', 'stop'))} "
                "They take start and stop."
            )
    if kind == "imagefolder":
        source = open_folder(Path(place), wanted or 3)
    elif kind == "tensors":
        source = open_tensors(Path(place))
    elif kind == "idx":
        first, comma, second = place.partition(",")
        source = open_idx(Path(first), Path(second) if comma else None)
    elif kind == "torchvision":
        source = DatasetSource.of(torchvision_dataset(place, **arguments), spec, wanted)
    else:
        if ":" not in head:
            raise DataError(
                f"{spec!r} is not a data spec."
                f"{near_matches(head, ('imagefolder', 'torchvision', 'tensors', 'idx'))} "
                f"Write {DATA_FORMS}."
            )
        source = DatasetSource.of(
            call_factory(head, arguments, DataError, DATA_FORMS), spec, wanted, arity
        )
    names, order = source.classes, None
    # Pictures without labels, which calibration takes too, have no classes to put in order.
    unlabelled = isinstance(source, FolderSource) and not source.classes
    if class_map and not unlabelled:
        names, order = _mapped(source, Path(class_map))
    return ImageSet(source, preprocessing, _slice(source, bounds), names, order)


def _slice(source: Source, bounds: dict[str, Any]) -> Sequence[int]:
    for key, value in bounds.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            raise DataError(f"{key}={value} is not an index; write a whole number from 0.")
    chosen = range(len(source))[bounds.get("start", 0) : bounds.get("stop", len(source))]
    if not chosen:
        raise DataError(
            f"The slice {bounds} of {source.described} is empty; it has {len(source)} images."
        )
    return chosen


# --- Folders of pictures -----------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class FolderSource(OneByOne):
    """Picture files in one folder per class, or in one folder without classes.

    ``files`` are names as the file system has them, ``classes`` such as can be written anywhere.
    """

    root: Path
    files: tuple[str, ...]
    file_labels: tuple[int, ...]
    classes: tuple[str, ...]
    channels: int
    whole: bool
    transformed: bool = False

    @property
    def described(self) -> str:
        """The folder's path."""
        return f"the folder {printable(self.root)}"

    def __len__(self) -> int:
        return len(self.files)

    def image(self, index: int) -> Image.Image:
        """Read one picture as L or RGB."""
        return pictures.read_image(self.root / self.files[index], self.channels)

    def stack(self, indices: Sequence[int]) -> None:
        """Return None: files are read one by one."""
        del indices

    def label(self, index: int) -> int:
        """Return the number of the file's class folder."""
        return self.file_labels[index]

    def target(self, index: int) -> int:
        """Return the label."""
        return self.file_labels[index]

    def name(self, index: int) -> str:
        """Return the file's path in the folder, as it can be written anywhere."""
        return printable(self.files[index])

    def content(self, index: int) -> bytes:
        """Return the name, size and bytes, of a large folder's files both ends only."""
        path = self.root / self.files[index]
        try:
            with open(path, "rb") as file:
                size = os.fstat(file.fileno()).st_size
                if self.whole or size <= 2 * _END_BYTES:
                    data = file.read()
                else:
                    data = file.read(_END_BYTES)
                    file.seek(-_END_BYTES, os.SEEK_END)
                    data += file.read()
        except OSError as error:
            raise DataError(
                f"The image {printable(path)} cannot be read: {error.strerror}."
            ) from error
        # The name's own bytes, whether they are UTF-8 or not.
        return f"{self.files[index]}\0{size}\0".encode(errors="surrogateescape") + data


def open_folder(root: Path, channels: int) -> FolderSource:
    """List the pictures of a folder, sorted by class and name, hidden files left out.

    Class folders are numbered in alphabetical order, as torchvision does; an empty one keeps its
    number. A folder that holds pictures and no folders is a set without labels. Links are
    followed; see `compress.data.walking`.

    Raises:
        DataError: A folder is missing or unreadable, a link leads nowhere, or there are no
            pictures.
    """
    top = entries(root)
    walk = Walk(root)
    classes = [found for found in top if walk.is_class(found)]
    files: list[str] = []
    labels: list[int] = []
    size = 0
    for label, folder in enumerate(classes) if classes else ((UNLABELLED, None),):
        found = walk.pictures(folder)
        files.extend(name for name, _ in found)
        labels.extend([label] * len(found))
        size += sum(bytes_ for _, bytes_ in found)
    if not files:
        raise DataError(
            f"The image folder {printable(root)} holds no pictures, neither in folders by class "
            f"nor at its top; pictures end in {', '.join(pictures.IMAGE_SUFFIXES)}."
        )
    names = tuple(printable(folder.name) for folder in classes)
    return FolderSource(
        root, tuple(files), tuple(labels), names, channels, whole=size <= WHOLE_BYTES
    )


# --- Class order -------------------------------------------------------------------------------


def _mapped(source: Source, path: Path) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """Return the model's class names and the model's label by the source's label."""
    try:
        text = read_text(path)
    except (OSError, Unreadable) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise DataError(f"The class map {path} cannot be read: {reason}.") from error
    names: Any = [line.strip() for line in text.splitlines() if line.strip()]
    if text.lstrip().startswith(("[", "{")):
        try:
            names = parse_json(text)
        except Unreadable as error:
            raise DataError(f"The class map {path} is not valid JSON: {error}.") from error
    if not isinstance(names, list) or not names or not all(isinstance(n, str) for n in names):
        raise DataError(
            f"The class map {path} must be a JSON list of class names in the model's order, or "
            "text with one name a line."
        )
    twice, times = Counter(names).most_common(1)[0]
    if times > 1:
        raise DataError(f"The class map {path} names {twice!r} twice.")
    if not source.classes:
        raise DataError(f"{source.described} has no class names that {path} could put in order.")
    places = {name: k for k, name in enumerate(names)}
    for name in source.classes:
        if name not in places:
            raise DataError(
                f"The class {name!r} of {source.described} is not in the class map {path}."
                f"{near_matches(name, names)}"
            )
    return tuple(names), tuple(places[name] for name in source.classes)


def as_images(images: Given, arity: Arity = Arity()) -> ImageSet:
    """Return what a program passes as an image set: inputs as the network takes them.

    Args:
        images: An image set; inputs ``[N, C, H, W]``, alone or with labels ``[N]``; or a dataset
            of such inputs, or a ``DataLoader``.
        arity: How many inputs the network takes by position, of each item of a dataset.

    Raises:
        DataError: It holds no images, or labels that do not fit.
    """
    if isinstance(images, ImageSet):
        return images
    source: Source
    if isinstance(images, Tensor):
        source = array_source("the images", images, None)
    elif isinstance(images, tuple):
        source = array_source("the images", images[0], images[1])
    else:
        source = DatasetSource.of(images, "the dataset", None, arity)
    as_given = Preprocessing(from_preset=True)
    return ImageSet(source, as_given, range(len(source)), tuple(source.classes))
