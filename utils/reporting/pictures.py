"""Pictures of what a network looked at, for TensorBoard and for PNG files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy
import torch
from PIL import Image, ImageDraw
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from utils.data.kinds import WRITTEN_BY_US
from utils.errors import UserError
from utils.files import SavingError, atomic_write
from utils.reporting.drawing import (
    PREDICTED_BOX,
    TRUE_BOX,
    dim_outside,
    draw_box,
    draw_dashed_box,
    draw_numbered_boxes,
    fit_into,
    heated,
    to_pillow,
)
from utils.reporting.figures import Caption, captioned, make_bars, make_grid, make_legend
from utils.reporting.metrics import inclusive_to_edges


def localization_panel(
    images: Tensor,
    *,
    object_boxes: Tensor | None = None,
    masks: Tensor | None = None,
    true_boxes: Tensor | None = None,
    crops: Tensor | None = None,
    window_boxes: Sequence[Tensor | None] | Tensor | None = None,
    windows: str = "window",
    captions: Sequence[Caption] | None = None,
    columns: int = 2,
    tile_height: int = 288,
) -> Tensor:
    """One figure of what the network found in each picture: a legend, then `columns` pictures a row.

    Left: the picture, dark outside the adaptive mask, with the predicted and the true box. Right: the crop of the
    object with its numbered windows. Below: the names. Anything that is None is left out, in the legend too.

    Args:
        images: uint8 [B, 3, H, W].
        object_boxes: [B, 4] inclusive pixels (x0, y0, x1, y1) of `images`.
        masks: [B, g, g] bool, True where kept; the cells of a grid over the picture.
        true_boxes: [B, 4] continuous edges in pixels of `images`, NaN where one is not known.
        crops: uint8 [B, 3, S, T], the object's crop enlarged.
        window_boxes: [B, N, 4] inclusive pixels of `crops`, or [N, 4] of each picture, None of one without; the legend
            calls them `windows`.
        captions: one per picture.
        columns: pictures in a row.
        tile_height: height in pixels that pictures and crops are drawn at.

    Returns:
        uint8 [3, height, width].

    Raises:
        UserError: windows without the crops they lie in.
    """
    if window_boxes is not None and crops is None:
        raise UserError("window_boxes lie in the crops, and crops is None: pass both or neither")
    cells = []
    for index, image in enumerate(images):
        tiles = [
            _picture_tile(
                image,
                object_box=_item(object_boxes, index),
                mask=_item(masks, index),
                true_box=_known(_item(true_boxes, index)),
                height=tile_height,
            )
        ]
        if crops is not None:
            tiles.append(_crop_tile(crops[index], _item(window_boxes, index), height=tile_height))
        cells.append(captioned(tiles, captions[index] if captions is not None else None))
    legend = make_legend(
        predicted=object_boxes is not None,
        true=true_boxes is not None,
        mask=masks is not None,
        windows=None if window_boxes is None or all(boxes is None for boxes in window_boxes) else windows,
        names=captions is not None and any(caption.true is not None for caption in captions),
    )
    figure = make_grid(cells, columns, legend)
    return torch.from_numpy(numpy.array(figure)).permute(2, 0, 1).contiguous()


def prediction_panel(
    picture: Image.Image,
    names: Sequence[str],
    probabilities: Sequence[float],
    *,
    input_size: int,
    title: str = "",
    evidence: Tensor | None = None,
    object_box: Tensor | None = None,
    mask: Tensor | None = None,
    window_boxes: Tensor | None = None,
    part_boxes: Tensor | None = None,
    true_box: Tensor | None = None,
    height: int = 320,
) -> Tensor:
    """One picture of any size, with all that its prediction shows, side by side.

    The picture with the object's box, the mask and the parts; the object's crop with its numbered windows; where the
    evidence for the prediction lies; the most likely names as bars. What is None is left out.

    Args:
        picture: RGB, in its own proportions (drawn no flatter than 2 to 1).
        names, probabilities: the most likely classes, the likeliest first.
        input_size: the boxes are in pixels of the picture resized to input_size x input_size.
        title: stands above the bars.
        evidence: [g, g], not negative, over the whole picture.
        object_box: [4] inclusive pixels (x0, y0, x1, y1).
        mask: [g, g] bool, True where kept.
        window_boxes: [N, 4] inclusive pixels of the object's crop, input_size x input_size.
        part_boxes: [N, 4] inclusive pixels, for systems without a crop; they may reach beyond the picture.
        true_box: [4] continuous edges, NaN where it is not known.
        height: of the drawings in pixels.

    Returns:
        uint8 [3, height, width].
    """
    width = round(height * min(max(picture.width / picture.height, 0.5), 2))
    shown = picture.resize((width, height), Image.Resampling.BICUBIC)
    to_tile = torch.tensor([width, height] * 2) / input_size
    tile = shown if mask is None else dim_outside(shown, mask.cpu())
    tile = tile.copy()
    draw = ImageDraw.Draw(tile)
    if object_box is not None:
        draw_box(draw, fit_into(_edges(object_box) * to_tile, tile), PREDICTED_BOX)
    true_box = _known(true_box)
    if true_box is not None:
        draw_dashed_box(draw, fit_into(true_box.float().cpu() * to_tile, tile), TRUE_BOX)
    if part_boxes is not None:
        draw_numbered_boxes(tile, [fit_into(_edges(box) * to_tile, tile) for box in part_boxes])
    tiles = [tile]
    if object_box is not None:
        scale = torch.tensor([picture.width, picture.height] * 2) / input_size
        left, top, right, bottom = fit_into(_edges(object_box) * scale, picture)
        crop = picture.resize(shown.size, Image.Resampling.BICUBIC, box=(left, top, right + 1, bottom + 1))
        if window_boxes is not None:
            draw_numbered_boxes(crop, [fit_into(_edges(box) * to_tile, crop) for box in window_boxes])
        tiles.append(crop)
    if evidence is not None:
        tiles.append(heated(shown, evidence.cpu()))
    tiles.append(make_bars(names, probabilities, title=title, height=height))
    legend = make_legend(
        predicted=object_box is not None,
        true=true_box is not None,
        mask=mask is not None,
        windows="window" if window_boxes is not None else "part" if part_boxes is not None else None,
        names=False,
        evidence=evidence is not None,
    )
    figure = make_grid([captioned(tiles, None)], 1, legend)
    return torch.from_numpy(numpy.array(figure)).permute(2, 0, 1).contiguous()


def save_png(path: str | Path, image: Tensor) -> None:
    """Write an image, uint8 [3, H, W], as a PNG file: complete or not at all, in a folder that is made if missing.

    Raises SavingError where the system does not let it.
    """
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SavingError(path.parent, error) from error
    facts = PngInfo()
    facts.add_text("Software", WRITTEN_BY_US)
    with atomic_write(path) as file:
        to_pillow(image).save(file, format="PNG", pnginfo=facts)


def _item(values: Sequence[Tensor | None] | Tensor | None, index: int) -> Tensor | None:
    return None if values is None or values[index] is None else values[index].detach().cpu()


def _edges(box: Tensor) -> Tensor:
    return inclusive_to_edges(box.float().cpu())


def _known(box: Tensor | None) -> Tensor | None:
    return None if box is None or box.isnan().any() else box


def _scaled(image: Tensor, height: int) -> tuple[Image.Image, float]:
    """The image at a height, and the factor from its pixels to the tile's."""
    picture = to_pillow(image)
    scale = height / picture.height
    if scale != 1:
        picture = picture.resize((max(1, round(picture.width * scale)), height), Image.Resampling.BICUBIC)
    return picture, scale


def _picture_tile(
    image: Tensor, *, object_box: Tensor | None, mask: Tensor | None, true_box: Tensor | None, height: int
) -> Image.Image:
    tile, scale = _scaled(image, height)
    if mask is not None:
        tile = dim_outside(tile, mask)
    draw = ImageDraw.Draw(tile)
    if object_box is not None:
        draw_box(draw, fit_into(_edges(object_box) * scale, tile), PREDICTED_BOX)
    if true_box is not None:
        draw_dashed_box(draw, fit_into(true_box.float() * scale, tile), TRUE_BOX)
    return tile


def _crop_tile(crop: Tensor, window_boxes: Tensor | None, height: int) -> Image.Image:
    tile, scale = _scaled(crop, height)
    if window_boxes is None:
        return tile
    draw_numbered_boxes(tile, [fit_into(_edges(box) * scale, tile) for box in window_boxes])
    return tile
