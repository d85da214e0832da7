"""What lies in an SQLite cache: what readers find, what they may store, what busts hide, mark and remove.

How the file is opened and shared is told by test_sqlite_file.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, initialize, invariant, rule

from pybustcall import sqlite_layout as layout
from pybustcall.keys import covers, is_variant
from pybustcall.models import Kind
from pybustcall.sqlite_layout import EVERY, Stored, Token, WentBack

HERE = "default"
ROOM = 1 << 30
LEASE = 10.0
FAR = 1 << 40


def made() -> sqlite3.Connection:
    """Make a file that is only in memory."""
    db = sqlite3.connect(":memory:", isolation_level=None)
    layout.create(db, 1)
    return db


@pytest.fixture
def db() -> Iterator[sqlite3.Connection]:
    with closing(made()) as connection:
        yield connection


def look(
    db: sqlite3.Connection,
    key: str,
    *,
    namespace: str = HERE,
    known: Token | None = None,
    now: float = 0.0,
    since_start: float = 0.0,
) -> layout.Seen:
    return layout.look_up(db, namespace, key, known, now=now, since_start=since_start, lease=LEASE)


def value(db: sqlite3.Connection, key: str, **at: Any) -> bytes | None:
    entry = look(db, key, **at).entry
    return None if entry is None else entry.value


def put(
    db: sqlite3.Connection,
    key: str,
    content: bytes = b"x",
    *,
    namespace: str = HERE,
    known: Token | None = None,
    tags: tuple[str, ...] = (),
    ttl: float | None = None,
    token: Token | None = None,
    room: int = ROOM,
    now: float = 0.0,
) -> Stored:
    return layout.store(db, namespace, key, content, known, tags=tags, ttl=ttl, token=token, room=room, now=now)


def begin(
    db: sqlite3.Connection,
    kind: Kind,
    target: str,
    *,
    namespace: str = HERE,
    known: Token | None = None,
    soft: bool = False,
    wide: bool = False,
    most: int = layout.MAX_FENCES,
) -> int:
    return layout.begin(db, namespace, kind, target, known, soft=soft, wide=wide, most=most).generation


def bust(db: sqlite3.Connection, kind: Kind, target: str, *, soft: bool = False, namespace: str = HERE) -> int:
    generation = begin(db, kind, target, soft=soft, namespace=namespace)
    ranges = layout.ranges_of_prefix(target) if kind == "prefix" else (EVERY,)
    tag = target if kind == "tag" else None
    keys: tuple[str, ...] = (target,)
    if kind != "key":
        keys = layout.page(db, namespace, ranges, tag=tag, limit=10_000, now=0.0).keys
    removed = layout.remove(db, namespace, keys, generation=generation, soft=soft, now=0.0)
    layout.end(db, namespace, [(kind, target, generation)])
    return removed


def rows(db: sqlite3.Connection) -> dict[str, int]:
    """Tell how many rows there are of what belongs to entries."""
    return {
        table: db.execute(f"SELECT count(*) FROM {table}").fetchone()[0] for table in ("entries", "contents", "tags")
    }


# A naive model


KEYS = ("a", "a/b", "a/b.gz", "a/b?c", "a/b/c", "a:b", "ab", "b", "b.br?q")
TAGS = ("t", "u")
TARGETS: tuple[tuple[Kind, str], ...] = (
    *(("key", key) for key in ("a", "a/b", "b")),
    *(("prefix", prefix) for prefix in ("a", "a/", "a/b", "b")),
    *(("tag", tag) for tag in TAGS),
    ("all", "*"),
)


@dataclass
class Held:
    """An entry."""

    content: bytes
    born: int
    tags: frozenset[str]
    expires: float | None
    stale: bool = False


@dataclass
class Busted:
    """What a fence is for."""

    kind: Kind
    target: str
    wide: bool
    generation: int

    def covers(self, key: str, tags: frozenset[str]) -> bool:
        direct = {
            "key": key == self.target,
            "prefix": covers(self.target, key),
            "tag": self.target in tags,
            "all": True,
        }[self.kind]
        return direct or (self.wide and self.kind in {"key", "prefix"} and is_variant(self.target, key))


@dataclass
class Model:
    """What should be, held in the simplest way."""

    seq: int = 0
    entries: dict[str, Held] = field(default_factory=dict)
    fences: list[Busted] = field(default_factory=list)
    open: list[Busted] = field(default_factory=list)

    def sees(self, key: str, now: float) -> tuple[bytes, bool] | None:
        found = self.alive(key, now)
        if found is None:
            return None
        if any(it.generation > found.born and it.covers(key, found.tags) for it in self.open):
            return None
        return found.content, found.stale

    def hide(self, it: Busted) -> None:
        """Have readers miss what it covers; one that is begun again counts by its last."""
        self.open = [one for one in self.open if (one.kind, one.target, one.wide) != (it.kind, it.target, it.wide)]
        self.open.append(it)

    def alive(self, key: str, now: float) -> Held | None:
        found = self.entries.get(key)
        return None if found is None or (found.expires is not None and found.expires <= now) else found

    def tidy(self, now: float) -> None:
        self.entries = {key: held for key in self.entries if (held := self.alive(key, now)) is not None}

    def takes(self, key: str, tags: frozenset[str], since: int) -> bool:
        both = tags | (self.entries[key].tags if key in self.entries else frozenset())
        return not any(it.generation > since and it.covers(key, both) for it in self.fences)


class Cache(RuleBasedStateMachine):
    """Readers and busts at one namespace, in any order, each step a transaction. A store drops all that is over."""

    fills = Bundle("fills")
    busts = Bundle("busts")

    @initialize()
    def start(self) -> None:
        self.patches = pytest.MonkeyPatch()
        self.patches.setattr(layout, "_TIDIED", len(KEYS))
        self.db = made()
        self.model = Model()
        self.now = 100.0
        self.made = 0

    def teardown(self) -> None:
        self.db.close()
        self.patches.undo()

    @rule(target=fills, key=st.sampled_from(KEYS))
    def begin_to_fill(self, key: str) -> tuple[str, Token, bytes]:
        self.made += 1
        return key, look(self.db, key, now=self.now).token, b"%d" % self.made

    @rule(fill=fills, tags=st.frozensets(st.sampled_from(TAGS)), ttl=st.none() | st.integers(1, 3))
    def store(self, fill: tuple[str, Token, bytes], tags: frozenset[str], ttl: int | None) -> None:
        key, token, content = fill
        stored = put(self.db, key, content, tags=tuple(tags), ttl=ttl, token=token, now=self.now).stored
        assert stored == self.model.takes(key, tags, token.generation)
        if stored:
            self.model.tidy(self.now)
            expires = None if ttl is None else self.now + ttl
            self.model.entries[key] = Held(content, token.generation, tags, expires)

    @rule(key=st.sampled_from(KEYS), tags=st.frozensets(st.sampled_from(TAGS)))
    def set(self, key: str, tags: frozenset[str]) -> None:
        assert put(self.db, key, b"set", tags=tuple(tags), now=self.now).stored
        self.model.tidy(self.now)
        self.model.entries[key] = Held(b"set", self.model.seq, tags, None)

    @rule(target=busts, scope=st.sampled_from(TARGETS), soft=st.booleans(), wide=st.booleans())
    def begin(self, scope: tuple[Kind, str], soft: bool, wide: bool) -> tuple[Busted, bool]:
        kind, named = scope
        self.model.seq += 1
        busted = Busted(kind, named, wide, self.model.seq)
        assert begin(self.db, kind, named, soft=soft, wide=wide) == busted.generation
        self.model.fences.append(busted)
        if not soft:
            self.model.hide(Busted(kind, named, False, busted.generation))
            if wide and kind in {"key", "prefix"}:
                self.model.hide(Busted("key", named, True, busted.generation))
        return busted, soft

    @rule(begun=busts, wanted=st.integers(1, 4))
    def sweep(self, begun: tuple[Busted, bool], wanted: int) -> None:
        busted, soft = begun
        tag = busted.target if busted.kind == "tag" else None
        ranges: tuple[layout.Range, ...] = (EVERY,)
        if busted.kind in {"key", "prefix"}:
            ranges = layout.ranges_of_prefix(busted.target)
        keys: list[str] = []
        while ranges:
            page = layout.page(self.db, HERE, ranges, tag=tag, limit=wanted, now=self.now)
            ranges = page.rest
            keys += page.keys
        narrow = Busted("prefix" if busted.kind == "key" else busted.kind, busted.target, False, 0)
        alive = {key: held for key in self.model.entries if (held := self.model.alive(key, self.now)) is not None}
        assert keys == sorted(key for key, held in alive.items() if narrow.covers(key, held.tags))
        self.remove(keys, busted.generation, soft)

    @rule(begun=busts, keys=st.lists(st.sampled_from(KEYS), max_size=3))
    def sweep_dependents(self, begun: tuple[Busted, bool], keys: list[str]) -> None:
        busted, soft = begun
        self.model.tidy(self.now)
        layout.tidy(self.db, most=len(KEYS), now=self.now)
        self.remove(keys, busted.generation, soft)

    def remove(self, keys: list[str], generation: int, soft: bool) -> None:
        removed = layout.remove(self.db, HERE, keys, generation=generation, soft=soft, now=self.now)
        expected = 0
        for key in keys:
            held = self.model.entries.get(key)
            if held is None or held.born >= generation:
                continue
            expected += not (soft and held.stale)
            if soft:
                held.stale = True
            else:
                del self.model.entries[key]
        assert removed == expected

    @rule(begun=busts)
    def end(self, begun: tuple[Busted, bool]) -> None:
        busted, _ = begun
        layout.end(self.db, HERE, [(busted.kind, busted.target, busted.generation)])
        self.model.open = [it for it in self.model.open if it.generation != busted.generation]

    @rule(keys=st.lists(st.sampled_from(KEYS), max_size=3), begun=busts)
    def fence(self, keys: list[str], begun: tuple[Busted, bool]) -> None:
        generation = begun[0].generation
        layout.fence(self.db, HERE, keys, generation=generation, soft=True)
        self.model.fences += [Busted("key", key, True, generation) for key in keys]

    @rule(seconds=st.integers(1, 2))
    def wait(self, seconds: int) -> None:
        self.now += seconds

    @rule()
    def tidy(self) -> None:
        before = len(self.model.entries)
        self.model.tidy(self.now)
        assert layout.tidy(self.db, most=len(KEYS), now=self.now) == before - len(self.model.entries)

    @invariant()
    def readers_see_what_they_should(self) -> None:
        for key in KEYS:
            seen = look(self.db, key, now=self.now)
            assert seen.token.generation == self.model.seq
            entry = None if seen.entry is None else (seen.entry.value, seen.entry.stale)
            assert entry == self.model.sees(key, self.now)

    @invariant()
    def all_rows_belong_together(self) -> None:
        query = "SELECT key, tags FROM entries"
        expected = {(key, tag) for key, tags in self.db.execute(query) for tag in tags.split("\n") if tag}
        assert set(self.db.execute("SELECT key, tag FROM tags")) == expected
        assert rows(self.db)["contents"] == rows(self.db)["entries"]


TestCache = Cache.TestCase
TestCache.settings = settings(max_examples=60, stateful_step_count=25, deadline=None)


# Tokens


def test_tokens_are_ordered_by_what_follows_upon_what() -> None:
    """In one epoch by generations; of two, the one with the greater number came later; equal ones are two files."""
    assert not Token("1:a", 3).is_before(None)
    assert not Token("1:a", 3).is_before(Token("1:a", 3))
    assert Token("1:a", 2).is_before(Token("1:a", 3))
    assert Token("1:b", 9).is_before(Token("1:a", 3))
    assert not Token("2:b", 0).is_before(Token("1:a", 3))
    assert Token("9:a", 0).is_before(Token("10:a", 0))
    assert Token("1:a", 2).newest(None) == Token("1:a", 2)
    assert Token("1:a", 2).newest(Token("1:a", 3)) == Token("1:a", 3)
    assert Token("10:a", 0).newest(Token("9:b", 3)) == Token("10:a", 0)


def test_a_fill_of_another_file_or_of_the_future_is_refused(db: sqlite3.Connection) -> None:
    """Neither says anything of what was busted here."""
    token = look(db, "a").token
    assert not put(db, "a", token=Token("1:other", token.generation)).stored
    assert not put(db, "a", token=Token(token.epoch, token.generation + 1)).stored
    assert put(db, "a", token=token).stored


def test_the_token_that_a_store_tells_is_of_now(db: sqlite3.Connection) -> None:
    """Also where it is refused."""
    token = look(db, "a").token
    begin(db, "key", "a")
    told = put(db, "a", token=token)
    assert told == Stored(Token(token.epoch, token.generation + 1), False)


def test_a_bust_by_a_tag_that_the_entry_had_refuses_fills(db: sqlite3.Connection) -> None:
    """The value was read when it was still about that."""
    put(db, "a", tags=("t",))
    token = look(db, "a").token
    begin(db, "tag", "t")
    assert not put(db, "a", tags=("u",), token=token).stored


@pytest.mark.parametrize("key", ["m.css.gz", "m.css?v=2", "m.css.br?v=2", "m.css?v=2.gz", "m.css?v=2?w"])
def test_a_wide_bust_refuses_fills_of_variants(db: sqlite3.Connection, key: str) -> None:
    """Of the key that it names, and of what depends on that; a narrow one does not."""
    token = look(db, key).token
    begin(db, "key", "m.css", wide=False)
    assert put(db, key, token=token).stored
    begin(db, "key", "m.css", wide=True)
    assert not put(db, key, token=token).stored
    token = look(db, key).token
    generation = begin(db, "key", "theme")
    assert put(db, key, token=token).stored
    layout.fence(db, HERE, ["m.css"], generation=generation, soft=False)
    assert not put(db, key, token=token).stored
    assert put(db, "m.css.map", token=token).stored


def test_an_entry_is_as_old_as_its_token(db: sqlite3.Connection) -> None:
    """A bust that began meanwhile may find only later that it covers it, as what depends on the named."""
    token = look(db, "page").token
    generation = begin(db, "key", "fragment")
    assert put(db, "page", token=token).stored
    assert put(db, "other").stored
    assert layout.held(db, HERE, ["page", "other"], generation=generation, stale=True, now=0.0) == ["page"]
    assert layout.remove(db, HERE, ["page", "other"], generation=generation, soft=False, now=0.0) == 1
    assert (value(db, "page"), value(db, "other")) == (None, b"x")


# Files that went back


def test_a_file_that_went_back_begins_anew(db: sqlite3.Connection) -> None:
    """A reader that knows more raises; after the new epoch all is a miss, and no earlier fill is stored."""
    put(db, "a", b"old")
    before = look(db, "a").token
    known = Token(before.epoch, before.generation + 1)
    with pytest.raises(WentBack):
        look(db, "a", known=known)
    layout.begin_anew(db, HERE, known)
    layout.begin_anew(db, HERE, known)  # another client, to the same effect
    seen = look(db, "a", known=known)
    assert seen.entry is None
    assert seen.token.number == 2
    assert layout.page(db, HERE, (EVERY,), limit=10, now=0.0).keys == ()
    assert layout.held(db, HERE, ["a"], generation=None, stale=True, now=0.0) == []
    assert not put(db, "a", token=before).stored
    assert put(db, "a", b"new", token=seen.token).stored
    assert value(db, "a") == b"new"


def test_a_bust_and_a_store_notice_that_the_file_went_back(db: sqlite3.Connection) -> None:
    """Whoever writes begins the new epoch itself."""
    put(db, "a", b"old")
    put(db, "b", b"old")
    epoch = look(db, "a").token.epoch
    assert put(db, "b", b"new", known=Token(epoch, 5)).token.number == 2
    assert (value(db, "a"), value(db, "b")) == (None, b"new")
    told = layout.begin(db, HERE, "key", "b", Token("7:x", 0), soft=True, wide=False)
    assert told.number == 8
    assert value(db, "b") is None


def test_what_an_epoch_left_behind_is_dropped_in_portions(db: sqlite3.Connection) -> None:
    """Its tags, too; what was stored since stays."""
    for number in range(10):
        put(db, f"old/{number}", tags=("t",))
    layout.begin_anew(db, HERE, Token("1:other", 0))
    assert bust(db, "tag", "t") == 0
    put(db, "new", tags=("t",))
    assert layout.tidy(db, most=4, now=0.0) == 4
    while layout.tidy(db, most=4, now=0.0):
        pass
    assert rows(db) == {"entries": 1, "contents": 1, "tags": 1}
    assert value(db, "new") == b"x"


def test_a_copy_is_not_the_file(db: sqlite3.Connection) -> None:
    """It says of which inode it is; what is found under another one begins anew, once."""
    put(db, "a")
    token = look(db, "a").token
    assert layout.recognize(db, 1)
    assert value(db, "a") == b"x"
    assert not layout.recognize(db, 2)
    assert value(db, "a") is None
    assert look(db, "a").token.number == token.number + 1
    assert layout.recognize(db, 2)
    db.execute("DROP TABLE fences")
    with pytest.raises(sqlite3.OperationalError, match="no such table"):
        layout.recognize(db, 3)
    assert not db.in_transaction


# Clocks


def test_an_entry_ends_with_its_lifetime(db: sqlite3.Connection) -> None:
    """Neither found nor counted by anybody from then on, and dropped by the next stores."""
    put(db, "a", ttl=5.0, tags=("t",), now=100.0)
    assert value(db, "a", now=104.9) == b"x"
    assert value(db, "a", now=105.0) is None
    assert layout.held(db, HERE, ["a"], generation=None, stale=True, now=105.0) == []
    assert layout.page(db, HERE, (EVERY,), tag="t", limit=10, now=105.0).keys == ()
    generation = begin(db, "key", "a")
    assert layout.remove(db, HERE, ["a"], generation=generation, soft=False, now=105.0) == 0
    put(db, "b", ttl=5.0, tags=("t",), now=100.0)
    put(db, "c", now=105.0)
    assert rows(db) == {"entries": 1, "contents": 1, "tags": 0}


def test_a_clock_that_is_set_back_prolongs_no_lifetime(db: sqlite3.Connection) -> None:
    """What would end later than a whole lifetime from now is over."""
    put(db, "a", ttl=5.0, now=100.0)
    put(db, "b", ttl=None, now=100.0)
    assert value(db, "a", now=50.0) is None
    assert value(db, "b", now=50.0) == b"x"


def test_one_reader_gets_the_lease(db: sqlite3.Connection) -> None:
    """Until it is over, or the entry is stored, or busted again."""

    def take(since_start: float) -> Token | None:
        entry = look(db, "a").entry
        assert entry is not None
        return layout.take_lease(db, HERE, entry.id, None, since_start=since_start, lease=LEASE)

    put(db, "a")
    assert take(50.0) is None, "it is fresh"
    bust(db, "key", "a", soft=True)
    token = take(50.0)
    assert token is not None
    assert take(59.9) is None
    leased = [entry.leased for at in (49.0, 50.0, 59.9, 60.0) if (entry := look(db, "a", since_start=at).entry)]
    assert leased == [False, True, True, False]
    assert take(60.0) == token
    bust(db, "key", "a", soft=True)
    newer = take(60.1)
    assert newer is not None
    assert newer.generation == token.generation + 1
    assert put(db, "a", b"new", token=newer).stored
    assert look(db, "a").entry == layout.Entry(2, b"new", stale=False, leased=False)


def test_a_lease_that_lies_too_far_ahead_is_over(db: sqlite3.Connection) -> None:
    """The machine was started again meanwhile, and its clock runs from the beginning."""
    put(db, "a")
    bust(db, "key", "a", soft=True)
    entry = look(db, "a").entry
    assert entry is not None
    assert layout.take_lease(db, HERE, entry.id, None, since_start=5000.0, lease=LEASE) is not None
    assert layout.take_lease(db, HERE, entry.id, None, since_start=5.0, lease=LEASE) is not None


def test_no_lease_is_given_for_what_is_gone(db: sqlite3.Connection) -> None:
    """Dropped, or of an epoch that is over."""
    put(db, "a")
    bust(db, "key", "a", soft=True)
    entry = look(db, "a").entry
    assert entry is not None
    assert layout.take_lease(db, HERE, entry.id, Token("3:x", 0), since_start=5.0, lease=LEASE) is None
    layout.tidy(db, most=10, now=0.0)
    assert layout.take_lease(db, HERE, entry.id, None, since_start=50.0, lease=LEASE) is None


# What is bounded


def test_so_many_fences_are_kept_and_older_fills_refused(db: sqlite3.Connection) -> None:
    """Whatever they fill: what they may have missed is forgotten. Younger ones are judged by what is left."""
    tokens = []
    for number in range(20):
        tokens.append(look(db, "a").token)
        begin(db, "key", f"b/{number}", soft=True, most=5)
    tokens.append(look(db, "a").token)
    assert db.execute("SELECT count(*) FROM fences").fetchone() == (5,)
    assert [put(db, "a", token=token).stored for token in tokens] == [False] * 15 + [True] * 6
    layout.fence(db, HERE, [f"c/{number}" for number in range(30)], generation=FAR, soft=False, most=5)
    assert db.execute("SELECT count(*), max(generation) FROM fences").fetchone() == (5, 20)
    assert [put(db, "a", token=token).stored for token in tokens] == [False] * 20 + [True]


def test_so_many_open_fences_are_kept(db: sqlite3.Connection, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of daemons that never came back the oldest go; however few fences are kept, others stay."""
    put(db, "b/0")
    put(db, "b/9")
    for number in range(10):
        begin(db, "key", f"b/{number}", most=5)
    assert db.execute("SELECT count(*) FROM open_fences").fetchone() == (10,)
    monkeypatch.setattr(layout, "_OPEN", 5)
    begin(db, "key", "b/9")
    assert db.execute("SELECT count(*) FROM open_fences").fetchone() == (5,)
    assert (value(db, "b/0"), value(db, "b/9")) == (b"x", None)


def test_a_namespace_that_nobody_uses_costs_nothing(db: sqlite3.Connection) -> None:
    """Looking leaves no row, nor do what ends, removes and puts up fences for what never began."""
    look(db, "a", namespace="nobody")
    layout.end(db, "nobody", [("key", "a", 1)])
    layout.fence(db, "nobody", ["a"], generation=1, soft=False)
    assert layout.remove(db, "nobody", ["a"], generation=FAR, soft=False, now=0.0) == 0
    assert layout.count(db, "nobody", (EVERY,), most=10) == 0
    assert db.execute("SELECT count(*) FROM namespaces").fetchone() == (0,)


def test_of_too_many_namespaces_empty_ones_go_and_their_busts_count_all_the_same(
    db: sqlite3.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A fill that began before a bust in a namespace that is forgotten is refused; none with entries goes."""
    monkeypatch.setattr(layout, "_MOST_NAMESPACES", 3)
    put(db, "a", namespace="kept")
    late = look(db, "a", namespace="empty").token
    begin(db, "key", "a", namespace="empty")
    known = look(db, "a", namespace="empty").token
    for number in range(5):
        begin(db, "all", "*", namespace=f"n{number}")
    assert db.execute("SELECT count(*) FROM namespaces").fetchone() == (3,)
    assert not db.execute("SELECT 1 FROM namespaces WHERE name = 'empty'").fetchone()
    assert db.execute("SELECT count(*) FROM fences").fetchone() == (2,)
    assert value(db, "a", namespace="kept") == b"x"
    assert not put(db, "a", namespace="empty", token=late).stored
    newer = look(db, "a", namespace="empty", known=known).token
    assert put(db, "a", namespace="empty", token=newer).stored


def test_namespaces_with_entries_may_be_many(db: sqlite3.Connection, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is held is never forgotten for another tenant's sake."""
    monkeypatch.setattr(layout, "_MOST_NAMESPACES", 3)
    for number in range(6):
        put(db, "a", namespace=f"n{number}")
    assert [value(db, "a", namespace=f"n{number}") for number in range(6)] == [b"x"] * 6


def test_the_file_stays_within_its_room(db: sqlite3.Connection) -> None:
    """What was stored longest ago goes; what was stored again counts as new."""
    room = 1 << 20
    for number in range(600):
        assert put(db, f"a/{number}", b"x" * 4000, room=room, tags=("t",)).stored
        assert put(db, "again", room=room).stored
    assert layout.used_bytes(db) <= room
    kept = [int(key[2:]) for key in layout.page(db, HERE, layout.ranges_of_prefix("a"), limit=999, now=0.0).keys]
    assert sorted(kept) == list(range(600 - len(kept), 600))
    assert 100 < len(kept) < 300
    assert value(db, "again") == b"x"
    assert rows(db)["tags"] == len(kept)


def test_what_is_too_large_is_not_stored(db: sqlite3.Connection) -> None:
    """Neither at once nor after all the rest has gone for it."""
    put(db, "a")
    assert not put(db, "b", b"x" * (1 << 20), room=1 << 20).stored
    assert (value(db, "a"), value(db, "b")) == (None, None)
    assert put(db, "b", b"x", room=1 << 20).stored


def test_one_store_makes_only_so_many_go(db: sqlite3.Connection, monkeypatch: pytest.MonkeyPatch) -> None:
    """It must not take long: where more would have to go, the value is not stored, and the next one finds room."""
    monkeypatch.setattr(layout, "_EVICTED", 50)
    for number in range(200):
        put(db, f"a/{number}", b"x" * 3000)
    room = layout.used_bytes(db) + 1000
    stored = [put(db, "b", b"x" * 400_000, room=room).stored for _ in range(5)]
    assert stored[0] is False
    assert stored[-1] is True
    assert stored == sorted(stored)


def test_room_is_given_back_where_much_is_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    """In portions, until what is empty is not worth it."""
    monkeypatch.setattr(layout, "_VACUUMED", 50)
    with closing(made()) as db:
        for number in range(2000):
            put(db, f"a/{number}", b"x" * 3000)
        assert not layout.shrink(db)
        full = db.execute("PRAGMA page_count").fetchone()[0]
        assert bust(db, "all", "*") == 2000
        portions = 1
        while layout.shrink(db):
            portions += 1
        assert portions > 10
        assert db.execute("PRAGMA page_count").fetchone()[0] < full // 4


# Finding


def test_pages_look_at_so_many_keys(db: sqlite3.Connection) -> None:
    """Also where most are over; the next one goes on behind the last."""
    for number in range(10):
        put(db, f"a/{number}", ttl=5.0 if number % 2 else None)
    ranges: tuple[layout.Range, ...] = layout.ranges_of_prefix("a")
    found = []
    while ranges:
        page = layout.page(db, HERE, ranges, limit=3, now=9.0)
        ranges = page.rest
        found.append(page.keys)
    assert found == [("a/0", "a/2"), ("a/4",), ("a/6", "a/8"), ()]


def test_counting_ends_where_there_are_many(db: sqlite3.Connection) -> None:
    """It would take as long as finding them."""
    for number in range(10):
        put(db, f"a/{number}", tags=("t",))
    put(db, "a")
    assert layout.count(db, HERE, layout.ranges_of_prefix("a"), most=11) == 11
    assert layout.count(db, HERE, layout.ranges_of_prefix("a"), most=10) is None
    assert layout.count(db, HERE, layout.ranges_of_prefix("a/"), most=10) == 10
    assert layout.count(db, HERE, (EVERY,), tag="t", most=10) == 10
    assert layout.count(db, HERE, (EVERY,), tag="t", most=9) is None


def test_marking_does_not_write_the_value_again(db: sqlite3.Connection) -> None:
    """Values may be large, and many of them be marked by one bust."""
    put(db, "a", b"x" * 1_000_000)
    (before,) = db.execute("SELECT count(*) FROM contents").fetchone()
    generation = begin(db, "key", "a", soft=True)
    statements: list[str] = []
    db.set_trace_callback(statements.append)
    assert layout.remove(db, HERE, ["a"], generation=generation, soft=True, now=0.0) == 1
    db.set_trace_callback(None)
    assert not any("contents" in statement for statement in statements)
    assert before == 1
