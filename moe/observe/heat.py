"""Colours of heat maps and small PNGs of them: blue below, white at, orange above the middle; idle experts black.

Letters: L MoE layers, E experts, N columns.
"""

from __future__ import annotations

import base64
import io
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from PIL.Image import Image

CELL = 6  # pixels of W&B's heat maps

# A pixel is an index into this palette, so that whoever reads the picture gets the value back: 0 idle, 1 nothing known,
# then HALF steps down to the low end, the middle, HALF steps up to the high end, and quarters of an octave beyond.
IDLE, UNKNOWN, FIRST, HALF, BEYOND = 0, 1, 2, 24, 12
BLUE, WHITE, ORANGE, BROWN = (33, 102, 172), (255, 255, 255), (230, 97, 1), (90, 30, 0)


def _blend(start: tuple[int, int, int], end: tuple[int, int, int], share: float) -> tuple[int, ...]:
    return tuple(round(a + share * (b - a)) for a, b in zip(start, end, strict=True))


def palette() -> list[tuple[int, ...]]:
    """RGB of every index; all differ."""
    below = [_blend(BLUE, WHITE, i / HALF) for i in range(HALF)]
    above = [_blend(WHITE, ORANGE, i / HALF) for i in range(HALF + 1)]
    beyond = [_blend(ORANGE, BROWN, i / BEYOND) for i in range(1, BEYOND + 1)]
    return [(0, 0, 0), (128, 128, 128), *below, *above, *beyond]


def load_values() -> list[float | None]:
    """A_k / L of every index: 0, None, 0 ... 1 ... 2 in steps of 1 / HALF, then to 16 in quarters of an octave."""
    near = [i / HALF for i in range(2 * HALF + 1)]
    return [0.0, None, *near, *(2 * 2 ** (i / 4) for i in range(1, BEYOND + 1))]


def load_index(load: np.ndarray | float) -> np.ndarray:
    """uint8 palette index of A_k / L; NaN is unknown."""
    safe = np.nan_to_num(load, nan=1.0, posinf=16.0)
    octaves = 4 * np.log2(np.maximum(safe, 2.0) / 2)
    steps = np.where(safe <= 2, np.rint(safe * HALF), 2 * HALF + np.clip(np.rint(octaves), 0, BEYOND))
    index = FIRST + steps
    return np.where(np.isnan(load), UNKNOWN, np.where(load == 0, IDLE, index)).astype(np.uint8)


def signed_index(value: np.ndarray, limit: float) -> np.ndarray:
    """uint8 palette index of a value in [-limit, limit], white at 0; NaN is unknown."""
    scaled = np.nan_to_num(value) / (limit or 1.0)
    index = FIRST + HALF + np.rint(np.clip(scaled, -1, 1) * HALF)
    return np.where(np.isnan(value), UNKNOWN, index).astype(np.uint8)


def picture(index: np.ndarray) -> Image:
    """One pixel a cell."""
    from PIL import Image as Pillow

    image = Pillow.fromarray(np.ascontiguousarray(index, dtype=np.uint8), mode="P")
    image.putpalette([channel for colour in palette() for channel in colour])
    return image


def png_url(index: np.ndarray) -> str:
    """A data: URL of the picture."""
    file = io.BytesIO()
    picture(index).save(file, "png", optimize=True)
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def heat_map(load_LE: np.ndarray) -> Image:
    """A_k / L for W&B: one row of cells a layer, one column an expert."""
    return picture(load_index(load_LE).repeat(CELL, 0).repeat(CELL, 1)).convert("RGB")
