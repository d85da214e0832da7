# ruff: noqa: ASYNC240 - these files are on a local disk, and nobody else waits
"""The outbox store: what joins what, in which order rows are lent, and that nothing is lost by whatever befalls it."""

from __future__ import annotations

import asyncio
import fcntl
import gc
import os
import signal
import sqlite3
import stat
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass, field, replace
from itertools import zip_longest
from pathlib import Path
from typing import Any, Final, TypeVar

import coverage
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from pybustcall import outbox
from pybustcall.errors import ConfigurationError, InvalidRequest, OutboxError
from pybustcall.outbox import (
    ANY,
    LONGEST_DELAY,
    Outbox,
    OutboxCounts,
    OutboxRow,
    OutboxStore,
    RowState,
    StoredBust,
    _line_of,
)
from tests.conftest import PATIENCE, eventually, virtual_time, wait_until

ROOT = Path(__file__).parent.parent
A, B = "http://a:1", "http://b:1"
T = TypeVar("T")


class Inline(Executor):
    """Runs everything at once, in the caller's thread."""

    def submit(self, fn: Callable[..., T], /, *args: Any, **kwargs: Any) -> Future[T]:
        future: Future[T] = Future()
        try:
            future.set_result(fn(*args, **kwargs))
        except BaseException as error:  # noqa: BLE001 - as an executor does
            future.set_exception(error)
        return future


@dataclass
class Clock:
    """A wall clock that is set by hand."""

    now: float = 1_800_000_000.0

    def __call__(self) -> float:
        return self.now


class HeldClock:
    """A clock that stops the store in the middle of a transaction while `go` is not set, and counts transactions."""

    def __init__(self) -> None:
        self.go = threading.Event()
        self.transactions = 0

    def __call__(self) -> float:
        self.transactions += 1
        assert self.go.wait(PATIENCE)
        return time.time()


def bust(target: str = "users/7", key: str = "k", **more: Any) -> StoredBust:
    """Make a bust to store."""
    values: dict[str, Any] = {"strategy": "dimensional", "fault_tolerance": 6, **more}
    return StoredBust(target=target, key=key, **values)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Where the outbox is."""
    return tmp_path / "outbox.db"


@pytest.fixture
def clock() -> Clock:
    """The store's wall clock."""
    return Clock()


@pytest.fixture
async def store(path: Path, clock: Clock) -> Any:
    """A small outbox with a clock that is set by hand."""
    made = OutboxStore(Outbox(path=path, rows=100, age=1000, lease=30), clock=clock)
    yield made
    await made.aclose()


async def ids_of(
    store: OutboxStore, owner: str = "me", destinations: Iterable[str] = (), limit: int = 100
) -> list[int]:
    """Lease, and tell only the ids."""
    return [row.id for row in await store.lease(owner, tuple(destinations), limit)]


async def states(store: OutboxStore) -> dict[int, str]:
    """Tell the state of every row."""
    return {row.id: row.state.value for row in await store.rows()}


def asides(path: Path) -> list[str]:
    """Tell the names of what was set aside."""
    return sorted(name for name in os.listdir(path.parent) if ".corrupt-" in name)


# --- the policy and the values


def test_the_defaults_are_those_of_the_design() -> None:
    """100,000 rows, a day, leases of 30 s, 50 a second."""
    policy = Outbox(path="outbox.db")
    assert (policy.rows, policy.age, policy.lease, policy.replay) == (100_000, 86_400.0, 30.0, 50.0)


@pytest.mark.parametrize(
    ("setting", "values"),
    [
        ("path", ("", ":memory:", "a\0b", b"bytes", None, 7)),
        ("rows", (0, -1, True, 1.5, "9")),
        ("age", (0, -1.0, 86_401, "1", float("nan"))),
        ("lease", (0, True, float("inf"))),
        ("replay", (0, -1, True, "50", float("nan"), float("inf"))),
    ],
)
def test_a_setting_that_cannot_be_used_is_named(setting: str, values: tuple[Any, ...]) -> None:
    """ConfigurationError, with the setting as data."""
    for value in values:
        with pytest.raises(ConfigurationError) as caught:
            Outbox(**{"path": "outbox.db", setting: value})
        assert caught.value.setting == f"outbox.{setting}"


def test_the_repr_of_what_is_stored_hides_the_target() -> None:
    """So that a row may be logged."""
    shown = repr(bust("users/secret-name"))
    assert "secret" not in shown
    assert shown.startswith("StoredBust(target='users/…")
    assert "key='k'" in shown


async def test_the_repr_of_a_store_tells_its_state(path: Path) -> None:
    """Unopened, open, closed."""
    store = OutboxStore(Outbox(path=path))
    assert repr(store) == f"OutboxStore({str(path)!r}; unopened)"
    assert not path.exists()
    await store.open()
    assert repr(store).endswith("; open)")
    await store.aclose()
    assert repr(store).endswith("; closed)")


# --- what is stored


async def test_what_was_put_is_there_when_the_file_is_opened_again(path: Path, clock: Clock) -> None:
    """Every field."""
    stored = bust("users/7", "key-1", strategy="direct", fault_tolerance=9, kind="tag", namespace="shop", soft=True)
    store = OutboxStore(Outbox(path=path), clock=clock)
    assert await store.put(stored, (A,), sent=True) == (1,)
    await store.aclose()
    store = OutboxStore(Outbox(path=path), clock=clock)
    (row,) = await store.rows()
    assert row == OutboxRow(
        id=1,
        destination=A,
        bust=stored,
        state=RowState.PENDING,
        sent=True,
        attempts=0,
        created=clock.now,
        joined=clock.now,
        not_before=clock.now,
        reason="",
    )
    await store.aclose()


async def test_a_commit_is_synced_and_survives_a_reader_of_another_kind(store: OutboxStore) -> None:
    """WAL, synchronous=FULL."""
    await store.open()
    assert store._file.db is not None
    assert store._file.db.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    assert store._file.db.execute("PRAGMA synchronous").fetchone() == (2,)


async def test_every_file_is_for_its_user_alone(path: Path, store: OutboxStore) -> None:
    """Whatever the umask, from the first byte; the -wal, the -shm and the lock, too."""
    before = os.umask(0)
    try:
        await store.put(bust(), sent=False)
    finally:
        os.umask(before)
    modes = {name: stat.S_IMODE(os.stat(path.parent / name).st_mode) for name in os.listdir(path.parent)}
    assert modes == dict.fromkeys(["outbox.db", "outbox.db-wal", "outbox.db-shm", "outbox.db.lock"], 0o600)


def test_a_new_file_is_for_its_user_alone_before_it_is_opened(path: Path) -> None:
    """Not only once it is looked after. Who comes second to create it leaves it as it is."""
    file = outbox._OutboxFile(str(path), time.time)
    before = os.umask(0)
    try:
        file.make()
        identity = path.stat().st_ino
        file.make()
    finally:
        os.umask(before)
        file.close()
    assert path.stat().st_ino == identity
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


async def test_a_file_that_others_could_read_is_closed_to_them(path: Path) -> None:
    """At opening."""
    store = OutboxStore(Outbox(path=path))
    await store.put(bust(), sent=False)
    await store.aclose()
    path.chmod(0o644)
    store = OutboxStore(Outbox(path=path))
    await store.put(bust("other"), sent=False)
    modes = {stat.S_IMODE(os.stat(path.parent / name).st_mode) for name in os.listdir(path.parent)}
    await store.aclose()
    assert modes == {0o600}


async def test_a_relative_path_stays_where_it_was(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever directory the process goes to later."""
    monkeypatch.chdir(path.parent)
    store = OutboxStore(Outbox(path="outbox.db"))
    monkeypatch.chdir("/")
    await store.put(bust(), sent=False)
    await store.aclose()
    assert path.exists()


async def test_a_path_with_odd_characters_is_taken_as_it_is(tmp_path: Path) -> None:
    """It is no URI."""
    path = tmp_path / "o?mode=memory&x=%20#é.db"
    store = OutboxStore(Outbox(path=path))
    await store.put(bust(), sent=False)
    await store.aclose()
    assert path.exists()


async def test_text_that_cannot_be_stored_is_refused(store: OutboxStore) -> None:
    """A lone surrogate, without being repeated."""
    with pytest.raises(InvalidRequest, match="target has a lone surrogate; nothing was stored") as caught:
        await store.put(bust("secret\ud800"), sent=False)
    assert caught.value.field == "target"
    assert await store.rows() == ()


async def test_nothing_for_nobody(store: OutboxStore) -> None:
    """No destination, no row."""
    assert await store.put(bust(), (), sent=False) == ()
    assert await store.rows() == ()


# --- what joins what


async def test_busts_join_a_row_that_was_never_sent(store: OutboxStore, clock: Clock) -> None:
    """It takes the newest key and tolerance; its age counts from the newest."""
    before = clock.now
    first = await store.put(bust(key="old", fault_tolerance=6), sent=False)
    clock.now += 5
    assert await store.put(bust(key="new", fault_tolerance=9), sent=False) == first
    (row,) = await store.rows()
    assert (row.bust.key, row.bust.fault_tolerance, row.sent) == ("new", 9, False)
    assert (row.created, row.joined) == (before, clock.now)


@pytest.mark.parametrize(
    "other",
    [
        {"target": "users/8"},
        {"namespace": ""},
        {"namespace": "shop"},
        {"kind": "tag"},
        {"strategy": "direct"},
        {"soft": True},
    ],
)
async def test_busts_of_different_effect_do_not_join(store: OutboxStore, other: dict[str, Any]) -> None:
    """Nor do those for different destinations."""
    await store.put(bust(), sent=False)
    assert await store.put(replace(bust(), **other), sent=False) == (2,)
    assert await store.put(bust(), (A,), sent=False) == (3,)
    assert await store.put(bust(), (A, ANY, A), sent=False) == (3, 1, 3)


async def test_a_row_that_was_sent_accepts_no_joiners(store: OutboxStore) -> None:
    """A bust made after a write must never be answered by an older one."""
    await store.put(bust(key="sent"), sent=True)
    assert await store.put(bust(key="later"), sent=False) == (2,)
    assert [row.bust.key for row in await store.rows()] == ["sent", "later"]


async def test_a_bust_that_was_sent_joins_but_leaves_the_row_its_unsent_key(store: OutboxStore, clock: Clock) -> None:
    """A daemon may remember the sent key; under it, it would not apply the row's own, newer bust."""
    await store.put(bust(key="never sent"), sent=False)
    clock.now += 5
    assert await store.put(bust(key="sent"), sent=True) == (1,)
    (row,) = await store.rows()
    assert (row.bust.key, row.sent, row.joined) == ("never sent", False, clock.now)


async def test_a_row_that_somebody_speaks_for_accepts_no_joiners(store: OutboxStore, clock: Clock) -> None:
    """Born leased, leased later, or left behind by an owner who may still be sending."""
    await store.put(bust(key="1"), sent=False, owner="caller")
    assert await store.put(bust(key="2"), sent=False) == (2,)
    clock.now += 31
    assert await ids_of(store, "deliverer") == [1]
    assert await store.put(bust(key="3"), sent=False) == (2,)
    await store.put(bust("other"), sent=False, owner="dead")
    clock.now += 31
    assert await ids_of(store, limit=0) == []
    assert (await states(store))[3] == "pending"
    assert await store.put(bust("other"), sent=False) == (4,)


async def test_a_leased_row_counts_as_sent_ever_after(store: OutboxStore) -> None:
    """Nobody knows how far its owner came."""
    await store.put(bust(), sent=False)
    (row,) = await store.lease("me", (), 1)
    assert (row.sent, row.state) == (True, RowState.LEASED)
    await store.release("me", [1], sent=False, reason="refused")
    assert await store.put(bust(), sent=False) == (2,)


async def test_a_row_written_ahead_and_never_sent_may_be_joined_later(store: OutboxStore) -> None:
    """Its owner says so when it gives the row back."""
    assert await store.put(bust(key="ahead"), sent=False, owner="caller") == (1,)
    assert (await store.rows())[0].state is RowState.LEASED
    assert await store.release("caller", [1], sent=False, reason="no daemon") == 1
    assert await store.put(bust(key="later"), sent=False) == (1,)
    (row,) = await store.rows()
    assert (row.sent, row.attempts, row.reason, row.bust.key) == (False, 1, "no daemon", "later")


async def test_a_row_set_aside_is_not_joined(store: OutboxStore) -> None:
    """It is in no line."""
    await store.put(bust(), sent=False, owner="me")
    await store.set_aside("me", [1], "refused")
    assert await store.put(bust(), sent=False) == (2,)


# --- limits


async def test_a_full_outbox_says_so_and_stores_nothing(path: Path, clock: Clock) -> None:
    """All destinations or none; joining needs no room."""
    store = OutboxStore(Outbox(path=path, rows=3), clock=clock)
    await store.put(bust("a"), (A, B), sent=False, owner="me")
    await store.set_aside("me", [1], "refused")
    with pytest.raises(OutboxError) as caught:
        await store.put(bust("secret"), (A, B), sent=False)
    assert "it holds 2 of at most 3 rows, 1 of them set aside. Nothing was stored." in str(caught.value)
    assert "secret" not in str(caught.value)
    assert len(await store.rows()) == 2
    await store.put(bust("c"), sent=False)
    assert await store.put(bust("c"), sent=False) == await store.put(bust("c"), sent=False)
    with pytest.raises(OutboxError, match="is full"):
        await store.put(bust("d"), sent=False)
    assert await store.purge() == 1
    await store.put(bust("d"), sent=False)
    await store.aclose()


async def test_rows_past_their_age_are_set_aside_at_a_lease(store: OutboxStore, clock: Clock) -> None:
    """With the reason; listed, counted, never sent."""
    await store.put(bust("a"), sent=False)
    await store.put(bust("b"), sent=False, owner="me")
    await store.release("me", [2], sent=True, reason="503", delay=600)
    clock.now += 999
    await store.put(bust("c"), sent=False)
    clock.now += 1
    assert await ids_of(store) == [3]
    first, second, _ = await store.rows()
    assert (first.state, first.reason) == (RowState.ASIDE, "it could not be delivered within 1000 s")
    assert second.reason == "it could not be delivered within 1000 s; before that: 503"
    assert await store.counts() == OutboxCounts(pending=0, leased=1, aside=2, oldest=1.0)


async def test_a_row_that_is_being_sent_is_not_set_aside_for_its_age(store: OutboxStore, clock: Clock) -> None:
    """But once its lease has ended it is; its owner may still say that it was delivered."""
    await store.put(bust("a"), sent=False)
    clock.now += 990
    assert await ids_of(store) == [1]
    clock.now += 20
    assert await ids_of(store, "other") == []
    assert await states(store) == {1: "leased"}
    clock.now += 10
    assert await ids_of(store, "other") == []
    assert await states(store) == {1: "aside"}
    assert await store.release("me", [1], sent=True, reason="503") == 0
    assert await store.done("me", [1]) == 1


async def test_a_joiner_has_its_whole_age(store: OutboxStore, clock: Clock) -> None:
    """A row whose newest bust is young is not set aside for its oldest."""
    await store.put(bust(), sent=False)
    clock.now += 900
    await store.put(bust(), sent=False)
    clock.now += 900
    assert (await store.counts()).oldest == 1800
    assert await ids_of(store) == [1]


# --- order, leases, time


async def test_rows_are_lent_in_order_and_to_whom_they_are_owed(store: OutboxStore) -> None:
    """For any daemon or the ones named; another's stay."""
    await store.put(bust("a"), (B,), sent=False)
    await store.put(bust("b"), (A,), sent=False)
    await store.put(bust("c"), sent=False)
    await store.put(bust("d"), (A,), sent=False)
    assert await ids_of(store, limit=0) == []
    assert await ids_of(store, limit=-1) == []
    assert await ids_of(store, destinations=(A, ANY), limit=2) == [2, 3]
    assert await ids_of(store, destinations=(A,)) == [4]
    assert await ids_of(store) == []
    assert await ids_of(store, destinations=(A, B)) == [1]


async def test_of_one_line_only_the_first_row_is_lent(store: OutboxStore) -> None:
    """Until it is delivered or set aside, whoever holds it and however long it waits."""
    for strategy in ("1", "2", "3"):
        await store.put(bust(strategy=strategy), sent=False)
    assert await ids_of(store) == [1]
    assert await ids_of(store, "other") == []
    await store.release("me", [1], sent=True, reason="503", delay=10)
    assert await ids_of(store) == []
    assert await store.purge([1]) == 0
    assert await store.purge([1], aside_only=False) == 1
    assert await ids_of(store) == [2]
    await store.set_aside("me", [2], "422")
    assert await ids_of(store) == [3]
    assert await store.retry([2]) == 1
    assert await ids_of(store) == [2]  # first in its line again, though a later one is being sent
    await store.done("me", [2, 3])
    assert await store.rows() == ()


async def test_a_row_written_ahead_waits_in_its_line_once_its_owner_is_gone(store: OutboxStore, clock: Clock) -> None:
    """An earlier row goes first."""
    await store.put(bust(), sent=True)
    await store.put(bust(), sent=False, owner="caller")
    clock.now += 31
    assert await ids_of(store) == [1]
    assert await states(store) == {1: "leased", 2: "pending"}
    await store.done("me", [1])
    assert await ids_of(store) == [2]


async def test_a_retried_row_goes_before_later_ones_of_its_line(store: OutboxStore, clock: Clock) -> None:
    """Order is by id; otherwise it is as new."""
    await store.put(bust(), sent=False)
    await ids_of(store)
    await store.set_aside("me", [1], "422")
    await store.put(bust(), sent=False)
    clock.now += 500
    assert await store.retry() == 1
    row = (await store.rows())[0]
    assert (row.state, row.attempts, row.reason, row.created, row.joined) == ("pending", 0, "", clock.now, clock.now)
    assert row.sent
    assert await ids_of(store) == [1]
    assert await store.retry([1, 2, 3]) == 0


async def test_a_wait_delays_a_row(store: OutboxStore, clock: Clock) -> None:
    """Until its time, to the moment."""
    await store.put(bust(), sent=False)
    await ids_of(store)
    assert await store.release("me", [1], sent=True, reason="503", delay=10) == 1
    clock.now += 9.5
    assert await ids_of(store) == []
    (row,) = await store.rows()
    assert (row.not_before, row.attempts, row.reason) == (clock.now + 0.5, 1, "503")
    clock.now += 0.5
    assert await ids_of(store) == [1]
    assert await store.release("me", [1], sent=True, reason="paused", attempted=False) == 1
    assert (await store.rows())[0].attempts == 1
    assert await ids_of(store) == [1]


async def test_no_wait_is_longer_than_the_longest(store: OutboxStore, clock: Clock) -> None:
    """And one that reaches further ahead is void: the clock was set back."""
    await store.put(bust(), sent=False)
    await ids_of(store)
    await store.release("me", [1], sent=True, reason="503", delay=1e9)
    clock.now += LONGEST_DELAY - 1
    assert await ids_of(store) == []
    clock.now -= LONGEST_DELAY
    assert await ids_of(store) == [1]


async def test_a_lease_that_ended_is_taken_over(store: OutboxStore, clock: Clock) -> None:
    """Not a moment earlier."""
    await store.put(bust(), sent=False)
    await ids_of(store, "first")
    clock.now += 29.5
    assert await ids_of(store, "second") == []
    clock.now += 0.5
    assert await ids_of(store, "second") == [1]


async def test_a_lease_of_the_future_is_void(store: OutboxStore, clock: Clock) -> None:
    """The clock was set back; nobody waits for it to come round again."""
    await store.put(bust(), sent=False)
    await ids_of(store, "first")
    clock.now -= 0.5
    assert await ids_of(store, "second") == [1]


async def test_a_row_of_the_future_is_taken_as_new(store: OutboxStore, clock: Clock) -> None:
    """The clock ran ahead when it was stored: it keeps its age and no more."""
    clock.now += 1e6
    await store.put(bust(), sent=False)
    clock.now -= 1e6
    assert (await store.counts()).oldest == 0.0
    assert await ids_of(store, limit=0) == []
    (row,) = await store.rows()
    assert (row.created, row.joined) == (clock.now, clock.now)
    clock.now += 1000
    assert await ids_of(store) == []
    assert await states(store) == {1: "aside"}


async def test_a_clock_set_ahead_sets_rows_aside_but_loses_none(store: OutboxStore, clock: Clock) -> None:
    """They are put back with one call."""
    await store.put(bust(), sent=False)
    clock.now += 1e6
    assert await ids_of(store) == []
    assert await store.retry() == 1
    assert await ids_of(store) == [1]


async def test_a_lease_is_renewed_by_its_holder(store: OutboxStore, clock: Clock) -> None:
    """Even after it ended, if nobody else took the row; the others are told apart."""
    await store.put(bust("a"), sent=False)
    await store.put(bust("b"), sent=False)
    assert await ids_of(store) == [1, 2]
    clock.now += 29
    assert await store.renew("me", [2, 1, 9]) == (2, 1)
    clock.now += 29
    assert await ids_of(store, "other") == []
    clock.now += 1
    assert await ids_of(store, "other", limit=1) == [1]
    assert await store.renew("me", [1, 2]) == (2,)
    assert await states(store) == {1: "leased", 2: "leased"}
    assert await ids_of(store, "other") == []


async def test_only_who_holds_a_row_may_speak_for_it(store: OutboxStore, clock: Clock) -> None:
    """Another's word changes nothing, and neither does a former holder's."""
    await store.put(bust(), sent=False)
    await ids_of(store, "first")
    for owner in ("second", ""):
        assert await store.done(owner, [1]) == 0
        assert await store.renew(owner, [1]) == ()
        assert await store.release(owner, [1], sent=True, reason="") == 0
        assert await store.set_aside(owner, [1], "") == 0
    clock.now += 30
    assert await ids_of(store, "second") == [1]
    assert await store.done("first", [1]) == 0
    assert await store.done("second", [1, 1, 2]) == 1


async def test_who_delivers_late_deletes_the_row_if_nobody_took_it_over(store: OutboxStore, clock: Clock) -> None:
    """The lease has ended, even visibly; the row is not sent again for nothing."""
    await store.put(bust("a"), sent=False)
    await store.put(bust("b"), sent=False)
    await ids_of(store)
    clock.now += 30
    assert await store.done("me", [1]) == 1
    assert await ids_of(store, limit=0) == []
    assert await states(store) == {2: "pending"}
    assert await store.done("me", [2]) == 1


async def test_an_owner_gives_back_all_that_it_holds(store: OutboxStore) -> None:
    """What to do before it ends: the next one need not wait for the lease."""
    for target in "abc":
        await store.put(bust(target), sent=False)
    assert await ids_of(store, "other", limit=1) == [1]
    assert await ids_of(store) == [2, 3]
    assert await store.release("me", None, sent=True, reason="the client was closed", attempted=False) == 2
    assert await store.release("me", None, sent=True, reason="the client was closed", attempted=False) == 0
    assert await ids_of(store, "next") == [2, 3]


async def test_nothing_asked_is_nothing_done(store: OutboxStore) -> None:
    """No ids, and a count of 0."""
    assert await store.done("me", []) == 0
    assert await store.renew("me", []) == ()
    assert await store.release("me", [], sent=True, reason="") == 0
    assert await store.set_aside("me", [], "") == 0
    assert await store.retry([]) == 0
    assert await store.purge([]) == 0


async def test_rows_are_listed_in_pages(store: OutboxStore) -> None:
    """Beyond an id, in order."""
    for target in "abcd":
        await store.put(bust(target), sent=False)
    assert [row.id for row in await store.rows(limit=2)] == [1, 2]
    assert [row.id for row in await store.rows(after=2, limit=9)] == [3, 4]
    for wrong in ({"limit": -1}, {"limit": 10**30}, {"after": "2"}, {"limit": True}):
        with pytest.raises(InvalidRequest, match="whole numbers"):
            await store.rows(**wrong)
    for ids in ("12", 5, [object()], [10**30], [-1]):
        with pytest.raises(InvalidRequest, match="ids must be"):
            await store.purge(ids)  # type: ignore[arg-type]


async def test_rows_are_purged(store: OutboxStore) -> None:
    """Those set aside, or all; some, or each."""
    for target in "abcd":
        await store.put(bust(target), sent=False)
    await ids_of(store, limit=2)
    await store.set_aside("me", [1, 2], "422")
    assert await store.purge([1, 3]) == 1
    assert await store.purge() == 1
    assert await store.counts() == OutboxCounts(pending=2, leased=0, aside=0, oldest=0.0)
    assert await store.purge(aside_only=False) == 2
    assert await store.counts() == OutboxCounts(pending=0, leased=0, aside=0, oldest=None)
    assert await store.put(bust(), sent=False) == (5,)  # ids are never used again


async def test_a_lease_costs_what_it_takes_and_not_what_is_stored(path: Path) -> None:
    """Counted in SQLite's own steps: with 100 rows and with 20,000, most of them in one line, waiting, or another's."""
    store = OutboxStore(Outbox(path=path), executor=Inline())
    steps = 0

    def count() -> int:
        nonlocal steps
        steps += 1
        return 0

    async def cost() -> int:
        nonlocal steps
        assert store._file.db is not None
        store._file.db.set_progress_handler(count, 1)
        steps = 0
        leased = await store.lease("me", (A,), 10)
        total = steps
        store._file.db.set_progress_handler(None, 1)
        assert len(leased) == 10
        await store.release("me", [row.id for row in leased], sent=True, reason="")
        return total

    def fill(rows: int) -> None:
        db = store._file.db
        assert db is not None
        db.execute("BEGIN")
        for index in range(rows):
            stored = bust("hot" if index % 2 else str(index))
            destination = B if index % 3 else ANY
            line = outbox._line_of(destination, stored)
            ident = outbox._insert(db, time.time(), stored, destination, line, True, None, 30.0, "")
            if not index % 5:
                db.execute("UPDATE busts SET state = 1, not_before = not_before + 50 WHERE id = ?", (ident,))
        db.execute("COMMIT")

    await store.open()
    fill(100)
    few = await cost()
    fill(20_000)
    many = await cost()
    await store.aclose()
    assert many < 2 * few


# --- the thread, cancellation, closing


async def test_what_is_asked_for_at_once_shares_a_transaction(path: Path) -> None:
    """The store counts time once for each."""
    held = HeldClock()
    store = OutboxStore(Outbox(path=path), clock=held)
    puts = [asyncio.ensure_future(store.put(bust(str(index)), sent=False)) for index in range(51)]
    await eventually(lambda: held.transactions == 1)
    held.go.set()
    ids = await asyncio.gather(*puts)
    assert sorted(ids) == [(index,) for index in range(1, 52)]
    assert held.transactions <= 3
    await store.aclose()


async def test_in_a_shared_transaction_each_fails_for_itself(path: Path) -> None:
    """The outbox fills up in the middle of it."""
    held = HeldClock()
    store = OutboxStore(Outbox(path=path, rows=5), clock=held)
    puts = [asyncio.ensure_future(store.put(bust(str(index)), sent=False)) for index in range(9)]
    await eventually(lambda: held.transactions == 1)
    held.go.set()
    results = await asyncio.gather(*puts, return_exceptions=True)
    assert [isinstance(result, OutboxError) for result in results] == [False] * 5 + [True] * 4
    assert len(await store.rows()) == 5
    assert await store.put(bust("0"), sent=False) == (1,)
    await store.aclose()


async def test_a_put_cancelled_before_it_began_stores_nothing(path: Path) -> None:
    """And one that has begun is finished."""
    held = HeldClock()
    store = OutboxStore(Outbox(path=path), clock=held)
    begun = asyncio.ensure_future(store.put(bust("begun"), (A, B), sent=False))
    await eventually(lambda: held.transactions == 1)
    waiting = asyncio.ensure_future(store.put(bust("waiting"), sent=False))
    await asyncio.sleep(0)
    for task in (begun, waiting):
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    held.go.set()
    assert [(row.bust.target, row.destination) for row in await store.rows()] == [("begun", A), ("begun", B)]
    await store.aclose()


async def test_the_rows_of_a_cancelled_lease_are_given_back_by_their_owner(path: Path) -> None:
    """It need not know which they are."""
    held = HeldClock()
    held.go.set()
    store = OutboxStore(Outbox(path=path), clock=held)
    await store.put(bust(), sent=False)
    held.go.clear()
    before = held.transactions
    leasing = asyncio.ensure_future(store.lease("me", (), 1))
    await eventually(lambda: held.transactions > before)
    leasing.cancel()
    with pytest.raises(asyncio.CancelledError):
        await leasing
    held.go.set()
    assert await store.release("me", None, sent=False, reason="cancelled", attempted=False) == 1
    assert await ids_of(store, "next") == [1]
    await store.aclose()


def our_threads() -> list[str]:
    """Tell the threads of outboxes."""
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("pybustcall-outbox")]


async def test_closing_finishes_what_was_asked_for_and_leaves_nothing(path: Path) -> None:
    """No thread, no descriptor, no -wal; repeating it is harmless; afterwards nothing can be asked."""
    descriptors = len(os.listdir("/proc/self/fd")) if sys.platform == "linux" else 0
    held = HeldClock()
    store = OutboxStore(Outbox(path=path), clock=held)
    putting = asyncio.ensure_future(store.put(bust(), sent=False))
    await eventually(lambda: held.transactions == 1)
    closers = [asyncio.ensure_future(store.aclose()) for _ in range(2)]
    await asyncio.sleep(0)
    with pytest.raises(OutboxError, match="is closed; nothing was changed in it"):
        await store.counts()
    assert our_threads() == ["pybustcall-outbox_0"]
    held.go.set()
    assert await putting == (1,)
    await asyncio.gather(*closers)
    await store.aclose()
    assert our_threads() == []
    assert sorted(os.listdir(path.parent)) == ["outbox.db", "outbox.db.lock"]
    if sys.platform == "linux":
        assert len(os.listdir("/proc/self/fd")) == descriptors


async def test_a_cancelled_closing_closes_and_then_is_cancelled(path: Path) -> None:
    """However often it is cancelled."""
    held = HeldClock()
    store = OutboxStore(Outbox(path=path), clock=held)
    putting = asyncio.ensure_future(store.put(bust(), sent=False))
    await eventually(lambda: held.transactions == 1)
    closer = asyncio.ensure_future(store.aclose())
    for _ in range(3):
        await asyncio.sleep(0)
        closer.cancel()
    await asyncio.sleep(0)
    assert not closer.done()
    held.go.set()
    with pytest.raises(asyncio.CancelledError):
        await closer
    assert await putting == (1,)
    assert our_threads() == []
    assert repr(store).endswith("closed)")


async def test_a_store_that_was_never_used_is_closed(path: Path) -> None:
    """Nothing is created for it."""
    store = OutboxStore(Outbox(path=path))
    await store.aclose()
    assert os.listdir(path.parent) == []
    assert our_threads() == []


def drop(holder: list[OutboxStore], caught: pytest.WarningsRecorder) -> None:
    """Let go of a store, and wait until its thread has, too, and it warns."""
    holder.clear()
    wait_until(lambda: len(caught), "the store is kept alive, or does not warn")


async def test_a_store_dropped_open_warns_and_lets_go(path: Path) -> None:
    """ResourceWarning; the connection, the lock and the thread end."""
    store = OutboxStore(Outbox(path=path))
    await store.put(bust(), sent=False)
    holder = [store]
    del store
    with pytest.warns(ResourceWarning, match="was dropped open; use aclose") as caught:
        drop(holder, caught)
    await eventually(lambda: not our_threads())
    assert sorted(os.listdir(path.parent)) == ["outbox.db", "outbox.db.lock"]


async def test_a_store_without_a_thread_dropped_open_warns_too(path: Path) -> None:
    """Its file is closed."""
    holder = [OutboxStore(Outbox(path=path), executor=Inline())]
    await holder[0].put(bust(), sent=False)
    with pytest.warns(ResourceWarning, match="was dropped open; use aclose") as caught:
        drop(holder, caught)
    assert sorted(os.listdir(path.parent)) == ["outbox.db", "outbox.db.lock"]


def test_a_store_that_could_not_be_made_is_dropped_in_silence() -> None:
    """Its policy is none."""
    with pytest.raises(AttributeError):
        OutboxStore(None)  # type: ignore[arg-type]
    gc.collect()


async def test_a_given_executor_is_used_and_left_open(path: Path) -> None:
    """It belongs to whoever made it; if it ended too early, the work is done all the same."""
    with ThreadPoolExecutor(2) as executor:
        store = OutboxStore(Outbox(path=path), executor=executor)
        await store.put(bust("a"), sent=False)
        assert our_threads() == []
        assert executor.submit(int, "7").result() == 7
    await store.put(bust("b"), sent=False)
    await store.aclose()
    store = OutboxStore(Outbox(path=path))
    assert len(await store.rows()) == 2
    await store.aclose()


@virtual_time
async def test_a_store_works_inline_under_virtual_time() -> None:
    """No thread, no wait."""
    with tempfile.TemporaryDirectory() as directory:
        store = OutboxStore(Outbox(path=f"{directory}/outbox.db"), executor=Inline())
        await asyncio.sleep(3600)
        assert await store.put(bust(), sent=False) == (1,)
        assert await ids_of(store) == [1]
        await store.aclose()


def test_several_loops_and_threads_share_a_store(path: Path) -> None:
    """Each has its own answers."""
    store = OutboxStore(Outbox(path=path))
    found: list[int] = []

    def work(name: str) -> None:
        async def put() -> None:
            for index in range(20):
                found.extend(await store.put(bust(f"{name}/{index}"), sent=False))

        asyncio.run(put())

    threads = [threading.Thread(target=work, args=(str(index),)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE)
    asyncio.run(store.aclose())
    assert sorted(found) == list(range(1, 81))


async def test_a_mistake_of_the_caller_is_the_callers(store: OutboxStore) -> None:
    """It arrives as it is, and undoes only its own request."""
    await store.put(bust("before"), sent=False)
    results = await asyncio.gather(
        store.put(bust("a"), sent=False),
        store.done("me", [1 << 70]),
        store.put(bust("b"), sent=False),
        return_exceptions=True,
    )
    assert isinstance(results[1], OverflowError)
    assert [row.bust.target for row in await store.rows()] == ["before", "a", "b"]


async def test_an_interrupt_inside_the_store_undoes_the_transaction(path: Path) -> None:
    """Ctrl-C arrives in whatever runs inline."""
    interrupt = False

    def clock() -> float:
        if interrupt:
            raise KeyboardInterrupt
        return time.time()

    class Catching(Inline):
        def submit(self, fn: Callable[..., T], /, *args: Any, **kwargs: Any) -> Future[T]:
            future = super().submit(fn, *args, **kwargs)
            caught.append(future.exception())
            return future

    caught: list[BaseException | None] = []
    store = OutboxStore(Outbox(path=path), clock=clock, executor=Catching())
    await store.put(bust("a"), sent=False)
    interrupt = True
    job = store.put(bust("b"), sent=False)
    job.send(None)
    job.close()
    assert isinstance(caught[-1], KeyboardInterrupt)
    interrupt = False
    assert len(await store.rows()) == 1
    await store.aclose()


# --- what can befall the file


async def test_a_locked_file_is_an_error_that_passes(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is not set aside; what to do is told, the cause is SQLite's."""
    monkeypatch.setattr(outbox, "_PATIENCE", 0.05)
    store = OutboxStore(Outbox(path=path))
    await store.put(bust("a"), sent=False)
    with closing(sqlite3.connect(path, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        results = await asyncio.gather(
            *(store.put(bust(f"secret{index}"), sent=False) for index in range(3)), return_exceptions=True
        )
        other.execute("ROLLBACK")
    for result in results:
        assert isinstance(result, OutboxError)
        assert "another process kept it locked" in str(result)
        assert "secret" not in str(result)
        assert isinstance(result.__cause__, sqlite3.OperationalError)
    assert await store.put(bust("b"), sent=False) == (2,)
    assert asides(path) == []
    await store.aclose()


async def test_a_held_lock_is_an_error_that_passes(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Somebody is setting the file aside, and does not come to an end."""
    monkeypatch.setattr(outbox, "_PATIENCE", 0.05)
    store = OutboxStore(Outbox(path=path))
    await store.open()
    other = outbox._OutboxFile(str(path), time.time)
    with other.holding(fcntl.LOCK_EX):
        with pytest.raises(OutboxError, match=r"another process kept .*outbox.db.lock"):
            await store.counts()
    other.close()
    assert (await store.counts()).pending == 0
    await store.aclose()


async def test_a_full_disk_is_an_error_and_each_put_fails_for_itself(path: Path) -> None:
    """What still fits is stored; the file stays where it is and goes on when there is room."""
    held = HeldClock()
    held.go.set()
    store = OutboxStore(Outbox(path=path), clock=held)
    await store.open()
    assert store._file.db is not None
    (pages,) = store._file.db.execute("PRAGMA page_count").fetchone()
    store._file.db.execute(f"PRAGMA max_page_count = {pages + 3}")
    held.go.clear()
    before = held.transactions
    first = asyncio.ensure_future(store.counts())
    await eventually(lambda: held.transactions > before)
    large = [asyncio.ensure_future(store.put(bust(f"{index}{'x' * 5000}"), sent=False)) for index in range(9)]
    await asyncio.sleep(0)
    held.go.set()
    results = await asyncio.gather(*large, return_exceptions=True)
    await first
    stored = [result for result in results if not isinstance(result, BaseException)]
    failed = [result for result in results if isinstance(result, OutboxError)]
    assert stored
    assert len(stored) + len(failed) == 9
    assert failed
    assert "its disk is full; make room there (SQLITE_FULL). Nothing was changed" in str(failed[0])
    assert "xxx" not in str(failed[0])
    assert len(await store.rows()) == len(stored)
    store._file.db.execute("PRAGMA max_page_count = 100000")
    await store.put(bust("y" * 5000), sent=False)
    assert asides(path) == []
    await store.aclose()


CHILD = """
import asyncio, os, resource, signal, sys, time
from pybustcall.errors import OutboxError
from pybustcall.outbox import Outbox, OutboxStore, StoredBust

def bust(target):
    return StoredBust(target=target, strategy="direct", fault_tolerance=6, key="k" + target)

def say(*words):
    print(*words, flush=True)

store = OutboxStore(Outbox(path=sys.argv[1], lease=float(sys.argv[2])))
name = sys.argv[3]
"""

PUTS_FOR_EVER = """
async def main():
    count = 0
    async def worker():
        nonlocal count
        while True:
            count += 1
            target = f"{name}/{count}"
            await store.put(bust(target), sent=False)
            say(target)
    await asyncio.gather(*(worker() for _ in range(8)))
asyncio.run(main())
"""

PUTS_UNTIL_FULL = """
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
async def main():
    await store.open()
    resource.setrlimit(resource.RLIMIT_FSIZE, (2_000_000, resource.RLIM_INFINITY))
    count = 0
    try:
        while count < 10_000:
            await store.put(bust(f"{count}" + "secret" * 100), sent=False)
            count += 1
    except OutboxError as error:
        say(count, "secret" in str(error), error)
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    await store.put(bust("after"), sent=False)
    say((await store.counts()).pending)
    await store.aclose()
asyncio.run(main())
"""

LEASES = """
async def main():
    while rows := await store.lease(name, (), 7):
        ids = [row.id for row in rows]
        say(*ids)
        await store.done(name, ids)
    await store.aclose()
asyncio.run(main())
"""

LEASES_AND_HANGS = """
async def main():
    say(*[row.id for row in await store.lease(name, (), 5)])
    time.sleep(1000)
asyncio.run(main())
"""

PUTS_ONE = """
async def main():
    sys.stdin.readline()
    say(*await store.put(bust(name), sent=False))
    await store.aclose()
asyncio.run(main())
"""


@contextmanager
def child(code: str, path: Path, name: str = "child", lease: float = 30.0) -> Iterator[subprocess.Popen[str]]:
    """Run this code in a process of its own."""
    command = [sys.executable, "-c", CHILD + code, str(path), str(lease), name]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT)
    try:
        yield process
    finally:
        process.kill()
        process.wait(PATIENCE)
        for pipe in (process.stdin, process.stdout):
            assert pipe is not None
            pipe.close()


def lines(process: subprocess.Popen[str]) -> Iterator[str]:
    """Read what it prints."""
    assert process.stdout is not None
    for line in process.stdout:
        if line.endswith("\n"):
            yield line.strip()


def test_a_disk_at_its_limit_is_an_error(path: Path) -> None:
    """A write that the system refuses; when there is room again, it goes on, and nothing reported is missing."""
    with child(PUTS_UNTIL_FULL, path) as process:
        stored, after = list(lines(process))
        assert process.wait(PATIENCE) == 0
    count, shown, text = stored.split(" ", 2)
    assert int(count) > 10
    assert shown == "False"
    assert "its disk failed, is full or over a limit" in text
    assert int(after) == int(count) + 1
    assert asides(path) == []


def test_what_was_reported_as_stored_survives_a_kill(path: Path) -> None:
    """Three times over, in the middle of many puts."""
    reported: set[str] = set()
    for round_ in range(3):
        with child(PUTS_FOR_EVER, path, f"round{round_}") as process:
            printed = lines(process)
            reported.update(next(printed) for _ in range(200))
            process.send_signal(signal.SIGKILL)
            process.wait(PATIENCE)
            reported.update(printed)

    async def read() -> set[str]:
        store = OutboxStore(Outbox(path=path))
        found = {row.bust.target for row in await store.rows(limit=1_000_000)}
        await store.aclose()
        return found

    assert reported <= asyncio.run(read())
    assert len(reported) >= 600
    assert asides(path) == []


async def test_processes_that_lease_at_once_never_get_the_same_row(store: OutboxStore, path: Path) -> None:
    """Each row to one of them, and all rows to somebody."""
    big = OutboxStore(Outbox(path=path))
    await asyncio.gather(*(big.put(bust(str(index)), sent=False) for index in range(400)))
    await big.aclose()

    def work(name: str) -> list[int]:
        with child(LEASES, path, name) as process:
            ids = [int(word) for line in lines(process) for word in line.split()]
            assert process.wait(PATIENCE) == 0
            return ids

    first, second = await asyncio.gather(asyncio.to_thread(work, "first"), asyncio.to_thread(work, "second"))
    assert sorted(first + second) == list(range(1, 401))


async def test_the_rows_of_a_killed_owner_come_back_after_the_lease(path: Path) -> None:
    """Not before."""
    ahead = 0.0
    store = OutboxStore(Outbox(path=path), clock=lambda: time.time() + ahead)
    for index in range(8):
        await store.put(bust(str(index)), sent=False)
    with child(LEASES_AND_HANGS, path, lease=3600) as process:
        taken = [int(word) for word in (await asyncio.to_thread(next, lines(process))).split()]
        process.kill()
        process.wait(PATIENCE)
    assert taken == [1, 2, 3, 4, 5]
    assert await ids_of(store) == [6, 7, 8]
    ahead = 3601.0
    assert await ids_of(store, "next") == [*taken, 6, 7, 8]
    await store.aclose()


async def make(path: Path, rows: int = 200, clock: Callable[[], float] = time.time) -> None:
    """Make an outbox with rows in it."""
    store = OutboxStore(Outbox(path=path), clock=clock)
    await asyncio.gather(*(store.put(bust(f"old/{index}"), sent=False) for index in range(rows)))
    await store.aclose()


def scribble(path: Path, start: int, size: int) -> None:
    """Write noise into a file."""
    with path.open("r+b") as file:
        file.seek(start)
        file.write(os.urandom(size))


def make_random(path: Path) -> None:
    path.write_bytes(os.urandom(10_000))


def make_text(path: Path) -> None:
    path.write_text("not a database " * 100)


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def empty(path: Path) -> None:
    os.truncate(path, 0)


def break_pages(path: Path) -> None:
    scribble(path, 8192, path.stat().st_size - 8192)


def drop_a_trigger(path: Path) -> None:
    with closing(sqlite3.connect(path, isolation_level=None)) as db:
        db.execute("DROP TRIGGER row_went")


def empty_the_tally(path: Path) -> None:
    with closing(sqlite3.connect(path, isolation_level=None)) as db:
        db.execute("DELETE FROM tally")


@pytest.mark.parametrize(
    "damage", [make_random, make_text, truncate, empty, break_pages, drop_a_trigger, empty_the_tally]
)
async def test_a_damaged_file_is_set_aside_whole_and_a_new_one_begun(
    path: Path, clock: Clock, damage: Callable[[Path], None]
) -> None:
    """Whoever finds it is served by the new one; one event tells, without targets."""
    await make(path)
    damage(path)
    before = path.read_bytes()
    told: list[str] = []
    store = OutboxStore(Outbox(path=path), clock=clock, on_event=told.append)
    ids = await asyncio.gather(*(store.put(bust(str(index)), sent=False) for index in range(3)))
    assert [row.bust.target for row in await store.rows()] == ["0", "1", "2"]
    aside = path.parent / "outbox.db.corrupt-20270115T080000Z"
    assert aside.read_bytes() == before
    assert len(told) == 1
    assert f"and was set aside whole as {aside}; a new one was begun" in told[0]
    assert "old/" not in told[0]
    assert min(ids) > (1 << 32,)  # no id of the old file is used again
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    await store.aclose()


async def test_files_set_aside_in_one_second_have_names_of_their_own(path: Path, clock: Clock) -> None:
    """None is overwritten; without a listener, too."""
    for _ in range(3):
        make_random(path)
        store = OutboxStore(Outbox(path=path), clock=clock)
        await store.put(bust(), sent=False)
        await store.aclose()
    name = "outbox.db.corrupt-20270115T080000Z"
    assert asides(path) == [name, f"{name}-2", f"{name}-3"]


async def test_damage_found_in_use_sets_the_file_aside_with_its_wal(path: Path) -> None:
    """What the -wal holds is not lost; a second store that has it open goes over to the new file."""
    await make(path)
    told: list[str] = []
    finder = OutboxStore(Outbox(path=path), on_event=told.append)
    other = OutboxStore(Outbox(path=path), on_event=told.append)
    await other.put(bust("in the wal"), sent=False)
    assert await finder.put(bust("in the wal"), sent=False) == (201,)
    assert finder._file.db is not None
    for pragma in ("cache_size = 0", "shrink_memory"):
        finder._file.db.execute(f"PRAGMA {pragma}")
    scribble(path, 8192, path.stat().st_size - 8192)
    wal = Path(f"{path}-wal").read_bytes()
    assert wal
    assert await finder.lease("me", (), 10) == ()  # damaged: what can be leased is what the new one holds
    assert len(told) == 1
    main, sidecar = (name for name in asides(path) if not name.endswith("-shm"))
    assert sidecar == f"{main}-wal"
    (id_of_other,) = await other.put(bust("other"), sent=False)
    (id_of_finder,) = await finder.put(bust("finder"), sent=False)
    assert [row.id for row in await finder.rows()] == [id_of_other, id_of_finder]
    assert await other.rows() == await finder.rows()
    await other.aclose()
    await finder.aclose()
    assert (path.parent / sidecar).read_bytes() == wal
    assert len(told) == 1
    assert not Path(f"{path}-wal").exists()


async def test_a_lone_store_sets_the_wal_aside_as_it_is(path: Path) -> None:
    """SQLite would write it into the damaged file, and remove it, if the connection were closed first."""
    await make(path)
    store = OutboxStore(Outbox(path=path))
    await store.put(bust("in the wal"), sent=False)
    assert store._file.db is not None
    for pragma in ("cache_size = 0", "shrink_memory"):
        store._file.db.execute(f"PRAGMA {pragma}")
    scribble(path, 8192, path.stat().st_size - 8192)
    files = {end: Path(f"{path}{end}").read_bytes() for end in ("", "-wal")}
    assert await store.lease("me", (), 10) == ()
    await store.aclose()
    main = next(name for name in asides(path) if not name.endswith(("-wal", "-shm")))
    assert {end: (path.parent / f"{main}{end}").read_bytes() for end in files} == files


async def test_processes_that_find_the_damage_at_once_set_it_aside_once(path: Path) -> None:
    """And what each reports is in the one new file."""
    make_random(path)

    def work(process: subprocess.Popen[str]) -> list[str]:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
        found = list(lines(process))
        assert process.wait(PATIENCE) == 0
        return found

    with child(PUTS_ONE, path, "a") as a, child(PUTS_ONE, path, "b") as b, child(PUTS_ONE, path, "c") as c:
        await asyncio.gather(*(asyncio.to_thread(work, process) for process in (a, b, c)))
    store = OutboxStore(Outbox(path=path))
    assert sorted(row.bust.target for row in await store.rows()) == ["a", "b", "c"]
    await store.aclose()
    assert len(asides(path)) == 1


async def test_what_another_has_set_aside_is_not_set_aside_again(path: Path) -> None:
    """Both had found the same damage; the file that is there now is the new one."""
    make_random(path)
    file = outbox._OutboxFile(str(path), time.time)
    with pytest.raises(sqlite3.DatabaseError) as caught, file.use():
        pytest.fail("noise was opened")
    store = OutboxStore(Outbox(path=path))
    await store.put(bust(), sent=False)
    file.set_aside(str(caught.value))
    assert file.events == []
    with file.use() as db:
        assert outbox._tally(db) == [1, 0, 0, 0]
    file.close()
    await store.aclose()
    assert len(asides(path)) == 1


async def test_damage_that_returns_at_once_is_an_error(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The disk is to blame; the store does not go round in circles."""
    monkeypatch.setattr(outbox, "_OBJECTS", {"no such table"})
    store = OutboxStore(Outbox(path=path))
    with pytest.raises(OutboxError, match="it is damaged, and so is the new one that was begun"):
        await store.put(bust(), sent=False)
    assert len([name for name in asides(path) if not name.endswith(("-wal", "-shm"))]) == 1
    await store.aclose()


async def test_a_database_of_another_program_is_refused_and_left_alone(path: Path) -> None:
    """It is the path that is wrong."""
    with closing(sqlite3.connect(path)) as db:
        db.execute("CREATE TABLE theirs (secret)")
    path.chmod(0o644)
    before = path.read_bytes()
    store = OutboxStore(Outbox(path=path))
    for _ in range(2):
        with pytest.raises(OutboxError, match="an SQLite database of another program"):
            await store.put(bust(), sent=False)
    await store.aclose()
    assert path.read_bytes() == before
    assert stat.S_IMODE(path.stat().st_mode) == 0o644
    assert sorted(os.listdir(path.parent)) == ["outbox.db", "outbox.db.lock"]


async def test_the_file_of_a_later_version_is_refused_and_left_alone(path: Path) -> None:
    """It is not damaged."""
    await make(path)
    with closing(sqlite3.connect(path, isolation_level=None)) as db:
        db.execute("PRAGMA user_version = 3")
    store = OutboxStore(Outbox(path=path))
    with pytest.raises(OutboxError, match=r"a later pybustcall wrote it \(format 3, known is 2\)"):
        await store.rows()
    await store.aclose()
    assert asides(path) == []


OLD: Final = (Path(__file__).parent / "outbox_format_1.sql").read_text(encoding="utf-8")


def make_old(path: Path, rows: int = 3) -> None:
    """Make an outbox of format 1 with rows in it: one waits, one is leased, one was set aside."""
    with closing(sqlite3.connect(path, isolation_level=None)) as db:
        db.executescript(OLD)
        for number in range(1, rows + 1):
            state, owner = [(0, None), (2, "gone"), (3, None)][number % 3]
            db.execute(
                "INSERT INTO busts (destination, line, target, kind, strategy, soft, fault_tolerance, key, state, head,"
                " sent, created, joined, not_before, owner, leased_at, lease_until, reason)"
                " VALUES ('', ?, ?, 'key', 'direct', 0, 6, ?, ?, ?, 1, 1, 1, 1, ?, ?, ?, 'it was down')",
                (
                    *(_line_of("", bust(f"t{number}")), f"t{number}", f"k{number}", state, state != 3, owner),
                    *((1.0, 2.0) if state == 2 else (None, None)),
                ),
            )


async def test_a_file_of_an_earlier_format_is_brought_up_to_date_with_all_its_rows(path: Path) -> None:
    """Rows, states, keys and ids are as before; new rows go beside them, and say more."""
    make_old(path)
    store = OutboxStore(Outbox(path=path), clock=lambda: 1.5)
    rows = await store.rows()
    assert [(row.id, row.bust.target, row.bust.key, row.state.value) for row in rows] == [
        (1, "t1", "k1", "leased"),
        (2, "t2", "k2", "aside"),
        (3, "t3", "k3", "pending"),
    ]
    assert [row.bust.options for row in rows] == [None, None, None]
    (added,) = await store.put(bust("t4", kind="tag", settle=3.0), sent=False)
    assert added == 4
    await store.aclose()
    again = OutboxStore(Outbox(path=path), clock=lambda: 2.5)
    assert [row.bust.settle for row in await again.rows()] == [None, None, None, 3.0]
    assert await ids_of(again) == [1, 3, 4]
    assert asides(path) == []
    await again.aclose()


async def test_two_that_find_an_earlier_format_upgrade_it_once(path: Path) -> None:
    """Whoever comes second finds it done."""
    make_old(path)
    stores = [OutboxStore(Outbox(path=path)) for _ in range(4)]
    found = await asyncio.gather(*(store.rows() for store in stores))
    assert [len(rows) for rows in found] == [3] * 4
    for store in stores:
        await store.aclose()


async def test_an_upgrade_that_fails_changes_nothing(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file stays one of the earlier format, with all its rows, and is upgraded the next time."""
    make_old(path)
    monkeypatch.setattr("pybustcall.outbox._UPGRADES", {1: "ALTER TABLE nothing ADD COLUMN options TEXT"})
    store = OutboxStore(Outbox(path=path))
    with pytest.raises(OutboxError, match="cannot be used"):
        await store.rows()
    monkeypatch.undo()
    with closing(sqlite3.connect(path)) as db:
        assert db.execute("PRAGMA user_version").fetchone() == (1,)
    assert len(await store.rows()) == 3
    assert asides(path) == []
    await store.aclose()


async def test_what_a_bust_says_survives(store: OutboxStore) -> None:
    """Kind, namespace, soft, verify, settle, reason, and whether wider will do."""
    said = bust(kind="prefix", namespace="n", soft=True, verify=True, settle=0.0, reason='"why"', allow_wider=True)
    await store.put(said, sent=False)
    assert [row.bust for row in await store.rows()] == [said]


async def test_a_bust_that_says_something_else_joins_no_row(store: OutboxStore) -> None:
    """One with another reason stands for itself in the audit; the same again joins."""
    first = await store.put(bust(reason="one"), sent=False)
    other = await store.put(bust(reason="two"), sent=False)
    plain = await store.put(bust(), sent=False)
    assert len({*first, *other, *plain}) == 3
    assert await store.put(bust(reason="two", key="later"), sent=False) == other
    assert await store.put(bust(key="later"), sent=False) == plain


@pytest.mark.parametrize("options", ["{", "7", '{"colour": 1}', ""])
async def test_options_that_cannot_be_read_leave_the_rest_to_be_sent(path: Path, options: str) -> None:
    """Somebody has edited the file; the bust itself is worth more than how it was meant."""
    await make(path, rows=1)
    with closing(sqlite3.connect(path, isolation_level=None)) as db:
        db.execute("UPDATE busts SET options = ?", (options,))
    store = OutboxStore(Outbox(path=path))
    (row,) = await store.rows()
    assert row.bust.options is None
    await store.aclose()


async def test_a_file_system_without_wal_is_refused(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """SQLite answers with another journal mode, as it does where memory cannot be shared."""
    await make(path, rows=1)

    class Connection(sqlite3.Connection):
        def execute(self, sql: str, *rest: Any) -> sqlite3.Cursor:
            return super().execute("SELECT 'delete'" if sql == "PRAGMA journal_mode = WAL" else sql, *rest)

    connect = sqlite3.connect
    monkeypatch.setattr(sqlite3, "connect", lambda *args, **kwargs: connect(*args, factory=Connection, **kwargs))
    store = OutboxStore(Outbox(path=path))
    with pytest.raises(OutboxError, match="choose a path on a local disk"):
        await store.rows()
    await store.aclose()


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("link", "it is a symbolic link; choose another path"),
        ("directory", "it is a directory or a special file; choose another path"),
        ("fifo", "it is a directory or a special file; choose another path"),
        ("missing/outbox.db", "its directory does not exist; make it"),
        ("file/outbox.db", "its directory is no directory; choose another path"),
        ("locked-by-link", "its lock file is a link; choose another path"),
        ("locked-by-directory", "a directory is where its lock file should be; choose another path"),
        ("n" * 250, "cannot be used: the system says: File name too long"),
    ],
)
async def test_a_path_that_can_be_no_outbox_is_refused(tmp_path: Path, name: str, text: str) -> None:
    """With what is wrong, and nothing else is touched."""
    (tmp_path / "file").write_text("x")
    (tmp_path / "link").symlink_to(tmp_path / "file")
    (tmp_path / "directory").mkdir()
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "locked-by-link.lock").symlink_to(tmp_path / "file")
    (tmp_path / "locked-by-directory.lock").mkdir()
    store = OutboxStore(Outbox(path=tmp_path / name))
    with pytest.raises(OutboxError) as caught:
        await store.put(bust("secret"), sent=False)
    assert text in str(caught.value)
    assert "secret" not in str(caught.value)
    await store.aclose()
    assert (tmp_path / "file").read_text() == "x"


async def test_a_directory_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    """With the permission that is wanting."""
    directory = tmp_path / "theirs"
    directory.mkdir(mode=0o500)
    root = os.geteuid() == 0
    store = OutboxStore(Outbox(path=directory / "outbox.db"), executor=Inline())
    if root:
        os.seteuid(65534)
    try:
        with pytest.raises(OutboxError, match="let this user read and write the file and its directory") as caught:
            await store.put(bust(), sent=False)
    finally:
        if root:
            os.seteuid(0)
    assert isinstance(caught.value.__cause__, PermissionError)
    await store.put(bust(), sent=False) if root else None
    await store.aclose()


async def test_a_file_that_was_removed_in_use_is_begun_anew(path: Path, clock: Clock) -> None:
    """Nothing more is written to what nobody will read; a late word about an old row does not touch a new one."""
    told: list[str] = []
    store = OutboxStore(Outbox(path=path), clock=clock, on_event=told.append)
    await store.put(bust("old"), sent=False)
    assert await ids_of(store) == [1]
    path.unlink()
    (new,) = await store.put(bust("new"), sent=False)
    assert await ids_of(store) == [new]
    assert await store.done("me", [1]) == 0
    assert [row.bust.target for row in await store.rows()] == ["new"]
    assert "its main file is gone" in told[0]  # the -wal that it left was set aside
    assert any(name.endswith("-wal") for name in asides(path))
    await store.aclose()


async def test_a_removed_lock_file_is_made_again(path: Path) -> None:
    """Two that hold different lock files would not see each other."""
    store = OutboxStore(Outbox(path=path))
    await store.put(bust("a"), sent=False)
    Path(f"{path}.lock").unlink()
    await store.put(bust("b"), sent=False)
    assert Path(f"{path}.lock").exists()
    assert len(await store.rows()) == 2
    await store.aclose()


async def test_what_a_killed_creation_left_is_cleared_away(path: Path) -> None:
    """The file appears complete or not at all."""
    for end in (".new", ".new-journal", ".lock"):
        Path(f"{path}{end}").write_text("half")
    store = OutboxStore(Outbox(path=path))
    await store.put(bust(), sent=False)
    await store.aclose()
    assert sorted(os.listdir(path.parent)) == ["outbox.db", "outbox.db.lock"]


async def test_stores_that_create_the_file_at_once_share_it(path: Path) -> None:
    """One of them makes it."""
    stores = [OutboxStore(Outbox(path=path)) for _ in range(8)]
    await asyncio.gather(*(store.put(bust(str(index)), sent=False) for index, store in enumerate(stores)))
    assert len(await stores[0].rows()) == 8
    for store in stores:
        await store.aclose()
    assert asides(path) == []


# --- forks


def in_child(work: Callable[[], None]) -> int:
    """Fork, do this in the child, tell its exit code."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # later Pythons warn of any fork beside a thread
        process = os.fork()
    if process == 0:
        code = 1
        try:
            asyncio._set_running_loop(None)
            asyncio.set_event_loop(None)
            work()
            code = 0
        finally:
            if (measuring := coverage.Coverage.current()) is not None:
                measuring.stop()
                measuring.save()
            os._exit(code)
    return process


def test_a_forked_child_has_a_connection_and_a_thread_of_its_own(path: Path) -> None:
    """What the child commits outlives the parent's closing, and the parent goes on as before."""
    store = OutboxStore(Outbox(path=path))
    asyncio.run(store.put(bust("parent"), sent=False))
    go_reader, go_writer = os.pipe()
    ready_reader, ready_writer = os.pipe()

    def work() -> None:
        asyncio.run(store.put(bust("child before"), sent=False))
        os.write(ready_writer, b"x")
        os.read(go_reader, 1)
        asyncio.run(store.put(bust("child after"), sent=False))
        os.kill(os.getpid(), signal.SIGKILL)

    process = in_child(work)
    assert os.read(ready_reader, 1)
    asyncio.run(store.put(bust("parent again"), sent=False))
    asyncio.run(store.aclose())
    os.write(go_writer, b"x")
    assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == -signal.SIGKILL
    for descriptor in (go_reader, go_writer, ready_reader, ready_writer):
        os.close(descriptor)
    store = OutboxStore(Outbox(path=path))
    rows = asyncio.run(store.rows())
    asyncio.run(store.aclose())
    assert [row.bust.target for row in rows] == ["parent", "child before", "parent again", "child after"]


async def test_a_fork_waits_for_the_transaction_under_way(path: Path) -> None:
    """And the child does nothing of what the parent's queue holds, nor waits for the parent's thread."""
    held = HeldClock()
    store = OutboxStore(Outbox(path=path), clock=held)
    puts = [asyncio.ensure_future(store.put(bust("begun"), sent=False))]
    await eventually(lambda: held.transactions == 1)
    puts.append(asyncio.ensure_future(store.put(bust("queued"), sent=True)))  # done twice, it would be there twice
    await asyncio.sleep(0)
    release = threading.Timer(0.05, held.go.set)
    release.start()

    def work() -> None:
        asyncio.run(store.put(bust("child"), sent=False))
        asyncio.run(store.aclose())

    process = in_child(work)
    assert await asyncio.gather(*puts)
    _, status = await asyncio.to_thread(os.waitpid, process, 0)
    assert os.waitstatus_to_exitcode(status) == 0
    assert sorted(row.bust.target for row in await store.rows()) == ["begun", "child", "queued"]
    await store.aclose()
    await asyncio.to_thread(release.join)


def test_a_child_of_a_parent_that_has_closed_is_told(path: Path) -> None:
    """It neither hangs nor reopens."""
    store = OutboxStore(Outbox(path=path))
    asyncio.run(store.put(bust(), sent=False))
    asyncio.run(store.aclose())

    def work() -> None:
        with pytest.raises(OutboxError, match="is closed"):
            asyncio.run(store.counts())
        asyncio.run(store.aclose())

    assert os.waitstatus_to_exitcode(os.waitpid(in_child(work), 0)[1]) == 0


async def test_a_child_forked_while_the_parent_closes_closes_too(path: Path) -> None:
    """It does not wait for a thread that only the parent has."""
    held = HeldClock()
    store = OutboxStore(Outbox(path=path), clock=held)
    putting = asyncio.ensure_future(store.put(bust(), sent=False))
    await eventually(lambda: held.transactions == 1)
    closer = asyncio.ensure_future(store.aclose())
    await asyncio.sleep(0)
    release = threading.Timer(0.05, held.go.set)
    release.start()
    process = in_child(lambda: asyncio.run(store.aclose()))
    _, status = await asyncio.to_thread(os.waitpid, process, 0)
    assert os.waitstatus_to_exitcode(status) == 0
    await asyncio.gather(putting, closer)
    await asyncio.to_thread(release.join)


def test_a_child_that_drops_the_store_does_the_parent_no_harm(path: Path) -> None:
    """Nor is the child warned of what it never opened."""
    holder = [OutboxStore(Outbox(path=path))]
    asyncio.run(holder[0].put(bust("a"), sent=False))

    def work() -> None:
        holder.clear()
        gc.collect()

    assert os.waitstatus_to_exitcode(os.waitpid(in_child(work), 0)[1]) == 0
    asyncio.run(holder[0].put(bust("b"), sent=False))
    assert len(asyncio.run(holder[0].rows())) == 2
    asyncio.run(holder[0].aclose())


# --- the whole, against a model


@dataclass
class ModelRow:
    """A row as the rules say it, without heads, tallies or indexes."""

    id: int
    destination: str
    bust: StoredBust
    sent: bool
    owner: str | None
    created: float
    joined: float
    not_before: float
    state: str = "ready"
    leased_at: float = 0.0
    attempts: int = 0

    @property
    def line(self) -> tuple[Any, ...]:
        return self.destination, self.bust.namespace, self.bust.kind, self.bust.target


@dataclass
class Model:
    """What the outbox does, naively."""

    rows: list[ModelRow] = field(default_factory=list)
    last: int = 0

    def put(
        self, now: float, put: StoredBust, destinations: list[str], sent: bool, owner: str | None
    ) -> list[int] | None:
        joins = {
            destination: [
                row
                for row in self.rows
                if row.line == (destination, put.namespace, put.kind, put.target)
                and (row.bust.strategy, row.bust.soft, row.bust.reason) == (put.strategy, put.soft, put.reason)
                and row.state in {"ready", "waiting"}
                and not row.sent
                and row.owner is None
            ]
            for destination in destinations
        }
        if owner is not None:
            joins = {destination: [] for destination in destinations}
        fresh = [destination for destination, found in joins.items() if not found]
        if fresh and len(self.rows) + len(fresh) > LIMIT:
            return None
        ids = {}
        for destination, found in joins.items():
            if found:
                row = found[-1]
                row.joined = now
                if not sent:
                    row.bust = put
            else:
                self.last += 1
                row = ModelRow(self.last, destination, put, sent, owner, now, now, now)
                row.state, row.leased_at = ("leased", now) if owner is not None else ("ready", 0.0)
                self.rows.append(row)
            ids[destination] = row.id
        return [ids[destination] for destination in destinations]

    def lease(self, now: float, owner: str, destinations: list[str], limit: int) -> list[int]:
        for row in self.rows:
            ended = row.state == "leased" and (row.leased_at + LEASE <= now or row.leased_at > now)
            waited = row.state == "waiting" and not now < row.not_before <= now + LONGEST_DELAY
            if ended or waited:
                row.state = "ready"
            if row.state != "aside" and row.joined > now:
                row.joined, row.created = now, min(row.created, now)
            if row.state in {"ready", "waiting"} and row.joined <= now - AGE:
                row.state = "aside"
        queues: dict[str, list[ModelRow]] = {destination: [] for destination in (ANY, *destinations)}
        lines: set[tuple[Any, ...]] = set()
        for row in self.rows:
            if row.state == "aside":
                continue
            first = row.line not in lines
            lines.add(row.line)
            if first and row.destination in queues and row.state == "ready":
                queues[row.destination].append(row)
        fair = [row for turn in zip_longest(*queues.values()) for row in turn if row is not None][:limit]
        for row in fair:
            row.state, row.owner, row.leased_at, row.sent = "leased", owner, now, True
        return sorted(row.id for row in fair)

    def held(self, owner: str, ids: list[int]) -> list[ModelRow]:
        return [row for row in self.rows if row.owner == owner and row.id in ids and row.state != "aside"]


LIMIT, AGE, LEASE = 12, 1000.0, 32.0
OWNERS = st.sampled_from(["one", "two"])
DESTINATIONS = st.lists(st.sampled_from([ANY, A, B]), min_size=1, max_size=3)
IDS = st.lists(st.integers(1, 30), max_size=12, unique=True)
BUSTS = st.builds(
    StoredBust,
    target=st.sampled_from(["x", "y"]),
    strategy=st.sampled_from(["direct", "dimensional"]),
    fault_tolerance=st.integers(0, 12),
    key=st.text("abc", min_size=1, max_size=8),
    namespace=st.sampled_from([None, "n"]),
    soft=st.booleans(),
    reason=st.sampled_from([None, "why"]),
)


class StoreAgainstModel(RuleBasedStateMachine):
    """Whatever is asked in whatever order, the store answers as the model does."""

    @initialize()
    def begin(self) -> None:
        self.directory = tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None)
        self.clock = Clock()
        policy = Outbox(path=f"{self.directory.name}/outbox.db", rows=LIMIT, age=AGE, lease=LEASE)
        self.store = OutboxStore(policy, clock=self.clock, executor=Inline())
        self.model = Model()
        self.runner = asyncio.Runner()

    def teardown(self) -> None:
        if hasattr(self, "runner"):
            self.runner.run(self.store.aclose())
            self.runner.close()
            self.directory.cleanup()

    @rule(put=BUSTS, destinations=DESTINATIONS, sent=st.booleans(), owner=st.none() | OWNERS)
    def put(self, put: StoredBust, destinations: list[str], sent: bool, owner: str | None) -> None:
        expected = self.model.put(self.clock.now, put, destinations, sent, owner)
        try:
            found = list(self.runner.run(self.store.put(put, destinations, sent=sent, owner=owner)))
        except OutboxError:
            assert expected is None
        else:
            assert found == expected

    @rule(owner=OWNERS, destinations=DESTINATIONS, limit=st.integers(0, 9))
    def lease(self, owner: str, destinations: list[str], limit: int) -> None:
        found = self.runner.run(self.store.lease(owner, destinations, limit))
        assert [row.id for row in found] == self.model.lease(self.clock.now, owner, destinations, limit)

    @rule(owner=OWNERS, ids=IDS)
    def done(self, owner: str, ids: list[int]) -> None:
        gone = [row for row in self.model.rows if row.owner == owner and row.id in ids]
        assert self.runner.run(self.store.done(owner, ids)) == len(gone)
        self.model.rows = [row for row in self.model.rows if row not in gone]

    @rule(owner=OWNERS, ids=IDS)
    def renew(self, owner: str, ids: list[int]) -> None:
        held = self.model.held(owner, ids)
        assert sorted(self.runner.run(self.store.renew(owner, ids))) == [row.id for row in held]
        for row in held:
            row.state, row.leased_at = "leased", self.clock.now

    @rule(
        owner=OWNERS, ids=st.none() | IDS, sent=st.booleans(), delay=st.sampled_from([0, 8, 700]), tried=st.booleans()
    )
    def release(self, owner: str, ids: list[int] | None, sent: bool, delay: float, tried: bool) -> None:
        held = self.model.held(owner, list(range(99)) if ids is None else ids)
        asked = self.store.release(owner, ids, sent=sent, reason="r", delay=delay, attempted=tried)
        assert self.runner.run(asked) == len(held)
        for row in held:
            row.state, row.owner, row.sent = "waiting" if delay else "ready", None, row.sent or sent
            row.not_before, row.attempts = self.clock.now + min(delay, LONGEST_DELAY), row.attempts + tried

    @rule(owner=OWNERS, ids=IDS)
    def set_aside(self, owner: str, ids: list[int]) -> None:
        held = self.model.held(owner, ids)
        assert self.runner.run(self.store.set_aside(owner, ids, "r")) == len(held)
        for row in held:
            row.state, row.owner, row.attempts = "aside", None, row.attempts + 1

    @rule(ids=st.none() | IDS)
    def retry(self, ids: list[int] | None) -> None:
        back = [row for row in self.model.rows if row.state == "aside" and (ids is None or row.id in ids)]
        assert self.runner.run(self.store.retry(ids)) == len(back)
        for row in back:
            row.state, row.owner, row.attempts = "ready", None, 0
            row.created = row.joined = row.not_before = self.clock.now

    @rule(ids=st.none() | IDS, aside_only=st.booleans())
    def purge(self, ids: list[int] | None, aside_only: bool) -> None:
        gone = [
            row
            for row in self.model.rows
            if (ids is None or row.id in ids) and (not aside_only or row.state == "aside")
        ]
        assert self.runner.run(self.store.purge(ids, aside_only=aside_only)) == len(gone)
        self.model.rows = [row for row in self.model.rows if row not in gone]

    @rule(seconds=st.sampled_from([1.0, 8.0, 31.0, 32.0, 600.0, 999.0, 1000.0, -1.0, -40.0, -700.0]))
    def pass_time(self, seconds: float) -> None:
        self.clock.now += seconds

    @rule()
    def reopen(self) -> None:
        self.runner.run(self.store.aclose())
        self.store = OutboxStore(self.store._policy, clock=self.clock, executor=Inline())

    @invariant()
    def agrees(self) -> None:
        if not hasattr(self, "store"):
            return
        names = {"ready": "pending", "waiting": "pending", "leased": "leased", "aside": "aside"}
        found = [
            (row.id, row.destination, row.bust, row.state.value, row.sent, row.attempts, row.created, row.joined)
            for row in self.runner.run(self.store.rows())
        ]
        rows = self.model.rows
        assert found == [
            (row.id, row.destination, row.bust, names[row.state], row.sent, row.attempts, row.created, row.joined)
            for row in rows
        ]
        counts = self.runner.run(self.store.counts())
        kinds = [names[row.state] for row in rows]
        ages = [max(0.0, self.clock.now - row.created) for row in rows if row.state != "aside"]
        assert counts == OutboxCounts(
            pending=kinds.count("pending"),
            leased=kinds.count("leased"),
            aside=kinds.count("aside"),
            oldest=max(ages) if ages else None,
        )


TestStoreAgainstModel = StoreAgainstModel.TestCase
TestStoreAgainstModel.settings = settings(
    max_examples=100, stateful_step_count=30, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
