"""Every setting of a run. Edit the values here, or override any of them on the command line.

    python train.py                                                        # the drawn demo birds, ResNet-18, 3-8 min
    python train.py --dataset cub --data_root DIR                          # SG-KRL on CUB-200-2011, ResNet-50 at 448
    python train.py --dataset cub --data_root DIR --model mmal --name try1 # another system, a folder of its own
    python train.py --help                                                 # settings, the model's own too, and values
    python train.py --help_all                                             # the same with explanations

Here are the settings that all systems share; those that only one has stand in `Options` of its own file,
networks/systems/<model>.py. A value of None takes the first that there is of: that of the `recipe`, the data set's own
in the tables below, the system's `run_defaults`, the one in PUBLISHED. So an edit here always wins, and a flag over an
edit.
docs/settings.md explains each at length, with what was measured.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from utils.command_line import first_value, parse_flags
from utils.config_slips import check_edited, names_what_is_absent
from utils.older_runs import BEFORE, UnknownSettingsError, in_current_form
from utils.options import (
    Count,
    CountOrZero,
    Positive,
    PositiveOrZero,
    Probability,
    SettingsError,
    Share,
    checked,
    hints,
    shown,
    with_lists_as_defaults,
)
from utils.shared_settings import (
    NEEDED,
    READ,
    Alpha,
    Batches,
    Branches,
    Degrees,
    Device,
    Epochs,
    Folder,
    Fraction,
    PartOfArea,
    Patterns,
    Processes,
    RunName,
    SideOfInput,
    Weights,
    refuse_contradictions,
    refuse_other_data_sets,
)


@dataclass(frozen=True)
@with_lists_as_defaults
@names_what_is_absent(READ)
class Settings:
    # ---- What to train, and on what -----------------------------------------------------------------------------
    model: str = "sgkrl"  # the system: the name of a file in networks/systems/
    options: dict[str, Any] = {}  # the system's own settings, such as {"graph_neighbours": 2}; each is a flag, too
    dataset: str = "demo"  # demo, cub, cars, aircraft, dogs, nabirds, flowers, pets, folder (per class) or csv
    data_root: str | None = None  # folder that holds the data set; the demo set is drawn in memory and needs none
    classes: Patterns | None = None  # only the classes whose names match, such as '*_Gull' '*_Wren'; None: all
    class_level: Count | None = None  # dataset=folder: classes are folders so many levels deep; None: found, if clear
    labels: str | None = None  # dataset=csv: the table of pictures and classes; None: the only one there
    validation_labels: str | None = None  # dataset=csv: a table for the validation part, if it has one of its own
    test_labels: str | None = None  # dataset=csv: likewise for the test part
    image_column: str | None = None  # dataset=csv: its column of pictures; None: by the usual names
    label_column: str | None = None  # dataset=csv: its column of classes; None: by the usual names
    split_column: str | None = None  # dataset=csv: its column of parts (train, validation, test), if there is one
    aircraft_level: Literal["variant", "family", "manufacturer"] = "variant"  # dataset=aircraft: what the classes are
    name: RunName | None = None  # added to the run's folder, to keep several runs of one model and data set apart
    checkpoint_dir: Folder = "checkpoint"  # the run writes to <checkpoint_dir>/<dataset>-<model>[-<name>]/
    fresh: bool = False  # start anew: a run that is in the folder already is moved aside
    seed: CountOrZero = 0  # fixes weights, split, shuffling, augmentation and dropout

    # ---- Which images choose the best epoch -----------------------------------------------------------------------
    validation: Share = 0.1  # share of the training images of each class that is held back for it
    select_on: Literal["validation", "test"] = "validation"  # test: trains on all; test figures are optimistic
    test_fraction: Fraction = 0.2  # data without a test part: share of each class that is held back for it

    # ---- Pictures -------------------------------------------------------------------------------------------------
    input_size: SideOfInput | None = None  # side in pixels of what the backbone sees: a multiple of 32, at least 96
    image_size: Count | None = None  # side of what a batch holds; larger than input_size, crops gain detail; None: that
    resize_size: Count | None = None  # side at which pictures are loaded; image_size is cropped out of it; None: that
    keep_aspect_ratio: bool | None = None  # resize the shorter side to resize_size, not both; the crop is a square
    padding: CountOrZero | None = None  # zeros round the picture before training's random crop
    flip: Probability | None = None  # probability of a horizontal flip in training
    brightness: Share | None = None  # training brightness is multiplied by 1 - x to 1 + x
    contrast: Share | None = None  # likewise contrast
    saturation: Share | None = None  # likewise saturation
    rotation: Degrees | None = None  # training pictures are turned by up to so many degrees either way
    erasing: Probability | None = None  # probability that a random rectangle of a training picture is erased
    crop_scale: PartOfArea | None = None  # training sees a random part of this share of the area or more; 1: all of it
    auto_augment: Literal["none", "trivialaugment", "randaugment"] | None = None  # random operations in training
    normalization: Literal["imagenet", "half"] | None = None  # half: mean and deviation 0.5 for every colour

    # ---- Network --------------------------------------------------------------------------------------------------
    backbone: str | None = None  # resnet18, resnet50, regnet_y_1_6gf, convnext_tiny, swin_t ...: docs/settings.md
    pretrained: str | None = None  # torchvision weights such as IMAGENET1K_V2, a .pth file, or none: random weights
    initial_weights: str | None = None  # best.pth of another run, other classes or system included; None: pretrained
    stride_on_first_conv: bool = False  # for .pth files of the ResNet variant with the stride on the 1x1 convolution
    last_stride: Literal[1, 2] | None = None  # 1: the last stage without its stride, final maps twice as fine (cal)
    batch_norm: Literal["shared", "per_pass", "frozen"] | None = None  # whose running statistics a pass uses
    prediction: Branches | None = None  # branches that are ensembled; None: the system's own
    ensembling: Literal["mean_probability", "mean_logits", "sum_logits", "learned"] | None = None  # what predicts
    dropout: Share | None = None  # before every classifier; the attention of the fusion keeps its published 0.2

    # ---- Training -------------------------------------------------------------------------------------------------
    recipe: str = "none"  # none, or modern: a set of values for what is None below, see RECIPES
    epochs: Count | None = None  # passes over the training images; what fills no batch is left out
    patience: CountOrZero = 0  # stop after so many epochs without a gain on what chooses the best one; 0: never
    batch_size: Count | None = None  # over all devices together
    gradient_accumulation: Count = 1  # each batch is computed in so many parts, for less memory; the step is of all
    learning_rate: Positive | None = None  # the highest value of the schedule
    head_learning_rate_factor: Positive | None = None  # parts that start from random weights: times this
    optimizer: Literal["sgd", "adamw"] | None = None  # adamw wants a lower learning rate, such as 1e-4
    momentum: Share | None = None  # of SGD
    weight_decay: PositiveOrZero | None = None  # of all weights
    decay_norms_and_biases: bool | None = None  # False: the weights of norms and all biases do not decay
    schedule: Literal["steps", "one_cycle", "cosine", "cosine_per_step", "exponential"] | None = None  # steps: x 0.1
    milestones: Epochs | None = None  # schedule=steps: the epochs after which the learning rate falls to a tenth
    decay_rate: Fraction | None = None  # schedule=exponential: what an epoch multiplies the learning rate by
    linear_warmup_epochs: PositiveOrZero | None = None  # in which the learning rate first rises; 0.5: half of one
    frozen_trunk_epochs: CountOrZero | None = None  # first epochs, in which only the heads learn; all: linear probe
    ema_decay: Share | None = None  # of a moving average of the weights, which then is the result; 0: none is kept
    clip_gradient_norm: PositiveOrZero | None = None  # a larger gradient is scaled down to this norm; 0: never
    label_smoothing: Share | None = None  # share of the target that goes to the other classes
    class_weights: Literal["none", "balanced"] | tuple[Positive, ...] = "none"  # of cross-entropies, or one per class
    mixup: Alpha | None = None  # alpha; two pictures are blended, and their labels; only single-branch systems; 0: off
    cutmix: Alpha | None = None  # alpha; a part of a picture comes from another one, and its label's share; likewise
    loss_weights: Weights | None = None  # weights of loss terms, such as {"object": 2.0}; 0: term not trained
    images_per_class: CountOrZero | None = None  # batches hold so many of each class; 0: plainly shuffled
    warmup_epochs: CountOrZero | None = None  # first epochs, that train warm-up branches only: raw as a rule

    # ---- Faults ---------------------------------------------------------------------------------------------------
    save_every_steps: CountOrZero = 0  # a checkpoint within an epoch every so many steps, too; 0: after every epoch
    keep_checkpoints: CountOrZero = 0  # keep those of the last so many epochs beside last.pth and best.pth; 0: none
    on_bad_image: Literal["stop", "skip"] = "stop"  # unreadable pictures: stop before training, or leave out and list
    skip_nonfinite: CountOrZero = 0  # so many steps with a loss that is not finite are skipped before the run stops

    # ---- Machine --------------------------------------------------------------------------------------------------
    device: Device = "auto"  # auto: the GPU where there is one; or cpu, cuda, cuda:1 ..., mps (Apple's GPUs)
    data_parallel: bool = True  # several visible GPUs: share each batch among them (nn.DataParallel)
    sync_batch_norm: bool = False  # torchrun on GPUs: batch-norm statistics of all processes' images; slower
    precision: Literal["auto", "float32", "bf16", "fp16"] = "auto"  # the last two: mixed; auto: bf16 where in hardware
    channels_last: bool = True  # memory layout that convolutions prefer on CPUs and recent GPUs
    compile: bool = False  # run the backbone through torch.compile: for long runs on GPUs; not with nn.DataParallel
    workers: Processes = 2  # processes that load pictures; 0 loads in the main process
    picture_memory: Positive = 0.36  # GB that one decoded picture may take: a JPEG of more is decoded smaller
    prefetch: Batches = 2  # batches that each of these processes keeps ready; 3 image_size^2 bytes an image, as uint8
    cache: Literal["none", "ram", "disk"] | None = None  # decoded pictures: worth it where JPEGs keep the GPU waiting
    evaluation_batch_size: Count = 16  # images at a time where nothing is learnt
    log_every_steps: CountOrZero = 50  # steps between points of curves within epochs, and lines in a log file; 0: none
    pictures_every: CountOrZero = 5  # epochs between panels of boxes, masks and windows in TensorBoard; 0: never


# What is left at None above and neither in the data set's nor in the system's own values: the hyperparameters of the
# published SG-KRL for CUB, Cars and Aircraft; those of FLRDF and SCRIM are not known to us.
PUBLISHED: dict[str, object] = {
    "input_size": 448,
    "keep_aspect_ratio": False,
    "padding": 0,
    "flip": 0.5,
    "brightness": 0.2,
    "contrast": 0.2,
    "saturation": 0.0,
    "rotation": 0.0,
    "erasing": 0.0,
    "crop_scale": 1.0,
    "auto_augment": "none",
    "normalization": "imagenet",
    "backbone": "resnet50",
    "pretrained": "IMAGENET1K_V1",
    "last_stride": 2,
    "batch_norm": "shared",
    "ensembling": "mean_probability",
    "dropout": 0.5,
    "epochs": 100,
    "batch_size": 40,
    "learning_rate": 1e-3,
    "head_learning_rate_factor": 1.0,
    "optimizer": "sgd",
    "momentum": 0.9,
    "weight_decay": 1e-4,
    "decay_norms_and_biases": True,
    "schedule": "steps",
    "milestones": (60, 100),
    "decay_rate": 0.95,
    "linear_warmup_epochs": 0.0,
    "frozen_trunk_epochs": 0,
    "ema_decay": 0.0,
    "clip_gradient_norm": 0.0,
    "label_smoothing": 0.0,
    "mixup": 0.0,
    "cutmix": 0.0,
    "warmup_epochs": 1,
    "images_per_class": 0,
    "cache": "none",
}

# Values that belong together, and so come before those of a data set and of a system: any system can be trained with
# them. `modern` brought `sgkrl` 3.3 points on all of CUB (docs/results.md).
RECIPES: dict[str, dict[str, object]] = {
    "none": {},
    "modern": {
        "optimizer": "adamw",
        "learning_rate": 1e-4,
        "head_learning_rate_factor": 10.0,
        "weight_decay": 0.05,
        "decay_norms_and_biases": False,
        "schedule": "one_cycle",
        "linear_warmup_epochs": 0.0,
        "label_smoothing": 0.1,
        "ema_decay": 0.999,
    },
}

# What a data set changes; settings that only some systems have are taken by those.
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
        "head_learning_rate_factor": 1.0,  # all of it starts from random weights
        "schedule": "one_cycle",
        "clip_gradient_norm": 10.0,
        "label_smoothing": 0.1,
        "warmup_epochs": 5,
        "mask_from_epoch": 100,  # past the last epoch: never
        "cache": "ram",  # 30 MB, and nothing is drawn twice
    },
    "cub": {},
    "cars": {
        "windows": "vehicles",
        "location_weight": 0.01,
        "semantic_weights": (1.0, 0.25, 1.0),
        "stage3_pooling": "mean",
    },
    "aircraft": {
        "windows": "vehicles",
        "location_weight": 0.01,
        "regions": 2,
        "semantic_weights": (0.5, 0.1, 0.5),
        "stage3_pooling": "mean",
    },
    "dogs": {"semantic_weights": (0.01, 0.01, 1.0), "stage3_pooling": "mean", "combine_maps": False},
    "nabirds": {},
    "flowers": {},
    "pets": {},
    "folder": {},
    "csv": {},
}


# ---- From what is given to what a run is ----------------------------------------------------------------------------


def complete(settings: Settings) -> Settings:
    """Fill settings left at None as the top of this file says, and check them all. Raises SettingsError.

    `options` then holds all of the system's own. Lists become tuples, and whole numbers floats where those are meant.
    """
    from networks import Shared, build_options, check_trunk, defaults_of, find_system, refuse_slips, settings_of_systems

    tables = {"PUBLISHED": PUBLISHED, **_titled(RECIPES, "recipe"), **_titled(DATASETS, "the table of")}
    check_edited(Settings, tables, read=READ, path=__file__, options=settings_of_systems())
    settings = checked(settings)
    if settings.dataset not in DATASETS:
        readers = {path.stem for path in (Path(__file__).parent / "utils" / "data" / "readers").glob("*.py")}
        row = ", or give its reader's file a row in DATASETS of config.py" if settings.dataset in readers else ""
        raise SettingsError(f"unknown dataset {shown(settings.dataset)}; choose one of {', '.join(DATASETS)}{row}")
    if settings.recipe not in RECIPES:
        raise SettingsError(f"unknown recipe {shown(settings.recipe)}; choose one of {', '.join(RECIPES)}")
    system, of_data, of_recipe = find_system(settings.model), DATASETS[settings.dataset], RECIPES[settings.recipe]
    refuse_slips(system, hints(Settings))
    given, shared = settings, None
    for _ in range(2):  # a system's values may follow from the others: those are there in the second round
        defaults = PUBLISHED | defaults_of(system, shared) | of_data | of_recipe
        missing = {n: value for n, value in defaults.items() if n in hints(Settings) and getattr(given, n) is None}
        settings = checked(dataclasses.replace(given, **missing))  # the tables may have been edited, too
        absent = [name for name in NEEDED if getattr(settings, name) is None]
        if absent:
            raise SettingsError(f"config.py: PUBLISHED has no value for {', '.join(absent)}: put one there")
        shared = Shared(**{name: getattr(settings, name) for name in Shared._fields})
    if "warmup_epochs" in missing:  # a short run tries every branch out
        longest = max(settings.epochs - 1, 0) if system.warmup_branches else 0
        settings = dataclasses.replace(settings, warmup_epochs=min(settings.warmup_epochs, longest))
    if "ensembling" in missing and settings.select_on == "test" and settings.ensembling == "learned":
        settings = dataclasses.replace(settings, ensembling=PUBLISHED["ensembling"])  # test images teach nothing
    if settings.image_size is None:
        settings = dataclasses.replace(settings, image_size=settings.input_size)
    if settings.resize_size is None:
        settings = dataclasses.replace(settings, resize_size=settings.image_size)
    check_trunk(
        settings.backbone,
        stride_on_first_conv=settings.stride_on_first_conv,
        batch_norm=settings.batch_norm,
        last_stride=settings.last_stride,
    )
    refuse_contradictions(settings, system)
    options = _own_values(system, PUBLISHED, of_data, of_recipe) | settings.options
    options = dataclasses.asdict(build_options(system, options, shared))
    return dataclasses.replace(settings, options=dict(sorted(options.items())))


def _own_values(system: type, *tables: object) -> dict[str, object]:
    """Return what the tables say of settings that only the system has; later ones overrule earlier ones."""
    known = hints(system.Options)
    given = (table.items() for table in tables if isinstance(table, dict))
    return {name: value for name, value in itertools.chain.from_iterable(given) if name in known}


def _titled(tables: Mapping[str, object], kind: str) -> dict[str, object]:
    return {f"{kind} {name}": table for name, table in tables.items()}


def run_name(settings: Settings) -> str:
    """Return the name of the run's folder, `<dataset>-<model>[-<name>]`."""
    return "-".join(filter(None, (settings.dataset, settings.model, settings.name)))


# ---- Checkpoints of older versions ----------------------------------------------------------------------------------


def restored(saved: Mapping[str, object]) -> Settings:
    """Return the settings that a checkpoint or a report of any version holds. Raises UnknownSettingsError.

    What is younger than the run has the value that it had before it was a setting.
    """
    from networks import MODELS, find_system, own_settings

    values = dataclasses.asdict(Settings()) | BEFORE | in_current_form(saved, own_settings)
    if values["model"] not in MODELS:
        raise UnknownSettingsError(f"a model that this version does not know: {shown(values['model'])}")
    own = {field.name: field.default for field in dataclasses.fields(find_system(values["model"]).Options)}
    unknown = sorted(values.keys() - hints(Settings).keys())
    if unknown:
        raise UnknownSettingsError(f"settings that this version does not know: {', '.join(unknown)}")
    unknown = sorted(values["options"].keys() - own)
    if unknown:
        name = values["model"]
        raise UnknownSettingsError(f"settings of {name} that this version does not know: {', '.join(unknown)}")
    younger = {name: value for name, value in own.items() if value not in (dataclasses.MISSING, None)}
    return Settings(**values | {"options": younger | values["options"]})


def rebuilt(saved: Mapping[str, object], **overrides: object) -> Settings:
    """Return the same complete, with some of them changed, the system's own among them. Raises SettingsError."""
    settings = restored(saved)
    own = {name: value for name, value in overrides.items() if name not in hints(Settings)}
    shared = {name: value for name, value in overrides.items() if name in hints(Settings)}
    return complete(dataclasses.replace(settings, **shared, options={**settings.options, **own}))


# ---- The command line -----------------------------------------------------------------------------------------------

NO_FLAGS = {  # that somebody may try all the same
    "wiring": "wiring published is the model sgkrl_published now",
    "answer": "answer is called prediction now",
    "options": "each of the options is a flag of its own, such as --graph_neighbours 2",
}


def parse_settings(arguments: Sequence[str] | None = None, **overrides: object) -> Settings:
    """Return the settings above with the command line's overrides, complete and checked; `overrides` come before both.

    Raises SettingsError for impossible values, malformed ones and unknown names.
    """
    from networks import find_system, owners_of, refusal_of_option, refuse_slips

    edited = Settings()
    model = first_value(arguments, "model", edited.model)
    system = find_system(model)
    refuse_slips(system, hints(Settings))
    of_data = DATASETS.get(first_value(arguments, "dataset", str(edited.dataset)))
    of_recipe = RECIPES.get(first_value(arguments, "recipe", str(edited.recipe)))

    def explain(name: str) -> str | None:
        return refusal_of_option(name, system) if owners_of(name) else NO_FLAGS.get(name)

    values, own = parse_flags(
        arguments,
        {"": Settings, f"Only {model}": system.Options},
        description="Train a fine-grained classifier; settings default to config.py.",
        explain=explain,
        edited=_own_values(system, PUBLISHED, of_data, of_recipe, edited.options),
    )
    options = edited.options | own if isinstance(edited.options, dict) else edited.options
    settings = complete(dataclasses.replace(edited, **values | overrides, options=options))
    refuse_other_data_sets(settings, flags=values)
    return settings
