"""How a bench tells what grows with the number of entries: the sizes, the line through the counted steps, table, plot.

What is counted and timed, and of which operations, the benches decide. A row of their results is of one operation, and
has points (n, figure) under "steps" and under the name of each time. Whether steps lie on a + b * log2(n), and grow no
faster, is judged by `tests.counting`, and for all operations alike.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from bench.plot import Curve, chart
from tests.counting import fit_of

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

__all__ = ["fitted", "plot_steps", "sizes", "table"]

Row = dict[str, Any]

_FEWEST = 3


def sizes(most: int) -> list[int]:
    """List the sizes to measure: 1,000, 3,000, 10,000 and so on. Exits if these are too few for a line."""
    found = [n for power in range(3, 9) for n in (10**power, 3 * 10**power) if n <= most]
    if len(found) < _FEWEST:
        raise SystemExit(f"--most must be at least 10000, so that there are {_FEWEST} sizes to lay a line through")
    return found


def fitted(steps: Sequence[tuple[int, float]]) -> Row:
    """Tell of a row's steps the nearest line a + b * log2(n), how far they are off it, and whether that is little."""
    fit = fit_of(steps)
    return {
        "a": round(fit.a, 2) + 0.0,  # never -0.0
        "b": round(fit.b, 2) + 0.0,
        "off": round(fit.worst, 4),
        "growth": round(fit.growth, 3),
        "is_logarithmic": fit.is_logarithmic,
    }


def table(rows: Sequence[Row], heads: Sequence[str], *, times: Mapping[str, str], digits: int) -> str:
    """Make a Markdown table; of the sizes, the powers of ten.

    - `heads`: what of a row is told first, as it is
    - `times`: the name of each time in the rows, such as "p50_ms", and its format
    - `digits`: of counted steps, after the point
    """
    shown = [place for place, (n, _) in enumerate(rows[0]["steps"]) if math.log10(n).is_integer()]
    names = [f"{rows[0]['steps'][place][0]:,}" for place in shown]
    figures = {"steps": f".{digits}f", **times}
    cells = [*heads, "a", "b", "off by", *(f"{what.replace('_', ' ')} {name}" for what in figures for name in names)]
    lines = [f"| {' | '.join(cells)} |", f"|---|{'---:|' * (len(cells) - 1)}"]
    for row in rows:
        cells = [str(row[head]) for head in heads]
        cells += [f"{row['a']:.{digits}f}", f"{row['b']:.{digits + 1}f}", f"{row['off']:.1%}"]
        cells += [f"{row[what][place][1]:{figure}}" for what, figure in figures.items() for place in shown]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def plot_steps(title: str, rows: Mapping[str, Row], *, digits: int) -> str:
    """Plot of each row, under its name, what was counted as dots, and what was fitted as a line."""
    counted = [Curve(name, row["steps"], "dots") for name, row in rows.items()]
    lines = [
        Curve(
            f"{row['a']:.{digits}f} + {row['b']:.{digits + 1}f} log2 n",
            [(n, row["a"] + row["b"] * math.log2(n)) for n, _ in row["steps"]],
            dashed=True,
        )
        for row in rows.values()
    ]
    return chart(title, [*counted, *lines], x="entries", y="comparisons", log_x=True)
