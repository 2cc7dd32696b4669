"""Drawings of what a network saw in the images that it got wrong."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image

from networks.evidence import forward_with_evidence
from utils.data.catalogue import Entry
from utils.data.cropping import cut_out, seen_part
from utils.data.decoding import DRAWN_AT_LEAST, load_picture
from utils.data.demo_birds import draw_demo_picture
from utils.reporting.panels import image_panel
from utils.reporting.report_sections import Mistake
from utils.training.building import Trained


class Judged(NamedTuple):
    """A test image, and what was predicted for it among all others: alone it may be something else."""

    entry: Entry
    label: int
    probability: float


def mistaken_batches(
    judged: Sequence[tuple[Entry, int, float]],
    load_batch: Callable[[list[Entry]], Any],
    *,
    loading: Mapping[str, Any],
    step: int,
) -> Iterator[tuple[Any, list[Image.Image], list[Judged]]]:
    """Yield these images, `step` at a time, as batches, what is seen of them in its own size, and what they are.

    `load_batch` is that of `datasets` with a run's settings, `loading` what its `loading_of` gives.
    """
    for start in range(0, len(judged), step):
        chosen = [Judged(*image) for image in judged[start : start + step]]
        batch = load_batch([image.entry for image in chosen])
        sources = [image.entry.source for image in chosen]
        pictures = [draw_demo_picture(s) if isinstance(s, int) else _load_upright(s) for s in sources]
        pictures = [cut_out(picture, seen_part(*picture.size, **loading)) for picture in pictures]
        yield batch, pictures, chosen


def _load_upright(path: Path) -> Image.Image:
    return load_picture(path, at_least=DRAWN_AT_LEAST, memory=math.inf)[0]


def draw_mistakes(
    trained: Trained, batches: Iterable[tuple[Any, Sequence[Image.Image], Sequence[Judged]]]
) -> list[Mistake]:
    """Run the network once more on a few test images and draw what it found in each.

    `batches`: a batch of `datasets`, the pictures in their own size, and what they are. Of each, the predicted class
    comes first with its probability in the evaluation, then others as likely as they are here.
    """
    network, plan, execution = trained.network, trained.plan, trained.execution
    names, mistakes = trained.saved["class_names"], []
    for batch, pictures, judged in batches:
        with execution.autocast():
            output, evidence = forward_with_evidence(
                network,
                execution.images(batch.images),
                mask_background=plan.mask_background,
                branches=network.evaluated,
            )
        probabilities = network.predict_logits(output).float().softmax(dim=1)
        predicted = torch.tensor([[image.label] for image in judged], device=probabilities.device)
        others = probabilities.scatter(1, predicted, -1.0)
        top, labels = (t.tolist() for t in others.topk(min(4, len(names)) - 1, dim=1))
        for index, (picture, image) in enumerate(zip(pictures, judged, strict=True)):
            box = None
            if batch.boxes is not None:
                box = batch.boxes[index] * (network.input_size / batch.images.shape[-1])
            drawing = image_panel(
                picture,
                output,
                index,
                [names[likely] for likely in (image.label, *labels[index])],
                [image.probability, *top[index]],
                input_size=network.input_size,
                evidence=evidence[index],
                true_box=box,
                height=200,
            )
            both = names[image.entry.label], names[image.label]
            mistakes.append(Mistake(drawing, batch.paths[index], *both, image.probability))
    return mistakes
