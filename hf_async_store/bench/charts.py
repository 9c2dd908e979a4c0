"""The charts of a report: throughput, latency, ratios to floors, growth.

Dots on logarithmic scales, because a peer and an engine may be a thousand times apart; a bar would
have to begin at a zero that such a scale does not have. Every dot has its number beside it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import cycle
from typing import Final, NamedTuple

from hf_async_store.bench.drawing import (
    FAINT,
    GRID,
    INK,
    Dot,
    Drawing,
    Line,
    Shape,
    Words,
    width_of,
)
from hf_async_store.bench.numbers import shown, time_shown
from hf_async_store.bench.results import Cell, Results, Sweep, ratio

WIDTH: Final = 680.0
COLOURS: Final = {"strategy": "#0b62c4", "floor": "#8a90a0", "peer": "#d97706"}

# Okabe and Ito's palette: told apart by people who see colours differently, too.
_PALETTE: Final = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")

_ROW: Final = 21.0
_TOP: Final = 46.0
_LEFT: Final = 284.0
_RIGHT: Final = 84.0
_BOTTOM: Final = 30.0
_AXIS: Final = 10.0


class _Scale(NamedTuple):
    """A logarithmic scale from a range of values to one of pixels."""

    low: float
    high: float
    start: float
    end: float

    @classmethod
    def over(cls, values: Sequence[float], start: float, end: float) -> _Scale:
        known = [each for each in values if each > 0 and math.isfinite(each)]
        low, high = (min(known), max(known)) if known else (1.0, 10.0)
        # Some room at both ends, and at least a factor of ten.
        low, high = low / 1.3, high * 1.3
        if high / low < 10:
            middle = math.sqrt(low * high)
            low, high = middle / math.sqrt(10), middle * math.sqrt(10)
        return cls(low, high, start, end)

    def at(self, value: float) -> float:
        share = math.log(max(value, 1e-12) / self.low) / math.log(self.high / self.low)
        return self.start + min(max(share, 0.0), 1.0) * (self.end - self.start)

    def ticks(self) -> list[float]:
        """Powers of ten; halves and fifths between them where there are few."""
        first, last = math.floor(math.log10(self.low)), math.ceil(math.log10(self.high))
        steps = (1,) if last - first > 3 else (1, 2, 5)
        found = [step * 10.0**power for power in range(first, last + 1) for step in steps]
        return [each for each in found if self.low <= each <= self.high]


def throughput(results: Results) -> list[Drawing]:
    """By load: what each side did in a second."""
    return [_throughput(load, results.of(load)) for load in results.loads if results.of(load)]


def _throughput(load: str, cells: Sequence[Cell]) -> Drawing:
    ordered = sorted(cells, key=lambda each: (_family_rank(each, cells), -each.rate))
    title = f"{load}: {ordered[0].unit} a second"
    shapes, scale, rows = _rows(
        title, [each.family for each in ordered], [rate for each in cells for rate in each.rates]
    )
    for cell, y in zip(ordered, rows, strict=True):
        colour = COLOURS[cell.kind]
        shapes.append(_name(cell.subject, y, bold=cell.kind == "strategy"))
        shapes.append(_range(scale, min(cell.rates), max(cell.rates), y, colour))
        shapes.append(Dot(scale.at(cell.rate), y, 4.5, colour, hollow=cell.kind == "floor"))
        shapes.append(_value(scale.at(max(cell.rates)) + 9, y, shown(cell.rate)))
    return _done(title, shapes, scale, rows, shown)


def latency(results: Results) -> list[Drawing]:
    """By load: how long one waits for a strategy at about half of its speed."""
    found = []
    for load in results.loads:
        cells = [each for each in results.of(load) if each.kind == "strategy" and each.calm.count]
        if cells:
            found.append(_latency(load, cells))
    return found


_SHARES: Final = (0.5, 0.9, 0.99, 0.999)


def _latency(load: str, cells: Sequence[Cell]) -> Drawing:
    title = f"{load}: ms at half load, p50 to p99.9, o longest"
    waits = {each.subject: [each.calm.percentile(share) for share in _SHARES] for each in cells}
    longest = {each.subject: each.calm.highest / 1e9 for each in cells}
    values = [wait * 1000 for each in waits.values() for wait in each]
    values += [each * 1000 for each in longest.values()]
    shapes, scale, rows = _rows(title, ["" for _ in cells], values)
    for cell, y in zip(sorted(cells, key=lambda each: waits[each.subject][0]), rows, strict=True):
        places = [scale.at(each * 1000) for each in waits[cell.subject]]
        colour = COLOURS["strategy"]
        last = scale.at(longest[cell.subject] * 1000)
        shapes.append(_name(cell.subject, y, bold=True))
        shapes.append(Line(((places[-1], y), (last, y)), GRID, 2))
        shapes.append(Line(((places[0], y), (places[-1], y)), colour, 2))
        shapes += [Dot(place, y, 3.5, colour) for place in places]
        shapes.append(Dot(last, y, 3.5, FAINT, hollow=True))
        p50, p99 = waits[cell.subject][0], waits[cell.subject][2]
        shapes.append(_value(last + 9, y, f"{time_shown(p50)}, p99 {time_shown(p99)}", small=True))
    return _done(title, shapes, scale, rows, shown, right=150)


def ratios(results: Results) -> list[Drawing]:
    """By engine: how many times as fast as each of its floors, with 95 % intervals."""
    strategies = dict.fromkeys(each.subject for each in results.cells if each.kind == "strategy")
    drawings = [_ratios(results, each) for each in strategies]
    return [each for each in drawings if each is not None]


def _ratios(results: Results, strategy: str) -> Drawing | None:
    found = []
    for load in results.loads:
        ours = results.cell(strategy, load)
        floors = [each for each in results.of(load) if each.kind == "floor"]
        for floor in floors:
            against = ratio(ours, floor) if ours and floor.family == ours.family else None
            if against is not None:
                found.append((load, floor.subject, against))
    if not found:
        return None
    title = f"{strategy}: times as fast as its floors, with 95 % intervals"
    finite = [x for _, _, each in found for x in each if 0 < x < math.inf]
    shapes, scale, rows = _rows(title, [load for load, _, _ in found], [*finite, 1.0])
    one = scale.at(1.0)
    bottom = rows[-1] + _ROW / 2
    shapes.append(Line(((one, _TOP - 6), (one, bottom)), INK, 1.2))
    for (_, name, against), y in zip(found, rows, strict=True):
        colour = COLOURS["strategy"]
        shapes.append(_name(name, y))
        last, text = against.value, f"{shown(against.value)} x"
        if math.isfinite(against.high):
            last = against.high
            shapes.append(_range(scale, against.low, last, y, colour))
        else:
            text += ", one round"
        shapes.append(Dot(scale.at(against.value), y, 4.5, colour))
        shapes.append(_value(scale.at(last) + 9, y, text))
    return _done(title, shapes, scale, rows, shown)


def growth(results: Results) -> list[Drawing]:
    """By sweep: what one operation costs, as a knob is turned."""
    names = dict.fromkeys(curve.subject for sweep in results.sweeps for curve in sweep.curves)
    colours = dict(zip(names, cycle(_PALETTE), strict=False))  # the same in every chart
    return [_growth(each, colours) for each in results.sweeps if any(c.points for c in each.curves)]


_KNOBS: Final = {
    "entities": "stored machines",
    "tasks": "tasks at once",
    "size": "bytes of a machine",
    "processes": "processes",
}


def _growth(sweep: Sweep, colours: Mapping[str, str]) -> Drawing:
    height = 320.0
    title = f"{sweep.workload}: microseconds of one, by {_KNOBS[sweep.knob]}"
    curves = [each for each in sweep.curves if each.points]
    points = [point for each in curves for point in each.points]
    across = _Scale.over([each.size for each in points], 64, WIDTH - 176)
    up = _Scale.over([each.cost * 1e6 for each in points], height - 44, _TOP)
    shapes: list[Shape] = [_title(title)]
    for tick in up.ticks():
        y = up.at(tick)
        shapes.append(Line(((across.start, y), (across.end, y)), GRID))
        shapes.append(Words(across.start - 8, y, shown(tick), 11, FAINT, "end"))
    for size in sorted({each.size for each in points}):
        x = across.at(size)
        shapes.append(Line(((x, _TOP), (x, height - 44)), GRID))
        shapes.append(Words(x, height - 30, shown(size), 11, FAINT, "middle"))
    shapes.append(
        Words((across.start + across.end) / 2, height - 12, _KNOBS[sweep.knob], 11, FAINT, "middle")
    )
    ends = _spread(
        {each.subject: up.at(each.points[-1].cost * 1e6) for each in curves}, height - 44
    )
    for curve in curves:
        colour = colours[curve.subject]
        line = [(across.at(each.size), up.at(each.cost * 1e6)) for each in curve.points]
        shapes.append(Line(tuple(line), colour, 2))
        shapes += [Dot(x, y, 3, colour) for x, y in line]
        power = curve.exponent
        label = curve.subject + ("" if power is None else f"  n^{power:.2f}")
        y = ends[curve.subject]
        shapes.append(Line((line[-1], (across.end + 16, y)), colour, 0.8))
        shapes.append(Dot(across.end + 18, y, 4, colour))
        shapes.append(Words(across.end + 27, y, label, 12, INK))
    return Drawing(title, WIDTH, height, shapes)


def _spread(ends: Mapping[str, float], bottom: float, apart: float = 15.0) -> dict[str, float]:
    """Places for the labels at the ends of curves: none lies on another, and none below all."""
    ordered = sorted(ends, key=ends.__getitem__)
    placed: dict[str, float] = {}
    lowest = -math.inf
    for name in ordered:
        lowest = placed[name] = max(ends[name], lowest + apart)
    highest = math.inf
    for name in reversed(ordered):
        highest = placed[name] = min(placed[name], highest - apart, bottom)
    return placed


# -- what rows have in common -----------------------------------------------------------------


def _rows(
    title: str, groups: Sequence[str], values: Sequence[float]
) -> tuple[list[Shape], _Scale, list[float]]:
    """The title, the scale, and the height of each row; a new group stands a little apart."""
    rows: list[float] = []
    y = _TOP + _ROW / 2
    shapes: list[Shape] = [_title(title)]
    for place, group in enumerate(groups):
        if group and (place == 0 or groups[place - 1] != group):
            y += 12 if place == 0 else 24
            shapes.append(Words(8, y - _ROW + 4, group, 11, FAINT, bold=True))
        rows.append(y)
        y += _ROW
    return shapes, _Scale.over(values, _LEFT, WIDTH - _RIGHT), rows


def _done(
    title: str,
    shapes: Sequence[Shape],
    scale: _Scale,
    rows: Sequence[float],
    told: object,
    right: float = _RIGHT,
) -> Drawing:
    bottom = rows[-1] + _ROW / 2
    grid = list(_grid(scale, bottom))
    return Drawing(title, WIDTH + right - _RIGHT, bottom + _BOTTOM, [*grid, *shapes])


def _grid(scale: _Scale, bottom: float) -> Iterator[Shape]:
    taken: list[tuple[float, float]] = []
    # Powers of ten first: where there is no room for all, the others go without.
    for tick in sorted(scale.ticks(), key=lambda each: not math.log10(each).is_integer()):
        x, text = scale.at(tick), shown(tick)
        half = (width_of(text, 11) + _AXIS) / 2
        yield Line(((x, _TOP - 6), (x, bottom)), GRID)
        if all(x + half < left or right < x - half for left, right in taken):
            yield Words(x, bottom + 14, text, 11, FAINT, "middle")
            taken.append((x - half, x + half))


def _title(text: str) -> Words:
    return Words(8, 18, text, 14, INK, bold=True)


def _name(text: str, y: float, *, bold: bool = False) -> Words:
    return Words(_LEFT - 12, y, text, 12, INK, "end", bold)


def _value(x: float, y: float, text: str, *, small: bool = False) -> Words:
    return Words(x, y, text, 11 if small else 12, INK)


def _range(scale: _Scale, low: float, high: float, y: float, colour: str) -> Line:
    return Line(((scale.at(low), y), (scale.at(high), y)), colour, 2)


def _family_rank(cell: Cell, cells: Sequence[Cell]) -> int:
    """Families in the order in which they come."""
    return list(dict.fromkeys(each.family for each in cells)).index(cell.family)
