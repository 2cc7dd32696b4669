"""What the shared settings in `config.py` may be: types that `utils.options` has not, and what contradicts what."""

from __future__ import annotations

import math
import re
import stat
from collections.abc import Container
from pathlib import Path
from typing import Annotated, Any

from utils.options import Limit, SettingsError, require

# What the code reads of the settings in config.py, much of it late in a run
READ = (
    *("model", "options", "dataset", "data_root", "classes", "class_level", "labels", "validation_labels"),
    *("test_labels", "image_column", "label_column", "split_column", "aircraft_level", "name", "checkpoint_dir"),
    *("fresh", "seed", "validation", "select_on", "test_fraction", "input_size", "image_size", "resize_size"),
    *("keep_aspect_ratio", "padding", "flip", "brightness", "contrast", "saturation", "rotation", "erasing"),
    *("crop_scale", "auto_augment", "normalization", "backbone", "pretrained", "initial_weights"),
    "stride_on_first_conv",
    *("last_stride", "batch_norm", "prediction", "ensembling", "dropout", "recipe", "epochs", "patience"),
    *("batch_size", "gradient_accumulation", "learning_rate", "head_learning_rate_factor", "optimizer", "momentum"),
    *("weight_decay", "decay_norms_and_biases", "schedule", "milestones", "decay_rate", "linear_warmup_epochs"),
    *("frozen_trunk_epochs", "ema_decay", "clip_gradient_norm", "label_smoothing", "class_weights", "mixup"),
    *("cutmix", "loss_weights", "images_per_class", "warmup_epochs", "save_every_steps", "keep_checkpoints"),
    *("on_bad_image", "skip_nonfinite", "device", "data_parallel", "sync_batch_norm", "precision", "channels_last"),
    *("compile", "workers", "picture_memory", "prefetch", "cache", "evaluation_batch_size", "log_every_steps"),
    "pictures_every",
)
# Those that no run can do without, whatever is deleted from PUBLISHED in config.py
NEEDED = (
    *("input_size", "keep_aspect_ratio", "padding", "flip", "brightness", "contrast", "saturation", "rotation"),
    *("erasing", "crop_scale", "auto_augment", "normalization", "backbone", "pretrained", "last_stride"),
    *("batch_norm", "ensembling"),
    *("dropout", "epochs", "batch_size", "learning_rate", "head_learning_rate_factor", "optimizer", "momentum"),
    *("weight_decay", "decay_norms_and_biases", "schedule", "milestones", "decay_rate", "linear_warmup_epochs"),
    *("frozen_trunk_epochs", "ema_decay", "clip_gradient_norm", "label_smoothing", "mixup", "cutmix"),
    *("warmup_epochs", "images_per_class", "cache"),
)

# Where and how fast a run is computed, what it shows and keeps, not what it is
OF_THE_MACHINE = frozenset(
    {
        *("data_root", "checkpoint_dir", "device", "data_parallel", "workers", "prefetch", "cache"),
        *("keep_checkpoints", "log_every_steps", "pictures_every"),
    }
)
# Which data set of ours has a use for what only some readers read; one of a user's own may read any
OF_DATA_SET = {
    "class_level": "folder",
    **dict.fromkeys(("labels", "validation_labels", "test_labels"), "csv"),
    **dict.fromkeys(("image_column", "label_column", "split_column"), "csv"),
    "aircraft_level": "aircraft",
}
DATA_SETS = frozenset(("demo", "cub", "cars", "aircraft", "dogs", "nabirds", "flowers", "pets", "folder", "csv"))


def can_be_folder(text: str) -> bool:
    """Whether a path is a folder that is there, or one that could be made."""
    try:
        return text != "" and stat.S_ISDIR(Path(text).expanduser().stat().st_mode)
    except FileNotFoundError:
        return True
    except (OSError, ValueError, RuntimeError):  # below a file, too long, no file name, the home of an unknown user
        return False


Folder = Annotated[str, Limit(can_be_folder, "a folder that is there or can be made")]
SideOfInput = Annotated[
    int, Limit(lambda side: side % 32 == 0 and side >= 96, "a multiple of 32 of at least 96, such as 224 or 448")
]
Device = Annotated[
    str,
    Limit(
        lambda name: re.fullmatch(r"auto|cpu|mps|cuda(:[0-9]{1,2})?", name) is not None,
        "'auto', 'cpu', 'mps', 'cuda', 'cuda:1' ...",
    ),
]
Patterns = Annotated[
    tuple[str, ...], Limit(lambda p: len(p) > 0 and all(p), "at least one pattern and no empty one, or None for all")
]
Branches = Annotated[
    tuple[str, ...],
    Limit(lambda names: 0 < len(names) == len(set(names)), "at least one branch, and each of them once"),
]
RunName = Annotated[str, Limit(lambda n: re.fullmatch(r"[\w.+-]+", n) is not None, "letters, digits, any of . _ + -")]
Fraction = Annotated[float, Limit(lambda x: 0 < x < 1, "a share between 0 and 1")]
Alpha = Annotated[float, Limit(lambda a: a == 0 or 0.01 <= a <= 100, "0, or a number from 0.01 to 100")]
PartOfArea = Annotated[float, Limit(lambda x: 0.01 <= x <= 1, "a number from 0.01 to 1")]
Degrees = Annotated[float, Limit(lambda x: 0 <= x <= 180, "degrees from 0 to 180")]
Epochs = Annotated[tuple[int, ...], Limit(lambda epochs: all(e >= 1 for e in epochs), "epochs, counted from 1")]
Weights = Annotated[
    dict[str, float],
    Limit(lambda weights: all(0 <= w < math.inf for w in weights.values()), "finite numbers of at least 0"),
]
Processes = Annotated[int, Limit(lambda n: 0 <= n <= 1024, "a whole number from 0 to 1024, as each is a process")]
Batches = Annotated[int, Limit(lambda n: 1 <= n <= 1024, "a whole number from 1 to 1024")]


def refuse_other_data_sets(settings: Any, flags: Container[str]) -> None:
    """Refuse complete settings that are for data which the chosen data set would not read. Raises SettingsError.

    Where the data set is one of the `flags`, what was edited may be of the one that was edited.
    """
    dataset, root, chosen = settings.dataset, settings.data_root, "dataset" in flags
    expected = "none for data set demo, which is drawn in memory: give --dataset, such as folder (pictures by class)"
    require(dataset != "demo" or root is None or chosen, "data_root", root, expected)
    for name, owner in OF_DATA_SET.items():
        given = getattr(settings, name) not in (None, "variant") and (name in flags or not chosen)
        if given and dataset in DATA_SETS - {owner}:
            raise SettingsError(
                f"{name} is a setting of data set {owner}, not of {dataset}: give --dataset {owner}, or leave it out"
            )


def refuse_contradictions(settings: Any, system: Any) -> None:
    """Refuse complete settings, each of them possible, that contradict each other. Raises SettingsError."""

    def needs(name: str, condition: bool, expected: str) -> None:
        require(condition, name, getattr(settings, name), expected)

    needs(
        "data_root",
        settings.dataset == "demo" or (settings.data_root is not None and can_be_folder(settings.data_root)),
        f"the folder of the pictures of data set {settings.dataset}: give --data_root DIR",
    )
    needs("image_size", settings.image_size >= settings.input_size, f"at least input_size, {settings.input_size}")
    needs("resize_size", settings.resize_size >= settings.image_size, f"at least image_size, {settings.image_size}")
    needs("padding", 2 * settings.padding < settings.image_size, f"less than half of image_size, {settings.image_size}")
    needs(
        "validation",
        settings.validation > 0 or settings.select_on == "test",
        "a share above 0, unless select_on is 'test': something has to choose the best epoch",
    )
    needs(
        "ensembling",
        settings.ensembling != "learned" or settings.select_on != "test",
        "another one where select_on is 'test': the weights of the branches are learnt on the images that choose the "
        "best epoch, and test images shall not make the prediction",
    )
    needs("warmup_epochs", settings.warmup_epochs == 0 or len(system.warmup_branches) > 0, "0 for this model")
    needs(
        "warmup_epochs",
        settings.warmup_epochs < settings.epochs
        or set(settings.prediction or system.prediction) <= set(system.warmup_branches),
        f"less than epochs, {settings.epochs}: {settings.model} predicts with branches that are trained after it",
    )
    for name in ("mixup", "cutmix"):
        needs(
            name,
            getattr(settings, name) == 0 or system.takes_mixed_pictures(),
            f"0 for {settings.model}: pictures are mixed for systems of one branch and one step only, such as resnet",
        )
    needs(
        "linear_warmup_epochs",
        settings.linear_warmup_epochs == 0 or settings.schedule != "one_cycle",
        "0 for schedule 'one_cycle', which begins with a warm-up of its own",
    )
    needs(
        "linear_warmup_epochs",
        settings.linear_warmup_epochs < settings.epochs,
        f"less than epochs, {settings.epochs}",
    )
    needs(
        "images_per_class",
        settings.images_per_class == 0 or settings.batch_size % settings.images_per_class == 0,
        f"0, or a number that divides batch_size, {settings.batch_size}",
    )
    needs(
        "batch_norm",
        settings.batch_norm != "frozen" or settings.pretrained != "none" or settings.initial_weights is not None,
        "'shared' or 'per_pass' where pretrained is 'none' and initial_weights not given: frozen ones must be learnt",
    )
    needs(
        "sync_batch_norm",
        not settings.sync_batch_norm or settings.batch_norm == "shared",
        "False where batch_norm is 'per_pass', whose statistics each process takes from its own images, or 'frozen'",
    )
