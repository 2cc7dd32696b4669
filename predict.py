"""Name what is on pictures: `python predict.py --checkpoint checkpoint/demo-sgkrl/best.pth PICTURE_OR_FOLDER...`.

Names and probabilities go to standard output, picture by picture; one drawing per picture shows where the network
looked: the object and its mask, the crop with its windows, what speaks for the prediction, and the likeliest names.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from datasets import Batch, DataError, Entry, Pictures, Sample, collate, comes_with_corners, loading_of
from networks.evidence import forward_with_evidence
from networks.outputs import NetworkOutput
from networks.views import VIEWS, add_views
from utils.command_line import Parser, nonempty_path
from utils.config_slips import config_as_edited
from utils.data import folders
from utils.data.checking import NEVER_WRITTEN, ends_in_zeros
from utils.data.cropping import cut_out, seen_part
from utils.data.decoding import Box, limit_memory, load_picture, read_size
from utils.data.kinds import LeftOut, is_picture
from utils.data.workers import start_loader
from utils.errors import UserError, exit_with_one_sentence
from utils.files import make_output_folder
from utils.reporting.exit_threshold import LEARNED, learned_threshold, parse_threshold
from utils.reporting.metrics import inclusive_to_edges
from utils.reporting.panels import image_panel
from utils.reporting.pictures import save_png
from utils.reporting.results import refuse_nonfinite
from utils.text import json_line, let_every_name_pass, one_line
from utils.training.allocator import keep_freed_memory
from utils.training.building import Trained, load_trained

with config_as_edited():
    from config import rebuilt


def parse_arguments(arguments: Sequence[str] | None):
    parser = Parser(description="Name what is on pictures, and draw where the network looked.", allow_abbrev=False)
    parser.add_argument(
        "pictures",
        nargs="+",
        type=nonempty_path,
        metavar="PICTURE_OR_FOLDER",
        help="folders are searched with all below",
    )
    parser.add_argument(
        "--checkpoint", type=nonempty_path, required=True, metavar="FILE", help="best.pth or last.pth of a run"
    )
    parser.add_argument(
        "--weights", choices=("plain", "ema"), help="of a run with ema_decay (default: ema, the average)"
    )
    parser.add_argument("--views", nargs="+", choices=VIEWS, help="classify by these views of a picture, too; slower")
    parser.add_argument(
        "--exit_threshold",
        type=parse_threshold,
        default=LEARNED,
        metavar="P",
        help="pictures surer than P skip the last passes, 1: none does (%(default)s: in training)",
    )
    parser.add_argument(
        "--out", type=nonempty_path, default=Path("predictions"), metavar="DIR", help="drawings (%(default)s)"
    )
    parser.add_argument("--no_drawings", action="store_true", help="names only, which is faster")
    parser.add_argument("--json", action="store_true", help="one JSON object a line instead of text")
    parser.add_argument("--top", type=int, default=5, metavar="N", help="names per picture (%(default)s)")
    parser.add_argument("--batch_size", type=int, default=8, metavar="N", help="pictures at a time (%(default)s)")
    parser.add_argument("--workers", type=int, default=2, metavar="N", help="processes that load them (%(default)s)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1 ..., mps (%(default)s)")
    options = parser.parse_args(arguments)
    for name in ("top", "batch_size"):
        if getattr(options, name) < 1:
            raise UserError(f"{name} is {getattr(options, name)}; expected a whole number of at least 1")
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse_arguments(arguments)
    let_every_name_pass()
    keep_freed_memory()
    pictures = find_pictures(options.pictures, leave_out=options.out)
    drawings = drawing_paths(pictures, options.out)

    # Rebuild. Only the network is wanted: the data set's folder need not be possible on this machine.
    machine = {"device": options.device, "workers": options.workers, "evaluation_batch_size": options.batch_size}
    machine["compile"] = False  # it takes longer than a folder of pictures
    by_training = options.exit_threshold == LEARNED
    exits = {} if by_training or options.exit_threshold == 1 else {"exit_threshold": options.exit_threshold}
    trained = load_trained(options.checkpoint, rebuilt, weights=options.weights, data_root=".", **machine, **exits)
    network, class_names = trained.network, trained.saved["class_names"]
    if network.can_exit_early:
        network.exit_threshold = learned_threshold(trained.saved) if by_training else options.exit_threshold
    corners = comes_with_corners(trained.settings, options.views)
    if options.views:
        add_views(network, options.views, corners=corners)
    loading = loading_of(trained.settings)
    limit_memory(trained.settings.picture_memory)
    loader = DataLoader(
        ReadablePictures(pictures, **loading, corners=corners),
        batch_size=options.batch_size,
        num_workers=min(options.workers, len(pictures) // 2),
        collate_fn=collate_readable,
        worker_init_fn=partial(start_loader, picture_memory=trained.settings.picture_memory),
    )

    # Predict, and say it as it comes.
    bad = 0
    if not options.no_drawings:
        make_output_folder(options.out)
    bar = tqdm(total=len(pictures), unit=" pictures", desc="predict", disable=None, leave=False)
    for batch, reasons in loader:
        bad += len(reasons)
        for reason in reasons:
            tqdm.write(f"skipped: {reason}", file=sys.stderr)
        bar.update(len(reasons))
        if batch is None:
            continue
        bar.update(len(batch.paths))
        output, evidence = run_network(trained, batch.images, with_evidence=not options.no_drawings)
        logits = network.predict_logits(output)
        refuse_nonfinite(logits.isfinite().all(dim=1), batch.paths, "try an earlier checkpoint")
        probabilities = logits.float().softmax(dim=1)
        values, labels = (t.tolist() for t in probabilities.topk(min(options.top, len(class_names)), dim=1))
        for index, path in enumerate(batch.paths):
            names = [class_names[label] for label in labels[index]]
            drawing = None if options.no_drawings else drawings[Path(path)]
            box = None
            if options.json:  # in pixels of the file, which may be larger than what is decoded of it
                box = box_in(seen_part(*read_size(path), **loading), output, index, network)
            if drawing is not None:
                picture, _ = load_picture(path)  # again, for all its detail
                panel = image_panel(
                    cut_out(picture, seen_part(*picture.size, **loading)),
                    output,
                    index,
                    names,
                    values[index],
                    input_size=network.input_size,
                    title=drawing.stem,
                    evidence=evidence[index],
                )
                save_png(drawing, panel)
            tqdm.write(
                as_json(path, names, values[index], box, drawing)
                if options.json
                else f"{one_line(path)}: {', '.join(map(share, names, values[index]))}"
            )
            sys.stdout.flush()
    bar.close()
    if not options.no_drawings and bad < len(pictures):
        print(f"drawings are in {options.out}", file=sys.stderr)
    if bad:
        print(f"error: {bad} of {len(pictures)} pictures could not be read and were skipped", file=sys.stderr)
        sys.exit(1)


def run_network(trained: Trained, images: Tensor, *, with_evidence: bool) -> tuple[NetworkOutput, Tensor | None]:
    """Run the network on uint8 images [B, 3, S, S]; the evidence is float32 [B, 112, 112]."""
    images = trained.execution.images(images)
    passes = {"mask_background": trained.plan.mask_background, "branches": trained.network.prediction}
    with trained.execution.autocast():
        if with_evidence:
            return forward_with_evidence(trained.network, images, **passes)
        with torch.no_grad():
            return trained.network(images, **passes), None


def find_pictures(given: Sequence[Path], *, leave_out: Path) -> list[Path]:
    """Return the pictures named, and those in the folders named and below them, each once, by name.

    What is hidden and what lies in `leave_out`, where earlier drawings may be, is left out of folders; of files, named
    or in folders, what is no picture, with a note. Raises DataError where something named is not there and where
    nothing is found.
    """
    found: list[Path] = []
    left_out = LeftOut()
    out = leave_out.resolve()
    for path in given:
        if path.is_dir():
            below = sorted(folders.find_pictures(None, path, left_out=left_out))
            holds_all = path.resolve().is_relative_to(out)  # then drawings are known by what they hold
            found += [p for p in below if holds_all or not p.resolve().is_relative_to(out)]
        elif not path.exists():
            raise DataError(f"there is no picture or folder {path}: give the path of one")
        elif len(given) == 1 or is_picture(path):
            found.append(path)
        else:
            left_out.add(path)
    for sentence in left_out.sentences():
        print(f"note: {sentence}", file=sys.stderr)
    if not found:
        raise DataError(f"no picture in {', '.join(map(str, given))}: expected files such as *.jpg or *.png there")
    return list(dict.fromkeys(found))


def drawing_paths(pictures: Sequence[Path], out: Path) -> dict[Path, Path]:
    """Return where to draw each picture: below `out` as the pictures lie below the folder that they share.

    No drawing takes the place of another one or of a picture that was given.
    """
    absolute = [Path.cwd() / picture for picture in pictures]  # links are not followed: their names tell them apart
    shared = os.path.commonpath([os.path.normpath(path.parent) for path in absolute])
    taken = {os.path.normpath(path) for path in absolute}
    paths = {}
    for picture, path in zip(pictures, absolute, strict=True):
        drawing = out / f"{os.path.relpath(path, shared)}.png"
        while (place := os.path.normpath(Path.cwd() / drawing)) in taken:
            drawing = drawing.with_name(f"{drawing.stem}.drawing.png")
        taken.add(place)
        paths[picture] = drawing
    return paths


class ReadablePictures(Dataset):
    """Samples of picture files; of one that cannot be read, the sentence that says why."""

    def __init__(self, paths: Sequence[Path], **loading: Any) -> None:
        self.pictures = Pictures([Entry(path, label=0) for path in paths], **loading)

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, index: int) -> Sample | str:
        path = str(self.pictures.entries[index].source)
        try:
            if ends_in_zeros(path):  # training refuses it, too: what decoders make of it is no picture
                return f"{path} cannot be read as a picture ({NEVER_WRITTEN}): replace it"
            return self.pictures[index]
        except DataError as error:
            return str(error)


def collate_readable(samples: Sequence[Sample | str]) -> tuple[Batch | None, list[str]]:
    """Return the batch of those that could be read, None where none could, and why the others could not."""
    good = [sample for sample in samples if isinstance(sample, Sample)]
    return collate(good) if good else None, [sample for sample in samples if isinstance(sample, str)]


def box_in(seen: Box, output, index: int, network) -> list[float] | None:
    """Return the object's edges in pixels of the upright picture, None for systems without boxes.

    `seen`: the edges of what the network saw, in pixels of that picture.
    """
    if output.object_boxes is None:
        return None
    edges = inclusive_to_edges(output.object_boxes[index]).tolist()
    starts, sides = seen[:2] * 2, (seen[2] - seen[0], seen[3] - seen[1]) * 2
    return [
        round(start + edge / network.input_size * side, 1)
        for edge, start, side in zip(edges, starts, sides, strict=True)
    ]


def as_json(path: str, names: Sequence[str], values: Sequence[float], box: object, drawing: Path | None) -> str:
    predictions = [{"name": name, "probability": value} for name, value in zip(names, values, strict=True)]
    line = {"picture": path, "predictions": predictions, "object_box": box, "drawing": drawing and str(drawing)}
    return json_line(line)


def share(name: str, value: float) -> str:
    return f"{one_line(name)} {value:.1%}"


if __name__ == "__main__":
    with exit_with_one_sentence(elsewhere="--out", less_memory="lower --batch_size or --workers"):
        main()
