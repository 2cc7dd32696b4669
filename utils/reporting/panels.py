"""A network's output as a figure: what `utils.reporting.pictures` draws, taken from the output contract."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from networks.outputs import NetworkOutput
from networks.system import System
from utils.data.cropping import pictures_alone
from utils.reporting.figures import Caption
from utils.reporting.pictures import localization_panel, prediction_panel
from utils.training.execution import Execution
from utils.training.schedule import EpochPlan

Item = TypeVar("Item")

SHOWN = 8  # images of a panel
PARTS_SHOWN = 3  # of each module that proposes parts, the best ones: more would hide each other


def spread_over(entries: Sequence[Item], count: int = SHOWN) -> list[Item]:
    """Return up to `count` of these, evenly spread over all."""
    places = torch.linspace(0, len(entries) - 1, min(count, len(entries)), dtype=torch.float64)
    return [entries[place] for place in places.long().tolist()]


def draw_panel(
    network: System, batch: Any, execution: Execution, plan: EpochPlan, class_names: Sequence[str]
) -> Tensor:
    """Draw what a system (set to evaluate) finds in a batch of `datasets`: see `output_panel`."""
    network.eval()
    with torch.no_grad(), execution.autocast():
        output = network(
            execution.images(batch.images), mask_background=plan.mask_background, branches=network.evaluated
        )
    return output_panel(
        pictures_alone(batch.images),
        output,
        network.predict_logits(output),
        input_size=network.input_size,
        class_names=class_names,
        labels=batch.labels,
        true_boxes=batch.boxes,
    )


def output_panel(
    images: Tensor,
    output: NetworkOutput,
    prediction: Tensor,
    *,
    input_size: int,
    class_names: Sequence[str],
    labels: Tensor | None = None,
    true_boxes: Tensor | None = None,
) -> Tensor:
    """Draw what the network found in images [B, 3, S, S] uint8: uint8 [3, height, width].

    `prediction` [B, classes] are its logits; `true_boxes` [B, 4] are edges in pixels of `images`.
    Pictures are drawn at input_size, the pixels of the output's boxes.
    """
    scale = input_size / images.shape[-1]
    images = F.interpolate(images.float().cpu(), size=(input_size, input_size), mode="bilinear", antialias=True)
    pictures = images.round().clamp(0, 255).to(torch.uint8)
    probabilities, predictions = prediction.float().softmax(dim=1).max(dim=1)
    captions = [
        Caption(
            predicted=class_names[predicted],
            true=None if labels is None else class_names[labels[index]],
            note=f"{probability:.0%}",
        )
        for index, (predicted, probability) in enumerate(zip(predictions.tolist(), probabilities.tolist(), strict=True))
    ]
    true_boxes = None if true_boxes is None else true_boxes * scale
    if output.part_boxes is not None:
        return localization_panel(
            pictures,
            true_boxes=true_boxes,
            crops=pictures,
            window_boxes=parts_to_show(output),
            windows="part",
            captions=captions,
        )
    return localization_panel(
        pictures,
        object_boxes=output.object_boxes,
        masks=output.object_masks,
        true_boxes=true_boxes,
        crops=None if output.object_boxes is None else _object_crops(pictures, output.object_boxes),
        window_boxes=_looked_at(output),
        captions=captions,
    )


def _looked_at(output: NetworkOutput) -> Sequence[Tensor | None] | None:
    """The windows [N, 4] of each image, None of one that exited before them."""
    boxes, unsure = output.window_boxes, output.unsure
    if boxes is None or unsure is None:
        return boxes
    return [of_image if looked else None for of_image, looked in zip(boxes, unsure.tolist(), strict=True)]


def parts_to_show(output: NetworkOutput) -> Tensor:
    """Return the boxes [B, N, 4] of the best parts of each module."""
    modules = output.extras["part_scores"].shape[1] if output.extras and "part_scores" in output.extras else 1
    return output.part_boxes.unflatten(1, (modules, -1))[:, :, :PARTS_SHOWN].flatten(1, 2)


def image_panel(
    picture: Image.Image,
    output: NetworkOutput,
    index: int,
    names: Sequence[str],
    probabilities: Sequence[float],
    **more,
) -> Tensor:
    """Draw one image of a batch's output on its own picture: see `utils.reporting.pictures.prediction_panel`."""
    found = {"object_box": output.object_boxes, "mask": output.object_masks, "window_boxes": output.window_boxes}
    if output.part_boxes is not None:
        found["part_boxes"] = parts_to_show(output)
    found["window_boxes"] = _looked_at(output)
    found = {name: value[index] for name, value in found.items() if value is not None and value[index] is not None}
    return prediction_panel(picture, names, probabilities, **found, **more)


def _object_crops(pictures: Tensor, boxes: Tensor) -> Tensor:
    """Cut inclusive boxes [B, 4] out of uint8 pictures [B, 3, S, S] and enlarge them to S x S."""
    crops = []
    for picture, (x0, y0, x1, y1) in zip(pictures, boxes.round().long().tolist(), strict=True):
        cut = picture[None, :, y0 : y1 + 1, x0 : x1 + 1].float()
        crops.append(F.interpolate(cut, size=picture.shape[-2:], mode="bilinear", align_corners=True)[0])
    return torch.stack(crops).round().to(torch.uint8)
