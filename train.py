"""Train the model and data set chosen in config.py: `python train.py [--setting value ...]`.

Everything a run leaves is in `checkpoint/<dataset>-<model>[-<name>]/`. The same command again continues an interrupted
run. Several processes: `torchrun --nproc_per_node 4 train.py ...`.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
from torch.utils.data import DataLoader

from config import Settings, SettingsError, parse_settings, run_name
from datasets import (
    MEAN,
    STD,
    Augmentation,
    BalancedSampler,
    Catalogue,
    Entry,
    Pictures,
    ShuffledSampler,
    collate,
    read_catalogue,
    split_validation,
)
from networks import build_network
from networks.losses import loss_terms
from utils.checkpoint import CheckpointError, load_checkpoint, save_checkpoint
from utils.distributed import cleanup, is_main, rank, setup_distributed, unwrap, world_size, wrap_network
from utils.engine import Execution, check_finite, evaluate, train_one_epoch
from utils.errors import exit_with_one_sentence
from utils.panels import output_panel
from utils.pictures import save_png
from utils.runlog import RunLog
from utils.schedule import build_optimizer, build_schedule, plan_epoch
from utils.seeding import seed_everything

# These may differ when a run is continued: they change where and how it is computed, not what.
FREE_ON_RESUME = {"data_root", "checkpoint_dir", "device", "data_parallel", "workers", "pictures_every"}
TRAINING_STATE = ("optimizer", "schedule")  # in last.pth only


def main(arguments: Sequence[str] | None = None) -> None:
    settings = parse_settings(arguments)
    folder = Path(settings.checkpoint_dir) / run_name(settings)

    # Build: data, network, optimizer. Nothing is written before all of it stands.
    catalogue = catalogue_of(settings)
    train_entries, selection_entries, selected_on = choose_split(settings, catalogue)
    device = setup_distributed(settings.device)
    execution = Execution(device, settings.precision, settings.channels_last)
    train_loader = training_loader(settings, train_entries)
    selection_loader = evaluation_loader(settings, selection_entries[rank() :: world_size()])

    saved = load_resumable(folder / "last.pth", settings, catalogue, len(train_entries))
    seed_everything(settings.seed)
    network = network_of(settings, len(catalogue.class_names), pretrained=saved is None)
    if settings.channels_last:
        network = network.to(memory_format=torch.channels_last)
    network = wrap_network(network.to(device), device, data_parallel=settings.data_parallel)
    loss_weights = weights_of_losses(settings, unwrap(network))
    optimizer = build_optimizer(
        unwrap(network),
        unwrap(network).heads(),
        learning_rate=settings.learning_rate,
        head_learning_rate_factor=settings.head_learning_rate_factor,
        momentum=settings.momentum,
        weight_decay=settings.weight_decay,
    )
    schedule = build_schedule(
        optimizer,
        settings.schedule,
        epochs=settings.epochs,
        steps_per_epoch=len(train_loader),
        milestones=settings.milestones,
    )
    first_epoch, best = 1, {"accuracy": -1.0, "epoch": 0}
    if saved is not None:
        unwrap(network).load_state_dict(saved["network"])
        optimizer.load_state_dict(saved["optimizer"])
        schedule.load_state_dict(saved["schedule"])
        first_epoch, best = saved["epoch"] + 1, saved["best"]
        if is_main() and best["epoch"] == saved["epoch"] and not holds_epoch(folder / "best.pth", best["epoch"]):
            # the run was killed between its two files
            save_checkpoint(folder / "best.pth", {n: v for n, v in saved.items() if n not in TRAINING_STATE})

    # Loop.
    say(f"{folder}: {len(catalogue.class_names)} classes, {len(train_entries)} training images, on {device}")
    say(f"best.pth is chosen by {selected_on}" + (f"; continuing after epoch {first_epoch - 1}" if saved else ""))
    log = RunLog(folder, resume_epoch=saved["epoch"] if saved else None, enabled=is_main())
    if is_main() and saved is None:
        (folder / "config.json").write_text(json.dumps(dataclasses.asdict(settings), indent=2) + "\n")
        log.log_settings(dataclasses.asdict(settings) | {"selected_on": selected_on})
    prefix = settings.select_on
    loss_function = partial(loss_terms, label_smoothing=settings.label_smoothing)
    for epoch in range(first_epoch, settings.epochs + 1):
        seed_everything(settings.seed, epoch, rank())
        train_loader.sampler.set_epoch(epoch)
        plan = plan_epoch(
            epoch,
            unwrap(network).branches,
            loss_weights,
            warmup_epochs=settings.warmup_epochs,
            mask_from_epoch=settings.mask_from_epoch,
        )
        shared = {"plan": plan, "loss_function": loss_function, "execution": execution}
        learning_rate = optimizer.param_groups[0]["lr"]
        trained = train_one_epoch(
            network,
            train_loader,
            optimizer,
            schedule,
            clip_gradient_norm=settings.clip_gradient_norm,
            description=f"epoch {epoch}/{settings.epochs}",
            **shared,
        )
        evaluated = evaluate(network, selection_loader, description=prefix, **shared)
        check_finite(evaluated)  # the epoch's last step may have broken the weights: they must not replace whole ones

        # Log.
        speed = {"train": trained.pop("images_per_second"), prefix: evaluated.pop("images_per_second")}
        say(report_line(epoch, settings.epochs, trained, evaluated, speed["train"], prefix))
        log.log_epoch(
            epoch,
            {
                "train": trained,
                prefix: evaluated,
                "schedule": {"learning_rate": learning_rate},
                "speed": {f"{split}_images_per_second": value for split, value in speed.items()},
            },
        )
        last = epoch == settings.epochs
        if is_main() and settings.pictures_every and (last or epoch % settings.pictures_every == 0 or epoch == 1):
            panel = draw_panel(network, selection_entries, settings, catalogue.class_names, execution, plan)
            log.log_pictures(f"{prefix}/localization", panel, epoch)
            save_png(folder / "pictures" / f"epoch-{epoch:03d}.png", panel)

        # Save: last.pth first, so that best.pth is never ahead of what a continued run knows.
        is_best = evaluated["accuracy/answer"] > best["accuracy"]
        if is_best:
            best = {"accuracy": evaluated["accuracy/answer"], "epoch": epoch}
        if is_main():
            content = {
                "settings": dataclasses.asdict(settings),
                "class_names": list(catalogue.class_names),
                "selected_on": selected_on,
                "training_images": len(train_entries),
                "epoch": epoch,
                "best": best,
                "network": unwrap(network).state_dict(),
            }
            training_state = {"optimizer": optimizer.state_dict(), "schedule": schedule.state_dict()}
            save_checkpoint(folder / "last.pth", content | training_state)
            if is_best:
                save_checkpoint(folder / "best.pth", content)
    log.close()
    say(
        f"done: {best['accuracy']:.1%} on {prefix} at epoch {best['epoch']}; next: python test.py {folder / 'best.pth'}"
    )
    cleanup()


def catalogue_of(settings: Settings) -> Catalogue:
    return read_catalogue(
        settings.dataset,
        settings.data_root,
        classes=settings.classes,
        seed=settings.seed,
        test_fraction=settings.test_fraction,
    )


def choose_split(settings: Settings, catalogue: Catalogue) -> tuple[list[Entry], list[Entry], str]:
    """Return the training images, those that choose the best epoch, and the latter in words."""
    if settings.select_on == "test":
        return catalogue.train, catalogue.test, f"the {len(catalogue.test)} TEST images: test figures are optimistic"
    train, validation = split_validation(catalogue.train, settings.validation, settings.seed)
    if not validation:
        raise SettingsError("no class has an image to spare for validation: raise validation, or set select_on to test")
    share = f"{settings.validation:.0%} of the training images, by class, seed {settings.seed}"
    return train, validation, f"{len(validation)} validation images ({share})"


def training_loader(settings: Settings, entries: list[Entry]) -> DataLoader:
    processes = {"seed": settings.seed, "rank": rank(), "world_size": world_size()}
    if settings.batch_size % (world_size() * max(settings.images_per_class, 1)):
        per_class = f" in groups of images_per_class {settings.images_per_class}" if settings.images_per_class else ""
        raise SettingsError(
            f"batch_size {settings.batch_size} cannot be shared equally by {world_size()} processes{per_class}"
        )
    batch_size = settings.batch_size // world_size()
    if settings.images_per_class:
        labels = [entry.label for entry in entries]
        groups = {"batch_size": settings.batch_size, "images_per_class": settings.images_per_class}
        sampler = BalancedSampler(labels, **groups, **processes)
    else:
        sampler = ShuffledSampler(len(entries), **processes)
    augment = Augmentation(settings.flip, settings.brightness, settings.contrast)
    return DataLoader(
        Pictures(entries, image_size=settings.image_size, augment=augment),
        batch_size=batch_size,
        sampler=sampler,
        drop_last=len(sampler) > batch_size,  # a last batch of a few images has poor batch-norm statistics
        num_workers=settings.workers,
        collate_fn=collate,
        pin_memory=torch.cuda.is_available(),
        persistent_workers=settings.workers > 0,
        generator=torch.Generator(),  # the loader's own, so that it draws nothing from the network's
    )


def evaluation_loader(settings: Settings, entries: list[Entry]) -> DataLoader:
    return DataLoader(
        Pictures(entries, image_size=settings.image_size),
        batch_size=settings.evaluation_batch_size,
        num_workers=settings.workers,
        collate_fn=collate,
        pin_memory=torch.cuda.is_available(),
        generator=torch.Generator(),
    )


def network_of(settings: Settings, num_classes: int, *, pretrained: bool) -> torch.nn.Module:
    """Build the network of the settings; `pretrained=False` where a checkpoint's weights follow."""
    return build_network(
        settings.model,
        num_classes=num_classes,
        backbone=settings.backbone,
        pretrained=settings.pretrained if pretrained and settings.pretrained != "none" else None,
        stride_on_first_conv=settings.stride_on_first_conv,
        input_size=settings.input_size,
        dropout=settings.dropout,
        answer=settings.answer,
        windows=settings.windows,
        wiring=settings.wiring,
        graph_scope=settings.graph_scope,
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


def weights_of_losses(settings: Settings, network: torch.nn.Module) -> dict[str, float]:
    """Return the network's own weights of its loss terms, with those that the settings change."""
    own, changed = network.loss_weights, settings.loss_weights or {}
    if not changed.keys() <= own.keys():
        raise SettingsError(f"loss_weights names {', '.join(changed)}; {settings.model} has {', '.join(own)}")
    weights = own | changed
    if not any(weights.values()):
        raise SettingsError("loss_weights are all 0: leave at least one term to train")
    return weights


def load_resumable(path: Path, settings: Settings, catalogue: Catalogue, images: int) -> dict | None:
    """Return the run's last checkpoint, or None for a new run; refuse one of other settings or classes."""
    if not path.exists():
        return None
    saved = load_checkpoint(path)
    ours, theirs = dataclasses.asdict(settings), saved["settings"]
    differing = [n for n in ours if n not in FREE_ON_RESUME and ours[n] != theirs.get(n)]
    if differing:
        values = ", ".join(f"{name} {theirs.get(name)!r} there and {ours[name]!r} here" for name in differing)
        raise CheckpointError(f"{path} is of a run with other settings ({values}): give this one a --name of its own")
    if saved["class_names"] != list(catalogue.class_names):
        raise CheckpointError(f"{path} was trained on other classes: give this run a --name of its own")
    known = saved.get("training_images", images)
    if known != images:
        raise CheckpointError(
            f"{path} was trained on {known} images and the data now has {images} for training: "
            "give this run a --name of its own"
        )
    return saved


def holds_epoch(path: Path, epoch: int) -> bool:
    return path.exists() and load_checkpoint(path)["epoch"] == epoch


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
        mean=MEAN,
        std=STD,
        class_names=class_names,
        labels=batch.labels,
        true_boxes=batch.boxes,
    )


def report_line(epoch: int, epochs: int, trained: dict, evaluated: dict, speed: float, prefix: str) -> str:
    parts = [f"epoch {epoch}/{epochs}", f"loss {trained['loss/total']:.3f}", f"{speed:.1f} images/s", f"{prefix}:"]
    parts += [
        f"{name.removeprefix('accuracy/')} {value:.1%}"
        for name, value in evaluated.items()
        if name.startswith("accuracy/")
    ]
    if "box_iou/share_at_0.5" in evaluated:
        parts.append(f"boxes {evaluated['box_iou/share_at_0.5']:.1%}")
    return "  ".join(parts)


def say(text: str) -> None:
    if is_main():
        print(text, flush=True)


if __name__ == "__main__":
    with exit_with_one_sentence():
        main()
