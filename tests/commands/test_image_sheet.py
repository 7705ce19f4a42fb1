"""Sheets: images at their places, labels beside their rows, untrusted names escaped."""

from __future__ import annotations

import numpy as np

from pipeline_steps.commands.image_sheet import image_grid, labelled_sheet

ROWS = np.random.default_rng(0).integers(0, 200, (3, 2, 32, 40, 3), np.uint8)


def test_a_grid_is_nearly_square() -> None:
    grid = image_grid(ROWS.reshape(6, 32, 40, 3)[:5])
    assert grid.shape == (2 * 32 + 2, 3 * 40 + 4, 3)
    assert np.array_equal(grid[34:, 42:82], ROWS[2, 0])
    assert (grid[34:, 84:] == 255).all()


def test_every_row_stands_beside_its_label() -> None:
    sheet = np.asarray(labelled_sheet(ROWS, ["-24 dB", "", "a longer label"], "dog.wav"))
    left, top = sheet.shape[1] - 6 - 82, sheet.shape[0] - 6 - 100
    for row in range(3):
        for column in range(2):
            y, x = top + 34 * row, left + 42 * column
            assert np.array_equal(sheet[y : y + 32, x : x + 40], ROWS[row, column])
    inked = [(sheet[top + 34 * row : top + 34 * row + 32, :left] < 128).any() for row in range(3)]
    assert inked == [True, False, True]
    assert (sheet[:top] < 128).any(), "a title"
    longer = labelled_sheet(ROWS, ["", "", ""], "a title that is wider than its images" * 2)
    assert longer.width > sheet.shape[1], "no title is cut at the images"


def test_hostile_names_are_shown_as_escapes_and_cut() -> None:
    hostile = labelled_sheet(ROWS, ["\u202egnp.exe", "a\nb", "x" * 10_000], "\x1b[31m")
    shown = labelled_sheet(ROWS, ["\\u202egnp.exe", "a\\u000ab", "x" * 79 + "\u2026"], "\\u001b[31m")
    assert np.array_equal(np.asarray(hostile), np.asarray(shown))
