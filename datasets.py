"""Data sets of fine-grained classes: one sample type for all of them, one small reader for each.

`read_catalogue` lists a data set (file, label, object box), `Pictures` loads what is listed and draws how training is
to change it, `collate` makes a batch; `load_catalogue`, `choose_split` and the loaders do what settings ask for.

To add a data set, write its reader, from a folder to a `Catalogue`, name it in `READERS`, and give it a row in
config.py's table of data sets. The tools are in `utils/data/`: lists, decoding, samplers, augmentation, cache.

Boxes are (x0, y0, x1, y1) continuous edges in pixels: a box as wide as a picture of 500 pixels is (0, ..., 500, ...).
Everything that is wrong with the data on disk is a `DataError` of one sentence.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping, Sequence
from fnmatch import fnmatchcase
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
import PIL
import torch
import torchvision
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

from utils.data import demo_birds
from utils.data.augmentation import Augmentation
from utils.data.checking import find_bad_pictures
from utils.data.decoding import Box
from utils.data.errors import DataError, describe
from utils.data.folders import check_root, find_missing, find_pictures, find_root
from utils.data.picture_cache import PictureCache, cache_in_memory, cache_on_disk
from utils.data.pixels import load_pixels, source_code
from utils.data.samplers import BalancedSampler, ShuffledSampler
from utils.data.tables import (
    box_from_edges,
    box_from_matlab,
    look_up,
    picture_path,
    read_class,
    read_keyed,
    read_label,
    read_matlab,
    read_numbers,
    read_xml_box,
)
from utils.data.workers import leave_run_to_the_main_process
from utils.errors import UserError

# ---------------------------------------------------------------------------------------------------------------------
# What a data set holds
# ---------------------------------------------------------------------------------------------------------------------


class Entry(NamedTuple):
    """One picture of a data set, not loaded yet.

    source: the file, or the number of a drawn picture of the demo set.
    box: the object's edges (x0, y0, x1, y1) in the pixels as the file stores them, or None where there is none.
    """

    source: Path | int
    label: int
    box: Box | None = None


class Catalogue(NamedTuple):
    """All pictures of a data set in its official split; labels count from 0 and index `class_names`."""

    train: list[Entry]
    test: list[Entry]
    class_names: list[str]

    @property
    def has_boxes(self) -> bool:
        """Whether every picture has an object box."""
        return all(entry.box is not None for entry in self.train + self.test)


def read_catalogue(
    dataset: str,
    root: str | Path | None,
    *,
    classes: Sequence[str] | None = None,
    seed: int = 0,
    test_fraction: float = 0.2,
) -> Catalogue:
    """List a data set.

    Args:
        dataset: "demo", "folder", or a key of `READERS`.
        root: the data set's folder in its official layout, or the folder that holds it; unused for "demo".
        classes: patterns over class names as in a shell ("*_Gull"); keeps the classes that match any of them, in the
            data set's own order, and numbers them anew.
        seed, test_fraction: how a `folder` data set that is not split yet is split; unused otherwise.

    Raises:
        DataError: unknown data set, missing or malformed files, a picture listed twice in different ways, a class
            without pictures, a pattern without a class.
    """
    try:
        if dataset == "demo":
            catalogue = _read_demo()
        elif dataset == "folder":
            catalogue = _read_folder(check_root(dataset, root), seed=seed, test_fraction=test_fraction)
        elif dataset in READERS:
            catalogue = READERS[dataset](check_root(dataset, root))
        else:
            raise DataError(f"unknown data set {dataset!r}: expected one of demo, folder, {', '.join(READERS)}")
        catalogue = _drop_repeated(catalogue)
        _check_complete(dataset, catalogue)
    except OSError as error:
        raise DataError(
            f"{error.filename or root} cannot be read ({describe(error)}): expected files of data set {dataset!r} there"
        ) from None
    return _keep_classes(catalogue, classes) if classes else catalogue


def _drop_repeated(catalogue: Catalogue) -> Catalogue:
    """Keep one of equal entries, which lists that were joined hold and which would only count a picture twice.

    Raises DataError where a picture is listed in two ways: nothing says which of them is right.
    """
    first: dict[Path | int, tuple[str, Entry]] = {}
    for split, entries in (("training", catalogue.train), ("testing", catalogue.test)):
        for entry in entries:
            first_split, known = first.setdefault(entry.source, (split, entry))
            names = [catalogue.class_names[label] for label in (known.label, entry.label)]
            if known.label != entry.label:
                ways = f"as {names[0]!r} and as {names[1]!r}"
            elif first_split != split:
                ways = "for training and for testing"
            elif known.box != entry.box:
                ways = f"with the box {known.box} and with {entry.box}"
            else:
                continue
            raise DataError(f"{entry.source} is listed twice, {ways}: take the wrong one off the data set's list")
    kept = {"training": [], "testing": []}
    for split, entry in first.values():
        kept[split].append(entry)
    return Catalogue(kept["training"], kept["testing"], catalogue.class_names)


def _check_complete(dataset: str, catalogue: Catalogue) -> None:
    """Raise DataError if a class or a split has no pictures, or if listed files are not on disk."""
    if not catalogue.train or not catalogue.test:
        raise DataError(
            f"data set {dataset!r} has {len(catalogue.train)} training and {len(catalogue.test)} test pictures:"
            " expected some of each"
        )
    empty = set(range(len(catalogue.class_names))) - {entry.label for entry in catalogue.train}
    if empty:
        raise DataError(
            f"data set {dataset!r}: {len(empty)} of {len(catalogue.class_names)} classes have no training picture,"
            f" the first is {catalogue.class_names[min(empty)]!r}: add some, or leave the class out"
        )
    files = [entry.source for entry in catalogue.train + catalogue.test if isinstance(entry.source, Path)]
    missing = find_missing(files)
    if missing:
        raise DataError(
            f"{len(missing)} of {len(files)} listed pictures are not on disk, the first is {missing[0]}:"
            " unpack the data set's pictures there"
        )


def _keep_classes(catalogue: Catalogue, patterns: Sequence[str]) -> Catalogue:
    names = catalogue.class_names
    matches = {pattern: [i for i, name in enumerate(names) if fnmatchcase(name, pattern)] for pattern in patterns}
    for pattern, labels in matches.items():
        if not labels:
            raise DataError(
                f"classes: {pattern!r} matches none of the {len(names)} class names (such as {names[0]!r}):"
                " write '*' for any text"
            )
    kept = sorted({label for labels in matches.values() for label in labels})
    renumbered = {old: new for new, old in enumerate(kept)}

    def keep(entries: list[Entry]) -> list[Entry]:
        return [entry._replace(label=renumbered[entry.label]) for entry in entries if entry.label in renumbered]

    return Catalogue(keep(catalogue.train), keep(catalogue.test), [names[label] for label in kept])


def leave_out(catalogue: Catalogue, sources: Container[str]) -> Catalogue:
    """Return the catalogue without the pictures named. Raises DataError where a class or a split is left empty."""
    train, test = (
        [entry for entry in entries if str(entry.source) not in sources]
        for entries in (catalogue.train, catalogue.test)
    )
    rest = Catalogue(train, test, catalogue.class_names)
    _check_complete("without its unreadable pictures", rest)
    return rest


def split_validation(entries: list[Entry], fraction: float, seed: int) -> tuple[list[Entry], list[Entry]]:
    """Split entries into (rest, validation), class by class, both in the order they came in.

    Every class gives `fraction` of its pictures (rounded), at least one if it has two or more, never its last one.
    """
    if not 0 <= fraction < 1:
        raise UserError(f"the fraction to split off must be at least 0 and below 1, got {fraction}")
    if fraction == 0:
        return list(entries), []
    members: dict[int, list[int]] = {}
    for position, entry in enumerate(entries):
        members.setdefault(entry.label, []).append(position)
    generator = np.random.default_rng(seed)
    chosen: set[int] = set()
    for label in sorted(members):
        positions = members[label]
        count = min(max(round(fraction * len(positions)), 1), len(positions) - 1)
        chosen.update(generator.permutation(positions)[:count].tolist())
    rest = [entry for position, entry in enumerate(entries) if position not in chosen]
    return rest, [entries[position] for position in sorted(chosen)]


# ---------------------------------------------------------------------------------------------------------------------
# Readers, one per layout
# ---------------------------------------------------------------------------------------------------------------------


def _read_demo() -> Catalogue:
    """Birds drawn by `utils.data.demo_birds`, each species' first pictures for training."""
    per_species = demo_birds.DEMO_TRAIN + demo_birds.DEMO_TEST
    entries = [
        Entry(number, number // per_species, demo_birds.demo_scene(number).box)
        for number in range(per_species * len(demo_birds.SPECIES))
    ]
    return Catalogue(
        train=[entry for entry in entries if entry.source % per_species < demo_birds.DEMO_TRAIN],
        test=[entry for entry in entries if entry.source % per_species >= demo_birds.DEMO_TRAIN],
        class_names=[species.name for species in demo_birds.SPECIES],
    )


def _read_birds(root: Path, *, folder: str) -> Catalogue:
    """CUB-200-2011 and NABirds, which share a layout: tables of (image id, value).

    Sources: Wah et al., "The Caltech-UCSD Birds-200-2011 Dataset"; Van Horn et al., "Building a bird recognition app
    and large scale dataset with citizen scientists" (CVPR 2015).
    """
    root = find_root(root, folder, "images.txt")
    names = {class_id: name for _, (class_id, name) in read_keyed(root / "classes.txt", 2)}
    class_ids: dict[str, str] = {}
    for place, (image, class_id) in read_keyed(root / "image_class_labels.txt", 2):
        look_up(place, class_id, names, "classes.txt")
        class_ids[image] = class_id
    boxes: dict[str, Box] = {}
    for place, (image, *fields) in read_keyed(root / "bounding_boxes.txt", 5):
        x, y, width, height = read_numbers(place, fields)
        boxes[image] = box_from_edges(place, x, y, x + width, y + height)
    splits: dict[str, list[Entry]] = {"1": [], "0": []}
    split_of = {
        image: look_up(place, flag, splits, "the flags 1 (training) and 0 (test)")
        for place, (image, flag) in read_keyed(root / "train_test_split.txt", 2)
    }

    # The class ids of NABirds are nodes of a tree of which only some hold pictures: the classes are the ids in use.
    used = set(class_ids.values())
    labels = {class_id: label for label, class_id in enumerate(key for key in names if key in used)}
    for place, (image, file) in read_keyed(root / "images.txt", 2):
        label = labels[look_up(place, image, class_ids, "image_class_labels.txt")]
        box = look_up(place, image, boxes, "bounding_boxes.txt")
        split = look_up(place, image, split_of, "train_test_split.txt")
        split.append(Entry(picture_path(place, root / "images", file), label, box))
    return Catalogue(splits["1"], splits["0"], [names[class_id] for class_id in labels])


def _read_cars(root: Path) -> Catalogue:
    """Stanford Cars with its devkit; the list of the test set is the one with labels, which was published later.

    Source: Krause et al., "3D Object Representations for Fine-Grained Categorization" (3dRR 2013).
    """
    root = find_root(root, "stanford_cars", "devkit/cars_meta.mat")
    names = [str(name) for name in read_matlab(root / "devkit" / "cars_meta.mat", "class_names")]

    def read(path: Path, pictures: Path) -> list[Entry]:
        corners = ("bbox_x1", "bbox_y1", "bbox_x2", "bbox_y2")
        entries = []
        for number, record in enumerate(read_matlab(path, "annotations", (*corners, "class", "fname")), start=1):
            place = f"{path} record {number}"
            box = box_from_matlab(place, *read_numbers(place, [record[corner] for corner in corners]))
            label = read_label(place, record["class"], len(names))
            entries.append(Entry(picture_path(place, pictures, record["fname"]), label, box))
        return entries

    test = "cars_test_annos_withlabels.mat"
    test_list = root / test if (root / test).is_file() else root / "devkit" / test
    return Catalogue(
        read(root / "devkit" / "cars_train_annos.mat", root / "cars_train"), read(test_list, root / "cars_test"), names
    )


def _read_aircraft(root: Path) -> Catalogue:
    """FGVC-Aircraft, by variant. The pictures keep their 20-pixel banner at the bottom, as in published results.

    Source: Maji et al., "Fine-Grained Visual Classification of Aircraft" (2013).
    """
    data = find_root(root, "fgvc-aircraft-2013b", "data/variants.txt") / "data"
    names = [name for _, (name,) in read_keyed(data / "variants.txt", 1)]
    labels = {name: label for label, name in enumerate(names)}
    boxes = {
        image: box_from_matlab(place, *read_numbers(place, fields))
        for place, (image, *fields) in read_keyed(data / "images_box.txt", 5)
    }

    def read(split: str) -> list[Entry]:
        return [
            Entry(
                picture_path(place, data / "images", f"{image}.jpg"),
                look_up(place, variant, labels, "variants.txt"),
                look_up(place, image, boxes, "images_box.txt"),
            )
            for place, (image, variant) in read_keyed(data / f"images_variant_{split}.txt", 2)
        ]

    return Catalogue(read("trainval"), read("test"), names)


def _read_dogs(root: Path) -> Catalogue:
    """Stanford Dogs; a picture of several dogs gives the box of the first.

    Source: Khosla et al., "Novel Dataset for Fine-Grained Image Categorization" (FGVC 2011).
    """
    # The archive of the lists unpacks without a folder of its own.
    lists = find_root(root, "lists", "train_list.mat")
    folders: dict[int, str] = {}
    numbers: dict[str, int] = {}

    def read(path: Path) -> list[tuple[int, Path, Box]]:
        files, labels = (read_matlab(path, variable) for variable in ("file_list", "labels"))
        if len(files) != len(labels):
            raise DataError(f"{path} lists {len(files)} files and {len(labels)} labels: expected as many of each")
        found = []
        for record, (file, number) in enumerate(zip(files, labels, strict=True), start=1):
            place = f"{path} record {record}"
            picture = picture_path(place, root / "Images", file)
            number, folder = read_class(place, number), picture.parent.name
            if folders.setdefault(number, folder) != folder:
                raise DataError(f"{place}: class {number} is {folder!r} here and {folders[number]!r} before: keep one")
            if numbers.setdefault(folder, number) != number:
                raise DataError(f"{place}: {folder!r} is class {number} here and {numbers[folder]} before: keep one")
            found.append((number, picture, read_xml_box(root / "Annotation" / Path(file).with_suffix(""))))
        return found

    train, test = read(lists / "train_list.mat"), read(lists / "test_list.mat")
    labels = {number: label for label, number in enumerate(sorted(folders))}
    train, test = ([Entry(file, labels[number], box) for number, file, box in split] for split in (train, test))
    return Catalogue(train, test, [folders[number] for number in labels])


def _read_folder(root: Path, *, seed: int, test_fraction: float) -> Catalogue:
    """`train/` and `test/` (or `val/`) with one folder per class, or one tree of class folders, which is split here."""
    trees = [root]
    for name in ("test", "val"):
        if (root / "train").is_dir() and (root / name).is_dir():
            trees = [root / "train", root / name]
            break
    class_names = sorted(
        {path.name for tree in trees for path in tree.iterdir() if path.is_dir() and path.name[0] != "."}
    )
    if not class_names:
        raise DataError(f"{trees[0]} holds no folder: expected one folder of pictures per class")
    owners: dict[str, Path] = {}

    def read(tree: Path) -> list[Entry]:
        return [
            Entry(picture, label)
            for label, name in enumerate(class_names)
            for picture in find_pictures(tree, tree / name, owners)
        ]

    train, test = map(read, trees) if len(trees) == 2 else split_validation(read(root), test_fraction, seed)
    return Catalogue(train, test, class_names)


READERS: dict[str, Callable[[Path], Catalogue]] = {
    "cub": partial(_read_birds, folder="CUB_200_2011"),
    "cars": _read_cars,
    "aircraft": _read_aircraft,
    "dogs": _read_dogs,
    "nabirds": partial(_read_birds, folder="nabirds"),
}


# ---------------------------------------------------------------------------------------------------------------------
# From a file to a sample
# ---------------------------------------------------------------------------------------------------------------------


class Sample(NamedTuple):
    """One picture, ready for a batch. Normalisation and `augmentation` are left to the device, see utils/data/.

    image: [3, S, S] uint8, its values pixel by pixel in memory.
    box: [4] float32, the object's edges (x0, y0, x1, y1) in pixels of the image after augmentation (without area where
        the drawn part leaves the object out), or None.
    path: the file; for the demo set the number of the drawn picture.
    augmentation: [8] float32 as `Augmentation.draw` gives it, or None.
    """

    image: Tensor
    label: int
    box: Tensor | None
    path: str
    augmentation: Tensor | None = None


class Batch(NamedTuple):
    """B samples: images [B, 3, S, S] uint8, labels [B] int64, boxes [B, 4] float32 or None, paths.

    augmentation: [B, 8] float32, what is still to be done to the images (the boxes are those after it), or None.
    """

    images: Tensor
    labels: Tensor
    boxes: Tensor | None
    paths: list[str]
    augmentation: Tensor | None = None


class Pictures(Dataset[Sample]):
    """Pictures resized to image_size x image_size (aspect ignored, as published), with what is drawn to augment them.

    A key is an index, or a pair (index, seed) of `ShuffledSampler`. The seed decides all that is random about the
    sample (a plain index is its own seed), so nothing depends on the worker or on the global generators.

    cache: source -> (image, box) as `load_pixels` gives them, for all entries; None: files are read each time.
    """

    def __init__(
        self,
        entries: Sequence[Entry],
        *,
        image_size: int,
        augment: Augmentation | None = None,
        cache: Mapping[Path | int, tuple[Tensor, Tensor | None]] | None = None,
    ) -> None:
        self.entries = list(entries)
        self.image_size = image_size
        self.augment = augment
        self.cache = cache

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, key: int | tuple[int, int]) -> Sample:
        index, seed = key if isinstance(key, tuple) else (key, key)
        entry = self.entries[index]
        image, box = load_pixels(entry, self.image_size) if self.cache is None else self.cache[entry.source]
        path = f"demo/{entry.source:04d}" if isinstance(entry.source, int) else str(entry.source)
        if self.augment is None:
            return Sample(image, entry.label, box, path)
        augmentation = self.augment.draw(np.random.default_rng(seed))
        if box is not None:
            box = self.augment.carry(box, augmentation, self.image_size)
        return Sample(image, entry.label, box, path, augmentation)


def fingerprint(entries: Sequence[Entry], size: int) -> tuple[str, bytes]:
    """A name for this list of pictures at this size, and the SHA-256 of all that their pixels and boxes depend on.

    The list, its boxes and the size decide the name. The SHA-256 is of these, the files' sizes and times, the versions
    of Pillow, PyTorch and torchvision, and the code that makes pixels, see `utils.data.pixels.source_code`. No other
    code counts: a reader of lists, a sampler or this file may change, and decoded pictures that were kept stay good.

    Raises DataError where a file has vanished.
    """
    versions = (PIL.__version__, torch.__version__, torchvision.__version__)
    name, content = sha256(repr(size).encode()), sha256(repr(versions).encode())
    content.update(source_code(drawn=any(isinstance(entry.source, int) for entry in entries)))
    for source, _, box in entries:
        name.update(repr((str(source), box)).encode())
        if isinstance(source, Path):
            try:
                status = source.stat()
            except OSError as error:
                raise DataError(f"{source} cannot be read as a picture ({describe(error)}): restore it") from None
            content.update(repr((status.st_size, status.st_mtime_ns)).encode())
    content.update(name.digest())
    return f"{size}-{name.hexdigest()[:12]}", content.digest()


def collate(samples: Sequence[Sample]) -> Batch:
    """Stack samples into a batch; boxes and augmentation are None unless every sample has them."""
    images, labels, boxes, paths, augmentations = zip(*samples, strict=True)
    # In a worker, PyTorch's own function stacks straight into the memory that the batch is handed over in. It is
    # three times as fast where pixels stay in the order in which they are.
    images = default_collate([image.permute(1, 2, 0) for image in images]).permute(0, 3, 1, 2)
    return Batch(
        images=images,
        labels=torch.tensor(labels),
        boxes=None if any(box is None for box in boxes) else torch.stack(boxes),
        paths=list(paths),
        augmentation=None if any(values is None for values in augmentations) else torch.stack(augmentations),
    )


# ---------------------------------------------------------------------------------------------------------------------
# What a run's settings make of it
# ---------------------------------------------------------------------------------------------------------------------


class DataSettings(Protocol):
    """What is read of a run's settings; `config.Settings` has all of it, and says there what each means."""

    dataset: str
    data_root: str | None
    classes: tuple[str, ...] | None
    test_fraction: float
    seed: int
    on_bad_image: str
    select_on: str
    validation: float
    image_size: int
    flip: float
    brightness: float
    contrast: float
    crop_scale: float
    batch_size: int
    evaluation_batch_size: int
    images_per_class: int
    workers: int
    prefetch: int
    cache: str
    checkpoint_dir: str


def load_catalogue(settings: DataSettings) -> tuple[Catalogue, dict[str, str]]:
    """Return the data set without the unreadable pictures, and those with the reason; without leave to skip, refuse."""
    catalogue = read_catalogue(
        settings.dataset,
        settings.data_root,
        classes=settings.classes,
        seed=settings.seed,
        test_fraction=settings.test_fraction,
    )
    skip = settings.on_bad_image == "skip"
    bad = find_bad_pictures(catalogue.train + catalogue.test, thorough=skip)
    if not bad:
        return catalogue, bad
    if not skip:
        path, reason = next(iter(bad.items()))
        raise DataError(
            f"{len(bad)} of {len(catalogue.train + catalogue.test)} pictures cannot be read, the first is {path} "
            f"({reason}): repair them, or set on_bad_image to skip"
        )
    return leave_out(catalogue, bad), bad


def choose_split(settings: DataSettings, catalogue: Catalogue) -> tuple[list[Entry], list[Entry], str]:
    """Return the training images, those that choose the best epoch, and the latter in words."""
    if settings.select_on == "test":
        return catalogue.train, catalogue.test, f"the {len(catalogue.test)} TEST images: test figures are optimistic"
    train, validation = split_validation(catalogue.train, settings.validation, settings.seed)
    if not validation:
        raise DataError("no class has an image to spare for validation: raise validation, or set select_on to test")
    share = f"{settings.validation:.0%} of the training images, by class, seed {settings.seed}"
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
    augment = Augmentation(settings.flip, settings.brightness, settings.contrast, settings.crop_scale)
    return DataLoader(
        Pictures(entries, image_size=settings.image_size, augment=augment),
        batch_size=batch_size,
        sampler=sampler,
        drop_last=len(sampler) > batch_size,  # a last batch of a few images has poor batch-norm statistics
        collate_fn=collate,
        pin_memory=torch.cuda.is_available(),
        **_worker_options(settings),
        generator=torch.Generator(),  # the loader's own, so that it draws nothing from the network's
    )


def evaluation_loader(settings: DataSettings, entries: list[Entry]) -> DataLoader[Batch]:
    """Batches of the pictures as they are listed, not augmented."""
    return DataLoader(
        Pictures(entries, image_size=settings.image_size),
        batch_size=settings.evaluation_batch_size,
        collate_fn=collate,
        pin_memory=torch.cuda.is_available(),
        **_worker_options(settings),
        generator=torch.Generator(),
    )


def load_batch(entries: Sequence[Entry], image_size: int) -> Batch:
    """Load pictures as one batch, whole and not augmented."""
    pictures = Pictures(entries, image_size=image_size)
    return collate([pictures[index] for index in range(len(entries))])


def _worker_options(settings: DataSettings) -> dict[str, object]:
    """Return how a loader shares its work among processes, which stay between epochs."""
    if settings.workers == 0:
        return {}
    return {
        "num_workers": settings.workers,
        "prefetch_factor": settings.prefetch,
        "persistent_workers": True,
        "worker_init_fn": leave_run_to_the_main_process,
    }


def build_cache(settings: DataSettings, entries: list[Entry]) -> PictureCache | None:
    """Return the pictures decoded, if they are to be: in memory, or in a file below checkpoint_dir."""

    def decode(row: int) -> tuple[Tensor, Tensor | None]:
        return load_pixels(entries[row], settings.image_size)

    sources = [entry.source for entry in entries]
    if settings.cache == "ram":
        return cache_in_memory(sources, settings.image_size, decode)
    if settings.cache == "disk":
        name, digest = fingerprint(entries, settings.image_size)
        folder = Path(settings.checkpoint_dir).expanduser() / "cache"
        return cache_on_disk(
            folder / f"{settings.dataset}-{name}.pictures", digest, sources, settings.image_size, decode
        )
    return None
