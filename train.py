"""Train the model and data set chosen in config.py: `python train.py [--setting value ...]`.

Everything a run leaves is in `checkpoint/<dataset>-<model>[-<name>]/`. The same command again continues an interrupted
run. Several processes: `torchrun --nproc_per_node 4 train.py ...`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

from torch import Tensor, nn
from torch.utils.data import DataLoader

from datasets import (
    choose_split,
    evaluation_loader,
    load_batch,
    load_catalogue,
    note_on_left_out,
    training_loader,
)
from networks.system import System
from utils.config_slips import config_as_edited
from utils.data.catalogue import Catalogue, Entry
from utils.data.decoded import build_cache
from utils.data.picture_cache import PictureCache
from utils.data.record import pack, record_pictures, repeated_pictures
from utils.errors import exit_with_one_sentence
from utils.older_runs import folder_of
from utils.options import flat
from utils.reporting.panels import draw_panel, spread_over
from utils.run import Run
from utils.training.agreement import refuse_differing_processes
from utils.training.allocator import keep_freed_memory
from utils.training.averaging import Average, build_averaged_network
from utils.training.building import (
    build_learning,
    build_to_train,
    check_shares,
    note_on_untrained,
    weights_of_losses,
)
from utils.training.current_epoch import CurrentEpoch
from utils.training.distributed import (
    cleanup,
    print_note,
    print_once,
    rank,
    setup_distributed,
    share_weights,
    unwrap,
    world_size,
)
from utils.training.engine import evaluate, train_one_epoch
from utils.training.execution import Execution
from utils.training.found_boxes import find_boxes, with_bar
from utils.training.loss_scale import build_loss_scale
from utils.training.nonfinite import check_finite, check_weights
from utils.training.precision import agreed_precision, note_on_fp16
from utils.training.schedule import EpochPlan, freeze_trunk, plan_epoch
from utils.training.seeding import seed_everything
from utils.training.starting import start_from
from utils.training.targets import build_mixing, class_weights_of, images_shown

with config_as_edited():
    from config import Settings, parse_settings, restored, run_name


def describe_data(
    settings: Settings, catalogue: Catalogue, train_entries: list[Entry], selection_entries: list[Entry]
) -> dict[str, object]:
    """Return what a checkpoint says of the pictures that its run learns from, which all processes have to see."""
    pictures = record_pictures(train_entries, selection_entries, catalogue.test)
    refuse_differing_processes(flat(settings), catalogue.class_names, pictures)
    for note in repeated_pictures(pictures, selected_on_test=settings.select_on == "test"):
        print_note(note)
    return {
        "class_names": list(catalogue.class_names),
        "training_images": len(train_entries),
        "pictures": pack(pictures),
    }


def build_for(run: Run, class_names: Sequence[str]) -> nn.Module:
    """Return the network of a run on its device, with its first weights where it begins."""
    settings, begins = run.settings, run.saved is None
    other_run = begins and settings.initial_weights is not None
    network = build_to_train(settings, len(class_names), run.device, load_weights=begins and not other_run)
    if other_run:
        print_once(start_from(settings, unwrap(network), class_names, restored))
        share_weights(unwrap(network))
    return network


def prepare_network(
    run: Run,
    system: System,
    execution: Execution,
    entries: Mapping[str, list[Entry]],
    loaders: Mapping[str, DataLoader],
) -> None:
    """Prepare the network of a new run; where it takes boxes, give the loaders those of their pictures.

    A new run finds them, one that goes on has them in its checkpoint, or, where that is from before there were boxes,
    does without.
    """
    cache = loaders["training"].dataset.cache
    if run.saved is None:
        beginning = training_loader(run.settings, entries["training"], rank=rank(), world_size=world_size())
        beginning.dataset.cache = cache
        batches = with_bar(run.unless_stopped(execution.batches(beginning)), "preparing", len(beginning))
        if system.takes_boxes:
            looked_at = [entries["training"]] if system.learned_localization else entries.values()
            print_once(f"finding the objects in {sum(map(len, looked_at))} pictures, once for the whole run")
            with execution.autocast():
                system.prepare(batches)
            run.found_boxes = find_all_boxes(run, system, execution, entries, cache)
            system.objects_are_found()
        else:
            system.prepare(batches)  # with all digits: it may be k-means
    if run.found_boxes is not None:
        loaders["training"].dataset.found_boxes = run.found_boxes["training"]
        if "selection" in run.found_boxes:
            loaders["selection"].dataset.found_boxes = run.found_boxes["selection"][rank() :: world_size()]


def find_all_boxes(
    run: Run, system: System, execution: Execution, entries: Mapping[str, list[Entry]], cache: PictureCache | None
) -> dict[str, Tensor]:
    """Return where the objects are in pictures without augmentation, [n, 4] each, see `datasets.Pictures`.

    Pictures to train on are looked at whole, as any part of them may be trained on; those to select by as evaluation
    sees them, unless boxes only teach: in evaluation it shows what has been learnt.
    """
    settings, found = run.settings, {}
    whole = dataclasses.replace(settings, image_size=settings.resize_size, keep_aspect_ratio=False)
    seen_as = {"training": whole} if system.learned_localization else {"training": whole, "selection": settings}
    for part, seen in seen_as.items():
        loader = evaluation_loader(seen, entries[part][rank() :: world_size()])
        loader.dataset.cache = cache if seen.keep_aspect_ratio == settings.keep_aspect_ratio else None
        found[part] = find_boxes(system, run.unless_stopped(loader), execution, len(entries[part]))
    return found


def evaluate_epoch(
    current: CurrentEpoch,
    network: nn.Module,
    average: Average | None,
    loader: DataLoader,
    plan: EpochPlan,
    execution: Execution,
) -> tuple[dict[str, float], dict[str, float] | None]:
    """Evaluate the network after an epoch's training, and its average, where there is one.

    Raises NonFiniteLossError: the last step may have broken the weights, and such must not replace whole ones.
    """
    settings = current.settings
    shared = {"plan": plan, "execution": execution, "label_smoothing": settings.label_smoothing}
    shared |= {"on_batch": current.after_evaluation_batch, "description": settings.select_on}
    shared |= {"learn_ensemble": True, "learn_exit": settings.select_on == "validation"}
    current.before_evaluation(loader)
    evaluated = evaluate(network, loader, **shared)
    check_finite(evaluated)
    check_weights(unwrap(network), current.steps)  # evaluated or not
    of_average = evaluate(build_averaged_network(average, network), loader, **shared) if average else None
    check_finite(of_average or {})
    return evaluated, of_average


def show_pictures(
    run: Run, epoch: int, system: System, entries: Sequence[Entry], execution: Execution, plan: EpochPlan
) -> None:
    """Draw what the network finds in a few pictures, into the run's folder and TensorBoard."""
    with run.pictures(epoch):
        batch = load_batch(spread_over(entries), run.settings)
        run.show_pictures(epoch, draw_panel(system, batch, execution, plan, run.facts["class_names"]))


def main(arguments: Sequence[str] | None = None) -> None:
    settings = given = parse_settings(arguments)
    keep_freed_memory()

    # Data.
    catalogue, bad_pictures = load_catalogue(settings)
    train_entries, selection_entries, selected_on = choose_split(settings, catalogue)
    device = setup_distributed(settings.device)
    settings = dataclasses.replace(settings, precision=agreed_precision(settings.precision, device))
    print_note(note_on_fp16(given.precision, settings.precision, device))
    execution = Execution(device, settings.precision, settings.channels_last, settings.normalization)
    train_loader = training_loader(settings, train_entries, rank=rank(), world_size=world_size())
    selection_loader = evaluation_loader(settings, selection_entries[rank() :: world_size()])
    for note in (*catalogue.notes, note_on_left_out(train_loader, len(train_entries), world_size=world_size())):
        print_note(note)

    selected_on += ", with the averaged weights" if settings.ema_decay else ""
    facts = describe_data(given, catalogue, train_entries, selection_entries)
    facts |= {"steps_per_epoch": len(train_loader), "selected_on": selected_on}
    folder = folder_of(Path(settings.checkpoint_dir).expanduser() / run_name(settings), settings)
    with Run(folder, settings, facts, device, restored, again=partial(parse_settings, arguments)) as run:
        settings = run.settings
        # Network and optimizer, new or as they were. Nothing is written before all of it stands.
        seed_everything(settings.seed)
        network = build_for(run, catalogue.class_names)
        system, classes = unwrap(network), len(catalogue.class_names)
        check_shares(network, train_loader, settings.gradient_accumulation)
        loss_weights = weights_of_losses(settings, system)
        print_note(note_on_untrained(system, loss_weights))
        optimizer, schedule = build_learning(settings, system, steps_per_epoch=len(train_loader))
        shown = images_shown(train_loader.sampler, [entry.label for entry in train_entries], classes)
        system.class_weights = class_weights_of(settings.class_weights, shown, device)
        mix = build_mixing(classes, mixup=settings.mixup, cutmix=settings.cutmix)
        average = Average(system, settings.ema_decay) if settings.ema_decay > 0 else None
        loss_scale = build_loss_scale(execution)
        run.attach(system, optimizer, schedule, loss_scale, average)
        cache = build_cache(settings, train_entries + selection_entries)
        train_loader.dataset.cache = selection_loader.dataset.cache = cache
        run.begin(bad_pictures)
        loaders = {"training": train_loader, "selection": selection_loader}
        entries = {"training": train_entries, "selection": selection_entries}
        prepare_network(run, system, execution, entries, loaders)

        for epoch in run.epochs():
            plan = plan_epoch(system, epoch, loss_weights, warmup_epochs=settings.warmup_epochs)
            freeze_trunk(system, optimizer, frozen=epoch <= settings.frozen_trunk_epochs)
            with run.epoch(epoch, train_loader) as current:
                trained = train_one_epoch(
                    network,
                    train_loader,
                    optimizer,
                    schedule,
                    meter=current.meter,
                    first_step=current.steps_done + 1,
                    before_step=current.before_step,
                    save_after=current.save_after,
                    save=current.save,
                    clip_gradient_norm=settings.clip_gradient_norm,
                    skip_nonfinite=run.skipped if settings.skip_nonfinite else None,
                    average=average,
                    gradient_accumulation=settings.gradient_accumulation,
                    loss_scale=loss_scale,
                    mix=mix,
                    step_log=run.step_log,
                    plan=plan,
                    execution=execution,
                    label_smoothing=settings.label_smoothing,
                    description=f"epoch {epoch}/{settings.epochs}",
                )
                evaluated, of_average = evaluate_epoch(current, network, average, selection_loader, plan, execution)
            run.finish_epoch(epoch, trained, evaluated, of_average)
            if run.wants_pictures(epoch):
                result = average.module if average else system
                show_pictures(run, epoch, result, selection_entries, execution, plan)
    best = f"{run.best['accuracy']:.1%} on {settings.select_on} at epoch {run.best['epoch']}"
    print_once(f"done: {best}; next: python test.py {folder / 'best.pth'}")
    cleanup()


if __name__ == "__main__":
    with exit_with_one_sentence(training=True, less_memory="lower batch_size, image_size or input_size"):
        main()
