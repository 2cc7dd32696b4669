"""Drawings of what a network saw in the images that it got wrong."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from networks.evidence import forward_with_evidence
from utils.data.catalogue import Entry
from utils.data.cropping import cut_out, seen_part
from utils.data.decoding import DRAWN_AT_LEAST, load_picture
from utils.data.demo_birds import draw_demo_picture
from utils.reporting.panels import image_panel
from utils.reporting.report_sections import Mistake
from utils.training.building import Trained


def mistaken_batches(
    entries: Sequence[Entry], load_batch: Callable[[list[Entry]], Any], *, loading: Mapping[str, Any], step: int
) -> Iterator[tuple[Any, list[Image.Image], list[int]]]:
    """Yield these images, `step` at a time, as batches, what is seen of them in its own size, and labels.

    `load_batch` is that of `datasets` with a run's settings, `loading` what its `loading_of` gives.
    """
    for start in range(0, len(entries), step):
        chosen = entries[start : start + step]
        batch = load_batch(chosen)
        sources = [entry.source for entry in chosen]
        pictures = [draw_demo_picture(s) if isinstance(s, int) else _load_upright(s) for s in sources]
        pictures = [cut_out(picture, seen_part(*picture.size, **loading)) for picture in pictures]
        yield batch, pictures, [entry.label for entry in chosen]


def _load_upright(path: Path) -> Image.Image:
    return load_picture(path, at_least=DRAWN_AT_LEAST, memory=math.inf)[0]


def draw_mistakes(
    trained: Trained, batches: Iterable[tuple[Any, Sequence[Image.Image], Sequence[int]]]
) -> list[Mistake]:
    """Run the network once more on a few test images and draw what it found in each.

    `batches`: a batch of `datasets`, the pictures in their own size, and their labels.
    """
    network, _, saved, plan, execution = trained
    names, mistakes = saved["class_names"], []
    for batch, pictures, true_labels in batches:
        with execution.autocast():
            output, evidence = forward_with_evidence(
                network,
                execution.images(batch.images),
                size=112,
                mask_background=plan.mask_background,
                branches=network.evaluated,
            )
        probabilities = network.predict_logits(output).float().softmax(dim=1)
        top, labels = (t.tolist() for t in probabilities.topk(min(4, len(names)), dim=1))
        for index, (picture, label) in enumerate(zip(pictures, true_labels, strict=True)):
            box = None
            if batch.boxes is not None:
                box = batch.boxes[index] * (network.input_size / batch.images.shape[-1])
            drawing = image_panel(
                picture,
                output,
                index,
                [names[likely] for likely in labels[index]],
                top[index],
                input_size=network.input_size,
                evidence=evidence[index],
                true_box=box,
                height=200,
            )
            predicted = names[labels[index][0]]
            mistakes.append(Mistake(drawing, batch.paths[index], names[label], predicted, top[index][0]))
    return mistakes
