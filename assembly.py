"""What the scripts put together from settings: data, loaders, networks, and networks out of checkpoints."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import torch

from config import Settings, SettingsError, complete, settings_of_older_runs
from datasets import (
    Pictures,
    collate,
)
from networks import build_network
from networks.folding import cast_for_autocast, fold_batch_norm
from utils.checkpoint import CheckpointError, load_checkpoint
from utils.reporting.panels import output_panel
from utils.training.compilation import compile_backbone
from utils.training.distributed import choose_device, unwrap
from utils.training.engine import Execution
from utils.training.precision import resolve_precision
from utils.training.schedule import EpochPlan, plan_epoch


def network_of(settings: Settings, num_classes: int, *, pretrained: bool) -> torch.nn.Module:
    """Build the network of the settings; `pretrained=False` where a checkpoint's weights follow."""
    return build_network(
        settings.model,
        num_classes=num_classes,
        backbone=settings.backbone,
        pretrained=settings.pretrained if pretrained and settings.pretrained != "none" else None,
        stride_on_first_conv=settings.stride_on_first_conv,
        batch_norm=settings.batch_norm,
        input_size=settings.input_size,
        dropout=settings.dropout,
        answer=settings.answer,
        windows=settings.windows,
        wiring=settings.wiring,
        graph_scope=settings.graph_scope,
        graph_neighbours=settings.graph_neighbours,
        graph_edges=settings.graph_edges,
        graph_residual=settings.graph_residual,
        spatial_weights=settings.spatial_weights,
        without=settings.without,
        crop_gradient=settings.crop_gradient,
        localization_stride=settings.localization_stride,
        localization_threshold=settings.localization_threshold,
        suppression=settings.suppression,
        classify_suppressed=settings.classify_suppressed,
        box_agreement=settings.box_agreement,
        jigsaw_blocks=settings.jigsaw_blocks,
        coarse_channels=settings.coarse_channels,
        part_proposals=settings.part_proposals,
        parts_in_answer=settings.parts_in_answer,
        part_max_iou=settings.part_max_iou,
        parts_of_every_level=settings.parts_of_every_level,
        anchor_sizes=settings.anchor_sizes,
    )


class Trained(NamedTuple):
    """A network out of a checkpoint, ready to evaluate (its batch norms are folded), and what it was trained with."""

    network: torch.nn.Module
    settings: Settings
    saved: dict[str, object]  # the checkpoint's content
    plan: EpochPlan  # that of the epoch it was saved in
    execution: Execution


def settings_of(saved: dict[str, object], path: Path) -> Settings:
    """Return the settings a checkpoint was trained with. Raises CheckpointError for settings of another version."""
    unknown = saved["settings"].keys() - {field.name for field in dataclasses.fields(Settings)}
    if unknown:
        raise CheckpointError(f"{path} has settings that this version does not know: {', '.join(sorted(unknown))}")
    return Settings(**settings_of_older_runs() | saved["settings"])


def load_trained(path: Path, **overrides: object) -> Trained:
    """Rebuild a network from the settings saved in its checkpoint, not from config.py, with some of them changed.

    Raises CheckpointError where the file is no checkpoint of a run, SettingsError for impossible overrides.
    """
    saved = load_checkpoint(path)
    if not {"settings", "class_names", "network", "epoch", "selected_on"} <= saved.keys():
        raise CheckpointError(f"{path} was not written by train.py: it lacks settings or weights")
    settings = complete(dataclasses.replace(settings_of(saved, path), **overrides))
    return trained_network(settings, saved, lambda network: network.load_state_dict(saved["network"]))


def trained_network(settings: Settings, saved: dict[str, object], load: Callable[[torch.nn.Module], object]) -> Trained:
    """Build the network of `settings`, fill it with `load`, and make it ready to evaluate."""
    device = choose_device(settings.device)
    execution = Execution(device, resolve_precision(settings.precision, device), settings.channels_last)
    network = network_of(settings, len(saved["class_names"]), pretrained=False)
    load(network)
    if settings.channels_last:
        network = network.to(memory_format=torch.channels_last)
    network = fold_batch_norm(network.to(device))
    if execution.precision == "bf16":
        cast_for_autocast(network, torch.bfloat16)
    if settings.compile:
        compile_backbone(network)
    loss_weights = weights_of_losses(settings, network)
    network.evaluated = evaluated_branches(network, loss_weights)
    progress = saved.get("progress")  # of an epoch that is not done
    plan = plan_epoch(
        progress["epoch"] if progress else saved["epoch"],
        network.branches,
        loss_weights,
        warmup_epochs=settings.warmup_epochs,
        mask_from_epoch=settings.mask_from_epoch,
    )
    return Trained(network, settings, saved, plan, execution)


def weights_of_losses(settings: Settings, network: torch.nn.Module) -> dict[str, float]:
    """Return the network's own weights of its loss terms, with those that the settings change."""
    own, changed = network.loss_weights, settings.loss_weights or {}
    if not changed.keys() <= own.keys():
        raise SettingsError(f"loss_weights names {', '.join(changed)}; {settings.model} has {', '.join(own)}")
    weights = own | changed
    if not any(weights.values()):
        raise SettingsError("loss_weights are all 0: leave at least one term to train")
    return weights


def evaluated_branches(network: torch.nn.Module, loss_weights: Mapping[str, float]) -> tuple[str, ...]:
    """Return what evaluation computes: of the network's choice, the branches that are trained or in the answer."""
    return tuple(name for name in network.evaluated if loss_weights[name] > 0 or name in network.answer)


def draw_panel(network, entries, settings, class_names, execution, plan) -> torch.Tensor:
    """Draw boxes, masks and windows on up to eight images spread over `entries`."""
    spread = torch.linspace(0, len(entries) - 1, min(8, len(entries))).long().tolist()
    batch = collate([Pictures([entries[i]], image_size=settings.image_size)[0] for i in spread])
    network = unwrap(network).eval()
    with torch.no_grad(), execution.autocast():
        output = network(
            execution.images(batch.images), mask_background=plan.mask_background, branches=network.evaluated
        )
    return output_panel(
        batch.images,
        output,
        network.predict_logits(output),
        input_size=settings.input_size,
        class_names=class_names,
        labels=batch.labels,
        true_boxes=batch.boxes,
    )
