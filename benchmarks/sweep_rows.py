"""The rows of the ablation table: a name for each, and the flags of train.py that make it.

What `ablation.py` runs, after flags that are common to all rows and those that it was given.
"""

from __future__ import annotations

import itertools
import shlex
from collections.abc import Sequence
from pathlib import Path

COMMON = (
    *("--dataset", "cub", "--input_size", "224", "--epochs", "8", "--batch_size", "16"),
    *("--learning_rate", "4e-3", "--head_learning_rate_factor", "5", "--schedule", "one_cycle"),
    *("--clip_gradient_norm", "10", "--pictures_every", "0"),
    *("--batch_norm", "frozen"),  # for every row alike; other statistics after the rows: a table of its own
)

RESNET = ("--model", "resnet")
# the background is masked from an epoch past the last one: never
UNMASKED = ("--mask_from_epoch", "100")
# the object box as MMAL-Net draws it, round what is above the mean of the trunk's own grid
COARSE = ("--localization_stride", "32", "--localization_threshold", "1.0")
COLOCALIZATION = ("--localization", "colocalization")
ASPECT = ("--keep_aspect_ratio",)
MODERN = ("--recipe", "modern", "--learning_rate", "1e-4", "--head_learning_rate_factor", "10")
STAGE3_WINDOWS = ("--window_source", "stage3")
NO_WINDOWS = ("--loss_weights", "window=0", "graph=0", "--prediction", "raw", "fused", "object")
# our SG-KRL as it was before: its graph by itself, spatial weights as CBAM has them
FORMER = (*UNMASKED, "--no-graph_residual", "--spatial_weights", "absolute")
PUBLISHED = ("--model", "sgkrl_published", *UNMASKED)
# comparators see the pictures that the other rows see: their own recipes crop and colour them otherwise. Two things are
# left to those: dflcnn keeps the aspect ratio, and so sees central squares, and pmg normalises with 0.5
INPUT_SIZE = "INPUT_SIZE"  # stands for what the common flags say
# stands for as many epochs as take as long as those of the common flags take `trained`, a training step of which is
# 4.3 plain ones (systems.py at 224 pixels), those of a warm-up less
EQUAL_EPOCHS = "EQUAL_EPOCHS"
PLAIN_STEPS = 4.3
SAME_PICTURES = (
    *("--resize_size", INPUT_SIZE, "--padding", "0", "--flip", "0.5", "--rotation", "0"),
    *("--brightness", "0.2", "--contrast", "0.2", "--saturation", "0"),
)
COMPARATORS = ("ntsnet", "apinet", "cal", "dcl", "dflcnn", "mcloss")

# name -> flags after the common ones
ROWS: dict[str, tuple[str, ...]] = {
    "resnet": RESNET,
    # the plain network trained otherwise, in one thing each
    "resnet-crops": (*RESNET, "--resize_size", "256"),  # random crops of 224, the central one in evaluation
    # the central square of the picture, undistorted, in place of all of it made square; random ones in training
    "resnet-aspect": (*RESNET, *ASPECT),
    "resnet-adamw": (*RESNET, "--optimizer", "adamw", "--learning_rate", "1e-4", "--weight_decay", "0.05"),
    "resnet-ema": (*RESNET, "--ema_decay", "0.999"),
    "resnet-smoothing": (*RESNET, "--label_smoothing", "0.1"),
    "resnet-mixup": (*RESNET, "--mixup", "0.2"),
    "resnet-cutmix": (*RESNET, "--cutmix", "1.0"),
    # the whole recipe, in place of the common rates
    "resnet-modern": (*RESNET, *MODERN),
    "resnet-modern-trivialaugment": (*RESNET, *MODERN, "--auto_augment", "trivialaugment"),
    "resnet-modern-aspect": (*RESNET, *MODERN, *ASPECT),
    # the object found by a frozen copy of the pretrained trunk
    "resnet-colocalization": (*RESNET, *COLOCALIZATION),
    "resnet-colocalization-modern-aspect": (*RESNET, *COLOCALIZATION, *MODERN, *ASPECT),
    "mmal-colocalization": ("--model", "mmal", *COLOCALIZATION),
    "trained-colocalization": (*UNMASKED, *COLOCALIZATION),
    "trained-colocalization-modern-aspect": (*UNMASKED, *COLOCALIZATION, *MODERN, *ASPECT),
    "trained-learned": (*UNMASKED, "--localization", "learned"),
    "trained-learned-modern-aspect": (*UNMASKED, "--localization", "learned", *MODERN, *ASPECT),
    "mmal": ("--model", "mmal"),
    "flrdf": ("--model", "flrdf"),
    "scrim": ("--model", "scrim"),
    **{model: ("--model", model, *SAME_PICTURES) for model in COMPARATORS},
    "dflcnn-modern": ("--model", "dflcnn", *SAME_PICTURES, *MODERN),
    # about as long as 3 epochs of `trained`
    "dflcnn-modern-7-epochs": ("--model", "dflcnn", *SAME_PICTURES, *MODERN, "--epochs", "7"),
    # where rates of its own are needed not to fall to chance
    "crossx": (
        *("--model", "crossx", *SAME_PICTURES, "--stage3_pooling", "mean"),
        *("--learning_rate", "1e-3", "--head_learning_rate_factor", "1"),
    ),
    "pmg": ("--model", "pmg", *SAME_PICTURES, "--learning_rate", "1e-3"),  # a quarter: four steps in every batch
    "resnet-equal-compute": (*RESNET, "--epochs", EQUAL_EPOCHS),
    "resnet-modern-aspect-10-epochs": (*RESNET, *MODERN, *ASPECT, "--epochs", "10"),
    "resnet-10-epochs": (*RESNET, "--epochs", "10"),  # the arithmetic of 3 of `trained`, whose first is raw only
    "apinet-equal-compute": ("--model", "apinet", *SAME_PICTURES, "--epochs", EQUAL_EPOCHS),
    "published": PUBLISHED,
    "published-aspect": (*PUBLISHED, *ASPECT),
    "published-modern-aspect": (*PUBLISHED, *MODERN, *ASPECT),
    "published-modern-aspect-7-epochs": (*PUBLISHED, *MODERN, *ASPECT, "--epochs", "7"),
    "published-batch-graph": (*PUBLISHED, "--graph_scope", "batch"),
    "trained": UNMASKED,
    "trained-mean": (*UNMASKED, "--ensembling", "mean_probability"),  # what `trained` was until weights were learnt
    "trained-aspect": (*UNMASKED, *ASPECT),
    "trained-modern-aspect": (*UNMASKED, *MODERN, *ASPECT),
    "trained-modern-aspect-7-epochs": (*UNMASKED, *MODERN, *ASPECT, "--epochs", "7"),
    "trained-former": FORMER,
    # without one part
    "trained-no-fusion-loss": (*UNMASKED, "--loss_weights", "fused=0", "--prediction", "raw", "object", "graph"),
    "trained-no-fusion": (*UNMASKED, "--without", "fusion"),
    "trained-no-weighting": (*UNMASKED, "--without", "weighting"),
    "trained-no-fusion-no-weighting-modern-aspect": (*UNMASKED, "--without", "fusion", "weighting", *MODERN, *ASPECT),
    "trained-no-windows": (*UNMASKED, *NO_WINDOWS),
    "trained-no-graph": (*UNMASKED, "--loss_weights", "graph=0", "--prediction", "raw", "fused", "object"),
    "trained-mask": ("--mask_from_epoch", "4"),
    "trained-coarse": (*UNMASKED, *COARSE),
    # without the windows, the most expensive part, where only the object box is in question
    "trained-former-no-windows": (*FORMER, *NO_WINDOWS),
    "trained-former-coarse-no-windows": (*FORMER, *COARSE, *NO_WINDOWS),
    "published-no-windows": (*PUBLISHED, "--loss_weights", "window=0", "graph=0"),
    # variants
    "trained-lone-graph": (*UNMASKED, "--no-graph_residual"),
    "trained-absolute-weights": (*UNMASKED, "--spatial_weights", "absolute"),
    "trained-stage3-windows": (*UNMASKED, *STAGE3_WINDOWS),
    "trained-stage3-windows-aspect": (*UNMASKED, *STAGE3_WINDOWS, *ASPECT),
    "trained-raw-128": (*UNMASKED, "--raw_size", "128"),
    "trained-raw-128-stage3-windows": (*UNMASKED, "--raw_size", "128", *STAGE3_WINDOWS),
    "trained-crop-scale": (*UNMASKED, "--crop_scale", "0.5"),
    "trained-crop-gradient": (*UNMASKED, "--crop_gradient"),
    "trained-neighbours": (*UNMASKED, "--graph_neighbours", "6"),
    "trained-graph-overlap": (*UNMASKED, "--graph_edges", "overlap"),
    "trained-graph-distance": (*UNMASKED, "--graph_edges", "distance"),
    "trained-warmup-3": (*UNMASKED, "--warmup_epochs", "3"),
    "trained-smoothing": (*UNMASKED, "--label_smoothing", "0.1"),
    "trained-detail": (*UNMASKED, "--image_size", "448"),
    "trained-prediction-object": (*UNMASKED, "--prediction", "object"),
    "mmal-dense": ("--model", "mmal", "--localization_stride", "16", "--localization_threshold", "1.2"),
    "mmal-detail": ("--model", "mmal", "--image_size", "448"),
}
# flags that leave a run's figures as they are
OF_THE_MACHINE = ("--checkpoint_dir", "--workers", "--cache", "--device")
DECIDING = ("resnet", "mmal", "published", "trained", "trained-coarse")


def flags_of(row: str, seed: int, common: Sequence[str]) -> list[str]:
    given = dict(itertools.pairwise(portable(common)))  # of a flag that comes twice the last
    meant = {INPUT_SIZE: given["--input_size"], EQUAL_EPOCHS: str(round(PLAIN_STEPS * int(given["--epochs"])))}
    own = [meant.get(word, word) for word in ROWS[row]]
    return [*common, *own, "--seed", str(seed), "--name", f"{row}-{seed}"]


def portable(flags: Sequence[str]) -> list[str]:
    """Return flags of train.py without what only holds on this machine: places, and how pictures are loaded."""
    options: list[list[str]] = []
    for word in flags:
        if word.startswith("--"):
            name, equals, value = word.partition("=")
            options.append([name, value] if equals else [name])
        else:
            options[-1].append(word)
    words = []
    for name, *values in options:
        if name == "--data_root":
            values = ["DATA"]
        elif name == "--pretrained":
            values = [Path(value).name for value in values]
        if name not in OF_THE_MACHINE:
            words += [name, *values]
    return words


def command_of(flags: Sequence[str]) -> str:
    return f"python train.py {shlex.join(portable(flags))}"


def links_the_batch(flags: Sequence[str]) -> bool:
    scopes = [value for name, value in itertools.pairwise(portable(flags)) if name == "--graph_scope"]
    return scopes[-1:] == ["batch"]
