"""Sheets of images: a grid, and labelled rows of a sweep."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from pipeline_steps.core.array_types import ByteArray
from pipeline_steps.core.escape import escape_display

FONT_SIZE = 14
MARGIN = 6
MAX_LABEL = 80
"""Characters of a label or a title."""


def image_grid(images: ByteArray, gap: int = 2) -> ByteArray:
    """Arrange images [N, H, W, 3] in a nearly square grid, row by row, with white gaps of `gap` px."""
    return _arrange(images, math.ceil(math.sqrt(len(images))), gap)


def labelled_sheet(rows: ByteArray, labels: Sequence[str], title: str, gap: int = 2) -> Image.Image:
    """Sheet of images [R, N, H, W, 3] with a label left of each row and a title above; labels may be untrusted."""
    count, columns, height = rows.shape[:3]
    grid = _arrange(rows.reshape(-1, *rows.shape[2:]), columns, gap)
    font = ImageFont.load_default(FONT_SIZE)
    shown = [escape_display(label, MAX_LABEL) for label in (title, *labels)]
    widths = [math.ceil(font.getlength(text)) for text in shown]
    left, top = max(widths[1:]) + 2 * MARGIN, FONT_SIZE + 2 * MARGIN
    size = max(left + grid.shape[1], widths[0] + MARGIN) + MARGIN, top + grid.shape[0] + MARGIN
    sheet = Image.new("RGB", size, "white")
    sheet.paste(Image.fromarray(grid), (left, top))
    draw = ImageDraw.Draw(sheet)
    draw.text((MARGIN, top / 2), shown[0], fill="black", font=font, anchor="lm")
    for row, label in enumerate(shown[1 : count + 1]):
        draw.text((MARGIN, top + row * (height + gap) + height / 2), label, fill="black", font=font, anchor="lm")
    return sheet


def _arrange(images: ByteArray, columns: int, gap: int) -> ByteArray:
    """Images [N, H, W, 3] in rows of `columns` on white."""
    count, height, width, _ = images.shape
    rows = math.ceil(count / columns)
    canvas = np.full((rows * (height + gap) - gap, columns * (width + gap) - gap, 3), 255, np.uint8)
    for number, image in enumerate(images):
        top, left = (number // columns) * (height + gap), (number % columns) * (width + gap)
        canvas[top : top + height, left : left + width] = image
    return canvas
