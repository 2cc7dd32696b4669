"""Train the model and data set chosen in config.py: `python train.py [--setting value ...]`.

Everything a run leaves is in `checkpoint/<dataset>-<model>[-<name>]/`. The same command again continues an interrupted
run. Several processes: `torchrun --nproc_per_node 4 train.py ...`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch.utils.data import DataLoader

from config import Settings, SettingsError, complete, parse_settings, run_name
from datasets import (
    Augmentation,
    BalancedSampler,
    Batch,
    Catalogue,
    DataError,
    Entry,
    Pictures,
    ShuffledSampler,
    collate,
    find_bad_pictures,
    fingerprint,
    leave_out,
    load_pixels,
    read_catalogue,
    split_validation,
)
from networks import build_network
from networks.folding import cast_for_autocast, fold_batch_norm
from networks.losses import loss_terms
from networks.outputs import NetworkOutput
from utils.allocator import keep_freed_memory
from utils.checkpoint import CheckpointError, load_checkpoint, save_checkpoint, save_last
from utils.compilation import compile_backbone
from utils.distributed import (
    any_process,
    choose_device,
    cleanup,
    is_main,
    rank,
    setup_distributed,
    unwrap,
    world_size,
    wrap_network,
)
from utils.engine import (
    STEPS_BETWEEN_READINGS,
    Execution,
    NonFiniteLossError,
    SkipBudget,
    check_finite,
    evaluate,
    train_one_epoch,
)
from utils.errors import exit_with_one_sentence
from utils.files import locked, write_text
from utils.interruption import Stopped, StopRequest, leave_run_to_the_main_process
from utils.metrics import EpochMeter
from utils.panels import output_panel
from utils.picture_cache import PictureCache, cache_in_memory, cache_on_disk
from utils.pictures import save_png
from utils.precision import resolve_precision
from utils.resume import (
    TRAINING_STATE,
    drop_half_files,
    drop_old_epochs,
    holds_epoch,
    load_resumable,
    move_aside,
)
from utils.runlog import RunLog
from utils.schedule import EpochPlan, build_optimizer, build_schedule, plan_epoch
from utils.seeding import seed_everything

# These may differ when a run is continued: they change where and how it is computed, not what.
FREE_ON_RESUME = {
    *("data_root", "checkpoint_dir", "device", "data_parallel", "workers", "prefetch", "cache", "pictures_every"),
    *("save_every_steps", "keep_checkpoints", "on_bad_image", "skip_nonfinite", "fresh", "exit_threshold"),
}


def main(arguments: Sequence[str] | None = None) -> None:
    settings = parse_settings(arguments)
    folder = Path(settings.checkpoint_dir).expanduser() / run_name(settings)

    keep_freed_memory()
    # Build: data, network, optimizer. Nothing is written before all of it stands.
    catalogue, bad_pictures = catalogue_of(settings)
    train_entries, selection_entries, selected_on = choose_split(settings, catalogue)
    device = setup_distributed(settings.device)
    precision = resolve_precision(settings.precision, device)
    if any_process(precision == "float32", device):  # all of them alike
        precision = "float32"
    settings = dataclasses.replace(settings, precision=precision)
    execution = Execution(device, settings.precision, settings.channels_last)
    train_loader = training_loader(settings, train_entries)
    selection_loader = evaluation_loader(settings, selection_entries[rank() :: world_size()])
    steps = len(train_loader)

    with contextlib.ExitStack() as stack:
        if is_main():
            stack.enter_context(locked(folder))
        description = {
            "class_names": list(catalogue.class_names),
            "training_images": len(train_entries),
            "steps_per_epoch": steps,
        }
        saved = None
        if not settings.fresh:
            saved = load_resumable(folder, dataclasses.asdict(settings), free=FREE_ON_RESUME, **description)
        seed_everything(settings.seed)
        network = network_of(settings, len(catalogue.class_names), pretrained=saved is None)
        if settings.channels_last:
            network = network.to(memory_format=torch.channels_last)
        network = wrap_network(
            network.to(device),
            device,
            data_parallel=settings.data_parallel,
            sync_batch_norm=settings.sync_batch_norm,
        )
        system = unwrap(network)
        if settings.compile:
            compile_backbone(network)
        loss_weights = weights_of_losses(settings, system)
        optimizer = build_optimizer(
            system,
            system.heads(),
            learning_rate=settings.learning_rate,
            head_learning_rate_factor=settings.head_learning_rate_factor,
            momentum=settings.momentum,
            weight_decay=settings.weight_decay,
        )
        schedule = build_schedule(
            optimizer,
            settings.schedule,
            epochs=settings.epochs,
            steps_per_epoch=steps,
            milestones=settings.milestones,
        )
        epochs_done, best, progress = 0, {"accuracy": -1.0, "epoch": 0}, None
        skip_nonfinite = SkipBudget(settings.skip_nonfinite, used=saved["skipped_steps"] if saved else 0)
        if saved is not None:
            system.load_state_dict(saved["network"])
            optimizer.load_state_dict(saved["optimizer"])
            schedule.load_state_dict(saved["schedule"])
            epochs_done, best, progress = saved["epoch"], saved["best"], saved["progress"]
            is_best = best["epoch"] == epochs_done and progress is None
            if is_main() and is_best and not holds_epoch(folder / "best.pth", epochs_done):
                # the run was killed between its two files
                save_checkpoint(folder / "best.pth", {n: v for n, v in saved.items() if n not in TRAINING_STATE})

        def content(epochs_done: int) -> dict[str, object]:
            return {
                "settings": dataclasses.asdict(settings),
                **description,
                "selected_on": selected_on,
                "epoch": epochs_done,
                "best": best,
                "network": system.state_dict(),
            }

        def training_state(progress: dict[str, object] | None) -> dict[str, object]:
            """`progress`: what an epoch has done so far, None between two epochs."""
            return {
                "optimizer": optimizer.state_dict(),
                "schedule": schedule.state_dict(),
                "progress": progress,
                "skipped_steps": skip_nonfinite.used,
            }

        def save_within_epoch(step: int) -> None:
            progress = current | {"step": step, "meter": current["meter"].state_dict()}
            if is_main():
                save_last(folder, content(current["epoch"] - 1) | training_state(progress))
            if stop.agreed:
                any_process(False, device)  # torchrun ends all when one has ended: wait for the one that saves
                raise Stopped

        def before_step(step: int) -> None:
            seed_everything(settings.seed, current["epoch"], step, rank())

        def save_after(step: int) -> bool:
            # several processes have to agree, for which they wait for each other: not at every step
            asked = (world_size() == 1 or step % STEPS_BETWEEN_READINGS == 0) and stop.agree(device)
            return asked or (settings.save_every_steps > 0 and step % settings.save_every_steps == 0 and step < steps)

        def after_evaluation_batch(batch: Batch, output: NetworkOutput, answer: torch.Tensor) -> None:
            # an answer that is not finite: the last step has broken the weights, which the evaluation's end will tell
            if world_size() == 1 and stop.requested and answer.isfinite().all():
                stop.agree(device)
                save_within_epoch(steps)

        cache = cache_of(settings, train_entries + selection_entries)
        for loader in (train_loader, selection_loader):
            loader.dataset.cache = cache

        # Loop.
        stop = stack.enter_context(StopRequest())
        if is_main() and settings.fresh and (kept := move_aside(folder)):
            say(f"the run that was in {folder} is now in {kept}")
        if is_main():
            drop_half_files(folder)
        say(f"{folder}: {len(catalogue.class_names)} classes, {len(train_entries)} training images, on {device}")
        begun = f", step {progress['step']} of epoch {progress['epoch']}" if progress else ""
        continuing = f"; continuing after epoch {epochs_done}{begun}" if saved else ""
        say(f"best.pth is chosen by {selected_on}{continuing}")
        log = stack.enter_context(RunLog(folder, resume_epoch=epochs_done if saved else None, enabled=is_main()))
        if is_main() and saved is None:
            write_text(folder / "config.json", json.dumps(dataclasses.asdict(settings), indent=2) + "\n")
            log.log_settings(dataclasses.asdict(settings) | {"selected_on": selected_on})
        if is_main() and bad_pictures:
            lines = [f"{path}\t{reason}".replace("\n", "\\n") + "\n" for path, reason in bad_pictures.items()]
            write_text(folder / "bad_pictures.txt", "".join(lines))
            say(f"{len(lines)} unreadable pictures are left out; they are listed in {folder / 'bad_pictures.txt'}")
        prefix = settings.select_on
        loss_function = partial(loss_terms, label_smoothing=settings.label_smoothing)
        for epoch in range(epochs_done + 1, settings.epochs + 1):
            plan = plan_epoch(
                epoch,
                system.branches,
                loss_weights,
                warmup_epochs=settings.warmup_epochs,
                mask_from_epoch=settings.mask_from_epoch,
            )
            shared = {"plan": plan, "loss_function": loss_function, "execution": execution}
            current = {"epoch": epoch, "learning_rate": optimizer.param_groups[0]["lr"], "meter": EpochMeter(device)}
            steps_done = 0
            if progress is not None:
                steps_done, current["learning_rate"] = progress["step"], progress["learning_rate"]
                if is_main():  # it holds the sums of all processes
                    current["meter"].load_state_dict(progress["meter"])
            train_loader.sampler.set_epoch(epoch, start=steps_done * train_loader.batch_size)
            try:
                trained = train_one_epoch(
                    network,
                    train_loader,
                    optimizer,
                    schedule,
                    meter=current["meter"],
                    first_step=steps_done + 1,
                    before_step=before_step,
                    save_after=save_after,
                    save=save_within_epoch,
                    clip_gradient_norm=settings.clip_gradient_norm,
                    skip_nonfinite=skip_nonfinite if settings.skip_nonfinite else None,
                    description=f"epoch {epoch}/{settings.epochs}",
                    **shared,
                )
                evaluated = evaluate(
                    network, selection_loader, on_batch=after_evaluation_batch, description=prefix, **shared
                )
                check_finite(evaluated)  # the last step may have broken the weights: they must not replace whole ones
            except NonFiniteLossError as error:
                raise with_record(error, folder, epoch) from None
            progress = None

            # Log.
            speed = {"train": trained.pop("images_per_second"), prefix: evaluated.pop("images_per_second")}
            say(report_line(epoch, settings.epochs, trained, evaluated, speed["train"], prefix))
            log.log_epoch(
                epoch,
                {
                    "train": trained,
                    prefix: evaluated,
                    "schedule": {"learning_rate": current["learning_rate"]},
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
                if settings.keep_checkpoints:
                    save_checkpoint(folder / f"epoch-{epoch:03d}.pth", content(epoch))
                save_last(folder, content(epoch) | training_state(None))
                if is_best:
                    save_checkpoint(folder / "best.pth", content(epoch))
                if settings.keep_checkpoints:
                    drop_old_epochs(folder, settings.keep_checkpoints)
            if not last and stop.agree(device):
                raise Stopped
    say(
        f"done: {best['accuracy']:.1%} on {prefix} at epoch {best['epoch']}; next: python test.py {folder / 'best.pth'}"
    )
    cleanup()


def catalogue_of(settings: Settings) -> tuple[Catalogue, dict[str, str]]:
    """Return the data set without the unreadable pictures, and those with the reason; without leave to skip, refuse."""
    catalogue = read_catalogue(
        settings.dataset,
        settings.data_root,
        classes=settings.classes,
        seed=settings.seed,
        test_fraction=settings.test_fraction,
    )
    skip = settings.on_bad_image == "skip"
    bad = find_bad_pictures(catalogue.train + catalogue.test, thorough=skip)
    if not bad:
        return catalogue, bad
    if not skip:
        path, reason = next(iter(bad.items()))
        raise DataError(
            f"{len(bad)} of {len(catalogue.train + catalogue.test)} pictures cannot be read, the first is {path} "
            f"({reason}): repair them, or set on_bad_image to skip"
        )
    return leave_out(catalogue, bad), bad


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
        collate_fn=collate,
        pin_memory=torch.cuda.is_available(),
        **workers_of(settings),
        generator=torch.Generator(),  # the loader's own, so that it draws nothing from the network's
    )


def evaluation_loader(settings: Settings, entries: list[Entry]) -> DataLoader:
    return DataLoader(
        Pictures(entries, image_size=settings.image_size),
        batch_size=settings.evaluation_batch_size,
        collate_fn=collate,
        pin_memory=torch.cuda.is_available(),
        **workers_of(settings),
        generator=torch.Generator(),
    )


def workers_of(settings: Settings) -> dict[str, object]:
    """Return how a loader shares its work among processes, which stay between epochs."""
    if settings.workers == 0:
        return {}
    return {
        "num_workers": settings.workers,
        "prefetch_factor": settings.prefetch,
        "persistent_workers": True,
        "worker_init_fn": leave_run_to_the_main_process,
    }


def cache_of(settings: Settings, entries: list[Entry]) -> PictureCache | None:
    """Return the pictures decoded, if they are to be: in memory, or in a file below checkpoint_dir."""

    def decode(row: int) -> tuple[torch.Tensor, torch.Tensor | None]:
        return load_pixels(entries[row], settings.image_size)

    sources = [entry.source for entry in entries]
    if settings.cache == "ram":
        return cache_in_memory(sources, settings.image_size, decode)
    if settings.cache == "disk":
        name, digest = fingerprint(entries, settings.image_size)
        folder = Path(settings.checkpoint_dir).expanduser() / "cache"
        return cache_on_disk(
            folder / f"{settings.dataset}-{name}.pictures", digest, sources, settings.image_size, decode
        )
    return None


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


def load_trained(path: Path, **overrides: object) -> Trained:
    """Rebuild a network from the settings saved in its checkpoint, not from config.py, with some of them changed.

    Raises CheckpointError where the file is no checkpoint of a run, SettingsError for impossible overrides.
    """
    saved = load_checkpoint(path)
    if not {"settings", "class_names", "network", "epoch", "selected_on"} <= saved.keys():
        raise CheckpointError(f"{path} was not written by train.py: it lacks settings or weights")
    unknown = saved["settings"].keys() - {field.name for field in dataclasses.fields(Settings)}
    if unknown:
        raise CheckpointError(f"{path} has settings that this version does not know: {', '.join(sorted(unknown))}")
    settings = complete(Settings(**saved["settings"] | overrides))
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
    progress = saved.get("progress")  # of an epoch that is not done
    plan = plan_epoch(
        progress["epoch"] if progress else saved["epoch"],
        network.branches,
        weights_of_losses(settings, network),
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


def with_record(error: NonFiniteLossError, folder: Path, epoch: int) -> NonFiniteLossError:
    """Write what went wrong, with the images of the batch, next to the run, and say so in the error."""
    path = folder / "nonfinite.json"
    record = {"epoch": epoch, "step": error.step, "terms": error.terms, "images": error.paths}
    if is_main():
        write_text(path, json.dumps(record, indent=2) + "\n")
    where = f"; the images of the batch are listed in {path}" if error.paths else " (seen after its last step)"
    return NonFiniteLossError(f"epoch {epoch}: {error}{where}", step=error.step, terms=error.terms, paths=error.paths)


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


def report_line(epoch: int, epochs: int, trained: dict, evaluated: dict, speed: float, prefix: str) -> str:
    parts = [
        f"epoch {epoch}/{epochs}",
        f"loss {trained.get('loss/total', math.nan):.3f}",
        f"{speed:.1f} images/s",
        f"{prefix}:",
    ]
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
