"""Every setting of a run. Edit the values here, or override any of them on the command line.

    python train.py                                                        # the drawn demo birds, ResNet-18, CPU, 3 min
    python train.py --dataset cub --data_root DIR                          # SG-KRL on CUB-200-2011, ResNet-50 at 448
    python train.py --dataset cub --data_root DIR --model mmal --name try1 # another system, a folder of its own
    python train.py --help                                                 # all settings and their values
    python train.py --help_all                                             # the same with explanations

A value of None takes the data set's or the model's own value from the tables below, so an edit here always wins.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import copy
import dataclasses
import difflib
import functools
import inspect
import math
import re
import stat
import textwrap
import types
import typing
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from utils.errors import UserError

Windows = tuple[tuple[tuple[tuple[int, int], ...], int], ...]


def _with_lists_as_defaults(settings: type) -> type:
    """Let [60, 100] and {"object": 2.0} stand behind a field, which a dataclass refuses."""
    for name in settings.__annotations__:
        default = getattr(settings, name, None)
        if isinstance(default, list | dict | set):
            setattr(settings, name, dataclasses.field(default_factory=functools.partial(copy.deepcopy, default)))
    return settings


@dataclass(frozen=True)
@_with_lists_as_defaults
class Settings:
    # ---- What to train, and on what -----------------------------------------------------------------------------
    model: str = "sgkrl"  # resnet, mmal, sgkrl, flrdf or scrim
    dataset: str = "demo"  # demo, cub, cars, aircraft, dogs, nabirds or folder (pictures in a folder per class)
    data_root: str | None = None  # folder that holds the data set; the demo set is drawn in memory and needs none
    classes: tuple[str, ...] | None = None  # only the classes whose names match, such as '*_Gull' '*_Wren'; None: all
    name: str | None = None  # added to the run's folder, to keep several runs of one model and data set apart
    checkpoint_dir: str = "checkpoint"  # the run writes to <checkpoint_dir>/<dataset>-<model>[-<name>]/
    fresh: bool = False  # start anew: a run that is in the folder already is moved aside
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
    crop_scale: float = 1.0  # training sees a random part with this share of the area or more; 1: always the whole

    # ---- Network --------------------------------------------------------------------------------------------------
    backbone: str | None = None  # resnet18, resnet34, resnet50, resnet101 or resnet152
    pretrained: str | None = None  # torchvision weights such as IMAGENET1K_V2, a .pth file, or none: random weights
    stride_on_first_conv: bool = False  # for .pth files of the ResNet variant with the stride on the 1x1 convolution
    # Running statistics: shared by the passes over the picture, the object and its parts, or kept for each of these.
    # None: shared, as published; frozen for sgkrl's trained wiring on pretrained weights, not with sync_batch_norm.
    # That was chosen on 135 validation images of CUB's gulls and wrens (224 pixels, batches of 16, no windows, one run
    # each): the loss of the object was 1.02 frozen, 1.74 per_pass, 2.05 shared, the answer right for 70, 63, 60 %. On
    # 439 test images it was right for 65, 66, 65 %.
    batch_norm: str | None = None  # shared, per_pass, or frozen: those of the pretrained weights, in training, too
    answer: tuple[str, ...] | None = None  # branches whose mean probability is the prediction; None: the model's own
    dropout: float | None = None  # before every classifier; the attention of the fusion keeps its published 0.2
    # sgkrl, mmal: 'birds', 'vehicles', or groups of ((height, width), ...), quota in cells of a 14-cell grid, such as
    # ((((4, 4), (3, 5)), 2), (((8, 8),), 1)): the two best of small windows, the best one of the large.
    windows: str | Windows | None = None  # which windows of the object are looked at
    wiring: str = "trained"  # sgkrl: trained (every part learns) or published (fusion and weighting stay random)
    graph_scope: str = "image"  # sgkrl, published wiring: image, or batch (windows of other images are linked)
    graph_neighbours: int = 3  # sgkrl: how many of the nearest windows a window is linked to, if there are as many
    graph_edges: str = "equal"  # sgkrl: what a link weighs: equal, distance (near ones more) or overlap
    # None: yes in the trained wiring. On 439 test birds, three seeds (benchmarks/birds.md), the graph was right for
    # 64 % with it and relative spatial weights, 41 with neither; the answer for 66 with both and with neither.
    graph_residual: bool | None = None  # sgkrl: the graph's logits are added to the mean of those of the windows
    # Plain sigmoids learn to open everywhere, or along one side of the map: on the demo the windows lay there and were
    # right for 54 %, with relative ones on the bird, for 64. None: relative in the trained wiring.
    spatial_weights: str | None = None  # sgkrl: relative (mean 1 in each picture) or absolute (sigmoids, as published)
    without: tuple[str, ...] = ()  # sgkrl, trained wiring: fusion, weighting: parts that are left out, for comparison
    # An experiment: its gradient is several times as large as all others together, so set clip_gradient_norm, too.
    crop_gradient: bool = False  # sgkrl, trained wiring: the losses of what is cut out move the object box, too
    # sgkrl, mmal, flrdf: where the object is. None: as published (32, 1); for sgkrl's trained wiring on pretrained
    # weights 1.2, and 16 where the input is smaller than 448. Boxes with IoU >= 0.5 on 120 training birds of CUB,
    # ImageNet weights, nothing trained: 62.5 % as published; at 224 pixels 77.5 % with 16 and 1.2; at 448 71.7 % with
    # 1.2, 76.7 % with 16, too, which makes that pass 1.6 times as long. From random weights a finer map found less:
    # 28 of 60 demo birds after six of eleven epochs, against 37 as published (one run each).
    localization_stride: int | None = None  # pixels of the input for each cell of the map of the object: 32 or 16
    localization_threshold: float | None = None  # cells belong to the object above so many times the map's mean
    # flrdf. Its paper leaves the next four open.
    suppression: str | float = "learnable"  # what channels are capped at: learnable, or a share of their maximum (0.5)
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
    warmup_epochs: int | None = None  # first epochs, that train only the raw branch; None: 1, but never all epochs
    mask_from_epoch: int | None = None  # sgkrl: from this epoch on (from 1) the background is masked, as published (46)

    # ---- Faults ---------------------------------------------------------------------------------------------------
    save_every_steps: int = 0  # a checkpoint within an epoch every so many steps, too; 0: after every epoch only
    keep_checkpoints: int = 0  # keep the checkpoints of the last so many epochs beside last.pth and best.pth; 0: none
    on_bad_image: str = "stop"  # unreadable pictures: stop before training, or skip (left out and listed in the folder)
    skip_nonfinite: int = 0  # so many steps with a loss that is not finite are skipped before the run stops

    # ---- Machine --------------------------------------------------------------------------------------------------
    device: str = "auto"  # auto: the GPU where there is one; or cpu, cuda, cuda:1 ...
    data_parallel: bool = True  # several visible GPUs: share each batch among them (nn.DataParallel)
    sync_batch_norm: bool = False  # torchrun on GPUs: batch-norm statistics of all processes' images; slower
    # auto is settled when a run starts and then belongs to it: on other hardware, continue with --precision bf16 or
    # float32, as the refusal says. bf16 without the hardware is right but slower than float32.
    precision: str = "auto"  # float32; bf16: mixed precision, about twice as fast; auto: bf16 where the hardware has it
    channels_last: bool = True  # memory layout that convolutions prefer on CPUs and recent GPUs
    # compile needs a C++ compiler (on a GPU: Triton) and minutes at the start, so it only pays in long runs; not with
    # nn.DataParallel. It rounds differently, so a run cannot be continued with it switched.
    compile: bool = False  # run the backbone through torch.compile
    # Trained classifiers differ in how sure they are: `python test.py FILE --exit_curve` finds the threshold.
    exit_threshold: float = 1.0  # sgkrl, test.py: images whose object branch is surer skip the windows; 1: none does
    workers: int = 2  # processes that load pictures; 0 loads in the main process
    prefetch: int = 2  # batches that each of these processes keeps ready; 3 image_size^2 bytes an image, as uint8
    # Decoded training and validation pictures, 3 image_size^2 bytes each: CUB's 5994 take 3.6 GB at 448, 0.9 GB at 224.
    # ram: in every process that torchrun starts; disk: a file in <checkpoint_dir>/cache/ that all runs on the same
    # pictures share and that may be deleted at any time. Decoding them takes a minute or less at the start.
    cache: str | None = None  # none, ram or disk: worth it where reading JPEGs keeps the GPU waiting
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
    "cache": "none",
}

MODELS: dict[str, dict[str, object]] = {
    "sgkrl": {},
    "mmal": {"epochs": 200, "batch_size": 6},
    "flrdf": {},
    "scrim": {"images_per_class": 2},  # its contrastive loss needs pairs
    "resnet": {},
}

DATASETS: dict[str, dict[str, object]] = {
    # Small and from random weights, to finish on any machine: four minutes on two cores with bf16, about eight without.
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
        "cache": "ram",  # 30 MB, and nothing is drawn twice
    },
    "cub": {},
    "cars": {"windows": "vehicles"},
    "aircraft": {"windows": "vehicles"},
    "dogs": {},
    "nabirds": {},
    "folder": {},
}


# What runs that are older than a setting had. The values above may have been edited since; never None.
BEFORE: dict[str, object] = {
    "batch_norm": "shared",
    "crop_gradient": False,
    "crop_scale": 1.0,
    "graph_edges": "equal",
    "graph_neighbours": 3,
    "graph_residual": False,
    "localization_stride": 32,
    "localization_threshold": 1.0,
    "spatial_weights": "absolute",
    "without": (),
}

HINTS: dict[str, object] = typing.get_type_hints(Settings)

# What each annotated type is called in a sentence
EXPECTED: dict[object, str] = {
    int: "a whole number",
    float: "a number",
    bool: "True or False",
    str: "a text in quotes",
    types.NoneType: "None",
    tuple[str, ...]: "texts such as ('one',) or ('one', 'two')",
    tuple[int, ...]: "whole numbers such as (1,) or (1, 2)",
    dict[str, float]: "numbers by name such as {'object': 2.0}",
    Windows: "groups such as ((((4, 4), (3, 5)), 2),)",
}


class SettingsError(UserError):
    """A setting that cannot be, said in one sentence."""


# ---- The command line -----------------------------------------------------------------------------------------------


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one sentence, without printing the usage first. Raises SettingsError."""

    def error(self, message: str) -> typing.NoReturn:
        printable = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in message)
        raise SettingsError(f"{_shortened(printable.removeprefix('argument '))} (--help lists all settings)") from None


def parse_settings(arguments: Sequence[str] | None = None) -> Settings:
    """Return the settings above with the command line's overrides, complete and checked.

    Raises SettingsError for impossible values, malformed ones and unknown names.
    """
    parser = Parser(
        description="Train a fine-grained classifier; settings default to config.py.",
        usage="%(prog)s [--setting value ...]",
        argument_default=argparse.SUPPRESS,  # what is not given stays out: the defaults are checked as they are
        allow_abbrev=False,
        add_help=False,
    )
    parser.add_argument("-h", "--help", action=_Overview, help="all settings and their values, on one screen")
    parser.add_argument("--help_all", action="help", help="the same with explanations")
    groups: dict[str, argparse._ArgumentGroup] = {}
    for title, names in _blocks().items():
        groups |= dict.fromkeys(names, parser.add_argument_group(title))
    comments = dict(re.findall(r"^    (\w+): .*?  # (.*)$", inspect.getsource(Settings), flags=re.MULTILINE))
    for name, hint in HINTS.items():
        default = _shown(getattr(Settings(), name))
        options = {"help": f"{comments.get(name, '')} (default: {default})".strip().replace("%", "%%")}
        if bool in _members(hint):
            options["action"] = argparse.BooleanOptionalAction
        else:
            options |= {"type": _converter(hint), "metavar": "VALUE"}
            if _takes_several_words(hint):
                options["nargs"] = "*"
        groups.get(name, parser).add_argument(f"--{name}", **options)
    given, unknown = parser.parse_known_args(arguments)
    if unknown:
        near = difflib.get_close_matches(unknown[0].partition("=")[0], [f"--{name}" for name in HINTS], n=1)
        guess = f"; did you mean {near[0]}?" if near else ""
        parser.error(f"unrecognized arguments: {' '.join(unknown)}{guess}")
    values = vars(given)
    if "loss_weights" in values:
        values["loss_weights"] = dict(values["loss_weights"])
    return complete(dataclasses.replace(Settings(), **values))


def _blocks() -> dict[str, list[str]]:
    """The settings by the headed blocks they stand in."""
    blocks: dict[str, list[str]] = {}
    for title, name in re.findall(r"^    (?:# ---- (.*?) -+|(\w+): .*)$", inspect.getsource(Settings), re.MULTILINE):
        if title:
            blocks[title] = names = []
        else:
            names.append(name)
    return blocks


class _Overview(argparse.Action):
    """Prints the settings with their values, without explanations, and ends the program."""

    def __init__(self, option_strings: Sequence[str], dest: str, **options: object):
        super().__init__(option_strings, argparse.SUPPRESS, nargs=0, **options)

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> typing.NoReturn:
        lines = [f"usage: {parser.usage % {'prog': parser.prog}}", "", parser.description, ""]
        for title, names in _blocks().items():
            values = (f"--{name} {_shown(getattr(Settings(), name))}".replace(" ", "\0") for name in names)
            text = textwrap.fill("  ".join(values), 118, initial_indent="  ", subsequent_indent="  ")
            lines += [f"{title}:", text.replace("\0", " ")]
        lines += ["", "None: the value of the data set or the model. --no-NAME switches off what is True."]
        lines += ["--help_all explains every setting."]
        print("\n".join(lines))
        parser.exit()


def _members(hint: object) -> tuple[object, ...]:
    """The types of a union, or the type itself."""
    return typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)


def _takes_several_words(hint: object) -> bool:
    return any(typing.get_origin(member) in (tuple, dict) and member != Windows for member in _members(hint))


def _converter(hint: object) -> typing.Callable[[str], object]:
    """Return what turns a command-line word into a value of the annotated type."""
    members = _members(hint)
    if Windows in members:
        return _windows
    if float in members and str in members:
        return _name_or_number
    member = members[0]
    if typing.get_origin(member) is dict:
        return _weight
    if typing.get_origin(member) is tuple:  # the words of a list come one by one
        member = typing.get_args(member)[0]

    def convert(word: str) -> object:
        try:
            return member(word)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{_shown(word)}; expected {EXPECTED[member]}") from None

    return convert


def _windows(word: str) -> str | tuple:
    """A name, or a tuple written as in Python."""
    if not word.startswith("("):
        return word
    try:
        return ast.literal_eval(word)
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
        raise argparse.ArgumentTypeError(f"{_shown(word)}; expected a name, or a tuple as in config.py") from None


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
        raise argparse.ArgumentTypeError(f"{_shown(word)}; expected name=number, such as object=0.5") from None


# ---- What is possible -----------------------------------------------------------------------------------------------


def complete(settings: Settings) -> Settings:
    """Fill settings left at None from the tables above and check them all. Raises SettingsError.

    Lists become tuples, and whole numbers become floats where those are meant.
    """
    settings = _with_checked_types(settings)
    if settings.dataset not in DATASETS:
        raise SettingsError(f"unknown dataset {_shown(settings.dataset)}; choose one of {', '.join(DATASETS)}")
    if settings.model not in MODELS:
        raise SettingsError(f"unknown model {_shown(settings.model)}; choose one of {', '.join(MODELS)}")
    defaults = PUBLISHED | MODELS[settings.model] | DATASETS[settings.dataset]
    missing = {name: value for name, value in defaults.items() if getattr(settings, name) is None}
    settings = _with_checked_types(dataclasses.replace(settings, **missing))  # the tables may have been edited, too
    if "warmup_epochs" in missing:  # a short run tries every branch out
        warmup_epochs = min(settings.warmup_epochs, max(settings.epochs - 1, 0))
        settings = dataclasses.replace(settings, warmup_epochs=warmup_epochs)
    if settings.image_size is None:
        settings = dataclasses.replace(settings, image_size=settings.input_size)
    found = {name: value for name, value in _of_the_wiring(settings).items() if getattr(settings, name) is None}
    settings = dataclasses.replace(settings, **found, without=tuple(sorted(settings.without)))
    _check_values(settings)
    _check_together(settings)
    return settings


def _of_the_wiring(settings: Settings) -> dict[str, object]:
    """What settings that sgkrl's trained wiring changes have where they are not set."""
    trained = settings.model == "sgkrl" and settings.wiring == "trained"
    parts = {"graph_residual": trained, "spatial_weights": "relative" if trained else "absolute"}
    if not trained or settings.pretrained == "none":
        return parts | {"batch_norm": "shared", "localization_stride": 32, "localization_threshold": 1.0}
    return parts | {
        "batch_norm": "shared" if settings.sync_batch_norm else "frozen",
        "localization_stride": 16 if settings.input_size < 448 else 32,
        "localization_threshold": 1.2,
    }


def _with_checked_types(settings: Settings) -> Settings:
    """Return the settings with every value as its field's annotation says. Raises SettingsError."""
    values = {}
    for name, hint in HINTS.items():
        value = getattr(settings, name)
        came = f"{name} is {_shown(value)} ({type(value).__name__})"
        try:
            values[name] = _as_annotated(value, hint)
        except TypeError:
            expected = " or ".join(EXPECTED[member] for member in _members(hint))
            raise SettingsError(f"{came}; expected {expected}") from None
        except OverflowError:
            raise SettingsError(f"{came}; expected a smaller number, of 64 bits") from None
    return dataclasses.replace(settings, **values)


def _as_annotated(value: object, hint: object) -> object:
    """Return the value as a plain value of the annotated type. Raises TypeError, OverflowError for huge numbers."""
    kind, parts = typing.get_origin(hint) or hint, typing.get_args(hint)
    if kind is types.UnionType:
        for member in parts:
            with contextlib.suppress(TypeError):
                return _as_annotated(value, member)
        raise TypeError
    if kind is tuple and isinstance(value, tuple | list):
        parts = parts[:1] * len(value) if parts[-1] is ... else parts
        if len(value) != len(parts):
            raise TypeError
        return tuple(_as_annotated(item, part) for item, part in zip(value, parts, strict=True))
    if kind is dict and isinstance(value, dict):
        return {_as_annotated(name, parts[0]): _as_annotated(item, parts[1]) for name, item in value.items()}
    if kind is float and type(value) is int:
        return float(value)
    if type(value) is not kind:  # not isinstance: True is no number
        raise TypeError
    if kind is int and not -(2**63) <= value < 2**63:
        raise OverflowError
    return value


def _require(settings: Settings, name: str, condition: bool, expected: str) -> None:
    if not condition:
        raise SettingsError(f"{name} is {_shown(getattr(settings, name))}; expected {expected}")


def _check_values(settings: Settings) -> None:
    """Refuse what a setting can never be, naming it, what came and what is possible. Raises SettingsError."""
    require = functools.partial(_require, settings)
    for name in ("epochs", "batch_size", "evaluation_batch_size"):
        require(name, getattr(settings, name) >= 1, "a whole number of at least 1")
    for name in ("graph_neighbours", "jigsaw_blocks", "coarse_channels", "part_proposals", "parts_in_answer"):
        require(name, getattr(settings, name) >= 1, "a whole number of at least 1")
    for name in ("pictures_every", "warmup_epochs", "seed", "images_per_class"):
        require(name, getattr(settings, name) >= 0, "a whole number of at least 0")
    for name in ("save_every_steps", "keep_checkpoints", "skip_nonfinite"):
        require(name, getattr(settings, name) >= 0, "a whole number of at least 0")
    require("prefetch", 1 <= settings.prefetch <= 1024, "a whole number from 1 to 1024")
    require("workers", 0 <= settings.workers <= 1024, "a whole number from 0 to 1024, as each is a process")
    for name in ("brightness", "contrast", "dropout", "label_smoothing", "validation", "momentum", "part_max_iou"):
        require(name, 0 <= getattr(settings, name) < 1, "a number from 0 to less than 1")
    require("flip", 0 <= settings.flip <= 1, "a probability from 0 to 1")
    require("crop_scale", 0.01 <= settings.crop_scale <= 1, "a number from 0.01 to 1")
    require("test_fraction", 0 < settings.test_fraction < 1, "a share between 0 and 1")
    for name in ("learning_rate", "head_learning_rate_factor"):
        require(name, 0 < getattr(settings, name) < math.inf, "a finite number above 0")
    for name in ("weight_decay", "clip_gradient_norm"):
        require(name, 0 <= getattr(settings, name) < math.inf, "a finite number of at least 0")
    require(
        "input_size",
        settings.input_size % 32 == 0 and settings.input_size >= 96,
        "a multiple of 32 of at least 96, such as 224 or 448",
    )
    require("milestones", all(m >= 1 for m in settings.milestones), "epochs, counted from 1")
    require("mask_from_epoch", settings.mask_from_epoch >= 1, "an epoch, from 1")
    require(
        "device",
        re.fullmatch(r"auto|cpu|cuda(:[0-9]{1,2})?", settings.device) is not None,
        "'auto', 'cpu', 'cuda', 'cuda:1' ...",
    )
    choices = {
        "wiring": ("trained", "published"),
        "graph_scope": ("image", "batch"),
        "graph_edges": ("equal", "distance", "overlap"),
        "spatial_weights": ("relative", "absolute"),
        "batch_norm": ("shared", "per_pass", "frozen"),
        "select_on": ("validation", "test"),
        "schedule": ("steps", "one_cycle"),
        "on_bad_image": ("stop", "skip"),
        "precision": ("auto", "float32", "bf16"),
        "cache": ("none", "ram", "disk"),
    }
    for name, possible in choices.items():
        *most, last = map(repr, possible)
        require(name, getattr(settings, name) in possible, f"{', '.join(most)} or {last}")
    require("exit_threshold", 0 <= settings.exit_threshold <= 1, "a probability from 0 to 1")
    parts = set(settings.without)
    at_most_once = parts <= {"fusion", "weighting"} and len(parts) == len(settings.without)
    require("without", at_most_once, "'fusion', 'weighting', both or nothing")
    is_share = not isinstance(settings.suppression, str) and 0 < settings.suppression <= 1
    require("localization_stride", settings.localization_stride in (32, 16), "32 or 16")
    require("localization_threshold", 0 < settings.localization_threshold < math.inf, "a number above 0, such as 1.2")
    require("suppression", settings.suppression == "learnable" or is_share, "'learnable' or a share above 0, at most 1")
    sizes = settings.anchor_sizes
    require("anchor_sizes", len(sizes) == 3 and all(s >= 1 for s in sizes), "three sizes in pixels, of at least 1")
    weights = (settings.loss_weights or {}).values()
    require("loss_weights", all(0 <= w < math.inf for w in weights), "finite numbers of at least 0")
    if settings.classes is not None:
        patterns = settings.classes
        require(
            "classes", len(patterns) > 0 and all(patterns), "at least one pattern and no empty one, or None for all"
        )
    if settings.answer is not None:
        once = len(set(settings.answer)) == len(settings.answer)
        require("answer", len(settings.answer) > 0 and once, "at least one branch, and each of them once")
    if settings.name is not None:
        require("name", re.fullmatch(r"[\w.+-]+", settings.name) is not None, "letters, digits and any of . _ + -")
    require("checkpoint_dir", _can_be_folder(settings.checkpoint_dir), "a folder that is there or can be made")
    if settings.dataset != "demo":
        folder = f"the folder that holds {settings.dataset}"
        require("data_root", settings.data_root is not None and _can_be_folder(settings.data_root), folder)


def _check_together(settings: Settings) -> None:
    """Refuse settings, each of them possible, that contradict each other. Raises SettingsError."""
    require = functools.partial(_require, settings)
    require("image_size", settings.image_size >= settings.input_size, f"at least input_size, {settings.input_size}")
    require(
        "validation",
        settings.validation > 0 or settings.select_on == "test",
        "a share above 0, unless select_on is 'test': something has to choose the best epoch",
    )
    only_raw = settings.model == "resnet" or settings.answer == ("raw",)
    require(
        "warmup_epochs",
        settings.warmup_epochs < settings.epochs or only_raw,
        f"less than epochs, {settings.epochs}: {settings.model} answers with branches that are trained after it",
    )
    blocks = settings.input_size // 32
    require(
        "jigsaw_blocks", settings.jigsaw_blocks <= blocks, f"at most {blocks}: a block is a cell of 32 pixels or more"
    )
    proposals = settings.part_proposals
    require("parts_in_answer", settings.parts_in_answer <= proposals, f"at most part_proposals, {proposals}")
    require(
        "images_per_class",
        settings.images_per_class == 0 or settings.batch_size % settings.images_per_class == 0,
        f"0, or a number that divides batch_size, {settings.batch_size}",
    )
    has_statistics = settings.batch_norm != "frozen" or settings.pretrained != "none"
    require(
        "batch_norm", has_statistics, "'shared' or 'per_pass' where pretrained is 'none': frozen ones must be learnt"
    )
    require(
        "sync_batch_norm",
        not settings.sync_batch_norm or settings.batch_norm == "shared",
        "False where batch_norm is 'per_pass', whose statistics each process takes from its own images, or 'frozen'",
    )
    # What only one system minds
    if settings.model == "scrim" and (settings.loss_weights or {}).get("contrastive") != 0:
        require(
            "images_per_class",
            2 <= settings.images_per_class <= settings.batch_size // 2,
            f"at least 2 for scrim, whose contrastive loss compares images of one class, and at most half of "
            f"batch_size, {settings.batch_size}, as it compares classes, too",
        )
    if settings.model == "sgkrl":
        require(
            "graph_scope",
            settings.graph_scope == "image" or settings.wiring == "published",
            "'image', unless wiring is 'published': the trained wiring links windows of one image only",
        )
        require(
            "graph_edges",
            settings.graph_edges == "equal" or settings.graph_scope == "image",
            "'equal' where graph_scope is 'batch': windows of two images have no distance and no overlap",
        )
        for name, as_published in (("graph_residual", False), ("spatial_weights", "absolute"), ("without", ())):
            require(
                name,
                getattr(settings, name) == as_published or settings.wiring == "trained",
                f"{as_published!r} where wiring is 'published'",
            )
        require(
            "without",
            "weighting" not in settings.without or settings.spatial_weights != "absolute",
            "nothing or 'fusion' where spatial_weights is 'absolute': without the weighting there are no such weights",
        )
        require(
            "crop_gradient",
            not settings.crop_gradient or settings.wiring == "trained",
            "False where wiring is 'published', whose fusion never learns",
        )
    can_exit = settings.model == "sgkrl" and settings.graph_scope == "image"
    require(
        "exit_threshold",
        settings.exit_threshold == 1 or can_exit,
        "1, unless model is sgkrl with graph_scope 'image': other systems have no pass to skip",
    )
    if settings.model == "flrdf":
        require(
            "classify_suppressed",
            settings.classify_suppressed or settings.suppression != "learnable",
            "True, unless suppression is a number such as 0.7: nothing else would teach the learnable one",
        )
    if settings.backbone in ("resnet18", "resnet34"):
        require(
            "stride_on_first_conv",
            not settings.stride_on_first_conv,
            f"False for {settings.backbone}, which has no 1x1 convolution to put it on; resnet50 and deeper have",
        )


def _can_be_folder(text: str) -> bool:
    try:
        return text != "" and stat.S_ISDIR(Path(text).expanduser().stat().st_mode)
    except FileNotFoundError:
        return True
    except (OSError, ValueError, RuntimeError):  # below a file, too long, no file name, the home of an unknown user
        return False


def _shown(value: object) -> str:
    """The value as Python writes it, in one line that is not too long."""
    try:
        return _shortened(" ".join(repr(value).splitlines()))
    except Exception:  # more digits, or deeper nested, than Python writes
        return "a value that cannot be written out"


def _shortened(text: str) -> str:
    return text if len(text) <= 400 else f"{text[:400]}..."


def settings_of_older_runs() -> dict[str, object]:
    """Return what every setting was before it existed."""
    return dataclasses.asdict(Settings()) | BEFORE


def run_name(settings: Settings) -> str:
    """Return the name of the run's folder, `<dataset>-<model>[-<name>]`."""
    return "-".join(filter(None, (settings.dataset, settings.model, settings.name)))
