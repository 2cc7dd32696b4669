"""Data sets of fine-grained classes: one sample type for all of them, and what a run's settings make of it.

`read_catalogue` lists a data set (file, label, object box), `Pictures` loads what is listed and draws how training is
to change it, `collate` makes a batch; `load_catalogue`, `choose_split` and the loaders do what settings ask for.

To add a data set, write its reader, `utils/data/readers/<name>.py`, and give it a row in config.py's table of data
sets. The tools are in `utils/data/`: catalogues, lists, decoding, samplers, augmentation, cache.

Boxes are (x0, y0, x1, y1) continuous edges in pixels: a box as wide as a picture of 500 pixels is (0, ..., 500, ...).
Everything that is wrong with the data on disk is a `DataError` of one sentence.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

from utils.data.augmentation import Augmentation, whole_if_lost
from utils.data.auto_augment import carried, draw_operations, transformed
from utils.data.catalogue import CHOICES, Catalogue, Entry, Source, leave_out, note_on_small_classes, split_validation
from utils.data.checking import find_bad_pictures
from utils.data.cropping import central_offset, cut_box, cut_square, draw_offset, with_corners
from utils.data.decoding import limit_memory
from utils.data.errors import DataError
from utils.data.evaluated import Labelled
from utils.data.pixels import load_pixels
from utils.data.readers import read_catalogue, read_labelled
from utils.data.samplers import BalancedSampler, ShuffledSampler
from utils.data.settings import DataSettings
from utils.data.workers import start_loader
from utils.errors import UserError

# ---------------------------------------------------------------------------------------------------------------------
# From a file to a sample
# ---------------------------------------------------------------------------------------------------------------------


class Sample(NamedTuple):
    """One picture, ready for a batch. Normalisation and `augmentation` are left to the device, see utils/data/.

    image: [3, S, S] uint8, its values pixel by pixel in memory.
    box: [4] float32, the object's edges (x0, y0, x1, y1) in pixels of the image after augmentation (without area where
        the drawn part leaves the object out), or None.
    path: the file; for the demo set the number of the drawn picture.
    augmentation: [16] float32 as `Augmentation.draw` gives it, or None.
    found_box: [4] float32, like `box`, where the network has found the object; the whole image where augmentation
        leaves next to nothing of it. None where it was not asked.
    """

    image: Tensor
    label: int
    box: Tensor | None
    path: str
    augmentation: Tensor | None = None
    found_box: Tensor | None = None


class Batch(NamedTuple):
    """B samples: images [B, 3, S, S] uint8, labels [B] int64, boxes [B, 4] float32, paths.

    boxes: NaN where an image has none; None where none of them has one.
    augmentation: [B, 16] float32, what is still to be done to the images (the boxes are those after it), or None.
    found_boxes: [B, 4] float32, those that the network has found, or None.
    """

    images: Tensor
    labels: Tensor
    boxes: Tensor | None
    paths: list[str]
    augmentation: Tensor | None = None
    found_boxes: Tensor | None = None

    def __reduce__(self) -> tuple:
        """Leave only the images to the memory that processes share: there, a tensor that is kept keeps a file open."""
        return _unpickled, (self.images, *(v.numpy() if isinstance(v, Tensor) else v for v in self[1:]))


def _unpickled(images: Tensor, *values: object) -> Batch:
    return Batch(images, *(torch.from_numpy(v) if isinstance(v, np.ndarray) else v for v in values))


UNKNOWN = torch.full((4,), torch.nan)  # the box of an image that has none among others that have


class Pictures(Dataset[Sample]):
    """Pictures resized to resize_size x resize_size (aspect ignored, as published), or their shorter sides to it, of
    which the central square of image_size is taken; with `augment` a random one, and what else is drawn to augment it.

    A key is an index, or a pair (index, seed) of `ShuffledSampler`. The seed decides all that is random about the
    sample (a plain index is its own seed), so nothing depends on the worker or on the global generators.

    cache: source -> (image, box) as `load_pixels` gives them, for all entries; None: files are read each time.
    found_boxes: [n, 4] float32, where the network has found the object of each entry: edges in pixels of the image as
        it is seen; with `augment` of the whole picture, resized to resize_size x resize_size. None: not asked.
    corners: the image is [3, 5 * S, S]: the central square, below it those in the corners of the resized picture.
    """

    def __init__(
        self,
        entries: Sequence[Entry],
        *,
        image_size: int,
        resize_size: int | None = None,
        keep_aspect_ratio: bool = False,
        augment: Augmentation | None = None,
        cache: Mapping[Path | int, tuple[Tensor, Tensor | None]] | None = None,
        found_boxes: Tensor | None = None,
        corners: bool = False,
    ) -> None:
        self.entries = list(entries)
        self.image_size = image_size
        self.resizing = (resize_size or image_size, keep_aspect_ratio)
        self.augment = augment
        self.cache = cache
        self.found_boxes = found_boxes
        self.corners = corners

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, key: int | tuple[int, int]) -> Sample:
        index, seed = key if isinstance(key, tuple) else (key, key)
        entry = self.entries[index]
        image, box = load_pixels(entry, *self.resizing) if self.cache is None else self.cache[entry.source]
        size, sides = self.image_size, image.shape[-2:]
        path = f"demo/{entry.source:04d}" if isinstance(entry.source, int) else str(entry.source)
        found = None if self.found_boxes is None else self.found_boxes[index]
        if self.augment is None:
            if self.corners:
                _, box = cut_square(image, box, central_offset(*sides, size), size)
                return Sample(with_corners(image, size), entry.label, box, path, found_box=found)
            image, box = cut_square(image, box, central_offset(*sides, size), size)
            return Sample(image, entry.label, box, path, found_box=found)
        generator = np.random.default_rng(seed)
        augmentation = self.augment.draw(generator)
        offset = draw_offset(*sides, size, self.augment.padding, generator)
        image, box = cut_square(image, box, offset, size)
        operations = draw_operations(self.augment.auto_augment, generator)
        image = transformed(image, operations)
        if box is not None:
            box = self.augment.carry(carried(box, operations, size), augmentation, size)
        if found is not None:
            scales = torch.tensor([sides[1], sides[0]] * 2) / self.resizing[0]
            found = carried(cut_box(found * scales, offset, size), operations, size)
            found = whole_if_lost(self.augment.carry(found, augmentation, size), size)
        return Sample(image, entry.label, box, path, augmentation, found)


def collate(samples: Sequence[Sample]) -> Batch:
    """Stack samples into a batch; augmentation and found boxes are None unless every sample has them."""
    images, labels, boxes, paths, augmentations, found = zip(*samples, strict=True)
    # In a worker, PyTorch's own function stacks straight into the memory that the batch is handed over in. It is
    # three times as fast where pixels stay in the order in which they are.
    images = default_collate([image.permute(1, 2, 0) for image in images]).permute(0, 3, 1, 2)
    return Batch(
        images=images,
        labels=torch.tensor(labels),
        boxes=None if all(box is None for box in boxes) else torch.stack([UNKNOWN if b is None else b for b in boxes]),
        paths=list(paths),
        augmentation=None if any(values is None for values in augmentations) else torch.stack(augmentations),
        found_boxes=None if any(box is None for box in found) else torch.stack(found),
    )


# ---------------------------------------------------------------------------------------------------------------------
# What a run's settings make of it
# ---------------------------------------------------------------------------------------------------------------------


def load_catalogue(settings: DataSettings, *, parts: Collection[str] | None = None) -> tuple[Catalogue, dict[str, str]]:
    """Return the data set without the unreadable pictures, and those with the reason; without leave to skip, refuse.

    Only pictures of these `parts` (training, validation, test) are looked at; None: all.
    """
    catalogue = read_catalogue(
        settings.dataset, settings.data_root, classes=settings.classes, **_reading_choices(settings)
    )
    looked_at = [entries for part, entries in catalogue.parts.items() if parts is None or part in parts]
    bad = _unreadable(settings, [entry for entries in looked_at for entry in entries])
    return (leave_out(catalogue, bad) if bad else catalogue), bad


def load_labelled(settings: DataSettings) -> Labelled:
    """Return every labelled picture where the settings' data lie, whatever its part: those of other data than a run's.

    They are read as the run's own, or else as a folder of pictures for each class.
    """
    choices = _reading_choices(settings)
    try:
        own_kind = settings.dataset if settings.dataset != "demo" else "folder"
        catalogue = read_labelled(Source(own_kind, settings.data_root, **choices))
    except DataError:
        if settings.dataset in ("demo", "folder"):
            raise
        catalogue = read_labelled(Source("folder", settings.data_root, **choices))
    bad = _unreadable(settings, catalogue.entries)
    return Labelled([entry for entry in catalogue.entries if str(entry.source) not in bad], catalogue.class_names)


def _reading_choices(settings: DataSettings) -> dict[str, object]:
    return {name: getattr(settings, name) for name in CHOICES}


def _unreadable(settings: DataSettings, entries: Sequence[Entry]) -> dict[str, str]:
    """Return the unreadable pictures with the reason. Raises DataError where they may not be skipped."""
    limit_memory(settings.picture_memory)
    skip = settings.on_bad_image == "skip"
    bad = find_bad_pictures(entries, thorough=skip, at_least=2 * settings.resize_size)
    if bad and not skip:
        path, reason = next(iter(bad.items()))
        raise DataError(
            f"{len(bad)} of {len(entries)} pictures cannot be read, the first is {path} "
            f"({reason}): repair them, or set on_bad_image to skip"
        )
    return bad


def choose_split(settings: DataSettings, catalogue: Catalogue) -> tuple[list[Entry], list[Entry], str]:
    """Return the training images, those that choose the best epoch, and the latter in words."""
    given = catalogue.validation
    if settings.select_on == "test":
        words = f"the {len(catalogue.test)} TEST images: test figures are optimistic"
        return [*catalogue.train, *(given or [])], catalogue.test, words
    if given is not None:
        return catalogue.train, given, f"{len(given)} validation images (the data's own validation part)"
    train, validation = split_validation(catalogue.train, settings.validation, settings.seed)
    if not validation:
        raise DataError("no class has an image to spare for validation: raise validation, or set select_on to test")
    share = f"{settings.validation:.0%} of the training images, by class, seed {settings.seed}"
    share += note_on_small_classes(train, validation, settings.validation)
    return train, validation, f"{len(validation)} validation images ({share})"


def training_loader(
    settings: DataSettings, entries: list[Entry], *, rank: int = 0, world_size: int = 1
) -> DataLoader[Batch]:
    """Batches of augmented pictures for process `rank` of `world_size`, which share `batch_size`; the sampler's
    `set_epoch` decides which. Raises UserError where they cannot share it equally.
    """
    processes = {"seed": settings.seed, "rank": rank, "world_size": world_size}
    if settings.batch_size % (world_size * max(settings.images_per_class, 1)):
        per_class = f" in groups of images_per_class {settings.images_per_class}" if settings.images_per_class else ""
        raise UserError(
            f"batch_size {settings.batch_size} cannot be shared equally by {world_size} processes{per_class}"
        )
    batch_size = settings.batch_size // world_size
    if settings.images_per_class:
        labels = [entry.label for entry in entries]
        groups = {"batch_size": settings.batch_size, "images_per_class": settings.images_per_class}
        sampler = BalancedSampler(labels, **groups, **processes)
    else:
        sampler = ShuffledSampler(len(entries), **processes)
    drawn = {name: getattr(settings, name) for name in Augmentation._fields}
    return DataLoader(
        Pictures(entries, **loading_of(settings), augment=Augmentation(**drawn)),
        batch_size=batch_size,
        sampler=sampler,
        drop_last=len(sampler) > batch_size,  # a last batch of a few images has poor batch-norm statistics
        collate_fn=collate,
        **_process_options(settings),
        generator=torch.Generator(),  # the loader's own, so that it draws nothing from the network's
    )


def note_on_left_out(loader: DataLoader, images: int, *, world_size: int = 1) -> str | None:
    """Return what to say where a tenth or more of so many training images fills no batch of an epoch."""
    batch_size = loader.batch_size * world_size
    left_out = images - len(loader) * batch_size
    if not loader.drop_last or isinstance(loader.sampler, BalancedSampler) or left_out < images / 10:
        return None
    return (
        f"{left_out} of {images} training images are left out of each epoch, others every time, as they fill no batch "
        f"of {batch_size}: another batch_size may leave out fewer"
    )


def evaluation_loader(settings: DataSettings, entries: list[Entry], *, corners: bool = False) -> DataLoader[Batch]:
    """Batches of the pictures as they are listed, not augmented; see `Pictures` for `corners`."""
    return DataLoader(
        Pictures(entries, **loading_of(settings), corners=corners),
        batch_size=settings.evaluation_batch_size,
        collate_fn=collate,
        **_process_options(settings),
        generator=torch.Generator(),
    )


def load_batch(entries: Sequence[Entry], settings: DataSettings, *, corners: bool = False) -> Batch:
    """Load pictures as one batch, not augmented; see `Pictures` for `corners`."""
    pictures = Pictures(entries, **loading_of(settings), corners=corners)
    return collate([pictures[index] for index in range(len(entries))])


def loading_of(settings: DataSettings) -> dict[str, int | bool]:
    """Return how `Pictures` are loaded, whatever they are loaded for."""
    return {name: getattr(settings, name) for name in ("image_size", "resize_size", "keep_aspect_ratio")}


def comes_with_corners(settings: DataSettings, views: Sequence[str] | None) -> bool:
    """Whether views of a picture need its corners: the five crops, where more is loaded than is seen."""
    return "five_crops" in (views or ()) and settings.resize_size > settings.image_size


def _process_options(settings: DataSettings) -> dict[str, object]:
    """Return how a loader shares its work among processes, which stay between epochs, and where it leaves batches."""
    # page-locked memory touches a GPU, which shall be none but the one that computes
    pinned = {"pin_memory": torch.cuda.is_available() and settings.device.startswith(("auto", "cuda"))}
    if settings.workers == 0:
        return pinned
    return {
        **pinned,
        "num_workers": settings.workers,
        "prefetch_factor": settings.prefetch,
        "persistent_workers": True,
        "worker_init_fn": partial(start_loader, picture_memory=settings.picture_memory),
    }
