"""Train the model and data set chosen in config.py: `python train.py [--setting value ...]`.

Everything a run leaves is in `checkpoint/<dataset>-<model>[-<name>]/`. The same command again continues an interrupted
run. Several processes: `torchrun --nproc_per_node 4 train.py ...`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch

from assembly import (
    draw_panel,
    evaluated_branches,
    network_of,
    weights_of_losses,
)
from config import parse_settings, run_name, settings_of_older_runs
from datasets import Batch, build_cache, choose_split, evaluation_loader, load_catalogue, training_loader
from networks.losses import loss_terms
from networks.outputs import NetworkOutput
from utils.checkpoint import save_checkpoint, save_last
from utils.errors import Stopped, exit_with_one_sentence
from utils.files import locked, write_text
from utils.reporting.metrics import EpochMeter
from utils.reporting.pictures import save_png
from utils.reporting.runlog import RunLog
from utils.training.allocator import keep_freed_memory
from utils.training.compilation import compile_backbone
from utils.training.distributed import (
    any_process,
    cleanup,
    is_main,
    rank,
    setup_distributed,
    unwrap,
    world_size,
    wrap_network,
)
from utils.training.engine import (
    STEPS_BETWEEN_READINGS,
    Execution,
    NonFiniteLossError,
    SkipBudget,
    check_finite,
    evaluate,
    train_one_epoch,
)
from utils.training.interruption import StopRequest
from utils.training.precision import resolve_precision
from utils.training.resume import (
    TRAINING_STATE,
    drop_half_files,
    drop_old_epochs,
    holds_epoch,
    load_resumable,
    move_aside,
)
from utils.training.schedule import build_optimizer, build_schedule, plan_epoch
from utils.training.seeding import seed_everything

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
    catalogue, bad_pictures = load_catalogue(settings)
    train_entries, selection_entries, selected_on = choose_split(settings, catalogue)
    device = setup_distributed(settings.device)
    precision = resolve_precision(settings.precision, device)
    if any_process(precision == "float32", device):  # all of them alike
        precision = "float32"
    settings = dataclasses.replace(settings, precision=precision)
    execution = Execution(device, settings.precision, settings.channels_last)
    train_loader = training_loader(settings, train_entries, rank=rank(), world_size=world_size())
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
            ours, older = dataclasses.asdict(settings), settings_of_older_runs()
            saved = load_resumable(folder, ours, free=FREE_ON_RESUME, defaults=older, **description)
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
        system.evaluated = evaluated_branches(system, loss_weights)
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

        cache = build_cache(settings, train_entries + selection_entries)
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


def with_record(error: NonFiniteLossError, folder: Path, epoch: int) -> NonFiniteLossError:
    """Write what went wrong, with the images of the batch, next to the run, and say so in the error."""
    path = folder / "nonfinite.json"
    record = {"epoch": epoch, "step": error.step, "terms": error.terms, "images": error.paths}
    if is_main():
        write_text(path, json.dumps(record, indent=2) + "\n")
    where = f"; the images of the batch are listed in {path}" if error.paths else " (seen after its last step)"
    return NonFiniteLossError(f"epoch {epoch}: {error}{where}", step=error.step, terms=error.terms, paths=error.paths)


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
    with exit_with_one_sentence(training=True):
        main()
