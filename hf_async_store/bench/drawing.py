"""A small drawing surface with two ends: SVG for the page, PNG where there is no page.

Charts are drawn once, from lines, dots and words. The PNG needs Pillow, whose own font makes it the
same on every machine; the SVG takes the reader's.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final, Literal, TypeAlias
from xml.sax.saxutils import escape

import msgspec

from hf_async_store.errors import ConfigurationError

if TYPE_CHECKING:
    from PIL.ImageDraw import ImageDraw

Anchor: TypeAlias = Literal["start", "middle", "end"]

INK: Final = "#1f2430"
FAINT: Final = "#5b6170"
GRID: Final = "#e4e6ec"

_SCALE: Final = 2
_GAP: Final = 24
_FONT: Final = "system-ui, 'Helvetica Neue', Arial, 'DejaVu Sans', sans-serif"
_WIDE: Final = 0.56
"""A letter's width as a part of its height, about, in any sans-serif font."""


class Line(msgspec.Struct, frozen=True):
    points: tuple[tuple[float, float], ...]
    colour: str
    width: float = 1.0


class Dot(msgspec.Struct, frozen=True):
    x: float
    y: float
    radius: float
    colour: str
    hollow: bool = False


class Words(msgspec.Struct, frozen=True):
    """`y` is the middle of the letters' height."""

    x: float
    y: float
    text: str
    size: float = 12.0
    colour: str = INK
    anchor: Anchor = "start"
    bold: bool = False


Shape: TypeAlias = Line | Dot | Words


class Drawing(msgspec.Struct, frozen=True):
    """A chart. `title` is also what stands for it where it cannot be seen."""

    title: str
    width: float
    height: float
    shapes: list[Shape]


def width_of(text: str, size: float = 12.0) -> float:
    """About how wide it will be."""
    return len(text) * size * _WIDE


# -- SVG ------------------------------------------------------------------------------------


def as_svg(drawing: Drawing) -> str:
    """For a page: it scales with its column."""
    inner = "\n".join(map(_svg, drawing.shapes))
    return (
        f'<svg viewBox="0 0 {drawing.width:g} {drawing.height:g}" role="img" '
        f'xmlns="http://www.w3.org/2000/svg" font-family="{_FONT}">\n'
        f"<title>{escape(drawing.title)}</title>\n{inner}\n</svg>"
    )


def _svg(shape: Shape) -> str:
    match shape:
        case Line():
            points = " ".join(f"{x:.1f},{y:.1f}" for x, y in shape.points)
            return (
                f'<polyline points="{points}" fill="none" stroke="{shape.colour}" '
                f'stroke-width="{shape.width:g}" stroke-linejoin="round"/>'
            )
        case Dot():
            fill = "#ffffff" if shape.hollow else shape.colour
            return (
                f'<circle cx="{shape.x:.1f}" cy="{shape.y:.1f}" r="{shape.radius:g}" '
                f'fill="{fill}" stroke="{shape.colour}" stroke-width="1.5"/>'
            )
        case Words():
            weight = ' font-weight="600"' if shape.bold else ""
            # The baseline, because dominant-baseline is not the same everywhere.
            return (
                f'<text x="{shape.x:.1f}" y="{shape.y + shape.size * 0.35:.1f}" '
                f'font-size="{shape.size:g}" fill="{shape.colour}" '
                f'text-anchor="{shape.anchor}"{weight}>{escape(shape.text)}</text>'
            )


# -- PNG ------------------------------------------------------------------------------------


def can_png() -> str | None:
    """Why there is no PNG here, if so."""
    try:
        import PIL  # noqa: F401
    except ImportError:
        return "Pillow is not installed (pip install pillow)"
    return None


def as_png(title: str, drawings: Sequence[Drawing], columns: int = 2) -> bytes:
    """All of them on one sheet, in columns, with a title above.

    Raises:
        ConfigurationError: Pillow is not installed.
    """
    why = can_png()
    if why is not None:
        raise ConfigurationError(f"no PNG: {why}")
    from PIL import Image, ImageDraw

    placed, width, height = _placed(drawings, columns)
    image = Image.new("RGB", (int(width * _SCALE), int(height * _SCALE)), "white")
    draw = ImageDraw.Draw(image)
    _draw(draw, Words(_GAP, 26, title, 20, bold=True), 0, 0)
    for drawing, left, top in placed:
        for shape in drawing.shapes:
            _draw(draw, shape, left, top)
    data = io.BytesIO()
    image.save(data, "PNG", optimize=True)
    return data.getvalue()


def _placed(
    drawings: Sequence[Drawing], columns: int
) -> tuple[list[tuple[Drawing, float, float]], float, float]:
    """Each in the column that is shortest so far."""
    widest = max((each.width for each in drawings), default=600.0)
    columns = max(1, min(columns, len(drawings)))
    heights = [52.0] * columns
    placed = []
    for each in drawings:
        column = heights.index(min(heights))
        placed.append((each, _GAP + column * (widest + _GAP), heights[column]))
        heights[column] += each.height + _GAP
    return placed, _GAP + columns * (widest + _GAP), max(heights)


def _draw(draw: ImageDraw, shape: Shape, left: float, top: float) -> None:
    def at(x: float, y: float) -> tuple[float, float]:
        return (left + x) * _SCALE, (top + y) * _SCALE

    match shape:
        case Line():
            points = [at(x, y) for x, y in shape.points]
            draw.line(points, shape.colour, max(1, round(shape.width * _SCALE)), joint="curve")
        case Dot():
            (x, y), radius = at(shape.x, shape.y), shape.radius * _SCALE
            box = (x - radius, y - radius, x + radius, y + radius)
            fill = "#ffffff" if shape.hollow else shape.colour
            draw.ellipse(box, fill, shape.colour, round(1.5 * _SCALE))
        case Words():
            anchor = {"start": "lm", "middle": "mm", "end": "rm"}[shape.anchor]
            stroke = 1 if shape.bold else 0
            draw.text(
                at(shape.x, shape.y),
                shape.text,
                shape.colour,
                _font(shape.size),
                anchor=anchor,
                stroke_width=stroke / 2,
            )


def _font(size: float) -> Any:
    from PIL import ImageFont

    return ImageFont.load_default(size * _SCALE)
