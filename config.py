"""Every setting of a run. Edit the values here, or override any of them on the command line.

    python train.py                                                        # the drawn demo birds, ResNet-18, CPU, 3 min
    python train.py --dataset cub --data_root DIR                          # SG-KRL on CUB-200-2011, ResNet-50 at 448
    python train.py --dataset cub --data_root DIR --model mmal --name try1 # another system, a folder of its own
    python train.py --help                                                 # all settings

A value of None takes the data set's own value from the table `DATASETS` below, so an edit here always wins.
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
    model: str = "sgkrl"  # resnet, mmal or sgkrl
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
    wiring: str = "trained"  # sgkrl: trained (every part learns) or published (fusion and weighting stay random)
    graph_scope: str = "image"  # sgkrl, published wiring: image, or batch (windows of other images are linked)
    # sgkrl, mmal: 'birds', 'vehicles', or groups of ((height, width), ...), quota in cells of a 14-cell grid, such as
    # ((((4, 4), (3, 5)), 2), (((8, 8),), 1)): the two best of small windows, the best one of the large.
    windows: str | tuple | None = None  # which windows of the object are looked at
    answer: tuple[str, ...] | None = None  # branches whose mean probability is the prediction; None: the model's own
    dropout: float | None = None  # before every classifier; the attention of the fusion keeps its published 0.2

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


# The data sets' own values for the settings left at None above. CUB, Cars and Aircraft: the published hyperparameters
# of SG-KRL; MODELS holds what is published differently for other systems.
PUBLISHED = {
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
}

DATASETS: dict[str, dict[str, object]] = {
    # Small and from random weights, to finish on any machine: five minutes on two cores at the most.
    "demo": PUBLISHED
    | {
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
    "cub": PUBLISHED,
    "cars": PUBLISHED | {"windows": "vehicles"},
    "aircraft": PUBLISHED | {"windows": "vehicles"},
    "dogs": PUBLISHED,
    "nabirds": PUBLISHED,
    "folder": PUBLISHED,
}

MODELS: dict[str, dict[str, object]] = {
    "sgkrl": {},
    "mmal": {"epochs": 200, "batch_size": 6},
    "resnet": {},
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
            if field.name in ("classes", "answer", "milestones"):
                options["nargs"] = "+"
        parser.add_argument(f"--{field.name}", **options)
    values = vars(parser.parse_args(arguments))
    for name in ("classes", "answer", "milestones"):
        values[name] = tuple(values[name]) if values[name] is not None else None
    return complete(Settings(**values))


def _converter(hint: object) -> typing.Callable[[str], object]:
    """Return what turns a command-line word into a value of the annotated type."""
    members = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    member = next(m for m in members if m is not type(None))
    if tuple in members:
        return _windows
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


def complete(settings: Settings) -> Settings:
    """Fill settings left at None from the tables above and check them all. Raises SettingsError."""
    if settings.dataset not in DATASETS:
        raise SettingsError(f"unknown dataset {settings.dataset!r}; choose one of {', '.join(DATASETS)}")
    if settings.model not in MODELS:
        raise SettingsError(f"unknown model {settings.model!r}; choose one of {', '.join(MODELS)}")
    model_defaults = {} if settings.dataset == "demo" else MODELS[settings.model]
    defaults = DATASETS[settings.dataset] | model_defaults
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
    for name in ("workers", "pictures_every", "warmup_epochs", "seed"):
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
