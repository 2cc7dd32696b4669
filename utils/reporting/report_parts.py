"""What a report's sections are made of, as HTML: tables that sort, bars, charts, pictures."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from html import escape

import numpy
from PIL import Image
from torch import Tensor


def table(headers: Sequence[str], rows: Sequence[Sequence[tuple[str, object]]]) -> str:
    """A table whose columns sort; each cell is (HTML, the value it sorts by)."""
    head = "".join(f"<th><button>{escape(header)}</button></th>" for header in headers)
    body = "".join("<tr>" + "".join(_cell(cell, value) for cell, value in row) + "</tr>" for row in rows)
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _cell(content: str, value: object) -> str:
    kind = "" if isinstance(value, str) else ' class="number"'
    return f'<td{kind} data-value="{escape(str(value))}">{content}</td>'


def bar(share: float) -> str:
    return f'<span class="bar"><i style="width:{100 * share:.1f}%"></i></span>{share:.1%}'


def chart(shapes: str, below: str, aside: str) -> str:
    """A chart of 400 x 200 with both axes from 0 to 1 (the upright one only where the shapes say so)."""
    ticks = "".join(f'<text x="{400 * n / 5}" y="216" text-anchor="middle">{n / 5:g}</text>' for n in range(6))
    return (
        '<svg class="chart" viewBox="-30 -6 440 250" role="img"><path class="axis" d="M0 0V200H400"/>'
        f'{shapes}{ticks}<text x="200" y="236" text-anchor="middle">{below}</text>'
        f'<text transform="translate(-12 100) rotate(-90)" text-anchor="middle">{aside}</text></svg>'
    )


def png(pixels: numpy.ndarray) -> str:
    return _data_address(Image.fromarray(pixels), "PNG", optimize=True)


def jpeg(drawing: Tensor) -> str:
    return _data_address(Image.fromarray(drawing.permute(1, 2, 0).cpu().numpy()), "JPEG", quality=82, optimize=True)


def _data_address(picture: Image.Image, kind: str, **options: object) -> str:
    file = io.BytesIO()
    picture.save(file, format=kind, **options)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(file.getvalue()).decode()}"
