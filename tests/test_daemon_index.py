"""The index: relations, tags, lifetimes and namespaces, against dicts that do it the slow way, and in counted steps."""

from __future__ import annotations

import gc
import math
import operator
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from pybustcall.daemon.index import Entry, Index, Indexes, TooManyNamespaces
from pybustcall.keys import covers, is_variant
from tests.counting import OPERATIONS, SIZES, Counted, Fit, Steps, branch, entries, filled, fit_of, scan, steps_per
from tests.test_bench import check_plot, check_table, run_bench

KEYS = [
    stem + encoding + query
    for stem in ("main.css", "main.css2", "a", "é")
    for encoding in ("", ".gz", ".gzip", ".br", ".map", ".zst")
    for query in ("", "?", "?v=2", "?v=2.gz")
]
keys = st.sampled_from(KEYS)


class Clock:
    """A clock that stands until it is set."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.mark.parametrize(
    "other",
    [
        "main.css.gz",
        "main.css.br",
        "main.css.zst",
        "main.css.deflate",
        "main.css?v=2",
        "main.css?v=2.gz",
        "main.css.gz?v=2",
        "main.css?",
        "main.css?a\nb",
    ],
)
def test_an_encoding_a_query_or_both_make_a_variant(other: str) -> None:
    """A suffix of a content encoding and a query, in either order, make a variant of a key."""
    assert is_variant("main.css", other)


@pytest.mark.parametrize(
    "other",
    ["main.css", "main.css.map", "main.css2", "main.css.gzip", "main.css.gz.br", "main.cs", "x/main.css.gz", ""],
)
def test_nothing_else_is_a_variant(other: str) -> None:
    """The key itself, other suffixes and other names are no variants."""
    assert not is_variant("main.css", other)


@settings(deadline=None)
@given(st.text(), st.sampled_from(["", ".gz", ".br", ".zst", ".deflate"]), st.text())
def test_the_rest_of_a_variant_is_an_encoding_and_a_query(key: str, encoding: str, query: str) -> None:
    """Whatever the key is, an encoding and a query after it make a variant, unless both are missing."""
    assert is_variant(key, f"{key}{encoding}?{query}")
    assert is_variant(key, key + encoding) is bool(encoding)


def test_dependents_are_found_by_way_of_others() -> None:
    """What depends on a dependent depends on the key."""
    index = Index()
    index.add("page", ["fragment"])
    index.add("fragment", ["product:7"])
    assert index.dependents("product:7") == ["fragment", "page"]
    assert index.dependencies("page") == ("fragment",)


def test_a_walk_tells_each_dependent_once_and_none_that_was_found_before() -> None:
    """Whichever of the names lead there, and however the index changes meanwhile."""
    index = Index()
    for number in range(600):
        index.add(f"page/{number}", ["feed"])
    index.add("feed", ["a", "b"])
    index.add("of/a", ["a"])
    found = {"of/a"}
    told = [name for some in index.walk(["a", "b", "nobody"], found) for name in some]
    assert sorted(told) == sorted(["feed", *(f"page/{number}" for number in range(600))])
    assert found == {"of/a", *told}
    walk = index.walk(["feed", "late"], set())
    first = next(walk)
    index.add("page/late", ["page/0"])
    assert "page/late" in {name for some in walk for name in some} - set(first)


def test_a_cycle_of_dependencies_ends() -> None:
    """Entries that depend on each other are each other's dependents, and never their own."""
    index = Index()
    index.add("a", ["b", "a"])
    index.add("b", ["a"])
    assert index.dependents("a") == ["b"]
    assert index.dependents("b") == ["a"]


def test_adding_again_replaces_what_an_entry_depends_on() -> None:
    """The newest registration counts."""
    index = Index()
    index.add("page", ["old"])
    index.add("page", ["new", "new"])
    assert index.dependents("old") == []
    assert index.dependents("new") == ["page"]
    assert index.dependencies("page") == ("new",)
    assert len(index) == 1


def test_removing_an_entry_removes_its_own_edges_only() -> None:
    """What depends on a removed entry stays registered as depending on it, and on what that depended on."""
    index = Index()
    index.add("fragment", ["product:7"], tags=["t"])
    index.add("page", ["fragment"])
    assert index.remove("fragment")
    assert index.dependents("product:7") == ["page"]
    assert index.dependents("fragment") == ["page"]
    assert (index.subjects_under("product"), index.tagged("t"), list(index)) == (["product:7"], [], ["page"])
    assert not index.remove("fragment")
    assert index.dependencies("fragment") == ()


def test_a_chain_holds_though_what_is_between_is_over() -> None:
    """As long as somebody depends on its name; the end of that is the end of all the links, however many."""
    clock = Clock()
    index = Index(clock=clock)
    for number in range(10_000):
        index.add(f"f{number}", [f"f{number + 1}"], ttl=1.0)
    index.add("page", ["f0"])
    clock.now = 1.0
    while index.expire():
        pass
    assert (list(index), len(index._kept)) == (["page"], 10_000)
    assert index.dependents("f10000") == ["page"]
    index.remove("page")
    seen = 0
    while some := index.expire():
        assert some <= 250
        seen += some
    assert seen > 9000
    check_empty(index)


@pytest.mark.parametrize("again", [["other"], ["frag"], []])
def test_links_are_kept_of_a_name_while_it_is_depended_on(again: list[str]) -> None:
    """Whoever is registered anew and still depends on it may have been made of the old one."""
    index = Index()
    index.add("frag", ["k"])
    index.add("page", ["frag"])
    index.remove("frag")
    index.add("page", again)
    assert index.dependents("k") == (["page"] if again == ["frag"] else [])
    assert index.subjects() == (["frag", "k"] if again == ["frag"] else again)
    check_whole(index)


def test_an_entry_under_the_name_replaces_the_links_that_were_kept() -> None:
    """The newest registration counts."""
    index = Index()
    index.add("frag", ["k"])
    index.add("page", ["frag"])
    index.remove("frag")
    index.add("frag", ["other"])
    assert (index.dependents("k"), index.dependents("other")) == ([], ["frag", "page"])
    check_whole(index)


def test_links_in_a_cycle_go_when_no_entry_is_left_that_needs_them() -> None:
    """Though each of them is depended on by another; also where an entry that hung on it goes last."""
    index = Index()
    index.add("beside")
    index.add("a", ["b", "k"])
    index.add("b", ["c"])
    index.add("c", ["a"])
    index.add("page", ["c"])
    for key in "abc":
        index.remove(key)
    assert (index.dependents("k"), index.dependents("b")) == (["page"], ["page"])
    index.remove("page")
    assert (index.subjects(), index._kept, index._loose) == ([], {}, {})
    assert list(index) == ["beside"]


def test_what_is_over_and_not_dropped_yet_is_gone_through() -> None:
    """As what is dropped is; and nothing of it is told."""
    clock = Clock()
    index = Index(clock=clock, at_once=0)
    index.add("frag", ["k"], ttl=1.0)
    index.add("alone", ["k", "z"], ttl=1.0)
    index.add("page", ["frag"])
    clock.now = 1.0
    assert index.overdue == 2
    assert (index.dependents("k"), index.subjects(), index.dependents("z")) == (["page"], ["frag", "k"], [])
    assert index.known("frag") == Entry(depends_on=("k",), ttl=0.0, deadline=-math.inf)
    assert (index.known("alone"), index.known("page")) == (None, index.entry("page"))


def test_a_namespace_of_which_only_links_are_left_is_none() -> None:
    """They go a slice at a time, by whoever comes next, and then nothing is left of it."""
    indexes = Indexes(most=1, at_once=100)
    index = indexes.of("a")
    index.update({f"f{number:04}": Entry(depends_on=(f"f{number + 1:04}",)) for number in range(2000)})
    for number in reversed(range(2000)):
        index.remove(f"f{number:04}")
    assert (indexes.peek("a"), list(indexes), len(indexes), indexes.overdue) == (None, [], 0, 0)
    indexes.of("b").add("page")
    while indexes.expire():
        pass
    assert set(indexes._held) == set(indexes._shares) == {"b"}
    check_empty(index)


def test_what_was_gone_before_a_restart_is_kept_as_far_as_it_is_of_use() -> None:
    """And is no entry."""
    index = Index()
    index.add("frag")
    gone = Entry(ttl=0.0, depends_on=("k",))
    index.update({"page": Entry(depends_on=("frag",)), "frag": gone, "nobodys": gone})
    assert (list(index), index.dependents("k"), [key for key, _ in index.kept()]) == (["page"], ["page"], ["frag"])
    check_whole(index)


def test_what_is_depended_on_is_no_entry_by_that() -> None:
    """An abstract subject is not held, and has no size."""
    index = Index()
    index.add("é", ["product:7"])
    assert "product:7" not in index
    assert index.dependencies("product:7") == ()
    assert index.size_bytes == 2
    assert repr(index) == "Index(1 entries, 2 bytes of keys)"


# Marks and generations


def test_a_stale_mark_stays_until_the_entry_is_registered_again() -> None:
    """It is told whether it was new; what is no entry cannot be marked."""
    index = Index()
    index.add("page", ["model"], tags=["t"])
    assert not index.is_stale("page")
    assert index.mark_stale("page")
    assert not index.mark_stale("page")
    assert not index.mark_stale("other")
    assert index.is_stale("page")
    assert not index.is_stale("other")
    assert (index.dependencies("page"), index.tags("page")) == (("model",), ("t",))
    index.add("page")
    assert not index.is_stale("page")


def test_a_generation_parts_what_was_there_before_from_what_came_after() -> None:
    """Registering again is being born again."""
    index = Index()
    index.add("old")
    index.add("renewed")
    begun = index.begin()
    index.add("renewed")
    index.add("new")
    assert begun == index.generation
    assert [key for key in index if (index.born(key) or 0) >= begun] == ["new", "renewed"]
    assert index.born("old") == begun - 1
    assert index.born("none") is None
    assert index.begin() == begun + 1


# Lifetimes


def test_an_entry_that_has_outlived_its_lifetime_is_none() -> None:
    """At the end of it, for whatever is asked; what it depended on and its tags are free."""
    clock = Clock()
    index = Index(clock=clock)
    index.add("a/page", ["s/model"], tags=["t"], ttl=10.0)
    index.add("a/other", ttl=20.0)
    clock.now = 9.9
    assert "a/page" in index
    assert index.entry("a/page") == Entry(depends_on=("s/model",), tags=("t",), ttl=10.0, deadline=10.0)
    clock.now = 10.0
    assert "a/page" not in index
    assert index.entry("a/page") is None
    assert (index.tagged("t"), index.subjects(), index.dependents("s/model")) == ([], [], [])
    assert index.under("a") == list(index) == ["a/other"]
    assert (len(index), index.size_bytes, index.count_under("a")) == (1, 7, 1)
    clock.now = 100.0
    assert index.expire() == 1
    assert index.expire() == 0
    assert not index.remove("a/other")


def test_registering_again_gives_a_new_lifetime_or_none() -> None:
    """The old deadline does not count any more."""
    clock = Clock()
    index = Index(clock=clock)
    index.add("longer", ttl=10.0)
    index.add("for good", ttl=10.0)
    clock.now = 5.0
    index.add("longer", ttl=10.0)
    index.add("for good")
    clock.now = 14.0
    assert list(index) == ["for good", "longer"]
    clock.now = 15.0
    assert list(index) == ["for good"]


def test_however_many_end_in_one_moment_nobody_drops_more_than_a_slice() -> None:
    """They are no entries all the same, and whoever asks next goes on; what was registered anew is none of them."""
    clock = Clock()
    indexes = Indexes(clock=clock, at_once=10)
    index = indexes.of("a")
    index.update({f"p/{number:03}": Entry(tags=("t",), depends_on=("s",), ttl=1.0) for number in range(100)})
    index.add("p/alive", ["p/000"], tags=["t"])
    clock.now = 1.0
    index.add("p/099", tags=["t"])
    assert (index.overdue, indexes.overdue) == (90, 90)  # the links of one are kept, which is a look more
    assert (index.dependents("s"), index.dependents("p/000"), index.variants("p")) == (["p/alive"], ["p/alive"], [])
    assert not any([index.remove("p/098"), index.mark_stale("p/097"), "p/096" in index, index.entry("p/095")])
    assert index.overdue == 89  # of which single keys drop none but themselves
    questions: list[Callable[[], list[str]]] = [
        lambda: index.under("p"),
        lambda: index.tagged("t"),
        lambda: index.keys(limit=5),
    ]
    for ask in questions:
        before = index.overdue
        assert ask() == ["p/099", "p/alive"]
        assert before - index.overdue == 10
    assert (index.count_under("p"), index.count_tagged("t")) == (2 + 49, 2 + 39)
    assert len(indexes) == 2
    assert [indexes.expire() for _ in range(4)] == [10, 10, 9, 0]
    assert (index.count_under("p"), index.count_tagged("t"), indexes.size_bytes) == (2, 2, 12)


def test_a_namespace_in_which_all_is_over_is_none() -> None:
    """Though nothing of it is dropped yet: it is in no list, and its place is free."""
    clock = Clock()
    indexes = Indexes(most=1, clock=clock, at_once=1)
    indexes.of("a").update({str(number): Entry(ttl=1.0) for number in range(9)})
    clock.now = 1.0
    assert (indexes.peek("a"), list(indexes), len(indexes)) == (None, [], 0)
    indexes.of("b").add("page")
    with pytest.raises(TooManyNamespaces):
        indexes.of("a").add("page")
    assert indexes.overdue > 0
    assert [name for name, _ in indexes] == ["b"]


def test_a_watcher_may_ask_whatever_has_ended_in_one_moment() -> None:
    """While it is told, nothing else is dropped: otherwise each would be told within the telling of the one before."""
    clock = Clock()
    indexes = Indexes(clock=clock)
    told: list[tuple[str, int]] = []
    indexes.watch(lambda _namespace, key, before: told.append((key, len(indexes))) if before else None)
    indexes.of("a").update({f"{number:04}": Entry(ttl=1.0) for number in range(5000)})
    clock.now = 1.0
    while indexes.expire():
        pass
    assert told == [(f"{number:04}", 0) for number in range(5000)]


@pytest.mark.parametrize("ttl", [0, -1.0, math.nan])
def test_a_lifetime_is_more_than_nothing(ttl: float) -> None:
    """Whatever else is said is a mistake, and nothing has changed."""
    index = Index()
    index.add("page", ["a"])
    with pytest.raises(ValueError, match="ttl must be more than 0 seconds"):
        index.add("page", ["b"], ttl=ttl)
    assert index.dependencies("page") == ("a",)


def test_a_tag_lasts_as_long_as_its_last_member() -> None:
    """It has no lifetime of its own."""
    clock = Clock()
    index = Index(clock=clock)
    index.add("short", tags=["t", "t"], ttl=1.0)
    index.add("long", tags=["t"])
    assert (index.tagged("t"), index.count_tagged("t")) == (["long", "short"], 2)
    clock.now = 1e9
    assert (index.tagged("t"), index.count_tagged("t")) == (["long"], 1)


def test_a_watcher_is_told_of_the_end_of_a_lifetime_as_of_a_removal() -> None:
    """And of everything else, once it is made: with what was known before."""
    clock = Clock()
    index = Index(clock=clock)
    told: list[tuple[str, tuple[str, ...] | None, bool]] = []
    index.watch(lambda key, before: told.append((key, before and before.depends_on, key in index)))
    index.add("page", ["a"], ttl=1.0)
    index.add("page", ["b"], ttl=1.0)
    index.update({"page": Entry(depends_on=("c",), ttl=2.0), "other": Entry()})
    clock.now = 2.0
    assert len(index) == 1
    index.remove("other")
    index.watch(None)
    index.add("page")
    assert told == [
        ("page", None, True),
        ("page", ("a",), True),
        ("page", ("b",), True),
        ("other", None, True),
        ("page", ("c",), False),
        ("other", (), False),
    ]


def test_what_is_put_back_is_as_it_was() -> None:
    """With its birth, its deadline and its mark."""
    clock = Clock()
    index = Index(clock=clock)
    index.add("page", ["a"], tags=["t"], ttl=10.0)
    index.mark_stale("page")
    before = index.entry("page")
    assert before is not None
    index.begin()
    clock.now = 5.0
    index.add("page", ["b"])
    index.put_back({"page": before})
    assert index.entry("page") == before
    assert (index.tagged("t"), index.subjects(), index.born("page")) == (["page"], ["a"], 0)
    clock.now = 10.0
    assert len(index) == 0


def test_links_that_were_kept_are_put_back_with_what_needs_them() -> None:
    """In whatever order they are told; those that nothing needs any more are not kept."""
    index = Index()
    index.add("a", ["k"])
    index.add("b", ["a"])
    index.add("page", ["b"])
    index.remove("a")
    index.remove("b")
    before = {"a": index.known("a"), "b": index.known("b"), "page": index.entry("page")}
    index.add("page", ["new"])
    assert index.dependents("k") == []
    index.put_back(before)
    assert index.dependents("k") == ["page"]
    index.put_back({"page": None, "a": before["a"], "none": None})
    check_empty(index)


# What is named


def test_a_prefix_covers_whole_segments_in_order() -> None:
    """First itself, then what lies below it; a prefix that ends with a separator covers what begins so."""
    index = Index()
    for key in ("a/b", "a/b/c", "a/b:c", "a/b?c", "a/b#c", "a/bc", "a/b.c", "a", "a/", "b", "a0"):
        index.add(key)
    assert index.under("a/b") == ["a/b", "a/b#c", "a/b/c", "a/b:c", "a/b?c"]
    assert index.under("a/") == ["a/", "a/b", "a/b#c", "a/b.c", "a/b/c", "a/b:c", "a/b?c", "a/bc"]
    assert index.under("c") == []


def test_batches_go_on_though_entries_vanish() -> None:
    """Behind the last key of the batch before, which is gone: no entry is told twice, and none is left out."""
    index = Index()
    expected = []
    for number in range(25):
        for key in (f"a/{number:02}", f"ab/{number:02}"):
            index.add(key, tags=["t"])
        expected.append(f"a/{number:02}")
    index.add("a")
    batch, told = index.under("a", limit=4), []
    while batch:
        told += batch
        for key in batch:
            index.remove(key)
        batch = index.under("a", after=batch[-1], limit=4)
    assert told == ["a", *expected]
    assert index.under("a") == []
    batch, rest = index.tagged("t", limit=4), []
    while batch:
        rest += batch
        for key in batch:
            index.remove(key)
        batch = index.tagged("t", after=batch[-1], limit=4)
    assert rest == [f"ab/{number:02}" for number in range(25)]
    assert len(index) == 0


def test_going_through_all_entries_minds_no_change() -> None:
    """Those that were told may be removed, and others may come before them."""
    index = Index()
    index.update({f"{number:04}": Entry() for number in range(1200)})
    told = []
    for key in index:
        told.append(key)
        index.remove(key)
        index.add(f"!{key}")
    assert told == [f"{number:04}" for number in range(1200)]
    assert len(index) == 1200


def test_subjects_are_told_by_prefix() -> None:
    """Whether or not they are entries; those that nothing depends on are none."""
    index = Index()
    index.add("page", ["db:products/7", "db:products/9", "db:productsX", "db:users"])
    index.add("db:products/8")
    assert index.subjects_under("db:products") == ["db:products/7", "db:products/9"]
    assert index.subjects() == ["db:products/7", "db:products/9", "db:productsX", "db:users"]


# Against a model


@dataclass
class Known:
    """What the model knows of an entry."""

    depends_on: list[str]
    tags: list[str]
    deadline: float
    born: int
    stale: bool = False


@dataclass
class Model:
    """An index that is a few dicts, searched from end to end.

    - `held`: what is not dropped yet, and may be over if nothing is dropped
    - `kept`: what that which is gone depended on
    """

    dropping: bool
    held: dict[str, Known] = field(default_factory=dict)
    kept: dict[str, list[str]] = field(default_factory=dict)
    now: float = 0.0

    @property
    def entries(self) -> dict[str, Known]:
        return {key: it for key, it in self.held.items() if it.deadline > self.now}

    def links(self) -> dict[str, set[str]]:
        of_held = {key: set(it.depends_on) - {key} for key, it in self.held.items()}
        return of_held | {key: set(names) - {key} for key, names in self.kept.items()}

    def above(self, names: set[str]) -> set[str]:
        """Tell all that depends on any of these, and need be no entry any more."""
        links, found = self.links(), set[str]()
        while new := {key for key, on in links.items() if on & (names | found)} - found:
            found |= new
        return found

    def wait(self, now: float) -> None:
        """Drop what is over."""
        self.now = now
        for key in [key for key, it in self.held.items() if it.deadline <= now and self.dropping]:
            self.kept[key] = self.held.pop(key).depends_on
        self.prune()

    def put(self, entries: dict[str, Known]) -> None:
        self.held |= entries
        self.kept = {key: names for key, names in self.kept.items() if key not in entries}
        self.prune()

    def remove(self, key: str) -> bool:
        known = self.held.pop(key, None)
        if known is not None:
            self.kept[key] = known.depends_on
        self.prune()
        return known is not None and known.deadline > self.now

    def prune(self) -> None:
        self.kept = {
            key: names for key, names in self.kept.items() if set(names) - {key} and self.above({key}) & set(self.held)
        }


def check_whole(index: Index) -> None:
    """Check that the inner structures say the same, and that none has an empty or needless part."""
    held, kept = index._entries, index._kept
    assert list(held) == sorted(held)
    assert not index._changed
    assert not index._loose
    assert not set(held) & set(kept)
    assert all(entry.gone and entry.depends_on for entry in kept.values())
    dependents: dict[str, set[str]] = {}
    for key, entry in [*held.items(), *kept.items()]:
        for name in entry.depends_on:
            dependents.setdefault(name, set()).add(key)
    assert dict(index._dependents) == dependents
    assert list(index._tagged) == sorted((tag, key) for key, entry in held.items() for tag in entry.tags)
    deadlines = sorted((entry.deadline, key) for key, entry in held.items() if entry.deadline is not None)
    assert list(index._deadlines) == deadlines
    assert index._size == sum(len(key.encode()) for key in held)


def check_empty(index: Index) -> None:
    """Check that nothing is left in any structure."""
    structures = [getattr(index, name) for name in vars(index)]
    assert not any(len(it) for it in structures if hasattr(it, "__len__"))
    assert index._size == 0


PATHS = ["a", "a/", "a/b", "a/b/c", "a/b:c", "a/bc", "a?x", "b", "é/b", "a#1"]
names = st.sampled_from([*KEYS[:4], *PATHS])
tags = st.sampled_from(["t", "t\0", "u", ""])
ttls = st.sampled_from([None, None, 1.0, 2.0, 3.0])
several = st.lists(names, max_size=3)


class IndexAgainstModel(RuleBasedStateMachine):
    """Every answer of the index is that of a dict that is searched from end to end."""

    at_once = 250

    def __init__(self) -> None:
        super().__init__()
        self.clock = Clock()
        self.index = Index(clock=self.clock, at_once=self.at_once)
        self.model = Model(dropping=self.at_once > 0)
        self.watched: dict[str, Entry | None] = {}
        self.index.watch(self.note)

    def note(self, key: str, before: Entry | None) -> None:
        assert self.watched.get(key) == before
        self.watched[key] = self.index._entries.get(key) or self.index._kept.get(key)

    def known(self, depends_on: list[str], tagged: list[str], ttl: float | None) -> Known:
        deadline = math.inf if ttl is None else self.clock.now + ttl
        return Known(depends_on, tagged, deadline, self.index.generation)

    @rule(key=names, depends_on=several, tagged=st.lists(tags, max_size=3), ttl=ttls)
    def add(self, key: str, depends_on: list[str], tagged: list[str], ttl: float | None) -> None:
        self.index.add(key, depends_on, tags=tagged, ttl=ttl)
        self.model.put({key: self.known(depends_on, tagged, ttl)})

    @rule(chosen=st.dictionaries(names, several, max_size=6), tagged=st.lists(tags, max_size=2), ttl=ttls)
    def update(self, chosen: dict[str, list[str]], tagged: list[str], ttl: float | None) -> None:
        self.index.update({key: Entry(depends_on=tuple(on), tags=tuple(tagged), ttl=ttl) for key, on in chosen.items()})
        self.model.put({key: self.known(on, tagged, ttl) for key, on in chosen.items()})

    @rule(key=names)
    def remove(self, key: str) -> None:
        assert self.index.remove(key) is self.model.remove(key)

    @rule()
    def clear(self) -> None:
        for key in self.index:
            assert self.index.remove(key) is self.model.remove(key)
        if not self.index._entries:
            check_empty(self.index)

    @rule(key=names)
    def mark(self, key: str) -> None:
        known = self.model.entries.get(key)
        assert self.index.mark_stale(key) is (known is not None and not known.stale)
        if known is not None:
            known.stale = True
            self.watched[key] = self.index.entry(key)  # which is not told

    @rule()
    def begin(self) -> None:
        before = self.index.generation
        assert self.index.begin() == before + 1

    @rule(seconds=st.sampled_from([0.5, 1.0, 5.0]))
    def wait(self, seconds: float) -> None:
        self.clock.now += seconds
        self.model.wait(self.clock.now)

    @rule(key=names, tag=tags, after=st.none() | names, limit=st.none() | st.integers(0, 3))
    def ask(self, key: str, tag: str, after: str | None, limit: int | None) -> None:
        self.ask_of_one(key)
        self.ask_for_a_branch(key, after, limit)
        self.ask_for_many(tag, after, limit)

    def ask_of_one(self, key: str) -> None:
        held = self.model.entries
        known = held.get(key)
        assert self.index.dependents(key) == sorted(self.model.above({key}) & set(held) - {key})
        assert self.index.variants(key) == sorted(name for name in held if is_variant(key, name))
        assert self.index.is_stale(key) is (known is not None and known.stale)
        assert self.index.born(key) == (None if known is None else known.born)
        assert (key in self.index) is (known is not None)
        on = [] if known is None else [name for name in dict.fromkeys(known.depends_on) if name != key]
        assert list(self.index.dependencies(key)) == on
        assert list(self.index.tags(key)) == ([] if known is None else list(dict.fromkeys(known.tags)))

    def ask_for_a_branch(self, prefix: str, after: str | None, limit: int | None) -> None:
        held = self.model.entries
        below = sorted(key for key in held if covers(prefix, key))
        behind = [key for key in below if after is None or key > after]
        assert self.index.under(prefix, after=after, limit=limit) == behind[:limit]
        assert 0 <= self.index.count_under(prefix) - len(below) <= self.index.overdue
        named = set[str]().union(*self.model.links().values())
        subjects = {name for name in named if self.model.above({name}) & set(held)}
        assert self.index.subjects_under(prefix) == sorted(name for name in subjects if covers(prefix, name))
        assert self.index.subjects() == sorted(subjects)

    def ask_for_many(self, tag: str, after: str | None, limit: int | None) -> None:
        held = self.model.entries
        tagged = sorted(key for key, it in held.items() if tag in it.tags)
        assert (
            self.index.tagged(tag, after=after, limit=limit)
            == [key for key in tagged if after is None or key > after][:limit]
        )
        assert 0 <= self.index.count_tagged(tag) - len(tagged) <= self.index.overdue
        behind = [key for key in sorted(held) if after is None or key > after]
        assert self.index.keys(after=after, limit=limit) == behind[:limit]

    @invariant()
    def is_whole(self) -> None:
        assert len(self.index) == len(self.model.entries)
        assert [key for key, _ in self.index.items()] == list(self.index) == sorted(self.model.entries)
        assert {key: set(it.depends_on) for key, it in self.index.kept()} == {
            key: set(names) - {key} for key, names in self.model.kept.items()
        }
        watched = {key: it for key, it in self.watched.items() if it is not None and not it.gone}
        assert self.index.size_bytes == sum(len(key.encode()) for key in watched)
        assert self.index.overdue == len(watched) - len(self.model.entries)
        assert self.index.overdue == 0 or not self.at_once
        assert dict(self.index.items()) == {key: it for key, it in watched.items() if key in self.model.entries}
        check_whole(self.index)


class IndexThatDropsNothing(IndexAgainstModel):
    """So does one that is always behind with dropping what is over."""

    at_once = 0


TestIndexAgainstModel = IndexAgainstModel.TestCase
TestIndexAgainstModel.settings = settings(deadline=None, max_examples=100, stateful_step_count=40)
TestIndexThatDropsNothing = IndexThatDropsNothing.TestCase
TestIndexThatDropsNothing.settings = settings(deadline=None, max_examples=100, stateful_step_count=40)


# Namespaces


def test_namespaces_know_nothing_of_each_other() -> None:
    """But for the counter of generations, which they share."""
    indexes = Indexes()
    indexes.of("a").add("page", ["model"])
    indexes.of("b").add("page", ["other"])
    assert indexes.of("a").dependents("other") == []
    assert indexes.begin() == 1 == indexes.of("b").generation
    assert indexes.of("b").begin() == 2 == indexes.generation
    assert [(namespace, list(index)) for namespace, index in indexes] == [("a", ["page"]), ("b", ["page"])]
    assert (len(indexes), indexes.size_bytes) == (2, 8)
    assert repr(indexes) == "Indexes(2 namespaces, 2 entries, 8 bytes of keys)"


def test_an_empty_namespace_is_dropped_and_its_generations_go_on() -> None:
    """Nothing is left of it once nobody has it at hand; what is new in it was born later than what was old."""
    indexes = Indexes()
    indexes.of("a").add("page")
    indexes.begin()
    indexes.of("a").remove("page")
    assert indexes.peek("a") is None
    gc.collect()
    assert (indexes._held, indexes._shares, dict(indexes._empty), list(indexes)) == ({}, {}, {}, [])
    indexes.of("a").add("page")
    assert indexes.of("a").born("page") == 1


def test_what_is_added_to_an_index_that_was_empty_meanwhile_is_not_lost() -> None:
    """There is one index of a namespace, as long as somebody has it at hand."""
    indexes = Indexes()
    index = indexes.of("a")
    index.add("page")
    index.remove("page")
    assert indexes.of("a") is index
    index.add("other")
    assert indexes.peek("a") is index
    assert len(indexes) == 1


def test_there_are_only_so_many_namespaces_with_entries() -> None:
    """Those without do not count; one more entry in a namespace that has some is none more."""
    clock = Clock()
    indexes = Indexes(most=2, clock=clock)
    for namespace in ("a", "b"):
        indexes.of(namespace).add("page")
    indexes.of("a").add("page", ttl=5.0)
    indexes.of("c").remove("page")
    with pytest.raises(TooManyNamespaces, match="there may be, 2") as caught:
        indexes.of("c").add("page")
    assert caught.value.most == 2
    assert indexes.peek("c") is None
    indexes.of("b").add("other")
    clock.now = 5.0
    indexes.of("c").add("page")
    assert [namespace for namespace, _ in indexes] == ["b", "c"]


def test_what_was_there_before_a_restart_is_not_too_many() -> None:
    """To forget it would leave old values behind. Where nothing was, nothing is."""
    indexes = Indexes(most=1)
    empty = indexes.of("none")
    empty.update({})
    assert indexes.peek("none") is None
    for namespace in ("a", "b"):
        indexes.of(namespace).update({"page": Entry()})
    assert len(indexes) == 2


class IndexesAgainstModel(RuleBasedStateMachine):
    """Sums, watcher and limits are those of the single indexes, whatever happens in whichever of them."""

    namespaces = st.sampled_from("abc")
    at_once = 250

    def __init__(self) -> None:
        super().__init__()
        self.clock = Clock()
        self.indexes = Indexes(most=2, clock=self.clock, at_once=self.at_once)
        self.model: dict[tuple[str, str], float] = {}
        self.watched: set[tuple[str, str]] = set()
        self.at_hand: Index | None = None
        self.indexes.watch(self.note)

    def note(self, namespace: str, key: str, before: Entry | None) -> None:
        assert ((namespace, key) in self.watched) is (before is not None)
        index = self.indexes._held.get(namespace)
        if index is not None and key in index._entries:
            self.watched.add((namespace, key))
        else:
            self.watched.remove((namespace, key))

    @rule(namespace=namespaces, key=names, ttl=ttls)
    def add(self, namespace: str, key: str, ttl: float | None) -> None:
        held = {name for name, _ in self.model}
        if len(held) == 2 and namespace not in held:
            with pytest.raises(TooManyNamespaces):
                self.indexes.of(namespace).add(key, ttl=ttl)
        else:
            self.indexes.of(namespace).add(key, tags=["t"], ttl=ttl)
            self.model[namespace, key] = math.inf if ttl is None else self.clock.now + ttl

    @rule(namespace=namespaces)
    def take(self, namespace: str) -> None:
        self.at_hand = self.indexes.of(namespace)

    @rule(namespace=namespaces)
    def clear(self, namespace: str) -> None:
        for key in self.indexes.of(namespace):
            assert self.indexes.of(namespace).remove(key)
            del self.model[namespace, key]

    @rule(namespace=namespaces, key=names)
    def remove(self, namespace: str, key: str) -> None:
        assert self.indexes.of(namespace).remove(key) is (self.model.pop((namespace, key), None) is not None)

    @rule(seconds=st.sampled_from([0.5, 1.0, 5.0]))
    def wait(self, seconds: float) -> None:
        self.clock.now += seconds
        self.model = {place: end for place, end in self.model.items() if end > self.clock.now}

    @rule()
    def expire(self) -> None:
        before = len(self.indexes)
        self.clock.now += 1.0
        self.model = {place: end for place, end in self.model.items() if end > self.clock.now}
        dropped = self.indexes.expire()
        assert dropped == (before - len(self.model) if self.at_once else 0)

    @invariant()
    def is_whole(self) -> None:
        assert len(self.indexes) == len(self.model)
        assert self.indexes.size_bytes == sum(len(key.encode()) for _, key in self.watched)
        found = {(namespace, key) for namespace, index in self.indexes for key in index}
        assert found == set(self.model)
        assert self.indexes.overdue == len(self.watched) - len(self.model)
        assert self.indexes.overdue == 0 or not self.at_once
        held = {namespace for namespace, _ in self.model}
        assert {namespace for namespace, _ in self.indexes} == held
        assert {namespace for namespace in "abc" if self.indexes.peek(namespace) is not None} == held
        kept = self.indexes._held
        assert set(kept) == {namespace for namespace, _ in self.watched}
        for index in kept.values():
            check_whole(index)
        due = sorted((index._deadlines[0][0], namespace) for namespace, index in kept.items() if index._deadlines)
        assert list(self.indexes._due) == due
        assert not set(self.indexes._empty) & set(kept)


class IndexesThatDropNothing(IndexesAgainstModel):
    """So it is where the indexes are always behind with dropping what is over."""

    at_once = 0


TestIndexesAgainstModel = IndexesAgainstModel.TestCase
TestIndexesAgainstModel.settings = settings(deadline=None, max_examples=50, stateful_step_count=30)
TestIndexesThatDropNothing = IndexesThatDropNothing.TestCase
TestIndexesThatDropNothing.settings = settings(deadline=None, max_examples=50, stateful_step_count=30)


# Counted steps


@pytest.fixture(scope="module")
def counted() -> dict[str, list[tuple[int, float]]]:
    """Count the steps of each operation, from 10^3 to 10^6 entries, once."""
    points: dict[str, list[tuple[int, float]]] = {operation.name: [] for operation in OPERATIONS}
    for n in SIZES:
        index = filled(n)
        for operation in OPERATIONS:
            points[operation.name].append((n, steps_per(operation, index)))
        assert len(index) == n
    return points


@pytest.mark.requirement("RES-06")
@pytest.mark.requirement("IMP-14")
@pytest.mark.parametrize("name", [operation.name for operation in OPERATIONS])
def test_steps_grow_as_the_logarithm_of_the_entries(counted: dict[str, list[tuple[int, float]]], name: str) -> None:
    """The counts lie on a + b * log2(n), and are at most about twice as many for a thousand times as many entries."""
    fit = fit_of(counted[name])
    assert fit.is_logarithmic, (fit, counted[name])


@pytest.mark.requirement("IMP-14")
def test_the_end_of_a_lifetime_takes_logarithmic_steps() -> None:
    """Each entry that is over costs no more than being removed."""
    points = []
    for n in SIZES[:3]:
        clock = Clock()
        index, taken = filled(n, clock), 0
        for number in range(0, n // 10, n // 100):
            index.add(Counted(f"{branch(number)}/new"), tags=[Counted(f"t{number:07}")], ttl=1.0)
            clock.now += 1.0
            with Steps() as steps:
                assert index.expire() == 1
            taken += steps.taken
        points.append((n, taken / 10))
    assert fit_of(points).is_logarithmic, points


@pytest.mark.requirement("IMP-14")
def test_looking_from_end_to_end_would_be_found_out() -> None:
    """The check refuses a list that is searched one by one: a hundred times the entries, a hundred times the steps."""
    points = []
    for n in SIZES[:3]:
        held = list(entries(n))
        with Steps() as steps:
            assert scan(held, held[n // 2]) is held[n // 2]
        points.append((n, float(steps.taken)))
    fit = fit_of(points)
    assert fit.growth == pytest.approx(100, rel=0.01)
    assert not fit.is_logarithmic


@pytest.mark.parametrize("grow", [lambda n: n, math.sqrt, lambda n: n**0.2, lambda n: 100 + n / 1000])
def test_what_grows_faster_than_a_logarithm_is_found_out(grow: Any) -> None:
    """Also if it does so but slowly, or from a large beginning."""
    assert not fit_of([(n, grow(n)) for n in SIZES]).is_logarithmic


def test_what_grows_as_a_logarithm_is_fitted() -> None:
    """With its figures."""
    fit = fit_of([(n, 5 + 7 * math.log2(n)) for n in SIZES])
    assert [fit.a, fit.b] == pytest.approx([5, 7])
    assert fit.is_logarithmic
    assert not Fit(a=0.0, b=7.0, worst=0.2, growth=2.0).is_logarithmic


def test_every_comparison_is_a_step() -> None:
    """Whichever side of it the counted key stands on, and whoever makes it."""
    key = Counted("b")
    with Steps() as steps:
        assert all([key > "a", key >= "a", key == "b", key != "a", *map(operator.lt, "a", [key])])
        assert not any([key < "a", key <= "a", *map(operator.ne, "b", [key])])
        assert sorted([key, "a"]) == ["a", "b"]
        assert key in {"b": 1}
    assert steps.taken == 11


@pytest.mark.requirement("RES-06")
def test_the_bench_tells_the_steps_and_the_fit_of_each_operation(tmp_path: Path) -> None:
    """Run small: a row for each, counts that lie on their lines, and plots of counts and times."""
    ran = run_bench("index_scaling", tmp_path, "--most", "10000", "--samples", "60")
    check_table(ran)
    assert [row["operation"] for row in ran.rows] == [operation.name for operation in OPERATIONS]
    for row in ran.rows:
        assert [n for n, _ in row["steps"]] == [n for n, _ in row["us"]] == [1000, 3000, 10_000]
        assert row["is_logarithmic"]
    check_plot(tmp_path / "index_steps.svg", "tagged", "comparisons", "entries")
    check_plot(tmp_path / "index_times.svg", "tagged", "microseconds", "entries")
