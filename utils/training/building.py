"""Networks from settings, and out of checkpoints, ready to train or to evaluate."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import DataLoader

from networks import build_network
from networks.folding import cast_for_autocast, fold_batch_norm
from networks.system import ENSEMBLE_WEIGHTS, System
from utils.checkpoint import CheckpointError, fits, load_run
from utils.errors import UserError
from utils.older_runs import UnknownSettingsError
from utils.options import SettingsError
from utils.training.averaging import weights_of
from utils.training.compilation import compile_backbone
from utils.training.distributed import choose_device, unwrap, wrap_network
from utils.training.execution import Execution
from utils.training.precision import resolve_precision
from utils.training.restoring import load_weights
from utils.training.schedule import EpochPlan, build_optimizer, build_schedule, plan_epoch


class Trained(NamedTuple):
    """A network out of a checkpoint, ready to evaluate (its batch norms are folded), and what it was trained with."""

    network: System
    settings: Any  # config.Settings
    saved: dict[str, Any]  # the checkpoint's content, and `weights`: which of its weights these are
    plan: EpochPlan  # that of the epoch it was saved in
    execution: Execution


def build_from_settings(settings: Any, num_classes: int, *, load_weights: bool) -> System:
    """Build the network of `config.Settings`; without the pretrained weights where a checkpoint's follow."""
    return build_network(
        settings.model,
        num_classes=num_classes,
        backbone=settings.backbone,
        pretrained=settings.pretrained if load_weights or settings.pretrained == "none" else None,
        stride_on_first_conv=settings.stride_on_first_conv,
        batch_norm=settings.batch_norm,
        last_stride=settings.last_stride,
        input_size=settings.input_size,
        dropout=settings.dropout,
        prediction=settings.prediction,
        ensembling=settings.ensembling,
        **settings.options,
    )


def build_to_train(settings: Any, num_classes: int, device: torch.device, *, load_weights: bool) -> torch.nn.Module:
    """Build the network to train: on its device, spread over processes or GPUs, compiled where that is asked for."""
    network = build_from_settings(settings, num_classes, load_weights=load_weights)
    if settings.channels_last:
        network = network.to(memory_format=torch.channels_last)
    network = wrap_network(
        network.to(device), device, data_parallel=settings.data_parallel, sync_batch_norm=settings.sync_batch_norm
    )
    if settings.compile:
        compile_backbone(network)
    system = unwrap(network)
    if system.can_exit_early:
        system.exit_threshold = 1.0  # the validation looks at everything
    system.evaluated = evaluated_branches(system, weights_of_losses(settings, system))
    return network


def check_shares(network: torch.nn.Module, loader: DataLoader, parts: int = 1) -> None:
    """Raise UserError where a process or GPU would get fewer images of a batch than its system can learn from.

    `parts`: of each batch, one after another. Batch norms that are synchronised see the images of all processes.
    """
    images = min(loader.batch_size, len(loader.sampler))
    group = getattr(loader.sampler, "images_per_class", 0)
    if parts > images:
        raise UserError(f"gradient_accumulation is {parts}, and a process has {images} images of a batch: lower it")
    if parts > 1 and group and (images % (parts * group) or images < 2 * parts * group):
        raise UserError(
            f"gradient_accumulation is {parts}, and a process has {images} images of a batch: each part needs whole "
            f"groups of images_per_class {group}, two or more; lower it, or raise batch_size"
        )
    devices = len(network.device_ids) if isinstance(network, torch.nn.DataParallel) else 1
    shares = [share for part in torch.arange(images).tensor_split(parts) for share in part.chunk(devices)]
    smallest = min(map(len, shares))  # as DataParallel deals them
    needed = unwrap(network).smallest_batch
    synchronised = any(isinstance(module, torch.nn.SyncBatchNorm) for module in network.modules())
    if smallest < needed and not synchronised:
        raise UserError(
            f"of a batch, a process or GPU gets {smallest} training image and needs {needed}, as the system's heads "
            "normalise over images: raise batch_size, use fewer processes, GPUs or parts (gradient_accumulation), or "
            "train on more images"
        )


def build_learning(settings: Any, system: System, *, steps_per_epoch: int) -> tuple[Optimizer, LRScheduler]:
    """Return the optimizer of the system's parameters and the schedule of its learning rates."""
    optimizer = build_optimizer(
        system,
        learning_rate=settings.learning_rate,
        head_learning_rate_factor=settings.head_learning_rate_factor,
        momentum=settings.momentum,
        weight_decay=settings.weight_decay,
        kind=settings.optimizer,
        decay_norms_and_biases=settings.decay_norms_and_biases,
    )
    schedule = build_schedule(
        optimizer,
        settings.schedule,
        epochs=settings.epochs,
        steps_per_epoch=steps_per_epoch,
        milestones=settings.milestones,
        decay_rate=settings.decay_rate,
        linear_warmup_epochs=settings.linear_warmup_epochs,
    )
    return optimizer, schedule


def make_ready(network: System, settings: Any, saved: dict[str, Any]) -> Trained:
    """Make a network of `settings` that has its weights ready to evaluate; `saved` holds at least its epoch."""
    device = choose_device(settings.device)
    precision = resolve_precision(settings.precision, device)
    execution = Execution(device, precision, settings.channels_last, settings.normalization)
    if settings.channels_last:
        network = network.to(memory_format=torch.channels_last)
    network = fold_batch_norm(network.to(device))
    if execution.half is not None:
        cast_for_autocast(network, execution.half)
    if settings.compile:
        compile_backbone(network)
    if network.can_exit_early:
        network.exit_threshold = 1.0
    loss_weights = weights_of_losses(settings, network)
    network.evaluated = evaluated_branches(network, loss_weights)
    progress = saved.get("progress")  # of an epoch that is not done
    epoch = progress["epoch"] if progress else saved["epoch"]
    plan = plan_epoch(network, epoch, loss_weights, warmup_epochs=settings.warmup_epochs)
    return Trained(network, settings, saved, plan, execution)


def weights_of_losses(settings: Any, system: System) -> dict[str, float]:
    """Return the system's own weights of its loss terms, with those that the settings change. Raises SettingsError."""
    own, changed = system.loss_weights, settings.loss_weights or {}
    for name in system.evaluated:
        if name not in own:
            raise SettingsError(
                f"{type(system).__name__} has a branch {name} and no weight of its loss: give it one, or 0"
            )
    if not changed.keys() <= own.keys():
        raise SettingsError(f"loss_weights names {', '.join(changed)}; {settings.model} has {', '.join(own)}")
    weights = {**own, **changed}
    if not any(weights.values()):
        raise SettingsError("loss_weights are all 0: leave at least one term to train")
    return weights


def note_on_untrained(system: System, loss_weights: Mapping[str, float]) -> str | None:
    """Return what to say of branches of the prediction that have lost their loss, if there are any."""
    idle = [name for name in system.prediction if not loss_weights.get(name, 1) and system.loss_weights.get(name)]
    if not idle:
        return None
    return (
        f"{', '.join(idle)} of the prediction is not trained (loss_weights), unless what is trained has the same "
        "classifier: --prediction chooses other branches"
    )


def evaluated_branches(system: System, loss_weights: Mapping[str, float]) -> tuple[str, ...]:
    """Return what evaluation computes: of the system's choice, the branches that are trained or in the prediction.

    Those count as trained that learn through others.
    """
    without_loss = {*system.prediction, *system.trained_through_others}
    return tuple(name for name in system.evaluated if loss_weights[name] > 0 or name in without_loss)


REMEDY = "use a file that train.py of this version can have written"


def load_trained(
    path: Path,
    rebuilt: Callable[..., Any],
    *,
    weights: str | None = None,
    content: dict[str, object] | None = None,
    **overrides: object,
) -> Trained:
    """Rebuild a network from the settings saved in its checkpoint, with some of them changed; see `config.rebuilt`.

    `weights` "ema" or "plain" of a run that averaged them; None: the average where there is one. `content`: what
    `load_checkpoint` has read of the file already.

    Raises CheckpointError where the file is no checkpoint of a run, is of another version or damaged, SettingsError for
    impossible overrides.
    """
    saved = load_run(path, content)
    try:
        # where the run was written need not be possible on this machine
        settings = rebuilt(saved["settings"], **{"checkpoint_dir": "."} | overrides)
    except UnknownSettingsError as error:
        raise CheckpointError(f"{path} has {error}") from None
    except SettingsError as error:
        if str(error).partition(" ")[0] in overrides:
            raise
        raise CheckpointError(f"{path} has impossible settings ({error}): {REMEDY}") from None

    if "checkpoint_dir" not in overrides and "checkpoint_dir" in saved["settings"]:
        settings = dataclasses.replace(settings, checkpoint_dir=saved["settings"]["checkpoint_dir"])

    state, kind = weights_of(saved, weights, path)
    try:
        network = build_from_settings(settings, len(saved["class_names"]), load_weights=False)
    except UserError as error:
        raise CheckpointError(f"{path} has impossible settings ({error}): {REMEDY}") from None
    _refuse_other_ensemble(path, network, state)
    with fits(path, REMEDY):
        load_weights(network, state, len(saved["class_names"]))
    return make_ready(network, settings, saved | {"weights": kind})


def _refuse_other_ensemble(path: Path, network: System, state: Mapping[str, Tensor]) -> None:
    """Weights of branches are learnt for all of them together, and only in training."""
    ours, theirs = network.ensemble_weights, state.get(ENSEMBLE_WEIGHTS)
    if (None if ours is None else ours.shape) == (None if theirs is None else theirs.shape):
        return
    has, wanted = (
        "no learnt weights of branches" if weights is None else f"learnt weights of {weights.numel()} branches"
        for weights in (theirs, ours)
    )
    raise CheckpointError(
        f"{path} has {has}, and its ensembling and prediction ask for {wanted}: leave both as its run had them"
    )
