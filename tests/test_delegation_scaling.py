"""Delegation keeps O(log n): the steps of a bust from its wish to its end, counted among 10^3 to 10^6 entries."""

from __future__ import annotations

import asyncio
import itertools
from pathlib import Path

import pytest

from pybustcall.daemon.backends import Scope
from pybustcall.daemon.index import Index
from tests.counting import SIZES, fit_of
from tests.delegation import BUSTS, Asked, delegating, filled, spread, steps_per
from tests.test_bench import check_plot, check_table, run_bench

Points = dict[str, list[tuple[int, float]]]


async def count(sizes: tuple[int, ...], busts: tuple[Asked, ...], directory: Path) -> Points:
    """Count the steps of these busts at each size; the journals are files, so that hybrid busts come in two parts."""
    points: Points = {asked.name: [] for asked in busts}
    for n in sizes:
        indexes = filled(n)
        async with delegating(indexes, directory / f"journal-{n}") as delegation:
            for asked in busts:
                points[asked.name].append((n, await steps_per(asked, delegation)))
        assert len(indexes) == n
    return points


@pytest.fixture(scope="module")
def counted(tmp_path_factory: pytest.TempPathFactory) -> Points:
    """Count the steps of every bust, once."""
    return asyncio.run(count(SIZES, BUSTS, tmp_path_factory.mktemp("journals")))


@pytest.mark.requirement("INT-05")
@pytest.mark.requirement("IMP-14")
@pytest.mark.parametrize("name", [asked.name for asked in BUSTS])
def test_the_steps_of_a_bust_grow_as_the_logarithm_of_the_entries(counted: Points, name: str) -> None:
    """Whatever it names and whatever its strategy: the counts lie on a + b * log2(n), and double at most."""
    fit = fit_of(counted[name])
    assert fit.is_logarithmic, (fit, counted[name])
    assert fit.b > 0  # what is counted is the looking for it


def by_scanning(index: Index, scope: Scope, after: str | None) -> list[str]:
    """Find the entries with a tag as no backend should: by looking at all there are."""
    assert scope.kind == "tag"
    return [key for key, entry in index.items() if scope.target in entry.tags and (after is None or after < key)]


@pytest.mark.requirement("INT-05")
async def test_a_bust_that_looked_at_all_entries_would_be_found_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It removes what it should, and the check refuses it for its steps."""
    monkeypatch.setattr("pybustcall.daemon.backends.memory._some", by_scanning)
    [asked] = [asked for asked in BUSTS if asked.name == "tag, direct"]
    points: Points = {asked.name: []}
    for n in SIZES[:2]:
        async with delegating(filled(n), tmp_path / f"journal-{n}") as delegation:
            points[asked.name].append((n, await steps_per(asked, delegation, samples=5)))
    fit = fit_of(points[asked.name])
    assert fit.growth > 5
    assert not fit.is_logarithmic


def test_samples_are_alike_whatever_the_size() -> None:
    """They lie all over the index, and a fifth of them has a lifetime."""
    for n, samples in itertools.product((*SIZES, 3000), (25, 50, 200)):
        chosen = spread(n, samples)
        assert len([number for number in chosen if number % 5 == 0]) == samples / 5
        assert max(chosen) < n // 10
        assert max(chosen) - min(chosen) > 0.9 * n / 10


@pytest.mark.requirement("INT-05")
def test_the_bench_tells_steps_and_latency_of_each_bust(tmp_path: Path) -> None:
    """Run small: a row for each, counts that lie on their lines, a median below the p99, and plots of both."""
    ran = run_bench("delegation", tmp_path, "--most", "10000", "--samples", "25")
    check_table(ran)
    assert [row["bust"] for row in ran.rows] == [asked.name for asked in BUSTS]
    for row in ran.rows:
        assert [n for n, _ in row["steps"]] == [n for n, _ in row["p50_ms"]] == [1000, 3000, 10_000]
        assert all(p50 <= p99 for (_, p50), (_, p99) in zip(row["p50_ms"], row["p99_ms"], strict=True))
        assert row["is_logarithmic"]
    check_plot(tmp_path / "delegation_steps.svg", "tag, dimensional", "comparisons", "entries")
    check_plot(tmp_path / "delegation_times.svg", "tag, dimensional, p99", "milliseconds", "entries")
