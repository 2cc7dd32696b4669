"""Pictures of one colour, and where a picture is bright."""

from __future__ import annotations

from pathlib import Path

import torch
from PIL import Image


def write_picture(path: Path, size: tuple[int, int] = (8, 6), colour: tuple[int, int, int] = (200, 100, 50)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)
    return path


def bright_box(image: torch.Tensor) -> list[int]:
    """Edges of what is brighter than half-way between the darkest and the brightest pixel."""
    gray = image.float().mean(dim=0)
    rows, columns = torch.nonzero(gray > (gray.min() + gray.max()) / 2, as_tuple=True)
    return [int(columns.min()), int(rows.min()), int(columns.max()) + 1, int(rows.max()) + 1]
