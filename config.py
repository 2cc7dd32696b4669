"""Every setting of a run. Edit the values here, or override any of them on the command line.

    python train.py                                                        # the drawn demo birds, ResNet-18, CPU, 3 min
    python train.py --dataset cub --data_root DIR                          # SG-KRL on CUB-200-2011, ResNet-50 at 448
    python train.py --dataset cub --data_root DIR --model mmal --name try1 # another system, a folder of its own
    python train.py --help                                                 # all settings

A value of None takes the data set's or the model's own value from the tables below, so an edit here always wins.
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import inspect
import math
import re
import types
import typing
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Settings:
    # ---- What to train, and on what -----------------------------------------------------------------------------
    model: str = "sgkrl"  # resnet, mmal, sgkrl, flrdf or scrim
    dataset: str = "demo"  # demo, cub, cars, aircraft, dogs, nabirds or folder (pictures in a folder per class)
    data_root: str | None = None  # folder that holds the data set; the demo set is drawn in memory and needs none
    classes: tuple[str, ...] | None = None  # only the classes whose names match, such as '*_Gull' '*_Wren'; None: all
    name: str | None = None  # added to the run's folder, to keep several runs of one model and data set apart
    checkpoint_dir: str = "checkpoint"  # the run writes to <checkpoint_dir>/<dataset>-<model>[-<name>]/
    seed: int = 0  # fixes weights, split, shuffling, augmentation and dropout

    # ---- Which images choose the best epoch -----------------------------------------------------------------------
    validation: float = 0.1  # share of the training images of each class that is held back for it
    select_on: str = "validation"  # validation, or test: trains on all training images, and test figures flatter
    test_fraction: float = 0.2  # dataset=folder without train/ and test/: share of each class that becomes the test set

    # ---- Pictures -------------------------------------------------------------------------------------------------
    input_size: int | None = None  # side in pixels of what the backbone sees: a multiple of 32, at least 96
    image_size: int | None = None  # side of what is loaded; larger than input_size, crops gain detail. None: input_size
    flip: float = 0.5  # probability of a horizontal flip in training
    brightness: float = 0.2  # training brightness is multiplied by 1 - x to 1 + x
    contrast: float = 0.2  # likewise contrast

    # ---- Network --------------------------------------------------------------------------------------------------
    backbone: str | None = None  # resnet18, resnet34, resnet50, resnet101 or resnet152
    pretrained: str | None = None  # torchvision weights such as IMAGENET1K_V2, a .pth file, or none: random weights
    stride_on_first_conv: bool = False  # for .pth files of the ResNet variant with the stride on the 1x1 convolution
    answer: tuple[str, ...] | None = None  # branches whose mean probability is the prediction; None: the model's own
    dropout: float | None = None  # before every classifier; the attention of the fusion keeps its published 0.2
    # sgkrl, mmal: 'birds', 'vehicles', or groups of ((height, width), ...), quota in cells of a 14-cell grid, such as
    # ((((4, 4), (3, 5)), 2), (((8, 8),), 1)): the two best of small windows, the best one of the large.
    windows: str | tuple | None = None  # which windows of the object are looked at
    wiring: str = "trained"  # sgkrl: trained (every part learns) or published (fusion and weighting stay random)
    graph_scope: str = "image"  # sgkrl, published wiring: image, or batch (windows of other images are linked)
    # flrdf. Its paper leaves the next four open.
    suppression: str | float = "learnable"  # what channels are capped at: learnable, or a share of their maximum (0.7)
    classify_suppressed: bool = True  # raw classifies the suppressed map; without it only a fixed suppression works
    box_agreement: bool = False  # the box keeps only what the map before the last one confirms, as in mmal
    jigsaw_blocks: int = 2  # blocks along a side of the shuffled object; 1: not shuffled
    # scrim. Only its abstract is known to us, so these are those of its building blocks.
    coarse_channels: int = 1024  # length of the features that the contrastive loss compares
    part_proposals: int = 6  # regions that each of the two navigators proposes and learns to rank
    parts_in_answer: int = 4  # the best of them that join the final classification
    part_max_iou: float = 0.25  # a region that overlaps a better one by more is dropped
    parts_of_every_level: bool = True  # a navigator's best small, middle and large region are always among them
    anchor_sizes: tuple[int, ...] = (48, 96, 192)  # sides of regions in pixels of a 448-pixel input, by level

    # ---- Training -------------------------------------------------------------------------------------------------
    epochs: int | None = None
    batch_size: int | None = None  # over all devices together
    learning_rate: float | None = None  # SGD; the highest value of the schedule
    head_learning_rate_factor: float | None = None  # classifiers and graph start from random weights: times this
    momentum: float = 0.9
    weight_decay: float = 1e-4
    schedule: str | None = None  # steps: times 0.1 at each milestone; one_cycle: up, then down along a cosine
    milestones: tuple[int, ...] = (60, 100)  # schedule=steps: the epochs after which the learning rate falls
    clip_gradient_norm: float | None = None  # a larger gradient is scaled down to this norm; 0: never
    label_smoothing: float | None = None  # share of the target that goes to the other classes
    # Terms not named keep the model's own weight: 1, and 0.5 for scrim's contrastive loss. On the command line:
    # --loss_weights object=2 window=0.5
    loss_weights: dict[str, float] | None = None  # weights of loss terms, such as {"object": 2.0}; 0: term not trained
    images_per_class: int | None = None  # batches hold so many of each class (scrim: 2); 0: plainly shuffled
    warmup_epochs: int | None = None  # first epochs, in which only the raw branch is trained, as published (1)
    mask_from_epoch: int | None = None  # sgkrl: from this epoch on (from 1) the background is masked, as published (46)

    # ---- Machine --------------------------------------------------------------------------------------------------
    device: str = "auto"  # auto: the GPU where there is one; or cpu, cuda, cuda:1 ...
    data_parallel: bool = True  # several visible GPUs: share each batch among them (nn.DataParallel)
    precision: str = "float32"  # float32, or bf16: mixed precision, about twice as fast where the hardware has it
    channels_last: bool = True  # memory layout that convolutions prefer on CPUs and recent GPUs
    workers: int = 2  # processes that load pictures; 0 loads in the main process
    evaluation_batch_size: int = 16
    pictures_every: int = 5  # epochs between panels of boxes, masks and windows in TensorBoard; 0: never


# The values for the settings left at None above: PUBLISHED, over it what differs for a model, over that what differs
# for a data set. PUBLISHED holds SG-KRL's hyperparameters for CUB, Cars and Aircraft; those of FLRDF and SCRIM are not
# known to us.
PUBLISHED: dict[str, object] = {
    "input_size": 448,
    "backbone": "resnet50",
    "pretrained": "IMAGENET1K_V1",
    "windows": "birds",
    "dropout": 0.5,
    "epochs": 100,
    "batch_size": 40,
    "learning_rate": 1e-3,
    "head_learning_rate_factor": 1.0,
    "schedule": "steps",
    "clip_gradient_norm": 0.0,
    "label_smoothing": 0.0,
    "warmup_epochs": 1,
    "mask_from_epoch": 46,
    "images_per_class": 0,
}

MODELS: dict[str, dict[str, object]] = {
    "sgkrl": {},
    "mmal": {"epochs": 200, "batch_size": 6},
    "flrdf": {},
    "scrim": {"images_per_class": 2},  # its contrastive loss needs pairs
    "resnet": {},
}

DATASETS: dict[str, dict[str, object]] = {
    # Small and from random weights, to finish on any machine: five minutes on two cores at the most.
    "demo": {
        "input_size": 128,
        "backbone": "resnet18",
        "pretrained": "none",
        "windows": ((((7, 7),), 1), (((11, 11),), 1)),
        "dropout": 0.1,
        "epochs": 11,
        "batch_size": 16,
        "learning_rate": 0.01,
        "schedule": "one_cycle",
        "clip_gradient_norm": 10.0,
        "label_smoothing": 0.1,
        "warmup_epochs": 5,
        "mask_from_epoch": 100,  # past the last epoch: never
    },
    "cub": {},
    "cars": {"windows": "vehicles"},
    "aircraft": {"windows": "vehicles"},
    "dogs": {},
    "nabirds": {},
    "folder": {},
}


# Settings that take several words on the command line, and what those become.
LISTS: dict[str, type] = {
    "classes": tuple,
    "answer": tuple,
    "anchor_sizes": tuple,
    "milestones": tuple,
    "loss_weights": dict,
}


class SettingsError(ValueError):
    """A setting that cannot be, said in one sentence."""


def parse_settings(arguments: Sequence[str] | None = None) -> Settings:
    """Return the settings above with the command line's overrides, complete and checked.

    Raises SettingsError for impossible values; argparse ends the program for unknown names and malformed values.
    """
    parser = argparse.ArgumentParser(
        description="Train a fine-grained classifier; settings default to config.py.",
        usage="%(prog)s [--setting value ...]",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    comments = dict(re.findall(r"^    (\w+): .*?  # (.*)$", inspect.getsource(Settings), flags=re.MULTILINE))
    hints = typing.get_type_hints(Settings)
    for field in dataclasses.fields(Settings):
        options = {"default": field.default, "help": comments.get(field.name, " ").replace("%", "%%")}
        if hints[field.name] is bool:
            options["action"] = argparse.BooleanOptionalAction
        else:
            options |= {"type": _converter(hints[field.name]), "metavar": "VALUE"}
            if field.name in LISTS:
                options["nargs"] = "+"
        parser.add_argument(f"--{field.name}", **options)
    values = vars(parser.parse_args(arguments))
    for name, kind in LISTS.items():
        values[name] = kind(values[name]) if values[name] is not None else None
    return complete(Settings(**values))


def _converter(hint: object) -> typing.Callable[[str], object]:
    """Return what turns a command-line word into a value of the annotated type."""
    members = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    member = next(m for m in members if m is not type(None))
    if tuple in members:
        return _windows
    if float in members and str in members:
        return _name_or_number
    if typing.get_origin(member) is dict:
        return _weight
    if typing.get_origin(member) is tuple:  # the words of a list come one by one
        member = typing.get_args(member)[0]
    return member


def _windows(word: str) -> str | tuple:
    """A name, or a tuple written as in Python."""
    if not word.startswith("("):
        return word
    try:
        return ast.literal_eval(word)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        raise argparse.ArgumentTypeError(f"{word!r}; expected a name, or a tuple as in config.py") from None


def _name_or_number(word: str) -> str | float:
    try:
        return float(word)
    except ValueError:
        return word


def _weight(word: str) -> tuple[str, float]:
    """`name=number`."""
    name, _, number = word.partition("=")
    try:
        return name, float(number)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{word!r}; expected name=number, such as object=0.5") from None


def complete(settings: Settings) -> Settings:
    """Fill settings left at None from the tables above and check them all. Raises SettingsError."""
    if settings.dataset not in DATASETS:
        raise SettingsError(f"unknown dataset {settings.dataset!r}; choose one of {', '.join(DATASETS)}")
    if settings.model not in MODELS:
        raise SettingsError(f"unknown model {settings.model!r}; choose one of {', '.join(MODELS)}")
    defaults = PUBLISHED | MODELS[settings.model] | DATASETS[settings.dataset]
    missing = {name: value for name, value in defaults.items() if getattr(settings, name) is None}
    settings = dataclasses.replace(settings, **missing)
    if settings.image_size is None:
        settings = dataclasses.replace(settings, image_size=settings.input_size)
    check(settings)
    return settings


def check(settings: Settings) -> None:
    """Refuse impossible values, naming the setting, what came and what is possible. Raises SettingsError."""

    def require(condition: bool, name: str, expected: str) -> None:
        if not condition:
            raise SettingsError(f"{name} is {getattr(settings, name)!r}; expected {expected}")

    for name in ("epochs", "batch_size", "evaluation_batch_size"):
        value = getattr(settings, name)
        require(isinstance(value, int) and value >= 1, name, "a whole number of at least 1")
    for name in ("jigsaw_blocks", "coarse_channels", "part_proposals", "parts_in_answer"):
        value = getattr(settings, name)
        require(isinstance(value, int) and value >= 1, name, "a whole number of at least 1")
    for name in ("workers", "pictures_every", "warmup_epochs", "seed", "images_per_class"):
        value = getattr(settings, name)
        require(isinstance(value, int) and value >= 0, name, "a whole number of at least 0")
    for name in ("brightness", "contrast", "dropout", "label_smoothing", "validation", "momentum"):
        require(0 <= getattr(settings, name) < 1, name, "a number from 0 to less than 1")
    require(0 <= settings.flip <= 1, "flip", "a probability from 0 to 1")
    require(0 < settings.test_fraction < 1, "test_fraction", "a share between 0 and 1")
    for name in ("learning_rate", "head_learning_rate_factor"):
        require(0 < getattr(settings, name) < math.inf, name, "a finite number above 0")
    for name in ("weight_decay", "clip_gradient_norm"):
        require(0 <= getattr(settings, name) < math.inf, name, "a finite number of at least 0")
    require(
        settings.input_size % 32 == 0 and settings.input_size >= 96,
        "input_size",
        "a multiple of 32 of at least 96, such as 224 or 448",
    )
    require(settings.image_size >= settings.input_size, "image_size", f"at least input_size, {settings.input_size}")
    require(all(m >= 1 for m in settings.milestones), "milestones", "epochs, counted from 1")
    require(settings.mask_from_epoch is None or settings.mask_from_epoch >= 1, "mask_from_epoch", "an epoch, from 1")
    require(
        re.fullmatch(r"auto|cpu|cuda(:\d+)?", settings.device) is not None,
        "device",
        "'auto', 'cpu', 'cuda', 'cuda:1' ...",
    )
    for name, choices in {"wiring": ("trained", "published"), "graph_scope": ("image", "batch")}.items():
        require(getattr(settings, name) in choices, name, f"'{choices[0]}' or '{choices[1]}'")
    is_share = not isinstance(settings.suppression, str) and 0 < settings.suppression <= 1
    require(settings.suppression == "learnable" or is_share, "suppression", "'learnable' or a share above 0, at most 1")
    blocks = settings.input_size // 32
    require(
        settings.jigsaw_blocks <= blocks, "jigsaw_blocks", f"at most {blocks}: a block is a cell of 32 pixels or more"
    )
    require(
        settings.parts_in_answer <= settings.part_proposals,
        "parts_in_answer",
        f"at most part_proposals, {settings.part_proposals}",
    )
    require(0 <= settings.part_max_iou < 1, "part_max_iou", "a share from 0 to less than 1")
    sizes = settings.anchor_sizes
    require(len(sizes) == 3 and all(s >= 1 for s in sizes), "anchor_sizes", "three sizes in pixels, of at least 1")
    weights = (settings.loss_weights or {"raw": 1.0}).values()
    require(all(0 <= w < math.inf for w in weights), "loss_weights", "finite numbers of at least 0")
    require(
        settings.images_per_class == 0 or settings.batch_size % settings.images_per_class == 0,
        "images_per_class",
        f"0, or a number that divides batch_size, {settings.batch_size}",
    )
    require(
        settings.model != "scrim" or settings.images_per_class >= 2,
        "images_per_class",
        "at least 2 for scrim, whose contrastive loss compares images of one class",
    )
    require(settings.select_on in ("validation", "test"), "select_on", "'validation' or 'test'")
    require(settings.schedule in ("steps", "one_cycle"), "schedule", "'steps' or 'one_cycle'")
    require(settings.precision in ("float32", "bf16"), "precision", "'float32' or 'bf16'")
    require(
        settings.validation > 0 or settings.select_on == "test",
        "validation",
        "a share above 0, unless select_on is 'test': something has to choose the best epoch",
    )
    if settings.dataset != "demo":
        require(settings.data_root is not None, "data_root", f"the folder that holds {settings.dataset}")
    if settings.name is not None:
        require(re.fullmatch(r"[\w.+-]+", settings.name) is not None, "name", "letters, digits and any of . _ + -")


def run_name(settings: Settings) -> str:
    """Return the name of the run's folder, `<dataset>-<model>[-<name>]`."""
    return "-".join(filter(None, (settings.dataset, settings.model, settings.name)))
