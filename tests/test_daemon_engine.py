"""The engine: what each kind and strategy covers, layer by layer, and what failures among the keys mean."""

from __future__ import annotations

import asyncio
import errno
import itertools
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import AsyncGenerator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pybustcall.daemon import (
    BackendFailure,
    Engine,
    FilesBackend,
    Indexes,
    IndexFull,
    Layer,
    MemoryBackend,
    RefusedKey,
    TooManyNamespaces,
    Unsupported,
)
from pybustcall.daemon.backends import NO_KEYS, Scope, Traits
from pybustcall.daemon.bust import SLICE
from pybustcall.daemon.engine import format_size
from pybustcall.daemon.journal import Wish
from pybustcall.errors import ConfigurationError
from pybustcall.keys import covers, is_variant
from pybustcall.models import DEFAULT_NAMESPACE
from tests.plain_cache import Plain, busted, engine_over, index_of, opened
from tests.test_daemon_jobs import Layered

if TYPE_CHECKING:
    from pathlib import Path


class Shelf:
    """A backend that fails as told, and remembers in which threads it was called."""

    name = "shelf"
    blocking = True

    def __init__(self, *held: str, broken: tuple[str, ...] = (), linked: tuple[str, ...] = ()) -> None:
        self.held = dict.fromkeys(held)
        self.broken = broken
        self.linked = linked
        self.threads: list[int] = []
        self.measured = 0

    def check(self, key: str) -> None:
        if key.startswith("/"):
            raise RefusedKey("is an absolute path")

    def check_ready(self) -> None:
        self.threads.append(threading.get_ident())

    def variants(self, key: str) -> list[str]:
        if f"variants of {key}" in self.broken:
            raise BackendFailure("the shelf is stuck")
        return [name for name in self.held if name.startswith(key + "?")]

    def remove(self, key: str) -> bool:
        self.threads.append(threading.get_ident())
        if key in self.broken:
            raise BackendFailure("the shelf is stuck")
        if key in self.linked:
            raise RefusedKey("leads through a link")
        return self.held.pop(key, key) is None

    def size_bytes(self) -> int:
        self.measured += 1
        return 1234567


@pytest.fixture
def indexes() -> Indexes:
    """Register a page and its variants, made of a fragment, made of product 7; and a key that only looks alike."""
    indexes = Indexes()
    index = indexes.of(DEFAULT_NAMESPACE)
    index.add("fragment", ["product:7"])
    for key in ("page", "page.gz", "page?v=2"):
        index.add(key, ["fragment"] if key == "page" else [], tags=["pages"] if key == "page" else [])
    index.add("page.map")
    return indexes


@pytest.fixture
def engine(indexes: Indexes) -> Engine:
    return engine_over(MemoryBackend(indexes), indexes)


def keys_of(engine: Engine, namespace: str = DEFAULT_NAMESPACE) -> list[str]:
    index = engine.indexes.peek(namespace)
    return [] if index is None else list(index)


def wish(target: str, strategy: str = "dimensional", **more: Any) -> Wish:
    return Wish(**{"namespace": DEFAULT_NAMESPACE, "kind": "key", "target": target, "strategy": strategy, **more})


async def test_direct_removes_exactly_the_key(engine: Engine) -> None:
    """Variants and dependents stay."""
    assert await busted(engine, "page", "direct") == 1
    assert keys_of(engine) == ["fragment", "page.gz", "page.map", "page?v=2"]


async def test_direct_on_an_abstract_subject_removes_nothing(engine: Engine) -> None:
    """Its dependents are not it."""
    assert await busted(engine, "product:7", "direct") == 0
    assert "page" in keys_of(engine)


@pytest.mark.parametrize("strategy", ["dimensional", "hybrid"])
async def test_everything_along_the_dimensions_goes(engine: Engine, strategy: str) -> None:
    """Dependents by way of others go too, and their variants, and nothing else."""
    assert await busted(engine, "product:7", strategy) == 4
    assert keys_of(engine) == ["page.map"]


async def test_the_first_part_of_hybrid_is_direct(engine: Engine) -> None:
    """What was named is gone before the answer, what hangs on it after."""
    bust = engine.bust(wish("fragment", "hybrid"))
    await bust.visit(engine.layers[0], "first")
    assert keys_of(engine) == ["page", "page.gz", "page.map", "page?v=2"]
    await bust.visit(engine.layers[0], "whole")
    assert keys_of(engine) == ["page.map"]
    assert bust.removed == {"memory": 4}


async def test_busting_what_is_not_held_is_a_success(engine: Engine) -> None:
    """No cache holds the old value, which is all that was asked."""
    assert await busted(engine, "unheard") == 0


async def test_an_unknown_strategy_is_refused_with_those_that_there_are(engine: Engine) -> None:
    """The error names the supported ones, and not what was asked."""
    with pytest.raises(Unsupported, match="supported are direct, dimensional, hybrid") as caught:
        await busted(engine, "page", "sideways")
    assert (caught.value.field, caught.value.supported) == ("strategy", ("direct", "dimensional", "hybrid"))
    assert "sideways" not in str(caught.value)


# Kinds


async def test_a_prefix_covers_whole_segments(engine: Engine) -> None:
    """And nothing that only begins so."""
    for key in ("users", "users/1", "users:1", "users?a", "usersAbc:1", "users.gz"):
        engine.register(key)
    assert await busted(engine, "users", "direct", kind="prefix") == 4
    assert {"usersAbc:1", "users.gz"} <= set(keys_of(engine))


async def test_a_prefix_takes_variants_and_dependents_of_all_that_it_covers(engine: Engine) -> None:
    """Also of subjects that are no entries, and variants of what it names."""
    for key, depends in {"users.gz": [], "list": ["users:7"], "list.br": [], "top": ["list"], "users/1": []}.items():
        engine.register(key, depends)
    assert await busted(engine, "users", kind="prefix") == 5
    assert keys_of(engine) == ["fragment", "page", "page.gz", "page.map", "page?v=2"]


async def test_a_tag_reaches_what_bears_it_and_what_belongs_to_that(engine: Engine) -> None:
    """Direct only the tagged."""
    engine.register("summary", ["page"])
    assert await busted(engine, "pages", "direct", kind="tag") == 1
    engine.register("page", tags=["pages"])
    assert await busted(engine, "pages", kind="tag") == 4
    assert keys_of(engine) == ["fragment", "page.map"]


async def test_all_reaches_everything_in_one_namespace(engine: Engine) -> None:
    """And nothing of other tenants."""
    engine.register("theirs", namespace="other")
    assert await busted(engine, "*", kind="all") == 5
    assert keys_of(engine) == []
    assert keys_of(engine, "other") == ["theirs"]


@pytest.mark.parametrize("kind", ["key", "prefix", "tag"])
async def test_a_tenant_never_reaches_the_entries_of_another(engine: Engine, kind: str) -> None:
    """Whatever is named."""
    for namespace in ("a", "b"):
        engine.register("x", ["s"], namespace=namespace, tags=["x"])
    assert await busted(engine, "x", kind=kind, namespace="a") == 1
    assert (keys_of(engine, "a"), keys_of(engine, "b")) == ([], ["x"])


async def test_soft_marks_and_does_not_remove(engine: Engine) -> None:
    """What is marked already is not counted again; an entry registered anew is fresh."""
    assert await busted(engine, "page", soft=True) == 3
    assert await busted(engine, "page", soft=True) == 0
    assert index_of(engine).is_stale("page")
    engine.register("page")
    assert not index_of(engine).is_stale("page")


@pytest.mark.parametrize("soft", [True, False])
async def test_an_entry_born_after_the_bust_began_survives_it(engine: Engine, soft: bool) -> None:
    """However late it is visited."""
    bust = engine.bust(wish("page", "hybrid", soft=soft))
    await bust.visit(engine.layers[0], "first")
    engine.register("page")
    await bust.visit(engine.layers[0], "whole")
    assert "page" in keys_of(engine)
    assert not index_of(engine).is_stale("page")


# Laws

_KEYS = st.lists(st.sampled_from([*"abc/?:", ".gz", "a/b"]), min_size=1, max_size=4).map("".join)
_ENTRIES = st.dictionaries(_KEYS, st.tuples(st.lists(_KEYS, max_size=2), st.lists(st.sampled_from("tu"), max_size=2)))
_KINDS = st.sampled_from(["key", "prefix", "tag", "all"])


def naive(entries: dict[str, tuple[list[str], list[str]]], kind: str, target: str, strategy: str) -> set[str]:
    """Tell what goes, by looking at every entry as often as it takes."""

    def named(key: str) -> bool:
        match kind:
            case "key":
                return key == target
            case "prefix":
                return covers(target, key)
            case "tag":
                return key in entries and target in entries[key][1]
            case _:
                return True

    gone = {key for key in entries if named(key)}
    if strategy == "direct":
        return gone
    subjects = {name for depends, _ in entries.values() for name in depends if kind != "tag" and named(name)}
    roots = {target} if kind in {"key", "prefix"} else set()
    ahead = gone | subjects | roots
    reached = set(ahead)
    while more := {key for key, (depends, _) in entries.items() if reached & (set(depends) - {key})} - reached:
        reached |= more
    reached |= {
        key for key in entries for base in reached if is_variant(base, key) and (base in entries or base in roots)
    }
    return gone | (reached & entries.keys())


@given(entries=_ENTRIES, kind=_KINDS, target=_KEYS, tag=st.sampled_from("tu"))
def test_the_engine_agrees_with_a_naive_model_and_strategies_are_nested(
    entries: dict[str, tuple[list[str], list[str]]], kind: str, target: str, tag: str
) -> None:
    """What direct removes, dimensional does; hybrid ends where dimensional does; a dry run tells the number before."""
    target = {"tag": tag, "all": "*"}.get(kind, target)
    gone: dict[str, set[str]] = {}

    async def law(strategy: str) -> None:
        indexes = Indexes()
        engine = engine_over(MemoryBackend(indexes), indexes)
        for key, (depends, tags) in entries.items():
            engine.register(key, depends, tags=tags)
        counted = (await engine.count(wish(target, strategy, kind=kind)))["memory"]
        assert set(keys_of(engine)) == set(entries)
        removed = await busted(engine, target, strategy, kind=kind)
        gone[strategy] = set(entries) - set(keys_of(engine))
        assert counted == removed == len(gone[strategy])
        assert await busted(engine, target, strategy, kind=kind) == 0

    for strategy in ("direct", "dimensional", "hybrid"):
        asyncio.run(law(strategy))
    assert gone["direct"] <= gone["dimensional"] == gone["hybrid"]
    assert gone["direct"] == naive(entries, kind, target, "direct")
    assert gone["dimensional"] == naive(entries, kind, target, "dimensional")


# Slices


async def test_what_many_depend_on_in_common_is_looked_at_once(engine: Engine, indexes: Indexes) -> None:
    """However many of the named lead to it; and so is what bears a tag, though cache and registry both know it."""
    index = indexes.of("shared")
    subjects = [f"p/{number}" for number in range(3 * SLICE)]
    for subject in subjects:
        index.add(subject, tags=["t"])
    index.add("feed", subjects)
    for number in range(2 * SLICE):
        index.add(f"page/{number}", ["feed"])
    for kind, target in (("prefix", "p"), ("tag", "t")):
        bust = engine.bust(wish(target, kind=kind, namespace="shared", soft=True))
        await bust.visit(engine.layers[0])
        assert bust.done == 5 * SLICE + 1


async def test_what_is_told_of_progress_never_falls(engine: Engine, indexes: Indexes) -> None:
    """Also where a second visit goes over the same keys again."""
    for number in range(2 * SLICE):
        indexes.of("many").add(f"p/{number}")
    bust = engine.bust(wish("p", "hybrid", kind="prefix", namespace="many", soft=True))
    told: list[int] = []
    engine.step = lambda _step: told.append(bust.done)
    bust._step = engine.step
    await bust.visit(engine.layers[0], "first")
    await bust.visit(engine.layers[0], "rest")
    assert (told, told[-1], bust.total) == (sorted(told), 2 * SLICE, 2 * SLICE)


async def test_no_layer_removes_what_its_neighbour_must_look_up_first() -> None:
    """The chain of dependents is known before the registry, being a cache of the same number, forgets it."""
    indexes, shelf = Indexes(), Shelf("end")
    names = ["start", *(f"link/{number}" for number in range(2 * SLICE)), "end"]
    for name, needed in zip(names[1:], names, strict=False):
        indexes.of(DEFAULT_NAMESPACE).add(name, [needed])
    layers = [
        Layer(name="memory", number=0, backend=MemoryBackend(indexes)),
        Layer(name="b", number=0, backend=Plain(shelf)),
    ]
    async with opened(Engine(layers, indexes)) as both:
        bust = both.bust(wish("start"))
        await asyncio.gather(*(bust.visit(layer) for layer in both.layers))
    assert (shelf.held, len(indexes)) == ({}, 0)


async def test_a_sweep_gives_the_event_loop_its_turn_after_every_slice(engine: Engine) -> None:
    """And counts what it looked at."""
    for number in range(4 * SLICE):
        engine.register(f"many/{number}")
    steps: list[str] = []
    turns = 0

    async def spin() -> None:
        nonlocal turns
        while True:
            await asyncio.sleep(0)
            turns += 1

    counted = Engine(engine.layers, engine.indexes, step=steps.append)
    spinning = asyncio.create_task(spin())
    bust = counted.bust(wish("many", "direct", kind="prefix"))
    await bust.visit(counted.layers[0])
    spinning.cancel()
    assert (bust.done, bust.total, bust.removed) == (4 * SLICE, 4 * SLICE, {"memory": 4 * SLICE})
    assert steps == ["begun memory", *["swept memory"] * steps.count("swept memory"), "ended memory"]
    assert turns >= steps.count("swept memory") >= 4


# Layers


class Fenced:
    """A backend that holds nothing, has a fence, and remembers what it was told."""

    name = "fenced"

    def __init__(self, told: list[str], label: str = "", **traits: Any) -> None:
        self.told = told
        self.label = label
        self.traits = Traits(**{"fences": True, "soft": True, **traits})
        self.left: list[str] = []
        self.failing = False

    def _tell(self, what: str) -> None:
        self.told.append(f"{self.label}{what}")

    def check(self, namespace: str, key: str) -> None: ...

    async def open(self) -> None:
        self._tell("open")
        if self.failing:
            raise BackendFailure("no")

    async def close(self) -> None:
        self._tell("close")
        if self.failing:
            raise BackendFailure("no")

    async def check_ready(self) -> None: ...

    async def begin(self, scope: Scope, *, soft: bool, wide: bool = False) -> int:
        self._tell(f"begin {scope.kind} {scope.target}{' wide' if wide else ''}{' soft' if soft else ''}")
        return 7

    async def fence(self, namespace: str, keys: Sequence[str], *, generation: int, soft: bool) -> None:
        self._tell(f"fence {','.join(keys)}")

    async def end(
        self, scope: Scope, generation: int, *, named: bool = True, keys: Mapping[str, int] = NO_KEYS
    ) -> None:
        self._tell(f"end {generation}")
        if self.failing:
            raise BackendFailure("no")

    async def select(self, scope: Scope) -> AsyncGenerator[Sequence[str], None]:
        yield ["one"]

    async def estimate(self, scope: Scope) -> int | None:
        return None

    async def variants(self, namespace: str, keys: Sequence[str]) -> list[str]:
        return []

    async def remove(self, namespace: str, keys: Sequence[str], *, generation: int, soft: bool) -> int:
        self._tell(f"remove {','.join(keys)}")
        return len(keys)

    async def held(
        self, namespace: str, keys: Sequence[str], *, generation: int | None = None, stale: bool = False
    ) -> list[str]:
        return [key for key in keys if key in self.left]

    async def size_bytes(self) -> int:
        return 500


async def test_a_fence_comes_before_the_first_removal_and_covers_dependents() -> None:
    """So that no late fill slips in behind the sweep."""
    told: list[str] = []
    engine = engine_over(Fenced(told))
    engine.register("list", ["product:7"])
    assert await busted(engine, "product:7") == 2
    assert told == [
        "begin key product:7 wide", "remove product:7", "begin key product:7 wide",
        "fence list", "remove list", "end 7",
    ]  # fmt: skip


async def test_a_chain_is_fenced_level_by_level_each_with_a_later_generation() -> None:
    """So that what is made of an old inner one is older than the fence over the outer one; a circle ends, too."""
    told: list[str] = []
    engine = engine_over(Fenced(told))
    for key, depends_on in {"page": ["list", "product"], "list": ["product"], "a": ["b"], "b": ["a", "x"]}.items():
        engine.register(key, depends_on)
    assert await busted(engine, "product") == 3
    begin = "begin key product wide"
    assert told == [
        begin, "remove product", begin, "fence list", "remove list",
        begin, "fence page", "remove page", "end 7",
    ]  # fmt: skip
    assert await busted(engine, "x") == 5  # a circle is gone through twice


async def test_where_nobody_can_list_what_is_held_nothing_is_counted() -> None:
    """A number that is too low would be taken for the truth, and what is told of a few kinds only is not advertised."""
    engine = engine_over(Fenced([], counts=False))
    assert not engine.counts
    for kind, target in (("key", "k"), ("prefix", "p"), ("tag", "t"), ("all", "*")):
        with pytest.raises(Unsupported, match=r"cannot list what it holds") as caught:
            await engine.count(wish(target, kind=kind))
        assert caught.value.field == "dry_run"
    assert await engine_over(Fenced([])).count(wish("one")) == {"fenced": 0}


async def test_what_is_registered_while_one_layer_is_busted_goes_in_the_next(indexes: Indexes) -> None:
    """It may have been made of what that one still held."""
    held = [Layered(name, []) for name in ("inner", "outer")]
    engine = Engine([Layer(name=it.name, number=place, backend=it) for place, it in enumerate(held)], Indexes())
    for it in held:
        it.put("product", "late")
    bust = engine.bust(wish("product"))
    await bust.visit(engine.layers[0])
    engine.register("late", ["product"])
    await bust.visit(engine.layers[1])
    assert [it.keys for it in held] == [["late"], []]


async def test_a_chain_may_be_of_any_length() -> None:
    """Each link is fenced after the one before it."""
    told: list[str] = []
    engine = engine_over(Fenced(told))
    chain = [f"link/{number}" for number in range(70)]
    for key, before in zip(chain, ["product", *chain], strict=False):
        engine.register(key, [before])
    await busted(engine, "product")
    fences = [it.removeprefix("fence ") for it in told if it.startswith("fence")]
    assert fences == chain
    told.clear()
    assert (await engine.bust_dependents(["product"])).count >= 70


async def test_what_hangs_off_a_circle_comes_after_it_and_all_comes_twice() -> None:
    """In a circle nothing comes first: what was made of its last, while its first was gone, goes in the second turn."""
    told: list[str] = []
    engine = engine_over(Fenced(told))
    for key, depends_on in {"a": ["product", "b"], "b": ["a"], "c": ["b"], "d": ["d", "product"]}.items():
        engine.register(key, depends_on)
    await busted(engine, "product")
    fences = [it.removeprefix("fence ").split(",") for it in told if it.startswith("fence")]
    order = [key for keys in fences for key in keys]
    assert sorted(order) == ["a", "a", "b", "b", "c", "c", "d", "d"]
    assert order.index("a") < order.index("b") < order.index("c")
    assert fences[: len(fences) // 2] == fences[len(fences) // 2 :]


async def test_left_overs_are_ended_once_though_several_busts_begin() -> None:
    """And those that still cannot be ended stay for the next."""
    told: list[str] = []
    backend = Fenced(told)
    engine = engine_over(backend)
    [layer] = engine.layers
    busts = [engine.bust(wish(f"p{number}", "hybrid", kind="prefix")) for number in range(2)]
    for bust in busts:
        await bust.visit(layer, "first")
    backend.failing = True
    for bust in busts:
        await bust.abandon()
    with pytest.raises(BackendFailure):
        await busted(engine, "other")
    backend.failing = False
    told.clear()
    await asyncio.gather(*(engine.bust(wish(f"q{number}")).visit(layer) for number in range(3)))
    assert told.count("end 7") == 2 + 3
    assert [len(it) for it in engine.fences.values()] == [0]


async def test_a_bust_ends_though_somebody_registers_all_the_while() -> None:
    """What is registered after the last round was made behind the fences."""
    told: list[str] = []
    backend = Fenced(told)
    engine = engine_over(backend)
    engine.register("page/0", ["product"])
    fence, count = backend.fence, 0

    async def registering(*args: Any, **more: Any) -> None:
        nonlocal count
        count += 1
        engine.register(f"page/{count}", ["product"])
        await fence(*args, **more)

    backend.fence = registering  # type: ignore[method-assign]
    await busted(engine, "product")
    assert 1 < count < 10


async def test_what_could_not_be_ended_is_ended_with_the_next_bust_there() -> None:
    """Or readers would miss for ever what a cancelled bust had only begun to remove."""
    told: list[str] = []
    backend = Fenced(told)
    engine = engine_over(backend)
    bust = engine.bust(wish("p", "hybrid", kind="prefix"))
    await bust.visit(engine.layers[0], "first")
    backend.failing = True
    await bust.abandon()
    backend.failing = False
    told.clear()
    await busted(engine, "other")
    assert told == ["end 7", "begin key other wide", "remove other", "end 7"]


async def test_where_a_fence_stands_the_first_part_of_a_hybrid_sweep_is_to_begin() -> None:
    """Readers already take what it names for a miss; of a soft one, and of one key, they do not wait for a sweep."""
    told: list[str] = []
    engine = engine_over(Fenced(told))
    await engine.bust(wish("p", "hybrid", kind="prefix")).visit(engine.layers[0], "first")
    assert told == ["begin prefix p wide"]
    await engine.bust(wish("p", "hybrid", kind="prefix", soft=True)).visit(engine.layers[0], "first")
    assert told[1:] == ["begin prefix p wide soft", "remove one"]


async def test_what_is_abandoned_is_ended() -> None:
    """Once, and whatever the cache says."""
    told: list[str] = []
    backend = Fenced(told)
    engine = engine_over(backend)
    bust = engine.bust(wish("p", "hybrid", kind="prefix"))
    await bust.visit(engine.layers[0], "first")
    backend.failing = True
    await bust.abandon()
    await bust.abandon()
    assert told == ["begin prefix p wide", "end 7"]


async def test_verifying_finds_what_is_still_held() -> None:
    """Then the layer has failed."""
    backend = Fenced([])
    engine = engine_over(backend)
    assert await busted(engine, "one", verify=True) == 1
    backend.left = ["one"]
    with pytest.raises(BackendFailure, match="1 of what was to be removed is still held"):
        await busted(engine, "one", verify=True)


def layered(*backends: tuple[int, str, Any]) -> Engine:
    return Engine([Layer(name=name, number=number, backend=backend) for number, name, backend in backends], Indexes())


def test_layers_are_sorted_inside_out_and_grouped_by_number() -> None:
    """In the order of their numbers, however they are listed."""
    engine = layered((2, "cdn", Fenced([])), (0, "redis", Fenced([])), (2, "nginx", Fenced([])))
    assert [[layer.name for layer in group] for group in engine.groups] == [["redis"], ["cdn", "nginx"]]
    assert repr(engine) == "Engine(0 redis, 2 cdn, 2 nginx)"


@pytest.mark.parametrize(
    ("traits", "asked", "field", "match"),
    [
        ({"kinds": frozenset({"key", "all"})}, {"kind": "tag"}, "kind", r"outer .* by tag; .*; supported are key, all"),
        ({"soft": False}, {"soft": True}, "soft", "outer .* cannot mark entries as stale"),
        ({"namespaces": False}, {"namespace": "a"}, "namespace", "outer .* has no namespaces"),
    ],
)
def test_what_one_layer_cannot_do_is_refused_before_anything_is_removed(
    traits: dict[str, Any], asked: dict[str, Any], field: str, match: str
) -> None:
    """The text names the layer, and what could be asked instead."""
    told: list[str] = []
    engine = layered((0, "inner", Fenced(told)), (1, "outer", Fenced(told, **traits)))
    with pytest.raises(Unsupported, match=match) as caught:
        engine.check(wish("x", **asked))
    assert caught.value.field == field
    assert told == []


def test_what_all_layers_can_is_told() -> None:
    """It is what the daemon advertises."""
    engine = layered((0, "a", Fenced([])), (1, "b", Fenced([], soft=False, kinds=frozenset({"key", "tag"}))))
    assert (engine.kinds, engine.soft, engine.namespaces) == (("key", "tag"), False, True)


async def test_a_key_that_one_layer_could_never_hold_is_not_held_there(tmp_path: Path) -> None:
    """It is busted where it can be."""
    told: list[str] = []
    engine = layered((0, "files", FilesBackend(tmp_path)), (1, "fenced", Fenced(told)))
    assert await busted(engine, "../x") == 1
    engine.register("../x")
    with pytest.raises(RefusedKey):
        engine_over(FilesBackend(tmp_path)).register("../x")


async def test_all_layers_are_opened_and_closed_whatever_fails() -> None:
    """The first error is told at the end."""
    told: list[str] = []
    first, second = Fenced(told, "1 "), Fenced(told, "2 ")
    engine = layered((0, "a", first), (1, "b", second))
    await engine.open()
    first.failing = True
    with pytest.raises(BackendFailure):
        await engine.close()
    assert told == ["1 open", "2 open", "1 close", "2 close"]
    told.clear()
    first.failing, second.failing = False, True
    with pytest.raises(BackendFailure):
        await engine.open()
    assert told == ["1 open", "2 open", "1 close", "2 close"]


def test_settle_is_what_was_asked_or_the_layers_or_the_backends() -> None:
    """In this order; 0 is never."""
    backend = Fenced([], settle=3.0)
    assert Layer(name="a", number=0, backend=backend).settles_after(None) == 3.0
    assert Layer(name="a", number=0, backend=backend, settle=0).settles_after(None) == 0
    assert Layer(name="a", number=0, backend=backend, settle=0).settles_after(2.0) == 2.0


async def test_what_depends_on_swapped_names_goes_in_every_layer() -> None:
    """A layer that fails does not keep the others, and the error counts for all of them."""
    told: list[str] = []
    shelf = Shelf("page", broken=("page",))
    engine = layered((0, "shelf", Plain(shelf)), (1, "fenced", Fenced(told)))
    engine.register("page", ["model"])
    assert await engine.dependents(["model", "other"]) == {DEFAULT_NAMESPACE: [["page"]]}
    with pytest.raises(BackendFailure, match="the shelf is stuck") as caught:
        await engine.bust_dependents(["model"])
    assert (caught.value.removed, caught.value.failed) == (1, 1)
    assert told == ["begin key page wide", "remove page", "end 7"]
    shelf.broken, shelf.linked = (), ("page",)
    with pytest.raises(BackendFailure, match="a key leads through a link"):
        await engine.bust_dependents(["model"])
    shelf.linked = ()
    assert (await engine.bust_dependents(["model"])).count == 2
    told.clear()
    engine.register("other", ["model"])
    assert (await engine.bust_dependents(["model"])).count == 2
    key, fenced, *removed = told
    assert (key.removeprefix("begin key "), fenced) in {("other wide", "fence page"), ("page wide", "fence other")}
    assert removed in (["remove other,page", "end 7"], ["remove page,other", "end 7"])


@pytest.mark.parametrize("failing", ["begin", "variants", "remove"])
async def test_what_fails_in_one_slice_keeps_no_other_from_a_hot_swap(failing: str, monkeypatch: Any) -> None:
    """It is told at the end; only a cache that is away ends it at once, telling what had gone."""
    backend = Fenced([])
    engine = layered((0, "fenced", backend))
    for number in range(600):
        engine.register(f"page/{number}", ["model"])
    calls, sound = 0, getattr(backend, failing)

    async def failing_once(*args: Any, **more: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise failure
        return await sound(*args, **more)

    monkeypatch.setattr(backend, failing, failing_once)
    failure = BackendFailure("one directory is unreadable")
    with pytest.raises(BackendFailure, match="one directory is unreadable") as caught:
        await engine.bust_dependents(["model"])
    assert (caught.value.removed, caught.value.failed) == {
        "begin": (350, 250), "variants": (600, 1), "remove": (350, 1),
    }[failing]  # fmt: skip
    calls, failure = 0, BackendFailure("no route", unreachable=True)
    with pytest.raises(BackendFailure, match="no route") as caught:
        await engine.bust_dependents(["model"])
    assert (caught.value.removed, caught.value.failed) == (250, 350)


async def test_what_depends_on_swapped_names_goes_in_every_namespace(indexes: Indexes) -> None:
    """A dependency is the whole daemon's; a layer without namespaces has the default one's."""
    indexes.of("shop").add("mine", ["product:7"])
    shelf = Shelf("page", "mine")
    layers = [Layer(name=it.name, number=0, backend=it) for it in (MemoryBackend(indexes), Plain(shelf))]
    engine = Engine(layers, indexes)
    assert (await engine.bust_dependents(["product:7"])).count == 6  # fragment, page and its variants, mine; and a file
    assert (keys_of(engine), keys_of(engine, "shop"), list(shelf.held)) == (["page.map"], [], ["mine"])


async def test_the_registry_is_asked_until_all_other_layers_are_done(indexes: Indexes) -> None:
    """Also by a swap: what it forgot could not be found for a layer that failed."""
    shelf = Shelf("fragment", "page", broken=("page",))
    layers = [
        Layer(name="memory", number=0, backend=MemoryBackend(indexes)),
        Layer(name="b", number=1, backend=Plain(shelf)),
    ]
    engine = Engine(layers, indexes)
    assert [[layer.name for layer in group] for group in engine.groups] == [["b"], ["memory"]]
    with pytest.raises(BackendFailure, match="1 removed, 1 not removed"):
        await engine.bust_dependents(["product:7"])
    assert "fragment" in keys_of(engine)
    shelf.broken = ()
    assert (await engine.bust_dependents(["product:7"])).count == 5
    assert (keys_of(engine), shelf.held) == (["page.map"], {})


@pytest.mark.parametrize("kind", ["key", "prefix", "tag"])
async def test_a_registry_forgets_the_end_of_a_chain_first(kind: Any) -> None:
    """So that a bust which was broken off, by a kill, finds what is left when it is begun anew."""
    indexes = Indexes()
    index = indexes.of(DEFAULT_NAMESPACE)
    index.add("start", tags=["start"])
    chain = ["start", *(f"link/{number}" for number in range(3 * SLICE))]
    for needed, name in itertools.pairwise(chain):
        index.add(name, [needed])
    engine = engine_over(MemoryBackend(indexes), indexes)
    left: list[list[str]] = []
    engine.step = lambda step: left.append(keys_of(engine)) if step.startswith("swept") else None
    await engine.bust(wish("start", kind=kind)).visit(engine.layers[0])
    assert len(left) == 4
    for names in left:
        assert sorted(chain[: len(names)]) == names


async def test_a_key_that_is_refused_there_keeps_nothing_from_its_dependents(indexes: Indexes) -> None:
    """It is refused if nothing depends on it."""
    shelf = Shelf("page", linked=("product:7", "alone"))
    engine = engine_over(Plain(shelf), indexes)
    bust = engine.bust(wish("product:7", "hybrid"))
    await bust.visit(engine.layers[0], "first")
    await bust.visit(engine.layers[0], "rest")
    assert (bust.removed, shelf.held) == ({"shelf": 1}, {})
    with pytest.raises(RefusedKey):
        await engine.bust(wish("alone")).visit(engine.layers[0])


async def test_abandoning_goes_on_after_an_odd_error(caplog: pytest.LogCaptureFixture) -> None:
    """It is logged, and the others are ended."""
    told: list[str] = []
    odd, fenced = Fenced(told), Fenced(told)
    engine = layered((0, "odd", odd), (1, "fenced", fenced))
    bust = engine.bust(wish("page", "hybrid", kind="prefix"))
    for layer in engine.layers:
        await bust.visit(layer, "first")

    async def fail(*_given: Any) -> None:
        raise OSError("odd")

    odd.end = fail  # type: ignore[method-assign, assignment]
    await bust.abandon()
    assert told[-1] == "end 7"
    assert "unexpected error at the layer odd" in caplog.text


def test_with_a_layer_that_settles_those_outside_of_it_do() -> None:
    """They may have been refilled from it; a registry beside them not, since nobody reads from it."""
    told: list[str] = []
    layers = [
        Layer(name="registry", number=0, backend=MemoryBackend(Indexes()), settle=9),
        Layer(name="in", number=1, backend=Fenced(told), settle=6),
        Layer(name="beside", number=1, backend=Fenced(told), settle=0),
        Layer(name="mid", number=2, backend=Fenced(told), settle=1),
        Layer(name="out", number=3, backend=Fenced(told), settle=0),
    ]
    engine = Engine(layers, Indexes())
    assert engine.rounds(None) == [(1, frozenset({"mid", "out"})), (6, frozenset({"in", "mid", "out"}))]
    assert engine.rounds(2.0) == [(2.0, frozenset({"in", "beside", "mid", "out"}))]
    assert engine.rounds(0.0) == []
    assert Engine(layers[:1], Indexes()).rounds(None) == [(9, frozenset({"registry"}))]


# Files, and failures


async def test_files_go_and_their_registrations_stay(tmp_path: Path) -> None:
    """A page is rendered again at the same path, so a second bust finds it too."""
    engine = engine_over(FilesBackend(tmp_path))
    engine.register("page.html", ["product:7"])
    for _ in range(2):
        for name in ("page.html", "page.html.gz", "other.html"):
            (tmp_path / name).touch()
        async with opened(engine):
            assert await busted(engine, "product:7") == 2
    assert os.listdir(tmp_path) == ["other.html"]


async def test_registered_tags_reach_files(tmp_path: Path) -> None:
    """Which know nothing of tags themselves."""
    engine = engine_over(FilesBackend(tmp_path))
    engine.register("page.html", tags=["product:7"])
    for name in ("page.html", "page.html.gz", "other.html"):
        (tmp_path / name).touch()
    async with opened(engine):
        assert (await engine.count(wish("product:7", kind="tag")))["files"] == 2
        assert await busted(engine, "product:7", kind="tag") == 2
    assert os.listdir(tmp_path) == ["other.html"]


async def test_a_target_that_the_backend_could_never_hold_is_refused(tmp_path: Path) -> None:
    """Unless something depends on it, it is a mistake, and nothing is touched."""
    engine = engine_over(FilesBackend(tmp_path))
    with pytest.raises(RefusedKey, match=r'has a segment "\.\."'):
        await busted(engine, "../secret")


@pytest.mark.parametrize(("strategy", "removed"), [("dimensional", 1), ("direct", 0)])
async def test_an_abstract_subject_need_not_be_a_key(tmp_path: Path, strategy: str, removed: int) -> None:
    """A subject with dependents is sound, whatever its name."""
    engine = engine_over(FilesBackend(tmp_path))
    engine.register("page.html", ["https://shop.example/product//7/"])
    (tmp_path / "page.html").touch()
    async with opened(engine):
        assert await busted(engine, "https://shop.example/product//7/", strategy) == removed


def test_only_possible_keys_are_registered(tmp_path: Path) -> None:
    """An entry must pass a backend's check; what it depends on may be anything."""
    engine = engine_over(FilesBackend(tmp_path))
    with pytest.raises(RefusedKey, match="absolute path"):
        engine.register("/etc/passwd", ["product:7"])
    assert len(engine.indexes) == 0


def test_the_registry_has_its_limits() -> None:
    """In entries over all namespaces, and in namespaces; what is known can be replaced."""
    indexes = Indexes(most=2)
    engine = engine_over(MemoryBackend(indexes), indexes)
    engine.register("a", most=2)
    engine.register("b", namespace="other", most=2)
    engine.register("a", ["x"], most=2)
    with pytest.raises(IndexFull):
        engine.register("c", most=2)
    with pytest.raises(TooManyNamespaces):
        engine.register("c", namespace="third")


async def test_a_way_through_a_link_is_refused_at_removal(tmp_path: Path) -> None:
    """What only the file system can tell is a refusal all the same."""
    (tmp_path / "link").symlink_to("/")
    (tmp_path / "page").write_text("old")
    async with opened(engine_over(FilesBackend(tmp_path))) as engine:
        with pytest.raises(RefusedKey, match="leads through a link"):
            await busted(engine, "link/etc")
        [layer] = engine.layers
        for kind in ("key", "prefix"):
            with pytest.raises(RefusedKey, match="through a link"):  # before anybody is told that it is done
                await engine.bust(wish("link/etc", "hybrid", kind=kind)).visit(layer, "first")
            engine.register("page", ["link/etc"])
            bust = engine.bust(wish("link/etc", "hybrid", kind=kind))
            await bust.visit(layer, "first")
            await bust.visit(layer)
            assert bust.removed == {layer.name: 1 if kind == "key" else 0}
            engine.indexes.of(DEFAULT_NAMESPACE).remove("page")


async def test_a_dry_run_of_a_branch_through_a_link_says_what_the_bust_would(tmp_path: Path) -> None:
    """Refused by a layer alone, unless something depends on it; of several, it is just not held in that one."""
    (tmp_path / "link").symlink_to("/")
    (tmp_path / "page").write_text("old")
    branch = wish("link/etc", kind="prefix")
    async with opened(engine_over(FilesBackend(tmp_path))) as engine:
        with pytest.raises(RefusedKey, match="through a link"):
            await engine.count(branch)
        engine.register("page", ["link/etc"])
        assert list((await engine.count(branch)).values()) == [1]
    indexes = Indexes()
    indexes.of(DEFAULT_NAMESPACE).add("link/etc/passwd")
    layers = [
        Layer(name="files", number=0, backend=FilesBackend(tmp_path)),
        Layer(name="memory", number=1, backend=MemoryBackend(indexes)),
    ]
    async with opened(Engine(layers, indexes)) as engine:
        assert await engine.count(branch) == {"files": 0, "memory": 1}


@pytest.mark.parametrize(
    ("shelf", "removed", "failed", "reason"),
    [
        (Shelf("t", "a", "b", "b?1", broken=("a",)), 3, 1, "the shelf is stuck"),
        (Shelf("t", "a", "b", "b?1", broken=("b?1",)), 3, 1, "the shelf is stuck"),
        (Shelf("t", "a", "b", linked=("a",)), 2, 1, "a key leads through a link"),
    ],
)
async def test_one_failure_does_not_keep_the_others(shelf: Shelf, removed: int, failed: int, reason: str) -> None:
    """All the others are tried, and the error tells how many were and were not removed."""
    engine = engine_over(shelf)
    engine.register("a", ["t"])
    engine.register("b", ["t"])
    with pytest.raises(BackendFailure, match=f"^{removed} removed, {failed} not removed: {reason}$") as caught:
        await busted(engine, "t")
    assert (caught.value.removed, caught.value.failed) == (removed, failed)


async def test_a_dependent_that_is_refused_only_there_counts_as_a_failure() -> None:
    """It is not what was asked for."""
    engine = engine_over(Shelf("t", linked=("a",)))
    engine.register("a", ["t"])
    with pytest.raises(BackendFailure, match=r"^1 removed, 1 not removed: a key leads through a link$"):
        await busted(engine, "t")


async def test_a_vanished_root_is_a_failure_and_never_a_success(tmp_path: Path) -> None:
    """A bust that could not look is not applied."""
    root = tmp_path / "root"
    root.mkdir()
    async with opened(engine_over(FilesBackend(root))) as engine:
        await engine.check_ready()
        shutil.rmtree(root)
        with pytest.raises(BackendFailure, match="the root directory cannot be opened") as caught:
            await busted(engine, "a")
        assert caught.value.unreachable
        with pytest.raises(BackendFailure):
            await engine.check_ready()


async def test_a_size_is_not_measured_twice_at_once() -> None:
    """Asking again soon does not walk the caches again."""
    shelf = Shelf()
    engine = Engine([*engine_over(shelf).layers, *engine_over(Fenced([])).layers], Indexes())
    assert list(await asyncio.gather(engine.size_text(), engine.size_text())) == ["1.2MB", "1.2MB"]
    assert shelf.measured == 1


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0B"),
        (512, "512B"),
        (999, "999B"),
        (1000, "1.0KB"),
        (1234, "1.2KB"),
        (999_949, "999.9KB"),
        (999_950, "1.0MB"),
        (1_234_567, "1.2MB"),
        (10**9, "1.0GB"),
        (10**12, "1.0TB"),
        (10**15, "1.0PB"),
    ],
)
def test_a_size_is_written_for_people(size: int, text: str) -> None:
    """Three digits and a unit, and never 1000.0 of one."""
    assert format_size(size) == text


def write(tmp_path: Path, content: object) -> Path:
    path = tmp_path / "entries.json"
    path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    return path


def test_registrations_are_read_from_a_file(tmp_path: Path) -> None:
    """Each entry of the file is registered with what it depends on."""
    indexes = Indexes()
    engine = engine_over(MemoryBackend(indexes), indexes)
    index = index_of(engine)
    assert engine.load_registrations(write(tmp_path, {"page": ["product:7"], "plain": []})) == 2
    assert index.dependents("product:7") == ["page"]
    assert "plain" in index


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ([], "expected an object of lists, found a list"),
        (7, "found a number"),
        ({"page": "product:7"}, "the key 'page': expected a list of what it depends on, found a string"),
        ({"page": {}}, "found an object"),
        ({"page": ["a", None]}, "the key 'page': number 2: expected a string, found null"),
        ({"page": [True]}, "number 1: expected a string, found a boolean"),
        ({"page": [""]}, r"number 1 \(''\) is empty"),
        ({"": []}, r"the key \(''\) is empty"),
        ({"a\nb": []}, r"has the control character U\+000A at character 1"),
        ({"x" * 9000: []}, r"x\.\.\.'\) has 9000 bytes, which is more than 8192"),
        (b'{"a": [], "a": ["b"]}', "the key 'a' is there twice"),
        (b'{"a": [', r"expected JSON: .* \(line 1, column 8\)"),
        (b'{"\xff": []}', "expected UTF-8, found the byte 0xff at 2"),
        (b"[" * 200_000, "found deeper nesting"),
        ({"/etc/passwd": []}, "the key '/etc/passwd' is an absolute path"),
    ],
)
def test_a_bad_file_of_registrations_is_refused_whole(tmp_path: Path, content: object, reason: str) -> None:
    """The error tells the file, the key, what was expected and what was found; nothing is registered."""
    engine = engine_over(Shelf())
    path = write(tmp_path, content)
    with pytest.raises(ConfigurationError, match=reason) as caught:
        engine.load_registrations(path)
    assert str(path) in str(caught.value)
    assert caught.value.setting == "entries"
    assert len(engine.indexes) == 0


def test_a_missing_file_of_registrations_is_told(tmp_path: Path) -> None:
    """A file that is not there is named."""
    with pytest.raises(ConfigurationError, match=r"nothing\.json': the file cannot be read: No such file"):
        engine_over(Shelf()).load_registrations(tmp_path / "nothing.json")


def test_a_missing_extra_is_told_with_what_to_install() -> None:
    """Without sortedcontainers the import says what to do."""
    code = "import sys; sys.modules['sortedcontainers'] = None; import pybustcall.daemon"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "ImportError: the daemon needs an extra: pip install 'pybustcall[daemon]'" in done.stderr


def left_below(root: Path) -> set[str]:
    """Tell the files below a directory."""
    return {str(path.relative_to(root)) for path in root.rglob("*") if path.is_file()}


async def test_what_cannot_be_looked_through_keeps_nothing_else_from_being_swept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A directory that cannot be read is told when all the rest is done: what it is beside, and what depends on it."""
    for name in ("a/x", "a/bad/y", "page", "page.gz", "page?q=/z"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("old")
    indexes = Indexes()
    indexes.of(DEFAULT_NAMESPACE).add("page", ["a/gone"])
    engine = Engine([Layer(name="files", number=0, backend=FilesBackend(tmp_path))], indexes)
    real, refused = os.open, {b"bad", b"page?q="}

    def opening(path: Any, *args: Any, **more: Any) -> int:
        if path in refused:
            raise PermissionError(errno.EACCES, "Permission denied")
        return real(path, *args, **more)

    await engine.open()
    try:
        monkeypatch.setattr(os, "open", opening)
        with pytest.raises(BackendFailure, match="3 removed, 2 not removed: not all files of prefix"):
            await engine.bust(wish("a", kind="prefix")).visit(engine.layers[0])
        with pytest.raises(BackendFailure, match="not all files of prefix"):
            await engine.count(wish("a", kind="prefix"))
    finally:
        await engine.close()
    assert left_below(tmp_path) == {"a/bad/y", "page?q=/z"}


async def test_a_prefix_below_which_nothing_could_be_held_is_refused(tmp_path: Path) -> None:
    """As its keys are, unless something that depends on what is there can be held."""
    (tmp_path / "link").symlink_to(tmp_path)
    (tmp_path / "page").write_text("old")
    indexes = Indexes()
    engine = Engine([Layer(name="files", number=0, backend=FilesBackend(tmp_path))], indexes)
    for prefix in ("../x", "a//b", "/p", "/", "./p", "a//"):
        with pytest.raises(RefusedKey):
            engine.check(wish(prefix, kind="prefix"))
    for prefix in ("a/", "..", "a/..", "a:", "?", "x" * 254 + ":"):
        engine.check(wish(prefix, kind="prefix"))
    await engine.open()
    try:
        with pytest.raises(RefusedKey, match="through a link"):
            await engine.bust(wish("link/", kind="prefix")).visit(engine.layers[0])
        indexes.of(DEFAULT_NAMESPACE).add("page", ["/p/1", "link/x"])
        engine.check(wish("/p", kind="prefix"))
        await engine.bust(wish("link/", kind="prefix")).visit(engine.layers[0])
    finally:
        await engine.close()
    assert not (tmp_path / "page").exists()
