"""Plots for the benches: one panel of lines, steps or dots as an SVG text, without a plotting library.

What is plotted, and whether it is good, the benches decide. Here are only axes with round ticks, marks, and a legend,
and how many values are summed up.
Colours are those of Okabe and Ito, which colour-blind readers can tell apart; each line is also named at its side.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, final
from xml.sax.saxutils import escape

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

__all__ = ["Curve", "chart", "ecdf", "percentile", "round_ticks"]

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 860, 420, 64, 250, 44, 52


@final
@dataclass(frozen=True, slots=True)
class Curve:
    """One line of a plot: its name, its points (x, y), how they are drawn, and whether the line is dashed.

    A dot's `sizes`, one for each point from 0 to 1, tell how much it weighs.
    """

    name: str
    points: Sequence[tuple[float, float]]
    kind: Literal["line", "step", "dots"] = "line"
    dashed: bool = False
    sizes: Sequence[float] = ()


def percentile(values: Sequence[float], share: float) -> float:
    """Tell the smallest value that so many per cent are at most."""
    return sorted(values)[math.ceil(share / 100 * len(values)) - 1]


def ecdf(values: Sequence[float]) -> list[tuple[float, float]]:
    """Tell for each value what share of all is at most that: the empirical distribution, at most 400 points."""
    ordered = sorted(values)
    last = len(ordered) - 1
    chosen = {round(index * last / 399) for index in range(400)} if last > 399 else range(len(ordered))
    return [(ordered[index], (index + 1) / len(ordered)) for index in sorted(chosen)]


def round_ticks(low: float, high: float, about: int = 6) -> list[float]:
    """Choose about so many round numbers from low to high: multiples of 1, 2 or 5 times a power of ten."""
    rough = (high - low) / about
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [index * step for index in range(first, math.floor(high / step + 1e-9) + 1)]


def _powers(low: float, high: float) -> list[float]:
    """List 1, 2 and 5 times the powers of ten from low to high."""
    exponents = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    return [10.0**n * m for n in exponents for m in (1, 2, 5) if low <= 10.0**n * m <= high]


def _draw(curve: Curve, colour: str, at_x: Callable[[float], float], at_y: Callable[[float], float]) -> str:
    places = [(at_x(x), at_y(y)) for x, y in curve.points]
    if curve.kind == "dots":
        sizes = curve.sizes or [0.2] * len(places)
        return "".join(
            f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{1.5 + 6 * math.sqrt(size):.1f}" fill="{colour}" fill-opacity=".6"/>'
            for (x, y), size in zip(places, sizes, strict=True)
        )
    path = f"M{places[0][0]:.1f} {places[0][1]:.1f}"
    for x, y in places[1:]:
        path += f"H{x:.1f}V{y:.1f}" if curve.kind == "step" else f"L{x:.1f} {y:.1f}"
    dashes = ' stroke-dasharray="6 4"' if curve.dashed else ""
    return f'<path d="{path}" fill="none" stroke="{colour}" stroke-width="2"{dashes}/>'


def chart(
    title: str,
    curves: Sequence[Curve],
    *,
    x: str,
    y: str,
    log_x: bool = False,
    log_y: bool = False,
    y_range: tuple[float, float] | None = None,
    marks: Sequence[tuple[float, str]] = (),
) -> str:
    """Return a plot as SVG. `x` and `y` name the axes; `marks` are vertical lines with a name each.

    Values on a logarithmic axis must be above 0. Raises ValueError if there is nothing to plot.
    """
    curves = [curve for curve in curves if curve.points]
    if not curves:
        raise ValueError("there is nothing to plot")
    xs = [point[0] for curve in curves for point in curve.points] + [place for place, _ in marks]
    ys = y_range or [point[1] for curve in curves for point in curve.points]

    def axis(values: Sequence[float], low_at: float, high_at: float, *, log: bool) -> Callable[[float], float]:
        scale: Callable[[float], float] = math.log10 if log else float
        low, high = scale(min(values)), scale(max(values))
        span = (high - low) or 1.0
        return lambda value: low_at + (scale(value) - low) / span * (high_at - low_at)

    def ticks(values: Sequence[float], *, log: bool) -> list[float]:
        low, high = min(values), max(values)
        return [low] if low == high else _powers(low, high) if log else round_ticks(low, high)

    right, bottom = WIDTH - RIGHT, HEIGHT - BOTTOM
    at_x, at_y = axis(xs, LEFT, right, log=log_x), axis(ys, bottom, TOP, log=log_y)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif">',
        '<g font-size="12"><rect width="100%" height="100%" fill="white"/>',
        f'<text x="{LEFT}" y="24" font-size="15" font-weight="bold">{escape(title)}</text>',
    ]
    for tick in ticks(xs, log=log_x):
        parts.append(f'<path d="M{at_x(tick):.1f} {TOP}V{bottom}" stroke="#e4e4e4"/>')
        parts.append(f'<text x="{at_x(tick):.1f}" y="{bottom + 18}" text-anchor="middle">{tick:g}</text>')
    for tick in ticks(ys, log=log_y):
        parts.append(f'<path d="M{LEFT} {at_y(tick):.1f}H{right}" stroke="#e4e4e4"/>')
        parts.append(f'<text x="{LEFT - 8}" y="{at_y(tick) + 4:.1f}" text-anchor="end">{tick:g}</text>')
    for place, name in marks:
        parts.append(f'<path d="M{at_x(place):.1f} {TOP}V{bottom}" stroke="#888" stroke-dasharray="2 3"/>')
        parts.append(f'<text x="{at_x(place) + 4:.1f}" y="{TOP + 12}" fill="#666">{escape(name)}</text>')
    for number, curve in enumerate(curves):
        colour, row = COLOURS[number % len(COLOURS)], TOP + 10 + 20 * number
        parts.append(_draw(curve, colour, at_x, at_y))
        sample = Curve("", [(right + 14, row), (right + 38, row)], "line", curve.dashed)
        parts.append(_draw(sample, colour, float, float))
        parts.append(f'<text x="{right + 44}" y="{row + 4}">{escape(curve.name)}</text>')
    parts += [
        f'<path d="M{LEFT} {TOP}V{bottom}H{right}" fill="none" stroke="#444"/>',
        f'<text x="{(LEFT + right) / 2}" y="{HEIGHT - 12}" text-anchor="middle">{escape(x)}</text>',
        f'<text transform="translate(16 {(TOP + bottom) / 2}) rotate(-90)" text-anchor="middle">{escape(y)}</text>',
        "</g></svg>",
    ]
    return "\n".join(parts) + "\n"
