"""Settings of runs that were begun by an older version, in the form that this one has."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

from utils.options import SettingsError

# What runs that are older than a shared setting had. The defaults may have been edited since; no None where a table
# would fill it.
BEFORE: dict[str, object] = {
    "aircraft_level": "variant",
    "batch_norm": "shared",
    "crop_scale": 1.0,
    "ensembling": "mean_probability",
    "initial_weights": None,
    "last_stride": 2,
    # of loading
    "normalization": "imagenet",
    "keep_aspect_ratio": False,
    "padding": 0,
    "picture_memory": 0.36,
    "rotation": 0.0,
    "saturation": 0.0,
    "erasing": 0.0,
    "auto_augment": "none",
    # of training
    "recipe": "none",
    "optimizer": "sgd",
    "decay_norms_and_biases": True,
    "decay_rate": 0.95,
    "linear_warmup_epochs": 0.0,
    "frozen_trunk_epochs": 0,
    "gradient_accumulation": 1,
    "ema_decay": 0.0,
    "patience": 0,
    "class_weights": "none",
    "mixup": 0.0,
    "cutmix": 0.0,
}

# The same where it was another one for a system.
BEFORE_OF_SYSTEM: dict[str, dict[str, object]] = {"pmg": {"ensembling": "sum_logits"}}

# The same for settings that a system has of its own.
OPTIONS_BEFORE: dict[str, object] = {
    "anchors": "former",
    "crop_gradient": False,
    "graph_edges": "equal",
    "graph_neighbours": 3,
    "graph_residual": False,
    "localization": "channel_sum",
    "localization_stride": 32,
    "localization_threshold": 1.0,
    "raw_size": None,  # input_size
    "spatial_weights": "absolute",
    "window_source": "pixels",
    "without": (),
}
OPTIONS_BEFORE_OF_SYSTEM: dict[str, dict[str, object]] = {"resnet": {"localization": "none"}}

# The localization_threshold of a system where no other one is accepted any more, as nothing looks at it
UNUSED_THRESHOLD = {"sgkrl": 1.2}  # left out: 1.0

# Former names of settings, of whatever system: none of them may come back
RENAMED = {"parts_in_answer": "parts_in_prediction"}

# When every setting stood in one list, whatever the system was
OF_SYSTEMS = {
    *("windows", "wiring", "graph_scope", "graph_neighbours", "graph_edges", "graph_residual", "spatial_weights"),
    *("without", "crop_gradient", "localization_stride", "localization_threshold", "suppression"),
    *("classify_suppressed", "box_agreement", "jigsaw_blocks", "coarse_channels", "part_proposals"),
    *("parts_in_prediction", "part_max_iou", "parts_of_every_level", "anchor_sizes"),
    *("mask_from_epoch", "exit_threshold"),
}


class UnknownSettingsError(SettingsError):
    """Settings of a newer version, or of no version at all."""


def in_current_form(saved: Mapping[str, object], own: Callable[[object], Collection[str]]) -> dict[str, object]:
    """Return saved settings with those of the system in `options`; `own` names what a system has there.

    Raises UnknownSettingsError where what was saved are no settings.
    """
    options = saved.get("options", {}) if isinstance(saved, dict) else None
    if not isinstance(options, dict) or not all(isinstance(n, str) for n in (*saved, *options, saved.get("model", ""))):
        raise UnknownSettingsError("something else in place of its settings")
    values, options = ({RENAMED.get(n, n): value for n, value in given.items()} for given in (saved, options))
    if "options" not in saved:
        if saved.get("model") == "sgkrl" and saved.get("wiring") == "published":
            values["model"] = "sgkrl_published"
        apart = {name: values.pop(name) for name in tuple(values) if name in OF_SYSTEMS}
        options = {name: value for name, value in apart.items() if name in own(values.get("model"))}
        values |= {"prediction": values.pop("answer", None), "options": options}
    younger = OPTIONS_BEFORE | OPTIONS_BEFORE_OF_SYSTEM.get(values.get("model"), {})
    younger = {name: value for name, value in younger.items() if name in own(values.get("model"))}
    options = younger | options
    if options.get("localization", "channel_sum") != "channel_sum" and "localization_threshold" in options:
        options["localization_threshold"] = UNUSED_THRESHOLD.get(values.get("model"), 1.0)
    if "image_size" in values:  # nothing was cropped
        values.setdefault("resize_size", values["image_size"])
    return BEFORE_OF_SYSTEM.get(values.get("model"), {}) | values | {"options": options}


def folder_of(folder: Path, settings: Any) -> Path:
    """Return a run's folder, or the one that an older version gave the same run, where only that is there.

    `sgkrl_published` was a variant of `sgkrl` (`--wiring published`), and its runs lie in that model's folders.
    """
    former = folder.with_name(folder.name.replace("-sgkrl_published", "-sgkrl", 1))
    if settings.model != "sgkrl_published" or folder.exists():
        return folder
    try:
        found = json.loads((former / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return folder
    if not isinstance(found, dict) or found.get("wiring") != "published" and found.get("model") != settings.model:
        return folder
    return former
