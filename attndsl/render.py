"""Pictures of block graphs: for terminals, as PNG and as self-contained HTML.

A `Picture` is a grid of cells, each one tile or a rectangle of them. Full, partial and empty cells differ in
glyph and in lightness, not in colour alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from html import escape
from os import PathLike, fspath
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from rich.console import RenderableType

# A PNG is at least so wide and high, in pixels.
MIN_PIXELS = 512


@dataclass(frozen=True, slots=True, eq=False)
class Picture:
    """A block graph scaled down to cells.

    `visited`, `full`: float64 [rows, columns], the share of a cell's tiles that are visited, and that are full.
    `text` is the program's source, `facts` what to write beside the picture, `start` the position of row 0.
    """

    title: str
    text: str
    facts: tuple[tuple[str, str], ...]
    visited: NDArray[np.float64]
    full: NDArray[np.float64]
    q_tiles: int
    k_tiles: int
    block_q: int
    block_k: int
    start: int

    @property
    def scaled(self) -> bool:
        """Whether a cell is more than one tile."""
        return self.visited.shape != (self.q_tiles, self.k_tiles)


class Shade(Enum):
    """What a cell shows: glyph, colour, and legend where a cell is one tile, then where it is several."""

    NONE = ("·", "#f4f1ea", "not visited", "not visited")
    SPARSE = ("░", "#f2cf8d", "", "under a third visited")
    PARTIAL = ("▒", "#e39b3b", "partial: masked pair by pair", "partly visited, or masked")
    DENSE = ("▓", "#5b9a8b", "", "over half full")
    FULL = ("█", "#14532d", "full: no mask", "full: no mask")

    @property
    def glyph(self) -> str:
        return self.value[0]

    @property
    def colour(self) -> str:
        return self.value[1]

    def legend(self, scaled: bool) -> str:
        return self.value[3 if scaled else 2]


def shades(picture: Picture) -> list[list[Shade]]:
    """What each cell shows."""

    def shade(visited: float, full: float) -> Shade:
        if visited == 0:
            return Shade.NONE
        if full >= 1:
            return Shade.FULL
        if picture.scaled and full > 0.5:
            return Shade.DENSE
        return Shade.SPARSE if picture.scaled and visited < 1 / 3 else Shade.PARTIAL

    return [
        [shade(v, f) for v, f in zip(*row, strict=True)]
        for row in zip(picture.visited.tolist(), picture.full.tolist(), strict=True)
    ]


def _legend(picture: Picture) -> Iterator[tuple[Shade, str]]:
    for shade in reversed(Shade):
        if text := shade.legend(picture.scaled):
            yield shade, text


# ---------------------------------------------------------------------------------------- terminals


def _heading(picture: Picture) -> list[str]:
    width = max((len(name) for name, _ in picture.facts), default=0)
    return [picture.title, *(f"{name:<{width}}  {value}" for name, value in picture.facts)]


def to_text(picture: Picture) -> str:
    """The picture in plain characters, two to a cell."""
    body = ["".join(shade.glyph * 2 for shade in row) for row in shades(picture)]
    legend = "   ".join(f"{shade.glyph} {text}" for shade, text in _legend(picture))
    return "\n".join([*_heading(picture), "", *body, "", legend])


def to_rich(picture: Picture) -> RenderableType:
    """The same in colour."""
    from rich.text import Text

    title, *facts = _heading(picture)
    text = Text(no_wrap=True, overflow="crop")
    text.append(title, "bold").append("\n" + "\n".join(facts) + "\n\n")
    for row in shades(picture):
        for shade in row:
            text.append(shade.glyph * 2, "dim" if shade is Shade.NONE else shade.colour)
        text.append("\n")
    for shade, legend in _legend(picture):
        text.append(f"\n{shade.glyph} ", shade.colour).append(legend)
    return text


# --------------------------------------------------------------------------------------------- files


def save_picture(small: Picture, large: Picture, path: str | PathLike[str]) -> None:
    """Writes `small` as HTML or `large` as PNG, as the ending of the path says; ValueError for any other."""
    match Path(path).suffix.lower():
        case ".png":
            _save_png(large, path)
        case ".html" | ".htm":
            Path(path).write_text(to_page(small), encoding="utf-8")
        case suffix:
            raise ValueError(f"a block graph is saved as .png or .html, not {suffix or 'a file without ending'!r}")


def _save_png(picture: Picture, path: str | PathLike[str]) -> None:
    from PIL import Image, ImageDraw

    palette = {shade: tuple(bytes.fromhex(shade.colour[1:])) for shade in Shade}
    cells = np.asarray([[palette[shade] for shade in row] for row in shades(picture)], np.uint8)
    scale = max(1, -(-MIN_PIXELS // max(cells.shape[:2])))
    cells = cells.repeat(scale, axis=0).repeat(scale, axis=1)
    # Pillow's own font holds Latin letters only.
    lines = [line.replace("×", "x") for line in _heading(picture)]
    line, margin = 14, 12
    legend = list(_legend(picture))
    top = margin + line * len(lines) + margin
    height = top + cells.shape[0] + margin + line * len(legend) + margin
    image = Image.new("RGB", (max(cells.shape[1] + 2 * margin, MIN_PIXELS), height), "white")
    draw = ImageDraw.Draw(image)
    for i, text in enumerate(lines):
        draw.text((margin, margin + line * i), text.encode("latin-1", "replace").decode("latin-1"), fill="black")
    image.paste(Image.fromarray(cells), (margin, top))
    for i, (shade, text) in enumerate(legend):
        y = top + cells.shape[0] + margin + line * i
        draw.rectangle((margin, y + 1, margin + 10, y + 11), fill=shade.colour, outline="black")
        draw.text((margin + 18, y), text, fill="black")
    image.save(fspath(path), format="PNG")


_STYLE = """
.attndsl{font:14px/1.45 system-ui,sans-serif;color:#1c1917;background:#fff;padding:12px;max-width:760px}
.attndsl svg{width:100%;height:auto;max-height:720px;border:1px solid #d6d3d1;background:#f4f1ea}
.attndsl rect:hover{stroke:#1d4ed8;stroke-width:.15}
.attndsl table{border-collapse:collapse;margin:6px 0 10px}
.attndsl td,.attndsl th{padding:1px 14px 1px 0;text-align:left;font-weight:400}
.attndsl th{color:#57534e}
.attndsl pre{background:#f5f5f4;padding:8px;overflow:auto}
.attndsl i{display:inline-block;width:12px;height:12px;margin:0 6px 0 0;border:1px solid #78716c}
.attndsl span{margin-right:16px}
"""


def to_fragment(picture: Picture) -> str:
    """The picture as one HTML element that needs nothing else."""
    facts = "".join(f"<tr><th>{escape(name)}</th><td>{escape(value)}</td></tr>" for name, value in picture.facts)
    legend = "".join(
        f'<span><i style="background:{shade.colour}"></i>{escape(text)}</span>' for shade, text in _legend(picture)
    )
    source = f"<pre>{escape(picture.text)}</pre>" if picture.text else ""
    rows, columns = picture.visited.shape
    drawing = (
        f'<svg viewBox="0 0 {columns} {rows}" shape-rendering="crispEdges" role="img" '
        f'aria-label="tiles of {escape(picture.title, quote=True)}">{"".join(_rectangles(picture))}</svg>'
    )
    return (
        f'<div class="attndsl"><style>{_STYLE}</style><h3>{escape(picture.title)}</h3>{source}'
        f"<table>{facts}</table>{drawing}<p>{legend}</p></div>"
    )


def to_page(picture: Picture) -> str:
    """The picture as a whole HTML page: no scripts, nothing loaded from elsewhere."""
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(picture.title)}: tiles</title></head><body>{to_fragment(picture)}</body></html>\n"
    )


def _rectangles(picture: Picture) -> Iterator[str]:
    """One rectangle for neighbours in a row that show the same, with its tiles and tokens as hover text."""
    rows, columns = picture.visited.shape
    for y, row in enumerate(shades(picture)):
        q_low, q_high = -(-y * picture.q_tiles // rows), -(-(y + 1) * picture.q_tiles // rows) - 1
        x = 0
        while x < columns:
            end = x + 1
            while end < columns and row[end] is row[x]:
                end += 1
            if row[x] is not Shade.NONE:
                k_low, k_high = -(-x * picture.k_tiles // columns), -(-end * picture.k_tiles // columns) - 1
                queries = _range("query", q_low, q_high, picture.block_q, picture.start)
                keys = _range("key", k_low, k_high, picture.block_k, 0)
                share = float(picture.visited[y, x:end].mean())
                note = f"{queries}\n{keys}\n{row[x].legend(picture.scaled)}"
                if picture.scaled:
                    note += f" ({100 * share:.0f} % visited)"
                yield (
                    f'<rect x="{x}" y="{y}" width="{end - x}" height="1" fill="{row[x].colour}">'
                    f"<title>{escape(note)}</title></rect>"
                )
            x = end


def _range(side: str, low: int, high: int, block: int, start: int) -> str:
    tiles = f"tile {low}" if low == high else f"tiles {low} to {high}"
    return f"{side} {tiles}: positions {start + low * block:,} to {start + (high + 1) * block - 1:,}"
