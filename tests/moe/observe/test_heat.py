"""Colours carry values: whoever reads a picture gets the load back."""

import base64
import io

import numpy as np
import pytest
from PIL import Image

from moe.observe import heat


def test_every_index_has_a_colour_of_its_own():
    colours = heat.palette()
    assert len(set(colours)) == len(colours) == len(heat.load_values())


def test_loads_come_back_within_half_a_step():
    load = np.concatenate([np.linspace(0.03, 2, 500), np.linspace(2, 15, 300)])
    found = np.array([heat.load_values()[i] for i in heat.load_index(load)])
    assert np.abs(found - load)[load <= 2].max() <= 0.5 / heat.HALF + 1e-9
    assert np.abs(found / load - 1)[load > 2].max() < 0.1


def test_idle_unknown_little_and_huge_are_told_apart():
    index = heat.load_index(np.array([0.0, np.nan, 1e-6, 1.0, 99.0, np.inf]))
    assert index.tolist() == [heat.IDLE, heat.UNKNOWN, heat.FIRST, heat.FIRST + heat.HALF, 62, 62]
    assert heat.palette()[heat.FIRST + heat.HALF] == (255, 255, 255)


@pytest.mark.parametrize("limit", [0.5, 0.0])
def test_signed_values_are_white_at_zero(limit):
    index = heat.signed_index(np.array([-limit, 0.0, limit, np.nan]), limit)
    ends = [heat.FIRST, heat.FIRST + 2 * heat.HALF] if limit else [heat.FIRST + heat.HALF] * 2
    assert index.tolist() == [ends[0], heat.FIRST + heat.HALF, ends[1], heat.UNKNOWN]


def test_a_png_holds_the_indices():
    index = np.arange(63, dtype=np.uint8).reshape(7, 9)
    image = Image.open(io.BytesIO(base64.b64decode(heat.png_url(index).split(",")[1])))
    assert np.array_equal(np.asarray(image), index)
    assert image.convert("RGB").getpixel((3, 1)) == heat.palette()[12]


def test_heat_map_is_blue_white_orange_and_black():
    image = heat.heat_map(np.array([[0.0, 0.5, 1.0, 2.0], [1.0, 1.0, 1.0, 9.0]]))
    cells = np.asarray(image)[:: heat.CELL, :: heat.CELL].astype(int)
    assert cells.shape == (2, 4, 3)
    assert cells[0, 0].tolist() == [0, 0, 0]
    assert cells[0, 1][2] > cells[0, 1][0]  # bluish
    assert cells[0, 2].tolist() == [255, 255, 255]
    assert cells[0, 3][0] > cells[0, 3][2]  # orange
    assert cells[1, 3].sum() < cells[0, 3].sum()  # darker above twice the target
