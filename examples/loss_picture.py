"""Curves over training steps as a PNG, drawn with Pillow: panels one above the other, on one axis of steps."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

WIDTH, PANEL_HEIGHT = 1000, 340
LEFT, RIGHT, TOP, GAP, BOTTOM = 86, 24, 56, 56, 44
# Drawn this many times larger and scaled down, which smooths the lines.
SCALE = 3
INK, PALE = "#1c1917", "#e7e5e4"


@dataclass(frozen=True, slots=True)
class Curve:
    """One value a step; those that are no numbers are left out. `width` in pixels: curves are drawn in order, so that
    a thin one on a wide one shows both."""

    label: str
    values: Sequence[float]
    colour: str
    width: float = 2.0


@dataclass(frozen=True, slots=True)
class Panel:
    """Curves on one axis. On a logarithmic one, values below `floor` (zeros, say) are drawn at it."""

    title: str
    curves: Sequence[Curve]
    floor: float | None = None  # logarithmic if given

    def height(self, value: float) -> float:
        return value if self.floor is None else math.log10(max(value, self.floor))

    def ticks(self) -> list[tuple[float, str]]:
        """Heights of the grid's lines, from below the lowest value to above the highest, and what they stand for."""
        heights = [self.height(value) for curve in self.curves for value in curve.values if math.isfinite(value)]
        low, high = min(heights, default=0.0), max(heights, default=1.0)
        # The first of 1, 2 and 5 times powers of ten that needs at most six steps; on a logarithmic axis whole powers.
        sizes = (m * 10.0**e for e in range(-3 if self.floor is None else 0, 12) for m in (1, 2, 5))
        size = next(s for s in sizes if high - low <= 6 * s)
        first = math.floor(low / size)
        marks = [size * i for i in range(first, max(math.ceil(high / size), first + 1) + 1)]
        return [(mark, f"{mark:.6g}" if self.floor is None else f"1e{mark:.0f}") for mark in marks]


def draw(path: Path, title: str, panels: Sequence[Panel]) -> None:
    """Write the picture. Every curve has one value for each step, from step 1 on."""
    height = TOP + len(panels) * (PANEL_HEIGHT + GAP) - GAP + BOTTOM
    image = Image.new("RGB", (WIDTH * SCALE, height * SCALE), "white")
    pen = _Pen(ImageDraw.Draw(image))
    pen.text(LEFT, 20, title, "lm", size=17)
    steps = max(len(curve.values) for panel in panels for curve in panel.curves)
    for i, panel in enumerate(panels):
        _draw_panel(pen, panel, TOP + i * (PANEL_HEIGHT + GAP), steps)
    pen.text((LEFT + WIDTH - RIGHT) / 2, height - 12, "step", "mm")
    image.resize((WIDTH, height), Image.Resampling.LANCZOS).save(path, format="PNG", optimize=True)


def _draw_panel(pen: _Pen, panel: Panel, top: float, steps: int) -> None:
    ticks = panel.ticks()
    low, high = ticks[0][0], ticks[-1][0]
    bottom, right = top + PANEL_HEIGHT, WIDTH - RIGHT

    def x_of(step: float) -> float:
        return LEFT + (right - LEFT) * (step - 1) / max(steps - 1, 1)

    def y_of(height: float) -> float:
        return bottom - PANEL_HEIGHT * (height - low) / (high - low)

    for mark, text in ticks:
        pen.line([(LEFT, y_of(mark)), (right, y_of(mark))], PALE, 1)
        pen.text(LEFT - 10, y_of(mark), text, "rm")
    for step in sorted({1, *(max(1, round(steps * part / 5)) for part in range(1, 6))}):
        pen.line([(x_of(step), bottom), (x_of(step), bottom + 5)], INK, 1)
        pen.text(x_of(step), bottom + 15, str(step), "mm")
    for curve in panel.curves:
        points = [(x_of(i), y_of(panel.height(y))) for i, y in enumerate(curve.values, 1) if math.isfinite(y)]
        pen.line(points, curve.colour, curve.width)
    pen.line([(LEFT, top), (LEFT, bottom), (right, bottom)], INK, 1)
    pen.text(LEFT, top - 14, panel.title, "lm", size=14)
    x: float = right
    for curve in reversed(panel.curves):
        x -= pen.text(x, top - 14, curve.label, "rm") + 8
        pen.line([(x - 22, top - 14), (x, top - 14)], curve.colour, max(curve.width, 2))
        x -= 40


class _Pen:
    """Draws in pixels of the finished picture."""

    def __init__(self, draw: ImageDraw.ImageDraw) -> None:
        self.draw = draw

    def line(self, points: Sequence[tuple[float, float]], colour: str, width: float) -> None:
        scaled = [(x * SCALE, y * SCALE) for x, y in points]
        self.draw.line(scaled, fill=colour, width=round(width * SCALE), joint="curve")

    def text(self, x: float, y: float, text: str, anchor: str, size: float = 12) -> float:
        """`anchor` as Pillow has it: "lm" puts the middle of the left edge at (x, y). Returns the width."""
        font = ImageFont.load_default(size * SCALE)
        self.draw.text((x * SCALE, y * SCALE), text, fill=INK, anchor=anchor, font=font)
        return self.draw.textlength(text, font=font) / SCALE
