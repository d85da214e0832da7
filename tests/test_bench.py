"""The benches, run small: what they print and write is whole, and no bust fails or is lost. Times are not judged."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import xml.etree.ElementTree as ET
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import PATIENCE
from tests.interop import require

BENCH = Path(__file__).parent.parent / "bench"


@dataclass(frozen=True)
class Ran:
    """A bench that has ended well."""

    table: list[list[str]]
    rows: list[dict[str, Any]]
    directory: Path


def run_bench(name: str, directory: Path, *options: str) -> Ran:
    """Run a bench that writes to `directory`; return what it printed and wrote."""
    ran = subprocess.run(
        [sys.executable, "-m", f"bench.{name}", "--output", str(directory), *options],
        capture_output=True,
        text=True,
        timeout=6 * PATIENCE,
        env={**os.environ, "BUSTCALL_TOKEN": "of-another-daemon"},
        check=False,
    )
    assert (ran.returncode, ran.stderr) == (0, ""), ran.stdout
    lines = [line for line in ran.stdout.splitlines() if line.startswith("|")]
    table = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return Ran(table, json.loads((directory / f"{name}.json").read_text())["rows"], directory)


@pytest.fixture(scope="module")
def failover(tmp_path_factory: pytest.TempPathFactory) -> Ran:
    """Run the failover bench with one fault of each kind, once."""
    options = ("--trials", "1", "--others", "1", "--workers", "20", "--think", "0.02")
    return run_bench("failover", tmp_path_factory.mktemp("failover"), *options)


@pytest.fixture(scope="module")
def latency(tmp_path_factory: pytest.TempPathFactory) -> Ran:
    """Run the latency bench with three delays, once."""
    return run_bench("latency_stages", tmp_path_factory.mktemp("latency"), "--calls", "10", "--step", "250")


def check_table(ran: Ran) -> None:
    """Check that a table is one: a head, a rule, and a line of as many cells for each row of the results."""
    assert {len(line) for line in ran.table} == {len(ran.table[0])}
    assert all(re.fullmatch("-+:?", cell) for cell in ran.table[1])
    assert len(ran.table) == 2 + len(ran.rows)


def check_plot(path: Path, *texts: str) -> None:
    """Check that a plot is well-formed, has marks, and says these texts."""
    root = ET.parse(path).getroot()
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    assert set(texts) <= {element.text for element in root.iter("{http://www.w3.org/2000/svg}text")}
    assert "nan" not in path.read_text()


def test_failover_bench_tells_every_fault_and_load(failover: Ran) -> None:
    """There is a row for each fault, load and contestant, with calls that the fault could affect."""
    check_table(failover)
    kinds = {(row["contestant"], row["fault"], row["load"]) for row in failover.rows}
    for contestant in ("pybustcall", "aiohttp by hand"):
        for fault in ("killed", "black hole"):
            assert {(contestant, fault, "workers"), (contestant, fault, "lone")} <= kinds
    assert all(row["calls"] > 0 and row["trials"] == 1 for row in failover.rows)


def test_failover_bench_loses_nothing(failover: Ran) -> None:
    """Whatever became of the hub, no bust failed, and none that was acknowledged is missing."""
    ours = [row for row in failover.rows if row["contestant"] == "pybustcall"]
    assert {(row["failed"], row["lost"]) for row in ours} == {(0, 0)}


def test_failover_bench_plots_the_distribution(failover: Ran) -> None:
    """Its plot has a curve for each contestant and fault, rising to 1."""
    check_plot(failover.directory / "failover.svg", "pybustcall, killed", "pybustcall, black hole", "milliseconds")
    for row in failover.rows:
        assert row["ecdf"][-1][1] == 1.0
        assert row["ecdf"] == sorted(row["ecdf"])


@pytest.mark.requirement("INT-06")
def test_latency_bench_shows_the_stages_that_delay_leads_to(latency: Ran) -> None:
    """A slow hub costs no call its acknowledgement, but for deadlines it cannot meet: EXCEPTION, or WARNING if stored.

    With a peer, every call is answered well before the hub could have done so.
    """
    check_table(latency)
    assert [row["delay_ms"] for row in latency.rows] == [0.0, 250.0, 500.0] * 4
    for row in latency.rows:
        stages = {int(stage) for stage in row["stages"]}
        missed = row["may_fail"]
        if row["circumstance"] == "the same, outbox" and missed:
            assert stages <= {6, 7, 8}, row
        elif row["circumstance"] == "hub alone, 0.25 s" and row["delay_ms"] == 500:
            assert stages <= {3, 4, 5}, row
        elif not missed:
            assert min(stages) >= 9, row
    with_peer = next(row for row in latency.rows if row["circumstance"] == "hub and peer" and row["delay_ms"] == 500)
    assert with_peer["by"] == {"peer": 10}
    assert with_peer["hedges"] + with_peer["overdue"] > 0


@pytest.mark.requirement("INT-06")
def test_latency_bench_loses_nothing(latency: Ran) -> None:
    """Every bust that was acknowledged was applied, and every deferred one is stored or was applied."""
    assert [row["lost"] for row in latency.rows] == [0] * len(latency.rows)
    assert {sum(row["statuses"].values()) for row in latency.rows} == {10}


@pytest.mark.requirement("INT-06")
def test_latency_bench_plots_stages_and_times(latency: Ran) -> None:
    """Both plots are written, with a name for each circumstance."""
    check_plot(latency.directory / "latency_stages.svg", "hub and peer", "the same, outbox", "stage")
    check_plot(latency.directory / "latency_times.svg", "hub and peer, p50", "hub alone, p99", "milliseconds")


SMALL = {
    "delegation": ("--most", "10000", "--samples", "5"),
    "events": ("--readers", "1,20", "--busts", "5"),
    "index_scaling": ("--most", "10000", "--samples", "20"),
    "journal": ("--begins", "50", "--callers", "1,8"),
    "near_cache": ("--entries", "100,1000", "--calls", "1000", "--busts", "20"),
    "redis_prefix": ("--entries", "1000", "--runs", "1"),
    "sqlite_cache": ("--entries", "1000", "--runs", "1", "--seconds", "0.1"),
}


@pytest.mark.parametrize("name", SMALL)
def test_a_bench_ends_well_and_tells_what_it_measured(name: str, tmp_path: Path) -> None:
    """Nothing was lost, left or touched, as its exit code tells; each of its tables is one, and no row is lacking."""
    if name == "redis_prefix":
        require("redis-server", "apt-get install redis-server")
    ran = run_bench(name, tmp_path, *SMALL[name])
    rules = [number for number, line in enumerate(ran.table) if all(re.fullmatch("-+:?", cell) for cell in line)]
    ends = [number - 1 for number in rules[1:]] + [len(ran.table)]
    heights = [end - rule - 1 for rule, end in zip(rules, ends, strict=True)]
    assert all(len(ran.table[rule - 1]) == len(ran.table[end - 1]) for rule, end in zip(rules, ends, strict=True))
    assert len(ran.rows) in heights
    assert min(heights) > 0


def test_a_bench_of_growth_wants_sizes_enough() -> None:
    """A line through one size is none."""
    ran = subprocess.run(
        [sys.executable, "-m", "bench.index_scaling", "--most", "2000"], capture_output=True, text=True, check=False
    )
    assert (ran.returncode, ran.stdout) == (1, "")
    assert ran.stderr.startswith("--most must be at least 10000")
