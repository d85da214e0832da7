"""How entries lie in Redis: what the scripts do, on a real server, and that losing any part of it costs misses only."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import hypothesis.strategies as st
import pytest
import redis
from hypothesis import HealthCheck, given, settings
from hypothesis.stateful import Bundle, RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test

from pybustcall.errors import ConfigurationError, InvalidRequest
from pybustcall.keys import covers, is_variant
from pybustcall.models import KINDS, Kind
from pybustcall.redis_layout import (
    EVERY,
    Call,
    Entry,
    Layout,
    Page,
    Range,
    Token,
    exists,
    intruder,
    ranges_of_prefix,
    ranges_of_variants,
    unlink,
)
from tests.conftest import wait_until
from tests.engines import RedisProcess
from tests.redis_harness import shared_redis


@dataclass
class Table:
    """A namespace in the server, and a client of it that remembers the newest token."""

    client: redis.Redis
    layout: Layout = field(default_factory=lambda: Layout("bustcall", "shop"))
    known: Token | None = None
    most: int = 10_000
    epochs: int = 0

    def run(self, call: Call) -> Any:
        return self.client.eval(call.script.source, len(call.keys), *call.keys, *call.arguments)

    def fresh(self) -> str:
        self.epochs += 1
        return f"epoch {self.epochs}"

    def told(self, reply: Any) -> Any:
        if reply[0]:
            self.known = Token.of(reply).newest(self.known)
        return reply

    def name(self, rest: str) -> str:
        return f"{self.layout.root}:{rest}"

    def lookup(self, key: str, lease: float = 0.0) -> tuple[Entry | None, Token]:
        reply = self.told(self.run(self.layout.lookup(self.fresh(), self.known, key, lease=lease)))
        return Entry.of(reply), Token.of(reply)

    def token(self) -> Token:
        return self.lookup("nothing")[1]

    def get(self, key: str) -> bytes | None:
        entry = self.lookup(key)[0]
        return entry and entry.value

    def store(
        self,
        key: str,
        value: bytes = b"v",
        *,
        tags: tuple[str, ...] = (),
        ttl: float | None = None,
        token: Token | None = None,
    ) -> bool:
        call = self.layout.store(self.fresh(), self.known, key, value, tags=tags, ttl=ttl, token=token)
        return bool(self.told(self.run(call))[2])

    def begin(self, kind: Kind, target: str = "*", *, soft: bool = False, wide: bool = False) -> int:
        call = self.layout.begin(self.fresh(), self.known, kind, target, soft=soft, wide=wide, most=self.most)
        return int(self.told(self.run(call))[1])

    def fence(self, *keys: str, generation: int, soft: bool = True) -> None:
        call = self.layout.fence(self.fresh(), self.known, keys, generation=generation, soft=soft, most=self.most)
        self.run(call)

    def end(self, kind: Kind, target: str, generation: int) -> None:
        self.run(self.layout.end(self.fresh(), self.known, [(kind, target, generation)]))

    def select(self, kind: Kind, target: str = "*", limit: int = 100) -> list[str]:
        ranges = {"key": ranges_of_prefix(target)[:1], "prefix": ranges_of_prefix(target)}.get(kind, (EVERY,))
        tag = target if kind == "tag" else None
        found: list[str] = []
        while ranges:
            call = self.layout.select(self.fresh(), self.known, ranges, tag=tag, limit=limit)
            page = Page.of(self.run(call), ranges)
            found += page.keys
            ranges = page.rest
        return found

    def remove(self, *keys: str, generation: int, soft: bool = False) -> bytes:
        return cast(
            "bytes", self.run(self.layout.remove(self.fresh(), self.known, keys, generation=generation, soft=soft))
        )

    def held(self, *keys: str, generation: int | None = None, stale: bool = False) -> bytes:
        return cast(
            "bytes", self.run(self.layout.held(self.fresh(), self.known, keys, generation=generation, stale=stale))
        )

    def bust(self, kind: Kind, target: str = "*", *, soft: bool = False) -> int:
        generation = self.begin(kind, target, soft=soft)
        removed = self.remove(*self.select(kind, target), generation=generation, soft=soft).count(b"1")
        self.end(kind, target, generation)
        return removed

    def names(self) -> set[str]:
        """List the names of all keys in the server, without the root of the namespace."""
        return {cast("bytes", name).decode().removeprefix(self.name("")) for name in self.client.scan_iter()}

    def lost(self) -> bytes | None:
        """Tell whether there may be what was lost, and since when."""
        return cast("list[bytes | None]", self.client.execute_command(*self.layout.lost))[1]  # type: ignore[no-untyped-call]

    def free(self) -> None:
        """Free what was lost, as a bust of everything does."""
        lost = self.lost()
        names = list(cast("Iterator[bytes]", self.client.scan_iter(self.layout.names)))
        while names:
            names = names[int(self.run(self.layout.free(self.fresh(), self.known, names))) :]
        self.run(self.layout.free(self.fresh(), self.known, [], all_of=lost or b""))

    def commands(self, call: Call) -> tuple[Any, int]:
        """Run a script; tell its answer, and how many commands it gave."""
        self.client.config_resetstat()
        answer = self.run(call)
        stats = cast("dict[str, dict[str, int]]", self.client.info("commandstats"))
        apart = {"cmdstat_eval", "cmdstat_config|resetstat"}
        return answer, sum(its["calls"] for name, its in stats.items() if name not in apart)


@pytest.fixture
def client() -> Iterator[redis.Redis]:
    """A client of an empty server."""
    with redis.Redis(unix_socket_path=str(shared_redis().socket)) as client:
        client.flushall()
        yield client


@pytest.fixture
def table(client: redis.Redis) -> Table:
    """A namespace without entries."""
    return Table(client)


# Names


@pytest.mark.parametrize("prefix", ["", "a{b", "a}b", "a b", "é", "x" * 65, "a\n", None])
def test_a_prefix_that_no_name_can_begin_with_is_refused(prefix: Any) -> None:
    """A brace would be taken for the tag of a slot."""
    with pytest.raises(ConfigurationError, match="prefix must be") as caught:
        Layout(prefix, "shop")
    assert caught.value.setting == "prefix"


def test_a_namespace_that_cannot_be_is_refused() -> None:
    """An empty one must not reach anybody."""
    with pytest.raises(InvalidRequest):
        Layout("bustcall", "")


def test_all_names_of_a_namespace_lie_in_one_slot(table: Table) -> None:
    """What is in braces is the namespace, whatever keys and tags have in them."""
    for key in ("a", "{b}", "}{", "{"):
        table.store(key, tags=("{t}", "}"))
        table.bust("key", key, soft=True)
        table.lookup(key, lease=1.0)
    table.begin("prefix", "{b}")
    names = cast("list[bytes]", table.client.keys())
    assert len(names) > 10
    assert all(name.startswith(b"bustcall:{shop}:") for name in names)


def test_a_cluster_runs_the_scripts(tmp_path: Path) -> None:
    """It would refuse keys of another slot than that of the key that is declared."""
    with RedisProcess(tmp_path, **{"cluster-enabled": "yes"}) as node, redis.Redis(port=node.port) as client:
        client.execute_command("CLUSTER ADDSLOTSRANGE 0 16383")
        table = Table(client)
        wait_until(lambda: b"cluster_state:ok" in node.ask("CLUSTER", "INFO"), "the cluster is well")
        for key in ("a", "{b}", "}{"):
            assert table.store(key, tags=("{t}",), ttl=60.0)
        table.bust("prefix", "a", soft=True)
        assert table.lookup("a", lease=1.0)[0] == Entry(b"v", stale=True, refresh=True)
        assert table.bust("tag", "{t}") == 3


@given(st.text("ab/:?#.gzé", min_size=1, max_size=6), st.text("ab/:?#.gzé", min_size=1, max_size=9))
def test_ranges_hold_exactly_what_is_covered(one: str, other: str) -> None:
    """As bytes are ordered, for a prefix and for variants."""

    def inside(key: str, ranges: tuple[tuple[bytes, bytes], ...]) -> int:
        name = key.encode()
        return sum(
            (name >= low[1:] if low[:1] == b"[" else name > low[1:])
            and (name <= high[1:] if high[:1] == b"[" else name < high[1:])
            for low, high in ranges
        )

    assert inside(other, ranges_of_prefix(one)) == covers(one, other)
    assert inside(other, ranges_of_variants(one)) == is_variant(one, other)


# Entries


def test_what_was_stored_is_found(table: Table) -> None:
    """The value, as it was, and fresh."""
    assert table.lookup("k")[0] is None
    assert table.store("k", b"\0\xff\r\n")
    assert table.lookup("k")[0] == Entry(b"\0\xff\r\n", stale=False, refresh=False)
    assert table.store("k", b"")
    assert table.get("k") == b""


def test_an_entry_ends_with_its_ttl(table: Table) -> None:
    """And one without a ttl, also if it had one before, does not."""
    table.store("short", ttl=0.2)
    table.store("kept", ttl=0.2)
    table.store("kept")
    assert 0 < table.client.pttl(table.name("e:short")) <= 200
    assert table.client.pttl(table.name("e:kept")) == -1


def test_nothing_is_left_of_what_was_removed(table: Table) -> None:
    """Only the counters of the namespace, and the fences."""
    for number in range(20):
        table.store(f"k/{number}", tags=("t", f"t{number}"), ttl=60.0)
    table.bust("prefix", "k", soft=True)
    table.lookup("k/1", lease=10.0)
    assert "l:k/1" in table.names()
    assert table.bust("all") == 20
    assert table.names() == {"m", "f"}
    assert table.client.hmget(table.name("m"), "keys", "tags") == [b"0", b"0"]


def test_a_namespace_that_nobody_stores_in_costs_nothing(table: Table) -> None:
    """However often it is busted."""
    for kind in KINDS:
        assert table.begin(kind, "x") == 0
        assert table.select(kind, "x") == []
        table.fence("x", generation=0)
        table.end(kind, "x", 0)
    assert table.remove("x", "y", generation=0) == table.held("x", "y") == b"00"
    assert table.names() == set()


# Fences


@pytest.mark.parametrize(
    ("kind", "target", "refused"),
    [
        ("key", "a/b.css", {"a/b.css"}),
        ("prefix", "a", {"a", "a/b.css", "a/b.css.gz", "a/b.css?v=1"}),
        ("prefix", "a/", {"a/b.css", "a/b.css.gz", "a/b.css?v=1"}),
        ("prefix", "a/b.css", {"a/b.css", "a/b.css?v=1"}),
        ("tag", "t", {"tagged"}),
        ("tag", "old", {"had"}),
        ("all", "*", {"a", "a/b.css", "a/b.css.gz", "a/b.css?v=1", "ab", "tagged", "had"}),
        ("key", "nothing", set()),
        ("prefix", "a/b", set()),
        ("tag", "a", set()),
    ],
)
@pytest.mark.parametrize("soft", [False, True])
def test_fills_from_before_a_bust_are_refused_and_no_others(
    table: Table, kind: Kind, target: str, refused: set[str], soft: bool
) -> None:
    """What is named, by the new tags and by those that it had."""
    table.store("had", tags=("old",))
    token = table.token()
    table.begin(kind, target, soft=soft)
    keys = {"a", "a/b.css", "a/b.css.gz", "a/b.css?v=1", "ab", "tagged", "had"}
    tags: dict[str, tuple[str, ...]] = {"tagged": ("u", "t")}
    later = table.token()
    assert {key for key in keys if not table.store(key, token=token, tags=tags.get(key, ()))} == refused
    assert all(table.store(key, token=later, tags=tags.get(key, ())) for key in keys)


@pytest.mark.parametrize(
    ("original", "variants"),
    [
        ("a.css", ["a.css", "a.css.gz", "a.css.br?x", "a.css?x", "a.css?x.zst", "a.css?x?y", "a.css.deflate"]),
        ("a.css?x", ["a.css?x", "a.css?x.gz", "a.css?x?y"]),
        ("a.css.gz", ["a.css.gz", "a.css.gz.gz", "a.css.gz?x"]),
    ],
)
@pytest.mark.parametrize("kind", ["key", "prefix"])
def test_a_wide_bust_refuses_fills_of_variants(table: Table, kind: Kind, original: str, variants: list[str]) -> None:
    """In another encoding, with a query, or both."""
    token = table.token()
    table.store("x")
    table.begin(kind, original, wide=True, soft=True)
    assert [key for key in variants if table.store(key, token=token)] == []
    assert table.store("a.cs", token=token)
    assert table.store("a.css.map", token=token)
    assert table.store(".gz", token=token)
    assert table.store("?", token=token)


def test_what_depends_is_fenced_with_its_variants(table: Table) -> None:
    """By the generation of the bust: fills that began after it are taken, and no fence is lowered."""
    token = table.token()
    generation = table.begin("key", "product")
    during = table.token()
    newer = table.begin("key", "page", wide=True)
    table.fence("page", "list", generation=generation)
    assert not table.store("list.gz", token=token)
    assert table.store("list", token=during)
    assert not table.store("page.gz", token=during)
    table.fence("other", generation=newer + 1000)
    assert table.store("other", token=table.token()), "a generation of an epoch that is over lies ahead"


def test_a_key_with_very_many_marks_is_refused_after_any_bust(table: Table) -> None:
    """To look each of its prefixes up would take long."""
    key = "/" * 4000
    token = table.token()
    assert table.store(key, token=token)
    table.begin("tag", "unrelated")
    assert not table.store(key, token=token)
    assert table.get(key) is None
    assert table.store("/" * 100, token=token)


def test_fences_are_kept_up_to_a_number(table: Table) -> None:
    """Fills older than one that went are refused, whatever they fill; newer ones are judged by what is there."""
    table.most = 10
    tokens = []
    for number in range(25):
        tokens.append(table.token())
        table.begin("key", f"k{number}")
    assert table.client.zcard(table.name("f")) == 10
    assert table.client.zcard(table.name("o")) == 25  # what is being swept is hidden all the while
    taken = [table.store("other", token=token) for token in tokens]
    assert taken == [False] * 15 + [True] * 10
    assert not table.store("k20", token=tokens[20])
    table.fence(*(f"d{number}" for number in range(30)), generation=20)
    assert table.client.zcard(table.name("f")) == 10
    assert [table.store("other", token=token) for token in tokens] == [False] * 20 + [True] * 5


def test_open_fences_that_are_lost_show_nothing_of_what_they_hid(table: Table) -> None:
    """Nobody knows any more what that was, so everything is a miss."""
    for key in ("p/1", "other"):
        assert table.store(key)
    table.begin("prefix", "p")
    assert (table.get("p/1"), table.get("other") is None) == (None, False)
    table.client.delete(table.name("o"))
    assert (table.get("p/1"), table.get("other")) == (None, None)
    assert table.store("other")
    assert table.get("other") is not None


def test_fences_that_are_lost_refuse_all_fills_so_far(table: Table) -> None:
    """And none after that."""
    table.store("kept")
    heals: list[Callable[[], object]] = [
        lambda: table.store("x", token=table.token()),
        lambda: table.begin("key", "y"),
    ]
    for heal in heals:
        token = table.token()
        table.begin("key", "k")
        table.client.delete(table.name("f"))
        heal()
        assert not table.store("k", token=token)
        assert not table.store("other", token=token)
        assert table.store("k", token=table.token())
        assert table.get("kept") == b"v"


def test_a_token_of_another_epoch_is_refused(table: Table) -> None:
    """The server was emptied meanwhile."""
    token = table.token()
    table.client.flushall()
    assert not table.store("k", token=token)
    assert table.store("k", token=table.token())


# Busts


def test_what_is_named_is_missed_as_soon_as_a_hard_bust_has_begun(table: Table) -> None:
    """Until it has ended; what was stored after it began is there."""
    for kind, target in (("key", "a/b"), ("prefix", "a"), ("prefix", "a/"), ("tag", "t"), ("all", "*")):
        table.store("a/b", tags=("t",))
        table.store("c", tags=("u",))
        generation = table.begin(cast("Kind", kind), target)
        assert table.get("a/b") is None
        assert table.get("c") == (None if kind == "all" else b"v")
        table.store("a/b", b"new", tags=("t",))
        assert table.get("a/b") == b"new"
        assert table.remove("a/b", generation=generation) == b"0"
        table.end(cast("Kind", kind), target, generation)
        assert table.get("a/b") == b"new"


def test_a_bust_that_was_begun_again_is_not_ended_by_the_first(table: Table) -> None:
    """Two daemons bust the same."""
    table.store("k")
    first, second = table.begin("key", "k"), table.begin("key", "k")
    table.end("key", "k", first)
    assert table.get("k") is None
    table.end("key", "k", second)
    assert table.get("k") == b"v"


def test_a_short_lived_member_of_a_tag_does_not_end_the_tag(table: Table) -> None:
    """The one that lives on is found after the other has ended."""
    table.store("long", tags=("t",), ttl=100.0)
    table.store("short", tags=("t",), ttl=0.01)
    while table.client.exists(table.name("e:short")):
        pass
    assert table.select("tag", "t") == ["long"]
    assert table.bust("tag", "t") == 1


def test_one_reader_makes_a_stale_entry_anew(table: Table) -> None:
    """Until its lease ends, it has stored, or the entry was busted again."""
    table.store("k")
    table.bust("key", "k", soft=True)
    assert table.lookup("k")[0] == Entry(b"v", stale=True, refresh=False)
    assert table.lookup("k", lease=10.0)[0] == Entry(b"v", stale=True, refresh=True)
    assert table.lookup("k", lease=10.0)[0] == Entry(b"v", stale=True, refresh=False)
    table.bust("key", "k", soft=True)
    entry, token = table.lookup("k", lease=0.001)
    assert entry == Entry(b"v", stale=True, refresh=True)
    while table.client.exists(table.name("l:k")):
        pass
    entry, token = table.lookup("k", lease=10.0)
    assert entry == Entry(b"v", stale=True, refresh=True)
    assert table.store("k", b"new", token=token)
    assert table.lookup("k", lease=10.0)[0] == Entry(b"new", stale=False, refresh=False)
    assert "l:k" not in table.names()


@pytest.mark.parametrize("left", [3_600_000, -1])
def test_a_lease_that_would_not_end_in_its_time_is_taken_over(table: Table, left: int) -> None:
    """The server's clock was set back since it was taken, or it was taken by nobody of ours."""
    table.store("k")
    table.bust("key", "k", soft=True)
    table.client.set(table.name("l:k"), "1", px=left if left > 0 else None)
    assert table.lookup("k", lease=10.0)[0] == Entry(b"v", stale=True, refresh=True)
    assert 0 < table.client.pttl(table.name("l:k")) <= 10_000
    assert table.lookup("k", lease=10.0)[0] == Entry(b"v", stale=True, refresh=False)


def test_what_is_stale_is_served_by_a_server_that_is_full(table: Table) -> None:
    """It refuses the lease, so nobody makes the entry anew, which it could not store."""
    table.store("k")
    table.bust("key", "k", soft=True)
    table.client.config_set("maxmemory", "1")
    try:
        assert table.lookup("k", lease=10.0)[0] == Entry(b"v", stale=True, refresh=False)
    finally:
        table.client.config_set("maxmemory", "0")
    assert table.lookup("k", lease=10.0)[0] == Entry(b"v", stale=True, refresh=True)


def test_pages_go_on_behind_the_last_key(table: Table) -> None:
    """Over several ranges, of all keys and of a tag, with ended ones among them."""
    keys = [f"p{mark}{number}" for mark in "#/:?" for number in range(5)]
    for key in [*keys, "p", "pq", "o"]:
        table.store(key, tags=("t",))
    for key in keys[::3]:
        table.client.delete(table.name(f"e:{key}"))
    left = [key for key in ["p", *keys] if key not in keys[::3]]
    for limit in (1, 2, 3, 7, 100):
        assert table.select("prefix", "p", limit) == left
        assert table.select("tag", "t", limit) == sorted([*left, "pq", "o"])
        assert table.select("all", "*", limit) == sorted([*left, "pq", "o"])
        assert table.select("key", "p", limit) == ["p"]


def test_plain_keys_of_others_are_told_one_by_one(client: redis.Redis) -> None:
    """Whether each was there."""
    client.set("a", "1")
    client.lpush("b", "1")

    def run(call: Call) -> Any:
        return client.eval(call.script.source, len(call.keys), *call.keys)

    assert run(exists([b"b", b"c", b"a"])) == b"101"
    assert run(unlink([b"c", b"b", b"b", b"a"])) == b"0101"
    assert client.dbsize() == 0


# What others put there


@pytest.mark.parametrize("kind", ["string", "hash", "list"])
def test_what_is_no_entry_is_left_alone(table: Table, kind: str) -> None:
    """It is missed, found by no bust, and neither removed nor written over; entries beside it are as ever."""
    for key in ("a/1", "a/2", "a/3"):
        table.store(key, tags=("t",))
    for name in (table.name("e:a/2"), table.name("e:a/new")):
        table.client.delete(name)
        if kind == "hash":
            table.client.hset(name, "v", "x")
        else:
            (table.client.set if kind == "string" else table.client.rpush)(name, "x")
    assert table.get("a/2") is table.get("a/new") is None
    for key in ("a/2", "a/new"):
        call = table.layout.store(table.fresh(), table.known, key, b"v", tags=(), ttl=None, token=None)
        reply = table.run(call)
        assert (reply[2], intruder(reply)) == (0, kind)
    assert table.held("a/1", "a/2", "a/new", "a/3", stale=True) == b"1001"
    assert table.bust("prefix", "a", soft=True) == 2
    assert table.remove("a/2", "a/new", generation=1000, soft=True) == b"00"
    assert table.lookup("a/1")[0] == Entry(b"v", stale=True, refresh=False)
    assert table.bust("tag", "t") == 2
    assert table.remove("a/2", "a/new", generation=1000) == b"00"
    table.free()
    assert table.names() == {"m", "f", "e:a/2", "e:a/new"}
    assert table.client.hget(table.name("m"), "keys") == b"0"
    assert table.client.type(table.name("e:a/2")) == kind.encode()


# Steps


MANY = tuple(f"t{number}" for number in range(256))
MOST_COMMANDS = 2000 + 4 * len(MANY)  # and one entry beyond


def test_finding_ends_early_where_ghosts_have_very_many_tags(table: Table) -> None:
    """Each page in so many commands, at least one key further, and none is left out."""
    keys = [f"k/{number:02}" for number in range(40)]
    for key in keys:
        table.store(key, tags=MANY)
    for key in keys[:-1]:
        table.client.delete(table.name(f"e:{key}"))
    for tag in (None, "t7"):
        ranges: tuple[Range, ...] = (EVERY,)
        found: list[str] = []
        pages = 0
        while ranges:
            call = table.layout.select(table.fresh(), table.known, ranges, tag=tag, limit=500)
            reply, commands = table.commands(call)
            assert commands <= MOST_COMMANDS
            page = Page.of(reply, ranges)
            ranges, found, pages = page.rest, [*found, *page.keys], pages + 1
        assert found == keys[-1:]
        assert pages > 1 or tag
    assert table.client.zcard(table.name("i")) == 1


def test_removing_ends_early_where_entries_have_very_many_tags(table: Table) -> None:
    """It tells of those that it has come to."""
    keys = [f"k/{number:02}" for number in range(40)]
    for key in keys:
        table.store(key, tags=MANY)
    generation = table.begin("all")
    left = keys
    while left:
        told, commands = table.commands(
            table.layout.remove(table.fresh(), table.known, left, generation=generation, soft=False)
        )
        assert commands <= MOST_COMMANDS
        assert told in (b"1" * count for count in range(1, 10))
        left = left[len(told) :]
    table.end("all", "*", generation)
    assert table.names() == {"m", "f"}


def test_a_store_takes_away_few_ghosts_that_have_very_many_tags(table: Table) -> None:
    """And more than it adds itself."""
    for number in range(40):
        table.store(f"k/{number:02}", tags=MANY)
        table.client.delete(table.name(f"e:k/{number:02}"))
        table.client.hset(table.name("m"), "cursor", "x")
    before = table.client.zcard(table.name("i"))
    for number in range(10):
        tags = tuple(f"u{tag}" for tag in MANY)
        call = table.layout.store(table.fresh(), table.known, f"n/{number}", b"v", tags=tags, ttl=None, token=None)
        assert table.commands(call)[1] <= 2 * MOST_COMMANDS
    assert table.client.zcard(table.name("i")) <= before - 5


def test_fences_go_in_portions_where_fewer_are_to_be_kept(table: Table) -> None:
    """The newest that went refuses those that are older, with each portion."""
    table.store("k")
    for number in range(5):
        table.fence(*(f"f{number}/{count}" for count in range(300)), generation=table.begin("key", f"k{number}"))
    token = table.token()
    table.most = 10
    table.begin("key", "x")
    assert table.client.zcard(table.name("f")) == 1506 - 1000
    table.begin("key", "y")
    assert table.client.zcard(table.name("f")) == 10
    assert table.store("other", token=token)
    assert not table.store("x", token=token)


# Ghosts


def test_entries_that_ended_do_not_pile_up(table: Table) -> None:
    """Each store takes some away, out of the index and of their tags, whatever clocks say."""
    for number in range(1000):
        table.store(f"k/{number}", tags=(f"t{number}",))
        table.client.delete(table.name(f"e:k/{number - 3}"))
    assert table.client.zcard(table.name("i")) <= 10
    assert table.client.hlen(table.name("h")) <= 10
    assert table.client.hlen(table.name("n")) <= 10
    assert len(table.names()) <= 30
    assert sorted(table.select("all")) == ["k/997", "k/998", "k/999"]
    assert table.client.hmget(table.name("m"), "keys", "tags") == [b"3", b"3"]


def test_selecting_takes_away_all_ghosts_that_it_meets(table: Table) -> None:
    """They are not told."""
    for number in range(50):
        table.store(f"k/{number}", tags=("t",))
    for number in range(49):
        table.client.delete(table.name(f"e:k/{number}"))
    assert table.select("tag", "t") == ["k/49"]
    assert table.client.zcard(table.name("i")) == table.client.zcard(table.name("t:t")) == 1


def test_no_script_asks_for_the_time() -> None:
    """So that a clock which is set back changes nothing but when an entry ends."""
    layout = Layout("bustcall", "shop")
    calls = [
        layout.lookup("", None, "k"),
        layout.store("", None, "k", b"", tags=(), ttl=None, token=None),
        layout.begin("", None, "all", "*", soft=False, wide=False),
        layout.fence("", None, [], generation=1, soft=False),
        layout.end("", None, [("all", "*", 1)]),
        layout.select("", None, [EVERY], limit=1),
        layout.remove("", None, [], generation=1, soft=False),
        layout.held("", None, [], generation=None, stale=False),
        layout.free("", None, []),
    ]
    for call in calls:
        assert "TIME" not in call.script.source
        assert "os." not in call.script.source
    assert len({call.script.digest for call in calls}) == len(calls)


# Losses


@pytest.mark.parametrize("lost", ["m", "i", "n", "t:t", "m i", "m n", "i n", "m i n h f o", "t:t h"])
def test_an_index_that_is_lost_costs_misses_and_never_an_old_value(table: Table, lost: str) -> None:
    """As a server that is full may evict it; what is stored after that is found again."""
    for number in range(5):
        table.store(f"k/{number}", tags=("t",))
    token = table.token()
    for name in lost.split():
        table.client.delete(table.name(name))
    table.store("k/new", tags=("t",))
    table.bust("tag", "t")
    assert [number for number in range(5) if table.get(f"k/{number}") is not None] == []
    assert table.get("k/new") is None
    assert not table.store("k/1", token=token)
    for key in ("k/1", "k/again"):
        assert table.store(key, b"2", tags=("t",), token=table.token())
        assert table.get(key) == b"2"
    assert table.bust("tag", "t") == 2
    assert table.select("all") == []


@pytest.mark.parametrize("lost", ["m", "i", "n", "m i h n f o"])
@pytest.mark.parametrize("is_used", [True, False])
def test_what_was_lost_can_be_freed(table: Table, lost: str, is_used: bool) -> None:
    """Entries and tags of epochs that are over, and neither what was stored since nor another tenant's."""
    other = Table(table.client, Layout("bustcall", "theirs"))
    other.store("k/1", tags=("t", "gone"))
    for number in range(5):
        table.store(f"k/{number}", tags=("t", "gone"))
    for name in lost.split():
        table.client.delete(table.name(name))
    if is_used:
        table.store("k/new", tags=("t",))
    table.free()
    own = {"i", "h", "n", "t:t", "e:k/new"} if is_used else set[str]()
    left = {name for name in table.names() if "theirs" not in name}
    assert left - {"m"} == own
    assert other.get("k/1") == b"v"
    assert other.bust("tag", "gone") == 1
    assert table.store("k/0", tags=("gone",))
    assert table.bust("tag", "gone") == 1
    assert table.get("k/new") == (b"v" if is_used else None)


def test_it_is_known_whether_there_may_be_what_was_lost(table: Table) -> None:
    """Until all was freed that had been lost when that began."""
    table.store("k")
    lost = table.lost()
    assert lost is not None
    table.client.delete(table.name("m"))
    table.store("k")
    table.run(table.layout.free(table.fresh(), table.known, [], all_of=lost))
    assert table.lost() not in {None, lost}
    table.free()
    assert table.lost() is None
    assert table.get("k") == b"v"


def test_what_is_stored_after_a_loss_is_no_part_of_what_was_lost(table: Table) -> None:
    """Old members of a tag, old fences and dead entries are in nobody's way."""
    for number in range(3):
        table.store(f"k/{number}", tags=("t",))
    table.begin("all")
    table.client.delete(table.name("m"))
    table.store("k/0", tags=("t",))
    table.store("bystander")
    assert table.get("k/0") == table.get("bystander") == b"v"
    assert table.remove("k/1", generation=1000) == b"0"
    assert table.bust("tag", "t") == 1
    table.store("k/1", tags=("t",))
    table.client.delete(table.name("m"))
    table.store("bystander")
    table.store("k/1", tags=("u",))
    assert table.bust("tag", "t") == 0
    assert table.get("k/1") == table.get("bystander") == b"v"


def test_an_entry_is_found_by_its_newest_tags_only(table: Table) -> None:
    """A tag that it had leads there no more, and is gone with its last member."""
    table.store("k", tags=("old", "both"))
    table.store("k", tags=("both", "new"))
    assert table.select("tag", "old") == []
    assert table.select("tag", "both") == table.select("tag", "new") == ["k"]
    assert "t:old" not in table.names()
    table.store("k")
    assert table.names() == {"m", "i", "e:k"}


def test_a_server_that_went_back_is_taken_for_empty(table: Table) -> None:
    """Busts were lost with what was after its snapshot; whoever knows how far it was tells it so, each time."""
    table.store("old")
    client = table.client
    snapshot = {cast("bytes", name): cast("bytes", client.dump(name)) for name in client.scan_iter()}
    table.store("gone", tags=("t",))
    for number in range(5):
        table.begin("key", f"k{number}")
    for _ in range(3):
        token = table.token()
        client.flushall()
        for name, content in snapshot.items():
            client.restore(name, 0, content)
        naive = Table(client)
        assert naive.get("old") == b"v", "a client that is new cannot tell"
        assert table.get("old") is None
        assert naive.get("old") is None, "now it is known to all"
        assert not table.store("k0", token=token)
        assert table.begin("key", "x") > token.generation
        assert table.store("k0", token=table.token())
        assert table.select("all") == ["k0"]


@pytest.mark.parametrize("is_known", [True, False])
def test_another_run_of_the_server_is_taken_for_empty(table: Table, is_known: bool) -> None:
    """Once, by whatever comes first; the counter goes on, and no token from before is good."""
    firsts: list[Callable[[], object]] = [
        lambda: table.get("k"),
        lambda: table.store("other"),
        lambda: table.begin("key", "other"),
        lambda: table.select("all"),
        lambda: table.held("k"),
        lambda: table.remove("other", generation=1),
        lambda: table.fence("other", generation=1),
    ]
    for first in firsts:
        table.store("k", tags=("t",))
        before = table.begin("key", "x")
        token = table.token()
        table.client.hset(table.name("m"), "run", "another")
        if not is_known:
            table.known = None
        first()
        assert table.held("k") == b"0"
        assert not table.store("k", token=token)
        assert table.begin("key", "x") > before
        assert table.store("k", token=table.token())
        assert table.get("k") == b"v"


def test_who_may_not_ask_for_the_run_is_told_by_what_it_remembers(table: Table) -> None:
    """And by those who may; it costs nothing as long as the server runs."""
    table.client.acl_setuser("limited", enabled=True, nopass=True, keys="*", commands=["+@all", "-info"])
    with redis.Redis(unix_socket_path=str(shared_redis().socket), username="limited", password="x") as client:
        limited = Table(client)
        limited.store("k")
        assert table.get("k") is None, "begun by nobody knows which run"
        table.store("k")
        assert limited.get("k") == b"v"
        table.client.hset(table.name("m"), "run", "another")
        assert limited.get("k") == b"v"
        assert table.get("k") is None
        assert limited.get("k") is None
        limited.store("k")
        limited.known = Token(limited.token().epoch, 1000)
        assert limited.get("k") is None
        table.store("k")
        assert limited.get("k") == b"v"
    table.client.acl_deluser("limited")


def test_a_bust_works_on_a_server_that_is_full(table: Table) -> None:
    """It frees memory; a store is refused by the server."""
    table.store("k", tags=("t",))
    table.store("l")
    table.client.config_set("maxmemory", "1")
    try:
        with pytest.raises(redis.exceptions.OutOfMemoryError):
            table.store("other")
        assert table.bust("key", "l", soft=True) == 1
        table.fence("x", generation=table.begin("key", "x"))
        assert table.bust("tag", "t") == 1
        assert table.bust("all") == 1
    finally:
        table.client.config_set("maxmemory", "0")


# Against a model


KEYS = ("a", "a/b", "a/b.gz", "a/b?x", "a/b?x/c", "ab")
TAGS = ("t", "u")
TARGETS: dict[Kind, tuple[str, ...]] = {"key": KEYS, "prefix": (*KEYS, "a/"), "tag": TAGS, "all": ("*",)}
SCOPES = st.sampled_from([(kind, target) for kind, targets in TARGETS.items() for target in targets])
EXAMPLES = int(os.environ.get("BUSTCALL_EXAMPLES", "80"))
PARTS = ("m", "f", "o", "i", "h", "n", "t:t", "t:u")


@dataclass
class Stored:
    """What the model knows of an entry. `made`: when its fill began."""

    value: bytes
    made: int
    born: int
    tags: frozenset[str]
    stale: bool = False


@dataclass
class Bust:
    """A bust of the model. `at`: when it began."""

    at: int
    generation: int
    kind: Kind
    target: str
    soft: bool
    wide: bool
    ended: bool = False

    def names(self, key: str, tags: frozenset[str]) -> bool:
        """Tell whether it removes such an entry."""
        return {
            "key": key == self.target,
            "prefix": covers(self.target, key),
            "tag": self.target in tags,
            "all": True,
        }[self.kind]

    def refuses(self, key: str, tags: frozenset[str]) -> bool:
        """Tell whether it refuses a late fill."""
        widely = self.wide and self.kind in {"key", "prefix"}
        return self.names(key, tags) or (widely and (key == self.target or is_variant(self.target, key)))


class Machine(RuleBasedStateMachine):
    """What is done to the scripts and to the model alike."""

    tokens = Bundle("tokens")
    busts = Bundle("busts")

    def __init__(self) -> None:
        super().__init__()
        self.client = redis.Redis(unix_socket_path=str(shared_redis().socket))
        self.client.flushall()
        self.table = Table(self.client)
        self.clock = 0
        self.all: list[Bust] = []

    def teardown(self) -> None:
        self.client.close()

    def tick(self) -> int:
        self.clock += 1
        return self.clock

    def seen(self, key: str, entry: Entry | None) -> None:
        """Check what a reader got."""

    def stored(
        self, key: str, tags: frozenset[str], made: int, taken: bool, value: bytes, refusing: list[Bust]
    ) -> None:
        """Check and note what became of a store; `refusing` are the busts after `made`."""

    def swept(self, bust: Bust, keys: list[str], told: bytes) -> None:
        """Check and note what was found and removed."""

    @rule(target=tokens, key=st.sampled_from(KEYS))
    def lookup(self, key: str) -> tuple[int, Token]:
        entry, token = self.table.lookup(key)
        self.seen(key, entry)
        return self.tick(), token

    @rule(key=st.sampled_from(KEYS), tags=st.frozensets(st.sampled_from(TAGS)), token=st.none() | tokens)
    def store(self, key: str, tags: frozenset[str], token: tuple[int, Token] | None) -> None:
        now = self.tick()
        made, said = (now, None) if token is None else token
        value = b"%d" % now
        taken = self.table.store(key, value, tags=tuple(sorted(tags)), token=said)
        self.stored(key, tags, made, taken, value, [bust for bust in self.all if bust.at > made])

    @rule(target=busts, scope=SCOPES, soft=st.booleans(), wide=st.booleans())
    def begin(self, scope: tuple[Kind, str], soft: bool, wide: bool) -> Bust:
        kind, target = scope
        bust = Bust(self.tick(), self.table.begin(kind, target, soft=soft, wide=wide), kind, target, soft, wide)
        self.all.append(bust)
        return bust

    @rule(bust=busts, limit=st.integers(1, 4))
    def sweep(self, bust: Bust, limit: int) -> None:
        keys = self.table.select(bust.kind, bust.target, limit)
        told = self.table.remove(*keys, generation=bust.generation, soft=bust.soft) if keys else b""
        self.table.end(bust.kind, bust.target, bust.generation)
        bust.ended = True
        self.swept(bust, keys, told)

    @rule(scope=SCOPES, soft=st.booleans())
    def bust(self, scope: tuple[Kind, str], soft: bool) -> None:
        self.sweep(self.begin(scope, soft, False), 100)

    @rule()
    def free(self) -> None:
        self.table.free()

    @invariant()
    def every_reader_sees_what_it_may(self) -> None:
        for key in KEYS:
            self.seen(key, self.table.lookup(key)[0])


class Exact(Machine):
    """Nothing is lost: the scripts do exactly what sets and lists do."""

    def __init__(self) -> None:
        super().__init__()
        self.entries: dict[str, Stored] = {}

    @initialize()
    def begin_with_something(self) -> None:
        for key in KEYS[:3]:
            self.store(key, frozenset("t"), None)

    def is_missed(self, key: str, entry: Stored) -> bool:
        """Tell whether a hard bust that has not ended covers it; one that was begun again counts by its last."""
        hard = [bust for bust in self.all if not bust.soft]
        last = {(bust.kind, bust.target): bust for bust in hard}
        widely = {bust.target: bust for bust in hard if bust.wide and bust.kind in {"key", "prefix"}}
        over = [it for it in last.values() if it.names(key, entry.tags)]
        over += [it for it in widely.values() if key == it.target or is_variant(it.target, key)]
        return any(not it.ended and entry.born < it.generation for it in over)

    def seen(self, key: str, entry: Entry | None) -> None:
        expected = self.entries.get(key)
        if expected is None or self.is_missed(key, expected):
            assert entry is None
        else:
            assert entry == Entry(expected.value, expected.stale, refresh=False)

    def stored(
        self, key: str, tags: frozenset[str], made: int, taken: bool, value: bytes, refusing: list[Bust]
    ) -> None:
        former = self.entries[key].tags if key in self.entries else frozenset[str]()
        assert taken is not any(bust.refuses(key, tags | former) for bust in refusing)
        if taken:
            self.entries[key] = Stored(value, made, len(self.all), tags)

    def swept(self, bust: Bust, keys: list[str], told: bytes) -> None:
        named = {key for key, entry in self.entries.items() if bust.names(key, entry.tags)}
        assert len(keys) == len(set(keys))
        assert set(keys) == named
        if bust.kind in {"tag", "all"}:
            assert keys == sorted(keys, key=str.encode)
        for key, yes in zip(keys, told, strict=True):
            entry = self.entries[key]
            assert (yes == ord("1")) is (entry.born < bust.generation and not (bust.soft and entry.stale))
            if entry.born < bust.generation:
                entry.stale = True
                if not bust.soft:
                    del self.entries[key]

    @rule()
    def read_back(self) -> None:
        fresh = [key in self.entries and not self.entries[key].stale for key in KEYS]
        assert self.table.held(*KEYS) == b"".join(b"%d" % it for it in fresh)
        assert self.table.held(*KEYS, stale=True) == b"".join(b"%d" % (key in self.entries) for key in KEYS)

    @rule(key=st.sampled_from(KEYS))
    def end_an_entry(self, key: str) -> None:
        """As by its ttl. Its tags are known until it is found out, so none with tags here."""
        if key in self.entries and not self.entries[key].tags:
            self.client.delete(self.table.name(f"e:{key}"))
            del self.entries[key]


class Lossy(Machine):
    """Anything may be lost at any time: there may be misses, but never an old value after a bust that has ended."""

    def __init__(self) -> None:
        super().__init__()
        self.values: dict[bytes, tuple[int, frozenset[str]]] = {}
        self.snapshot: dict[bytes, bytes] = {}

    @initialize(most=st.sampled_from([2, 10_000]))
    def begin_with_something(self, most: int) -> None:
        self.table.most = most
        for key in KEYS[:3]:
            self.store(key, frozenset("t"), None)
        self.begin(("key", "other"), True, False)
        self.take_a_snapshot()

    def seen(self, key: str, entry: Entry | None) -> None:
        if entry is not None:
            made, tags = self.values[entry.value]
            over = [bust for bust in self.all if bust.ended and bust.at > made and bust.names(key, tags)]
            assert not [bust for bust in over if not bust.soft], "a value from before a bust that has ended"
            assert entry.stale or not over

    def stored(
        self, key: str, tags: frozenset[str], made: int, taken: bool, value: bytes, refusing: list[Bust]
    ) -> None:
        assert not (taken and any(bust.refuses(key, tags) for bust in refusing))
        if taken:
            self.values[value] = made, tags

    @rule(key=st.sampled_from(KEYS))
    def lose_an_entry(self, key: str) -> None:
        self.client.delete(self.table.name(f"e:{key}"))

    @rule(names=st.sets(st.sampled_from(PARTS), min_size=1, max_size=3))
    def lose_a_part(self, names: set[str]) -> None:
        self.client.delete(*(self.table.name(name) for name in names))

    @rule()
    def lose_everything(self) -> None:
        self.client.flushall()

    @rule()
    def take_a_snapshot(self) -> None:
        names = cast("list[bytes]", self.client.keys())
        self.snapshot = {name: cast("bytes", self.client.dump(name)) for name in names}

    @rule()
    def go_back(self) -> None:
        self.client.flushall()
        for name, content in self.snapshot.items():
            self.client.restore(name, 0, content)

    @rule()
    def go_back_and_be_forgotten(self) -> None:
        """As by a restart, after which nobody is left who knows a later state."""
        self.go_back()
        if self.client.exists(self.table.name("m")):
            self.client.hset(self.table.name("m"), "run", "another")
        self.table.known = None


@pytest.mark.parametrize("machine", [Exact, Lossy])
def test_the_scripts_do_as_a_model_does(machine: type[Machine]) -> None:
    """Whatever is stored, busted and lost, in whatever order."""
    few = settings(
        max_examples=EXAMPLES,
        stateful_step_count=30,
        deadline=None,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
    )
    run_state_machine_as_test(machine, settings=few)
