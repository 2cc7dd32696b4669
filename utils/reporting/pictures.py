"""Pictures of what a network looked at, for TensorBoard and for PNG files."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy
import torch
from PIL import Image, ImageDraw, ImageFilter, ImageFont
from torch import Tensor

from utils.errors import UserError
from utils.files import written_whole

Colour = tuple[int, int, int]

PAPER: Colour = (255, 255, 255)
INK: Colour = (45, 45, 45)
SHADOW: Colour = (20, 20, 20)
PREDICTED_BOX: Colour = (255, 176, 0)
TRUE_BOX: Colour = (0, 210, 255)
MASK_OUTLINE: Colour = (235, 235, 235)
RIGHT: Colour = (0, 128, 60)
WRONG: Colour = (200, 30, 30)
# seven colours that stay apart for colour-blind readers (Okabe and Ito, "Color Universal Design", 2008, lightened)
WINDOWS: tuple[Colour, ...] = (
    (240, 228, 66),
    (86, 180, 233),
    (255, 130, 50),
    (60, 210, 150),
    (225, 140, 190),
    (170, 120, 255),
    (245, 245, 245),
)
TRACK: Colour = (232, 232, 232)  # the empty part of a bar
# from little evidence to much: dark red, orange, light yellow; brightness alone tells it, too
HEAT: tuple[tuple[float, Colour], ...] = (
    (0.0, (60, 0, 20)),
    (0.4, (190, 30, 20)),
    (0.7, (255, 150, 0)),
    (1.0, (255, 250, 170)),
)
BARS_WIDTH = 300
DIMMED = 0.4  # brightness left outside the mask
PADDING = 12
GAP = 4  # between a picture and its crop


class Caption(NamedTuple):
    """What stands below a picture; green or red by whether the two agree, neutral where the truth is not known."""

    predicted: str
    true: str | None = None
    note: str = ""  # appended to the predicted name, such as "93 %"


def localization_panel(
    images: Tensor,
    *,
    object_boxes: Tensor | None = None,
    masks: Tensor | None = None,
    true_boxes: Tensor | None = None,
    crops: Tensor | None = None,
    window_boxes: Tensor | None = None,
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
        true_boxes: [B, 4] continuous edges in pixels of `images`.
        crops: uint8 [B, 3, S, T], the object's crop enlarged.
        window_boxes: [B, N, 4] inclusive pixels of `crops`; the legend calls them `windows`.
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
                true_box=_item(true_boxes, index),
                height=tile_height,
            )
        ]
        if crops is not None:
            tiles.append(_crop_tile(crops[index], _item(window_boxes, index), height=tile_height))
        cells.append(_captioned(tiles, captions[index] if captions is not None else None))
    legend = _legend(
        predicted=object_boxes is not None,
        true=true_boxes is not None,
        mask=masks is not None,
        windows=None if window_boxes is None else windows,
        names=captions is not None and any(caption.true is not None for caption in captions),
    )
    figure = _grid(cells, columns, legend)
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
    true_name: str | None = None,
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
        true_box: [4] continuous edges.
        true_name: makes the caption green or red.
        height: of the drawings in pixels.

    Returns:
        uint8 [3, height, width].
    """
    width = round(height * min(max(picture.width / picture.height, 0.5), 2))
    shown = picture.resize((width, height), Image.Resampling.BICUBIC)
    to_tile = torch.tensor([width, height] * 2) / input_size
    tile = shown if mask is None else _dim_outside(shown, mask.cpu())
    tile = tile.copy()
    draw = ImageDraw.Draw(tile)
    if object_box is not None:
        _draw_box(draw, _fit(_edges(object_box) * to_tile, tile), PREDICTED_BOX)
    if true_box is not None:
        _draw_dashed_box(draw, _fit(true_box.float().cpu() * to_tile, tile), TRUE_BOX)
    if part_boxes is not None:
        _draw_numbered_boxes(tile, [_fit(_edges(box) * to_tile, tile) for box in part_boxes])
    tiles = [tile]
    if object_box is not None:
        scale = torch.tensor([picture.width, picture.height] * 2) / input_size
        left, top, right, bottom = _fit(_edges(object_box) * scale, picture)
        crop = picture.resize(shown.size, Image.Resampling.BICUBIC, box=(left, top, right + 1, bottom + 1))
        if window_boxes is not None:
            _draw_numbered_boxes(crop, [_fit(_edges(box) * to_tile, crop) for box in window_boxes])
        tiles.append(crop)
    if evidence is not None:
        tiles.append(_heated(shown, evidence.cpu()))
    tiles.append(_bars(names, probabilities, title=title, height=height))
    caption = None if true_name is None else Caption(names[0], true_name, f"{probabilities[0]:.0%}")
    legend = _legend(
        predicted=object_box is not None,
        true=true_box is not None,
        mask=mask is not None,
        windows="window" if window_boxes is not None else "part" if part_boxes is not None else None,
        names=true_name is not None,
        evidence=evidence is not None,
    )
    figure = _grid([_captioned(tiles, caption)], 1, legend)
    return torch.from_numpy(numpy.array(figure)).permute(2, 0, 1).contiguous()


def save_png(path: str | Path, image: Tensor) -> None:
    """Write an image, uint8 [3, H, W], as a PNG file: complete or not at all, in a folder that is made if missing."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with written_whole(path) as file:
        to_pillow(image).save(file, format="PNG")


def _item(values: Tensor | None, index: int) -> Tensor | None:
    return None if values is None else values[index].detach().cpu()


def to_pillow(image: Tensor) -> Image.Image:
    return Image.fromarray(image.detach().cpu().permute(1, 2, 0).contiguous().numpy())


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
        tile = _dim_outside(tile, mask)
    draw = ImageDraw.Draw(tile)
    if object_box is not None:
        edges = object_box.float() + torch.tensor([0, 0, 1, 1])
        _draw_box(draw, _fit(edges * scale, tile), PREDICTED_BOX)
    if true_box is not None:
        _draw_dashed_box(draw, _fit(true_box.float() * scale, tile), TRUE_BOX)
    return tile


def _crop_tile(crop: Tensor, window_boxes: Tensor | None, height: int) -> Image.Image:
    tile, scale = _scaled(crop, height)
    if window_boxes is None:
        return tile
    _draw_numbered_boxes(tile, [_fit(_edges(box) * scale, tile) for box in window_boxes])
    return tile


def _edges(box: Tensor) -> Tensor:
    """Inclusive pixels [4] -> continuous edges."""
    return box.float().cpu() + torch.tensor([0, 0, 1, 1])


def _draw_numbered_boxes(tile: Image.Image, corners: Sequence[tuple[int, int, int, int]]) -> None:
    draw = ImageDraw.Draw(tile)
    # windows lie on a grid and share lines: no dark line may cross a coloured one, no large window cover a small one
    for left, top, right, bottom in corners:
        draw.rectangle((left - 1, top - 1, right + 1, bottom + 1), outline=SHADOW)
    areas = [(right - left) * (bottom - top) for left, top, right, bottom in corners]
    for number in sorted(range(len(corners)), key=areas.__getitem__, reverse=True):
        draw.rectangle(corners[number], outline=WINDOWS[number % len(WINDOWS)], width=2)
    # numbers last, so that no box crosses them
    taken: set[tuple[int, int]] = set()
    for number, (left, top, _, _) in enumerate(corners):
        side = max(12, tile.height // 16)
        left, top = min(left, tile.width - side), min(top, tile.height - side)
        step = side if left < tile.width / 2 else -side  # windows with the same corner: one label beside the other
        while any(abs(left - x) < side and abs(top - y) < side for x, y in taken):
            left += step
        taken.add((left, top))
        square = (left, top, left + side - 1, top + side - 1)
        draw.rectangle(square, fill=WINDOWS[number % len(WINDOWS)], outline=SHADOW)
        centre = (left + side / 2, top + side / 2)
        draw.text(centre, str(number + 1), fill=SHADOW, font=_font(side - 4), anchor="mm")


def _heated(picture: Image.Image, evidence: Tensor) -> Image.Image:
    """The picture in grey, with the evidence [g, g] glowing over it; its highest value is the brightest."""
    strength = (evidence / evidence.amax().clamp(min=torch.finfo(torch.float32).tiny)).float()
    heat = Image.fromarray((strength * 255).round().to(torch.uint8).numpy())
    heat = heat.resize(picture.size, Image.Resampling.BICUBIC)
    # where two boxes end it jumps, which the eye would take for something in the picture
    heat = numpy.asarray(heat.filter(ImageFilter.GaussianBlur(picture.height / 50)), dtype=numpy.float32) / 255
    stops, colours = zip(*HEAT, strict=True)
    glow = numpy.stack([numpy.interp(heat, stops, channel) for channel in zip(*colours, strict=True)], axis=-1)
    grey = numpy.asarray(picture.convert("L"), dtype=numpy.float32)[..., None].repeat(3, axis=-1)
    share = numpy.clip(heat * 1.5, 0, 0.75)[..., None]
    return Image.fromarray((grey * (1 - share) + glow * share).round().clip(0, 255).astype(numpy.uint8))


def _bars(names: Sequence[str], probabilities: Sequence[float], *, title: str, height: int) -> Image.Image:
    """The names with their probabilities as bars, in a tile of a height."""
    width, row = BARS_WIDTH, min(56, (height - 24) // max(len(names), 1))
    tile = Image.new("RGB", (width, height), PAPER)
    draw = ImageDraw.Draw(tile)
    draw.text((8, 11), _shortened(title, _font(13), width - 16), fill=INK, font=_font(13), anchor="lm")
    size = max(9, min(15, row // 2 - 2))
    for number, (name, probability) in enumerate(zip(names, probabilities, strict=True)):
        top = 24 + number * row
        percent = f"{probability:.1%}"
        room = width - 24 - _font(size).getlength(percent)
        draw.text((8, top + row * 0.25), _shortened(name, _font(size), room), fill=INK, font=_font(size), anchor="lm")
        draw.text((width - 8, top + row * 0.25), percent, fill=INK, font=_font(size), anchor="rm")
        bar_top, bar_bottom = top + round(row * 0.52), top + round(row * 0.8)
        draw.rectangle((8, bar_top, width - 8, bar_bottom), fill=TRACK)
        length = round((width - 16) * min(max(probability, 0), 1))
        if length:
            draw.rectangle((8, bar_top, 8 + length, bar_bottom), fill=WINDOWS[1] if number else PREDICTED_BOX)
    return tile


def _dim_outside(tile: Image.Image, mask: Tensor) -> Image.Image:
    """Darken what the mask leaves out and draw its border there, so that every kept pixel stays as it is."""
    pixels = numpy.array(tile)
    rows = torch.arange(tile.height) * mask.shape[0] // tile.height
    columns = torch.arange(tile.width) * mask.shape[1] // tile.width
    kept = mask.bool()[rows][:, columns].numpy()
    pixels[~kept] = (pixels[~kept] * DIMMED).astype(numpy.uint8)
    border = numpy.pad(kept, 1)
    near = border[:-2, 1:-1] | border[2:, 1:-1] | border[1:-1, :-2] | border[1:-1, 2:]
    pixels[near & ~kept] = MASK_OUTLINE
    return Image.fromarray(pixels)


def _fit(edges: Tensor, tile: Image.Image) -> tuple[int, int, int, int]:
    """A box with continuous edges in tile pixels -> its first and last pixels, inside the tile."""
    limits = (tile.width, tile.height)
    x0, y0, x1, y1 = edges.nan_to_num().round().long().tolist()
    left, top = (min(max(first, 0), limit - 1) for first, limit in zip((x0, y0), limits, strict=True))
    right, bottom = (min(last, limit) - 1 for last, limit in zip((x1, y1), limits, strict=True))
    return left, top, max(left, right), max(top, bottom)


def _draw_box(draw: ImageDraw.ImageDraw, box: tuple[int, int, int, int], colour: Colour) -> None:
    """A frame whose outer line is the box's own border pixels, with a dark line round it for bright backgrounds."""
    left, top, right, bottom = box
    draw.rectangle((left - 1, top - 1, right + 1, bottom + 1), outline=SHADOW)
    draw.rectangle(box, outline=colour, width=3)


def _draw_dashed_box(draw: ImageDraw.ImageDraw, box: tuple[int, int, int, int], colour: Colour) -> None:
    left, top, right, bottom = box
    draw.rectangle(box, outline=SHADOW, width=2)
    dash, step = 9, 14
    for start in range(left, right + 1, step):
        end = min(start + dash - 1, right)
        draw.rectangle((start, top, end, min(top + 1, bottom)), fill=colour)
        draw.rectangle((start, max(bottom - 1, top), end, bottom), fill=colour)
    for start in range(top, bottom + 1, step):
        end = min(start + dash - 1, bottom)
        draw.rectangle((left, start, min(left + 1, right), end), fill=colour)
        draw.rectangle((max(right - 1, left), start, right, end), fill=colour)


def _captioned(tiles: Sequence[Image.Image], caption: Caption | None) -> Image.Image:
    """Tiles side by side, with two lines of text below if there is a caption."""
    width = sum(tile.width for tile in tiles) + GAP * (len(tiles) - 1)
    cell = Image.new("RGB", (width, tiles[0].height + (40 if caption else 0)), PAPER)
    left = 0
    for tile in tiles:
        cell.paste(tile, (left, 0))
        left += tile.width + GAP
    if caption is None:
        return cell
    draw = ImageDraw.Draw(cell)
    right = caption.predicted == caption.true
    colour = INK if caption.true is None else RIGHT if right else WRONG
    top = tiles[0].height
    draw.rectangle((0, top, 4, top + 39), fill=colour)
    # names are cut, notes are not
    note = f"  {caption.note}" if caption.note else ""
    name = _shortened(caption.predicted, _font(16), width - 16 - _font(16).getlength(note))
    draw.text((12, top + 13), name + note, fill=colour, font=_font(16), anchor="lm")
    if caption.true is not None:
        verdict = "right" if right else f"wrong, it is {caption.true}"
        draw.text((12, top + 31), _shortened(verdict, _font(13), width - 16), fill=INK, font=_font(13), anchor="lm")
    return cell


def _legend(
    *, predicted: bool, true: bool, mask: bool, windows: str | None, names: bool, evidence: bool = False
) -> Image.Image | None:
    """A strip of samples with their meaning, for what the figure shows."""
    entries = [
        (predicted, "predicted object", lambda draw, box: _draw_box(draw, box, PREDICTED_BOX)),
        (true, "true box", lambda draw, box: _draw_dashed_box(draw, box, TRUE_BOX)),
        (mask, "left out by the mask", lambda draw, box: draw.rectangle(box, fill=(75, 75, 75), outline=MASK_OUTLINE)),
        (windows is not None, windows, _draw_numbered_sample),
        (evidence, "speaks for the prediction", lambda draw, box: draw.rectangle(box, fill=HEAT[2][1])),
        (names, "right", lambda draw, box: draw.rectangle(box, fill=RIGHT)),
        (names, "wrong", lambda draw, box: draw.rectangle(box, fill=WRONG)),
    ]
    shown = [(text, sample) for is_shown, text, sample in entries if is_shown]
    if not shown:
        return None
    font = _font(14)
    widths = [26 + 6 + round(font.getlength(text)) + 18 for text, _ in shown]
    strip = Image.new("RGB", (sum(widths), 22), PAPER)
    draw = ImageDraw.Draw(strip)
    left = 1
    for (text, sample), width in zip(shown, widths, strict=True):
        sample(draw, (left, 2, left + 24, 19))
        draw.text((left + 32, 11), text, fill=INK, font=font, anchor="lm")
        left += width
    return strip


def _draw_numbered_sample(draw: ImageDraw.ImageDraw, box: tuple[int, int, int, int]) -> None:
    _draw_box(draw, box, WINDOWS[0])
    left, top, _, _ = box
    draw.rectangle((left, top, left + 12, top + 12), fill=WINDOWS[0], outline=SHADOW)
    draw.text((left + 6.5, top + 6.5), "1", fill=SHADOW, font=_font(10), anchor="mm")


def _grid(cells: Sequence[Image.Image], columns: int, legend: Image.Image | None) -> Image.Image:
    """All cells, equally large, row by row on paper, with the legend above."""
    columns = max(1, min(columns, len(cells)))
    rows = -(-len(cells) // columns)
    cell_width, cell_height = cells[0].size if cells else (0, 0)
    top = PADDING + (legend.height + PADDING if legend else 0)
    width = PADDING + columns * (cell_width + PADDING)
    width = max(width, legend.width + PADDING if legend else 0)
    figure = Image.new("RGB", (width, top + rows * (cell_height + PADDING)), PAPER)
    if legend:
        figure.paste(legend, (PADDING, PADDING))
    for index, cell in enumerate(cells):
        row, column = divmod(index, columns)
        figure.paste(cell, (PADDING + column * (cell_width + PADDING), top + row * (cell_height + PADDING)))
    return figure


def _shortened(text: str, font: ImageFont.FreeTypeFont, width: float) -> str:
    """The text, or as much of its beginning as fits into a width in pixels, with an ellipsis."""
    if font.getlength(text) <= width:
        return text
    length = len(text)
    while length > 0 and font.getlength(text[:length] + "...") > width:
        length -= 1
    return text[:length].rstrip() + "..."


@functools.cache
def _font(size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.load_default(size)
