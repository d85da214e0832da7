"""Delivery keeps its promises in seeded simulations, and the simulations would notice if it did not."""

from __future__ import annotations

import itertools
import math
import os
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

import pybustcall.delivery
import pybustcall.dispatcher
import pybustcall.outbox
import pybustcall.plan
from pybustcall.background import Courier
from pybustcall.delivery import Deliverer
from pybustcall.faults import Fault, Incidents
from pybustcall.fleet import Fleet, Flight
from pybustcall.outbox import ANY, OutboxStore
from pybustcall.plan import CallPlan
from pybustcall.policies import Circuit, HedgeAllowance, SharedBudget, ceiling
from pybustcall.topology import Route, StarRing
from tests import simulator
from tests.simulator import FAMILIES, INVARIANTS, family_of, run_scenario

_SEEDS = range(200)
_CHUNKS = 10


@pytest.mark.parametrize("chunk", range(_CHUNKS))
def test_every_promise_is_kept_in_two_hundred_scenarios(chunk: int) -> None:
    """Whatever fails, every invariant holds at the end of each scenario."""
    for seed in _SEEDS[chunk::_CHUNKS]:
        report = run_scenario(seed)
        assert not report.violations, f"seed {seed} ({report.family}): {report.violations[0]}"


def test_two_hundred_seeds_that_follow_one_another_hold_every_family() -> None:
    """No kind of scenario is left out, wherever one begins."""
    for first in (0, 1234):
        assert {family_of(seed) for seed in range(first, first + 200)} == set(FAMILIES)


@pytest.mark.parametrize("family", ["chaos", "replay", "delivery", "burst"])
def test_a_seed_replays_its_scenario(family: str) -> None:
    """The same seed sends, answers and returns the same at the same times."""
    for seed in range(3):
        assert run_scenario(seed, family) == run_scenario(seed, family)


def test_a_seed_replays_its_scenario_in_another_process() -> None:
    """No order of a set, of hashes or of addresses has a say."""
    code = (
        "import logging; logging.disable(); from tests.simulator import run_scenario;"
        "print(*(run_scenario(seed, family).trace for seed in range(6) for family in ('chaos', 'replay', 'delivery')))"
    )
    told = {
        subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONHASHSEED": hashing},
            cwd=Path(__file__).parent.parent,
            check=True,
            capture_output=True,
        ).stdout
        for hashing in ("1", "2")
    }
    assert len(told) == 1


def test_different_seeds_make_different_scenarios() -> None:
    """A seed decides."""
    assert len({run_scenario(seed, "chaos").trace for seed in range(5)}) == 5


# Defects that a simulation must notice

Patch = pytest.MonkeyPatch


def _no_budget(patch: Patch) -> None:
    patch.setattr(SharedBudget, "take", lambda *_: True)
    patch.setattr(SharedBudget, "affords", lambda *_: True)


def _new_key_for_each_attempt(patch: Patch) -> None:
    ask, numbers = Deliverer._ask, itertools.count()
    patch.setattr(
        Deliverer, "_ask", lambda self, request, key, wider: ask(self, request, f"{key}-{next(numbers)}", wider)
    )


def _delete_by_target(patch: Patch) -> None:
    async def done(self: OutboxStore, owner: str, ids: Iterable[int]) -> int:
        change = "DELETE FROM busts WHERE target IN (SELECT target FROM busts WHERE id = ? AND owner = ?)"
        asked = [(ident, owner) for ident in ids]
        return await self._ask(lambda db, _now: db.executemany(change, asked).rowcount)

    patch.setattr(OutboxStore, "done", done)


def _jitter_outside_the_cap(patch: Patch) -> None:
    def jitter(failures: int, base: float, cap: float, random: Callable[[], float]) -> float:
        return ceiling(failures, base, cap) + random() * base

    patch.setattr(pybustcall.plan, "full_jitter", jitter)


def _jitter_of_a_tenth(patch: Patch) -> None:
    def jitter(failures: int, base: float, cap: float, random: Callable[[], float]) -> float:
        return ceiling(failures, base, cap) * (0.9 + 0.1 * random())

    patch.setattr(pybustcall.plan, "full_jitter", jitter)


def _stuck_half_open(patch: Patch) -> None:
    released, succeeded, failed = Circuit.released, Circuit.succeeded, Circuit.failed
    patch.setattr(Circuit, "released", lambda self, **_: released(self, trial=False))
    patch.setattr(Circuit, "succeeded", lambda self, now, **_: succeeded(self, now, trial=False))
    patch.setattr(
        Circuit, "failed", lambda self, *what, **settings: failed(self, *what, **(settings | {"trial": False}))
    )


def _count_each_failure(patch: Patch) -> None:
    failed = Incidents.failed

    def count(self: Incidents, begun: float, now: float) -> tuple[int, bool]:
        self._ended = -math.inf
        return failed(self, begun, now)

    patch.setattr(Incidents, "failed", count)


def _fail_back_at_once(patch: Patch) -> None:
    def advance(self: StarRing, now: float, random: Callable[[], float]) -> Route:
        if self._good_since < math.inf and self.route is not Route.STAR:
            self.route, self._returned = Route.STAR, now
        return self.route

    patch.setattr(StarRing, "advance", advance)


def _hedge_without_a_cap(patch: Patch) -> None:
    patch.setattr(HedgeAllowance, "take", lambda *_: True)


def _refuse_the_last(patch: Patch) -> None:
    board = Fleet.board

    def refuse(self: Fleet, daemon: int, now: float, *, last: bool = False, hedge: bool = False) -> Flight | Fault:
        return board(self, daemon, now, hedge=hedge)

    patch.setattr(Fleet, "board", refuse)


def _deliver_to_anybody(patch: Patch) -> None:
    replay = Deliverer.replay
    patch.setattr(Deliverer, "replay", lambda self, row, paused: replay(self, replace(row, destination=ANY), paused))


def _join_what_was_sent(patch: Patch) -> None:
    join = pybustcall.outbox._join

    def joined(db: sqlite3.Connection, now: float, line: bytes, bust: Any, sent: bool) -> int | None:
        db.execute("UPDATE busts SET sent = 0, owner = NULL WHERE line = ? AND state < 2", (line,))
        return join(db, now, line, bust, sent)

    patch.setattr(pybustcall.outbox, "_join", joined)


def _forget_the_deadline(patch: Patch) -> None:
    def plan(fleet: Fleet, *, deadline: float, **settings: Any) -> CallPlan:
        return CallPlan(fleet, deadline=deadline + 3600, **settings)

    def handed(race: Any, *settings: Any) -> None:
        made(race, *settings[:-1], settings[-1] + 3600)

    made: Callable[..., None] = pybustcall.dispatcher._Race.__init__
    patch.setattr(pybustcall.dispatcher, "CallPlan", plan)
    patch.setattr(pybustcall.dispatcher._Race, "__init__", handed)


def _store_no_cancelled(patch: Patch) -> None:
    async def forget(*_: object) -> None:
        pass

    patch.setattr(Deliverer, "_keep_cancelled", forget)


def _delete_before_delivery(patch: Patch) -> None:
    one = Courier._one

    async def early(self: Courier, row: Any) -> str:
        await self._store.done(self._owner, [row.id])
        return await one(self, row)

    patch.setattr(Courier, "_one", early)


class _Unordered:
    """A connection that forgets that only the head of a line may be leased."""

    def __init__(self, db: sqlite3.Connection) -> None:
        self._db = db

    def execute(self, sql: str, *values: Any) -> sqlite3.Cursor:
        return self._db.execute(sql.replace(" AND head = 1", ""), *values)

    def executemany(self, sql: str, values: Any) -> sqlite3.Cursor:
        return self._db.executemany(sql, values)


def _lease_out_of_order(patch: Patch) -> None:
    lease = pybustcall.outbox._lease
    patch.setattr(pybustcall.outbox, "_lease", lambda db, *settings: lease(_Unordered(db), *settings))  # type: ignore[arg-type]


def _one_is_a_quorum(patch: Patch) -> None:
    patch.setattr(Deliverer, "_needed", lambda *_: 1)


def _owe_nothing(patch: Patch) -> None:
    owed = Deliverer._owed
    patch.setattr(Deliverer, "_owed", lambda self, job, legs: owed(self, job, legs)[:1])


def _leave_attempts_behind(patch: Patch) -> None:
    async def settle(race: Any) -> None:
        race._plan.close()

    patch.setattr(pybustcall.dispatcher._Race, "settle", settle)


def _wait_for_the_hub(patch: Patch) -> None:
    patch.setattr(CallPlan, "_attempt_end", lambda self, *_: self._deadline)


def _raise_at_a_bust(patch: Patch) -> None:
    def delivered(*_: object) -> None:
        raise KeyError("a mistake")

    patch.setattr(Deliverer, "_delivered", delivered)


@dataclass(frozen=True)
class Defect:
    """What is wrong, which scenarios meet it, and which invariant tells."""

    plant: Callable[[Patch], None]
    family: str
    invariants: Sequence[str]
    seeds: int = 20
    first: int = 0


_DEFECTS = [
    Defect(_no_budget, "half", ["load"], 8, first=5),
    Defect(_new_key_for_each_attempt, "failover", ["once"]),
    Defect(_delete_by_target, "replay", ["kept", "stored"], 40),
    Defect(_jitter_outside_the_cap, "lone", ["backoff"], 3),
    Defect(_jitter_of_a_tenth, "half", ["backoff"], 8),
    Defect(_stuck_half_open, "recovery", ["recovery", "tidy"]),
    Defect(_count_each_failure, "burst", ["burst"]),
    Defect(_fail_back_at_once, "flapping", ["flapping"], 3),
    Defect(_fail_back_at_once, "herd", ["failback"], 1),
    Defect(_hedge_without_a_cap, "hedging", ["hedging"], 6),
    Defect(_refuse_the_last, "lone", ["recovery"], 6),
    Defect(_deliver_to_anybody, "delivery", ["kept", "stored"]),
    Defect(_join_what_was_sent, "silence", ["kept", "stored"], 40),
    Defect(_forget_the_deadline, "replay", ["deadline"]),
    Defect(_store_no_cancelled, "replay", ["stored"], 40),
    Defect(_delete_before_delivery, "silence", ["kept", "stored"], 40),
    Defect(_lease_out_of_order, "replay", ["order"], 60),
    Defect(_one_is_a_quorum, "delivery", ["kept"]),
    Defect(_owe_nothing, "delivery", ["kept"]),
    Defect(_leave_attempts_behind, "chaos", ["tidy"], 60, first=22),
    Defect(_wait_for_the_hub, "failover", ["failover"]),
    Defect(_raise_at_a_bust, "replay", ["error"]),
]


def _name(defect: Defect) -> str:
    return f"{defect.plant.__name__.strip('_')}-{defect.family}"


@pytest.mark.parametrize("defect", _DEFECTS, ids=_name)
def test_a_planted_defect_is_noticed(defect: Defect, monkeypatch: pytest.MonkeyPatch) -> None:
    """Within few seeds, an invariant tells of each defect that others had, or that we might make."""
    defect.plant(monkeypatch)
    seen: set[str] = set()
    for seed in range(defect.first, defect.first + defect.seeds):
        seen |= {violation.invariant for violation in run_scenario(seed, defect.family).violations}
        if seen & set(defect.invariants):
            return
    pytest.fail(f"{defect.seeds} scenarios noticed nothing but {seen or 'nothing'}")


def test_every_invariant_has_a_defect_that_breaks_it() -> None:
    """An invariant that nothing can break says nothing."""
    assert {name for defect in _DEFECTS for name in defect.invariants} == set(INVARIANTS)


# The command


def test_the_command_counts_what_held(capsys: pytest.CaptureFixture[str]) -> None:
    """It prints a line for each invariant, and ends with 0."""
    assert simulator.main(["--scenarios", "3", "--jobs", "2", "--family", "failover"]) == 0
    told = capsys.readouterr().out
    assert told.startswith("3 scenarios, ")
    assert all(f"0 broken  {name}" in told for name in INVARIANTS)


def test_the_command_tells_how_to_replay_a_failure(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It names the first seed that failed, and ends with 1; a scenario that cannot go on is a finding too."""
    _new_key_for_each_attempt(monkeypatch)

    async def broken(_: object) -> None:
        raise RuntimeError("the scenario is broken")

    monkeypatch.setitem(FAMILIES, "herd", (broken, 1))
    for family, text in (("failover", "once: "), ("herd", "the scenario is broken")):
        assert simulator.main(["--scenarios", "2", "--jobs", "1", "--seed", "7", "--family", family]) == 1
        told = capsys.readouterr().out
        assert text in told
        assert f"python -m tests.simulator --scenarios 1 --jobs 1 --seed 7 --family {family}" in told
