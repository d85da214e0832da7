"""How the daemon's index grows with its entries: counted steps and time of each operation.

    python -m bench.index_scaling [--most 1000000] [--samples 300] [--json]

Indexes of 1,000 entries and more, three and ten times as many each, up to `--most`: branches of ten entries, each with
a tag and a subject of its own, a fifth with a lifetime. Every operation is done for branches from all over the index,
and its answer has the same size in each. Once with keys that count every comparison, and once with plain ones, for the
time. Writes results/index_scaling.json and two plots. The exit code tells whether the steps of each operation lie on
a + b * log2(n) and grow no faster; times decide nothing.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from bench.growth import fitted, plot_steps, sizes, table
from bench.plot import Curve, chart
from bench.record import record
from tests.counting import OPERATIONS, filled, numbers_in, operations, steps_per

if TYPE_CHECKING:
    from pybustcall.daemon.index import Index
    from tests.counting import Operation

PLOTTED: Final = ("look up", "add", "remove", "under a prefix", "variants", "tagged", "subjects under")


def microseconds_per(operation: Operation, index: Index, samples: int) -> float:
    """Tell how long an operation takes, half of the times less and half of them more."""
    taken = []
    for number in numbers_in(len(index), samples):
        operation.ready(index, number)
        begun = time.perf_counter()
        operation.act(index, number)
        taken.append(time.perf_counter() - begun)
        operation.undo(index, number)
    return statistics.median(taken) * 1e6


def bench(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Measure each operation at each size; sum up."""
    steps: dict[str, list[tuple[int, float]]] = {operation.name: [] for operation in OPERATIONS}
    times: dict[str, list[tuple[int, float]]] = {operation.name: [] for operation in OPERATIONS}
    for n in sizes(options.most):
        index = filled(n)
        for operation in OPERATIONS:
            steps[operation.name].append((n, round(steps_per(operation, index, samples=options.samples), 2)))
        index = filled(n, text=str)
        for operation in operations(str):
            times[operation.name].append((n, round(microseconds_per(operation, index, options.samples), 2)))
    return [{"operation": name, "steps": steps[name], "us": times[name], **fitted(steps[name])} for name in steps]


def plot_times(rows: dict[str, dict[str, Any]]) -> str:
    """Plot the times."""
    curves = [Curve(name, row["us"]) for name, row in rows.items()]
    return chart("Time per operation, by the number of entries", curves, x="entries", y="microseconds", log_x=True)


def main() -> int:
    """Run the bench; return the exit code."""
    parser = argparse.ArgumentParser(description="Counted steps and time of the index, by its entries.")
    parser.add_argument("--most", type=int, default=10**6, help="the largest index (default: 1000000)")
    parser.add_argument("--samples", type=int, default=300, help="times that each is done (default: 300)")
    parser.add_argument("--json", action="store_true", help="print the results as JSON instead of a table")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results", help="directory to write to")
    options = parser.parse_args()
    begun = time.perf_counter()
    rows = bench(options)
    recorded = record(options.output, "index_scaling", begun, rows=rows)
    plotted = {row["operation"]: row for row in rows if row["operation"] in PLOTTED}
    title = "Comparisons of keys per operation, by the number of entries"
    (options.output / "index_steps.svg").write_text(plot_steps(title, plotted, digits=1))
    (options.output / "index_times.svg").write_text(plot_times(plotted))
    print(recorded if options.json else table(rows, ["operation"], times={"us": ".1f"}, digits=1))
    return int(not all(row["is_logarithmic"] for row in rows))


if __name__ == "__main__":
    sys.exit(main())
