"""Pictures side by side as one figure: captions, bars, a legend, rows and columns."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from PIL import Image, ImageDraw

from utils.reporting.drawing import (
    HEAT,
    INK,
    MASK_OUTLINE,
    PAPER,
    PREDICTED_BOX,
    RIGHT,
    SHADOW,
    TRACK,
    TRUE_BOX,
    WINDOWS,
    WRONG,
    draw_box,
    draw_dashed_box,
    load_font,
    shortened,
)

BARS_WIDTH = 300
PADDING = 12
GAP = 4  # between a picture and its crop


class Caption(NamedTuple):
    """What stands below a picture; green or red by whether the two agree, neutral where the truth is not known."""

    predicted: str
    true: str | None = None
    note: str = ""  # appended to the predicted name, such as "93 %"


def make_bars(names: Sequence[str], probabilities: Sequence[float], *, title: str, height: int) -> Image.Image:
    """The names with their probabilities as bars, in a tile of a height."""
    width, row = BARS_WIDTH, min(56, (height - 24) // max(len(names), 1))
    tile = Image.new("RGB", (width, height), PAPER)
    draw = ImageDraw.Draw(tile)
    draw.text((8, 11), shortened(title, load_font(13), width - 16), fill=INK, font=load_font(13), anchor="lm")
    font = load_font(max(9, min(15, row // 2 - 2)))
    for number, (name, probability) in enumerate(zip(names, probabilities, strict=True)):
        top = 24 + number * row
        percent = f"{probability:.1%}"
        room = width - 24 - font.getlength(percent)
        draw.text((8, top + row * 0.25), shortened(name, font, room), fill=INK, font=font, anchor="lm")
        draw.text((width - 8, top + row * 0.25), percent, fill=INK, font=font, anchor="rm")
        bar_top, bar_bottom = top + round(row * 0.52), top + round(row * 0.8)
        draw.rectangle((8, bar_top, width - 8, bar_bottom), fill=TRACK)
        length = round((width - 16) * min(max(probability, 0), 1))
        if length:
            draw.rectangle((8, bar_top, 8 + length, bar_bottom), fill=WINDOWS[1] if number else PREDICTED_BOX)
    return tile


def captioned(tiles: Sequence[Image.Image], caption: Caption | None) -> Image.Image:
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
    name = shortened(caption.predicted, load_font(16), width - 16 - load_font(16).getlength(note))
    draw.text((12, top + 13), name + note, fill=colour, font=load_font(16), anchor="lm")
    if caption.true is not None:
        verdict = "right" if right else f"wrong, it is {caption.true}"
        verdict = shortened(verdict, load_font(13), width - 16)
        draw.text((12, top + 31), verdict, fill=INK, font=load_font(13), anchor="lm")
    return cell


def make_legend(
    *, predicted: bool, true: bool, mask: bool, windows: str | None, names: bool, evidence: bool = False
) -> Image.Image | None:
    """A strip of samples with their meaning, for what the figure shows."""
    entries = [
        (predicted, "predicted object", lambda draw, box: draw_box(draw, box, PREDICTED_BOX)),
        (true, "true box", lambda draw, box: draw_dashed_box(draw, box, TRUE_BOX)),
        (mask, "left out by the mask", lambda draw, box: draw.rectangle(box, fill=(75, 75, 75), outline=MASK_OUTLINE)),
        (windows is not None, windows, _draw_numbered_sample),
        (evidence, "speaks for the prediction", lambda draw, box: draw.rectangle(box, fill=HEAT[2][1])),
        (names, "right", lambda draw, box: draw.rectangle(box, fill=RIGHT)),
        (names, "wrong", lambda draw, box: draw.rectangle(box, fill=WRONG)),
    ]
    shown = [(text, sample) for is_shown, text, sample in entries if is_shown]
    if not shown:
        return None
    font = load_font(14)
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
    draw_box(draw, box, WINDOWS[0])
    left, top, _, _ = box
    draw.rectangle((left, top, left + 12, top + 12), fill=WINDOWS[0], outline=SHADOW)
    draw.text((left + 6.5, top + 6.5), "1", fill=SHADOW, font=load_font(10), anchor="mm")


def make_grid(cells: Sequence[Image.Image], columns: int, legend: Image.Image | None) -> Image.Image:
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
