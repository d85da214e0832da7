"""One bust, as it goes through the layers: what is named, its variants, its dependents, as the strategy says.

This module decides what a bust covers, in which order that goes at a layer, in which slices, and what readers of events
are to be told that went with it. How keys are found and removed is the backends' to know, what depends on what the
index's; which layers there are, and what they can do, the engine's. docs/explanation/engine.md tells why it is so.

Theory of operation. A `Bust` visits a layer: it begins there (which raises a fence where the layer has one), finds what
is named in batches, looks up what belongs to each batch, removes, gives the event loop its turn, and ends there. What
the registry knows to depend on the named is looked up before anything is removed, since an inner layer may be that very
registry. A visit that fails is begun anew; whatever it had removed stays removed.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from contextlib import aclosing, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Final, Literal, TypeVar, final

from pybustcall.daemon.backends import BackendFailure, RefusedKey, Scope

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable, Iterator, Sequence

    from pybustcall.daemon.engine import Engine, Layer
    from pybustcall.daemon.index import Index
    from pybustcall.daemon.journal import Wish

__all__ = ["SLICE", "Borne", "Bust", "Part", "Turns", "count_removed", "holdable", "levels_of", "slices"]

_T = TypeVar("_T")
_log = logging.getLogger("pybustcall.daemon")

SLICE: Final = 250
"""How many keys are looked at between two turns of the event loop."""
_DEEPEST: Final = 64  # levels that are sorted; what lies deeper, or in a circle, is sorted one by one
_ROUNDS: Final = 5  # in which what was registered meanwhile is looked for; each is of what the one before left open
_MOST_BEARERS: Final = 1000  # entries of which one bust tells the tags

Part = Literal["first", "rest", "whole"]
"""Of a bust at one layer: what must be done before it is answered, what may follow, or both."""


@final
@dataclass(frozen=True, slots=True)
class _Search:
    """How a layer is looked through.

    - `wide`: whether what belongs to the named is covered, too
    - `fenced`: the generation from which on late fills are refused of what the begin could not name; None: of nothing
    - `missed`: where to note what cannot be looked through, all the rest being found; None: it ends the search
    - `links`: whether what depends on the named is covered, too, and not only the variants
    """

    layer: Layer
    wide: bool
    fenced: int | None = None
    missed: list[BackendFailure | RefusedKey] | None = None
    links: bool = True

    @property
    def since(self) -> int:
        """The generation since which what is covered is new."""
        assert self.fenced is not None  # noqa: S101 - for the type checker: nothing is removed without one
        return self.fenced

    def pass_over(self, error: BackendFailure | RefusedKey) -> None:
        """Note it and go on, or raise it where there is no going on."""
        if self.missed is None or (isinstance(error, BackendFailure) and error.unreachable):
            raise error
        self.missed.append(error)


@final
@dataclass(slots=True)
class _Tally:
    """How a visit went so far: what failed, why the one key cannot be there, and how many keys were looked at."""

    failures: list[BackendFailure] = field(default_factory=list)
    refused: RefusedKey | None = None
    looked_at: int = 0


@final
@dataclass(slots=True)
class _Begun:
    """What was begun at a layer: as which generations, first and last, and what of the dependents was fenced by now."""

    layer: Layer
    first: int
    generation: int
    fenced: dict[str, None] = field(default_factory=dict)


@final
class Borne:
    """The tags of the registered entries that a bust reaches, unless these are too many, or nobody has looked."""

    def __init__(self) -> None:
        self._tags: set[str] = set()
        self._bearers: set[str] = set()
        self._has_begun = False
        self._is_lost = False

    @property
    def tags(self) -> tuple[str, ...] | None:
        """The tags; None where they could be any."""
        return tuple(self._tags) if self.is_wanted and self._has_begun else None

    @property
    def is_wanted(self) -> bool:
        """Whether it is of use to look at further entries."""
        return not self._is_lost

    def begin(self) -> None:
        """Take it that the entries are known from now on."""
        self._has_begun = True

    def lose(self) -> None:
        """Take it that the tags could be any, from now on."""
        self._is_lost = True
        self._tags.clear()
        self._bearers.clear()

    def note(self, index: Index, keys: Iterable[str], *, wide: bool) -> None:
        """Note the tags of the entries among these keys and, if `wide`, of their variants."""
        for key in keys:
            if self._is_lost:
                return
            for bearer in (key, *index.variants(key)) if wide else (key,):
                self._bearers.add(bearer)
                self._tags.update(index.tags(bearer))
            if len(self._bearers) > _MOST_BEARERS:
                self.lose()


@final
class Bust:
    """One bust, layer by layer.

    - `removed`: how many entries went at each layer, over all its visits
    - `also`: what the registry knows to bear the tag, or to depend on what is named, as far as it was looked up
    - `borne`: the tags of all these, and of what is named
    - `done`: how many keys were looked at in each layer, by the visit that came furthest; `total`: about how many there
      are at the layers that were begun, None if one cannot tell
    """

    def __init__(self, engine: Engine, wish: Wish) -> None:
        self.wish = wish
        self.scope = Scope(wish.namespace, wish.kind, wish.target)
        self.removed: dict[str, int] = {layer.name: 0 for layer in engine.layers}
        self.also: dict[str, None] = {}
        self.borne = Borne()
        self._looked_at: dict[str, int] = {}
        self._estimates: dict[str, int | None] = {}
        self._engine = engine
        self._step = engine.step
        self._begun: dict[str, _Begun] = {}
        self._broken: set[str] = set()  # begun, and to be begun anew: what failed there may know nothing of it any more
        self._looking = asyncio.Lock()
        self._looked_up: tuple[list[str], list[str]] | None = None
        self._known: tuple[list[str], list[str]] = ([], [])  # from looking before
        self._wide = wish.strategy != "direct"
        self._members: dict[str, None] = {}  # what was found at a layer to bear the tag, and something depends on
        self._turns = Turns()

    @property
    def done(self) -> int:
        """How many keys were looked at."""
        return sum(self._looked_at.values())

    @property
    def total(self) -> int | None:
        """About how many keys there are to look at, never fewer than were; None while that is unknown."""
        told = [it for it in self._estimates.values() if it is not None]
        return None if len(told) < len(self._estimates) or not told else max(sum(told), self.done)

    @property
    def _index(self) -> Index | None:
        return self._engine.indexes.peek(self.wish.namespace)

    async def visit(self, layer: Layer, part: Part = "whole") -> None:
        """Bust at one layer. Raises `BackendFailure`, and `RefusedKey` if it could never hold the one key.

        - "first": what must be done before the answer, which is the direct part, or only the begin where that alone
          has the effect for readers
        - "rest": what is left after that
        - "whole": both
        """
        try:
            generation = await self._begin(layer)
            if part == "first":
                await self._visit_first(layer, generation)
                return
            if self._wide and layer.backend.traits.fences and self.wish.kind != "all":
                await self._visit_by_levels(layer, generation)
            else:
                await self._sweep(layer, generation, wide=self._wide)
            if self.wish.verify:
                # What readers made anew since then, behind the first fences, is held rightly.
                await self._verify(layer, self._begun[layer.name].first)
            await self._end(layer)
        except RefusedKey:
            with suppress(BackendFailure):
                await self._end(layer)
            raise
        except BackendFailure:
            self._broken.add(layer.name)
            raise
        self._step(f"ended {layer.name}")
        self.look_again()  # something may have been registered that the next layer holds

    async def _visit_by_levels(self, layer: Layer, generation: int) -> None:
        """Bust the named, and then what depends on it, each after all that it is made of.

        What is fenced is missed at once, and whoever read it before has an older token. So of two that depend on one
        another the inner goes first, and the outer has a later generation: what is made in between of the old inner one
        is older than the fence over the outer. What is only marked as stale is marked twice, for what was found fresh
        while the marks were set may have gone into what was found stale before.
        """
        tally = _Tally()
        await self._remove(_Search(layer, wide=True, fenced=generation, links=False), tally)
        if self.wish.soft and self.wish.kind != "key":
            generation = await self._begin_later(layer)
            await self._remove(_Search(layer, wide=True, fenced=generation, links=False), tally)
        done: set[str] = set()
        for _ in range(_ROUNDS):
            levels = await self._levels()
            if done.issuperset(key for level in levels for key in level):
                break
            for level in levels:
                generation = await self._begin_later(layer)
                search = _Search(layer, wide=True, fenced=generation, missed=[])
                await self._remove_found(search, self._belonging(search, [], level), tally)
                done.update(level)
            self.look_again()
        self._conclude(layer, tally)
        if tally.refused is not None and not tally.looked_at:
            raise tally.refused

    async def _visit_first(self, layer: Layer, generation: int) -> None:
        traits = layer.backend.traits
        if traits.fences and self.wish.kind != "key" and not self.wish.soft:
            if self.wish.kind == "tag" and (index := self._index) is not None:
                search = _Search(layer, wide=False, fenced=generation)
                named = await self._all_of(partial(index.tagged, self.wish.target))
                async for keys in self._registered(search, named):
                    removing = layer.backend.remove(self.wish.namespace, keys, generation=generation, soft=False)
                    self.removed[layer.name] += await count_removed(removing)
                    await self._turns.take(len(keys))
            return
        # A registry that has forgotten who bears a tag could not tell any more what depends on these.
        wide = self._wide and traits.registry and self.wish.kind == "tag"
        await self._sweep(layer, generation, wide=wide)

    async def look_for_readers(self) -> None:
        """Look up what goes with the named, for those who follow, to be told also if no layer can be visited."""
        await self._look_up()
        self.look_again()

    def look_again(self) -> None:
        """Have the next visit ask the registry once more; what it knew before is covered, too.

        While a bust waited, something may have been made of the old value and registered.
        """
        if self._looked_up is not None:
            self._known = self._looked_up
            self._looked_up = None

    async def abandon(self) -> None:
        """End what was begun and is not done: what has been removed stays so, and the rest is as it was."""
        for begun in list(self._begun.values()):
            try:
                await self._end(begun.layer)
            except BackendFailure:
                continue  # it is ended before the next bust begins there
            except Exception:  # noqa: BLE001 - logged in full; the others are ended, too
                _log.exception("unexpected error at the layer %s while a bust was broken off", begun.layer.name)

    async def count(self, layer: Layer) -> int:
        """Tell how many entries this bust would remove or mark at a layer now.

        Raises `BackendFailure` if that cannot be told, and `RefusedKey` if nothing of it could be there.
        """
        found: set[str] = set()
        missed: list[BackendFailure | RefusedKey] = []
        async with aclosing(self._covered(_Search(layer, self._wide, missed=missed))) as covered:
            async for keys in covered:
                found.update(await layer.backend.held(self.wish.namespace, keys, stale=not self.wish.soft))
                await self._turns.take(len(keys))
        for miss in missed:
            if isinstance(miss, BackendFailure) or not found:
                raise miss
        return len(found)

    async def prepare(self) -> None:
        """Begin where nothing but the registry is: what is registered from now on is of what no layer holds yet.

        Before any other layer is begun at. What readers make anew behind the first fence stays registered. Who is to be
        told of the named is looked up here, too, for the answer may come before anything is removed.
        """
        for layer in self._engine.layers:
            if layer.backend.traits.registry and len(self._engine.layers) > 1:
                await self._begin(layer)
        await self._note_named()

    async def _begin(self, layer: Layer) -> int:
        begun = self._begun.get(layer.name)
        if begun is not None and layer.name not in self._broken:
            return begun.generation
        backend = layer.backend
        fences = self._engine.fences[layer.name]
        await fences.end_owed()
        generation = await backend.begin(self.scope, soft=self.wish.soft, wide=self._wide)
        if self._is_counted(layer):
            fences.begun(self.scope, generation, again=begun is not None)
        if begun is None:
            self._begun[layer.name] = _Begun(layer, generation, generation)
        else:
            begun.generation = generation
        self._broken.discard(layer.name)
        self._step(f"begun {layer.name}")
        self._estimates[layer.name] = await backend.estimate(self.scope)
        return generation

    async def _begin_later(self, layer: Layer) -> int:
        """Have another generation, later than all that was read by now."""
        begun = self._begun[layer.name]
        begun.generation = await layer.backend.begin(self.scope, soft=self.wish.soft, wide=self._wide)
        if self._is_counted(layer):
            self._engine.fences[layer.name].begun(self.scope, begun.generation, again=True)
        return begun.generation

    async def _end(self, layer: Layer) -> None:
        begun = self._begun.pop(layer.name)
        if self._is_counted(layer):
            await self._engine.fences[layer.name].end(self.scope, begun.fenced)
        else:
            await layer.backend.end(self.scope, begun.generation)

    def _is_counted(self, layer: Layer) -> bool:
        """Whether readers miss at this layer what is begun, so that several busts may need the same fence."""
        return layer.backend.traits.fences and not self.wish.soft

    async def _sweep(self, layer: Layer, generation: int, *, wide: bool) -> None:
        tally = _Tally()
        await self._remove(_Search(layer, wide, generation), tally)
        self._conclude(layer, tally)
        if tally.refused is not None and not tally.looked_at:
            _, dependents = await self._look_up()
            if wide == self._wide or not dependents:
                raise tally.refused

    async def _remove(self, search: _Search, tally: _Tally) -> None:
        """Remove, or mark, all that is covered."""
        search = replace(search, missed=[])
        await self._remove_found(search, self._covered(search), tally)

    async def _remove_found(self, search: _Search, covered: AsyncGenerator[list[str], None], tally: _Tally) -> None:
        layer, wish = search.layer, self.wish
        async with aclosing(covered):
            async for keys in covered:
                try:
                    removing = layer.backend.remove(wish.namespace, keys, generation=search.since, soft=wish.soft)
                    self.removed[layer.name] += await removing
                except RefusedKey as error:
                    if wish.kind == "key" and keys == [wish.target]:
                        tally.refused = error  # it cannot be there, and what depends on it can
                        continue
                    tally.failures.append(BackendFailure(f"a key {error}"))
                except BackendFailure as error:
                    self.removed[layer.name] += error.removed
                    if error.unreachable:
                        raise
                    tally.failures.append(error)
                tally.looked_at += len(keys)
                self._looked_at[layer.name] = max(tally.looked_at, self._looked_at.get(layer.name, 0))
                self._step(f"swept {layer.name}")
                await self._turns.take(len(keys))
        for miss in search.missed or ():
            if isinstance(miss, RefusedKey):
                tally.refused = miss
            else:
                tally.failures.append(miss)

    def _conclude(self, layer: Layer, tally: _Tally) -> None:
        """Raise for what failed, once all the rest is done."""
        if failures := tally.failures:
            removed, failed = self.removed[layer.name], sum(error.failed for error in failures)
            raise BackendFailure(
                f"{removed} removed, {failed} not removed: {failures[0]}", removed=removed, failed=failed
            ) from failures[0]

    async def _verify(self, layer: Layer, generation: int) -> None:
        left = 0
        async with aclosing(self._covered(_Search(layer, self._wide))) as covered:
            async for keys in covered:
                held = layer.backend.held(self.wish.namespace, keys, generation=generation, stale=not self.wish.soft)
                left += len(await held)
                await self._turns.take(len(keys))
        if left:
            raise BackendFailure(
                f"verified, and {left} of what was to be removed {'is' if left == 1 else 'are'} still held", failed=left
            )

    # What is covered

    async def _covered(self, search: _Search) -> AsyncGenerator[list[str], None]:
        """Find all that is covered at a layer, in slices; what belongs to the named comes after it."""
        layer = search.layer
        named, dependents = await self._look_up()
        if not search.links:
            dependents = []
        seen: set[str] = set()  # dependents that were found here
        if search.wide and layer.backend.traits.registry:
            # What belongs to the named goes first, and of a chain its end: see `Engine.dependents`.
            seen.update(dependents)
            async for more in self._belonging_to_target(search, dependents[::-1]):
                yield more
        async with aclosing(self._named(search, named)) as batches:
            async for batch in batches:
                for keys in slices(batch):
                    # The variants of what a prefix covers are covered, too, but for those of the prefix itself.
                    alone = keys if search.wide and self.wish.kind == "tag" else []
                    await self._fence(search, alone)
                    yield keys
                    if search.wide and self.wish.kind in {"prefix", "tag"}:
                        found = await self._walk(keys, seen) if search.links else self._note(keys)
                        async for more in self._belonging(search, alone, found):
                            yield more
        if search.wide and not layer.backend.traits.registry:
            left = [key for key in dependents if key not in seen]
            async for more in self._belonging_to_target(search, left):
                yield more

    async def _belonging_to_target(self, search: _Search, dependents: Sequence[str]) -> AsyncGenerator[list[str], None]:
        """Find the variants of what was named, and these dependents with their variants."""
        if self.wish.kind == "all":
            return
        # The named itself need not be held for its variants and dependents to be.
        named = [self.wish.target] if self.wish.kind in {"key", "prefix"} else []
        async for more in self._belonging(search, holdable(search.layer, self.wish.namespace, named), dependents):
            yield more

    async def _named(self, search: _Search, registered: Sequence[str]) -> AsyncGenerator[Sequence[str], None]:
        if self.wish.kind == "key":
            # Whether it is held is for `remove` to tell, which also refuses what can be seen only there.
            yield holdable(search.layer, self.wish.namespace, [self.wish.target])
            return
        left = dict.fromkeys(registered)
        # A walk of files has descriptors open, so that it is closed at once where the visit ends early.
        try:
            async with aclosing(search.layer.backend.select(self.scope)) as found:
                async for batch in found:
                    yield batch
                    for key in batch if left else ():
                        left.pop(key, None)
        except (BackendFailure, RefusedKey) as error:
            search.pass_over(error)
        async for some in self._registered(search, list(left)):
            yield some

    async def _registered(self, search: _Search, keys: Sequence[str]) -> AsyncGenerator[list[str], None]:
        """Go through what only the registry knows to bear the tag, which no fence of the tag covers."""
        for some in slices(keys):
            held = holdable(search.layer, self.wish.namespace, some)
            await self._fence(search, held)
            yield held

    async def _belonging(
        self, search: _Search, keys: Sequence[str], dependents: Sequence[str]
    ) -> AsyncGenerator[list[str], None]:
        """Find the variants of these keys, and these dependents with the variants of those."""
        for some in slices(dependents):
            more = holdable(search.layer, self.wish.namespace, some)
            await self._fence(search, more)
            async for found in self._with_variants(search, more, more):
                yield found
        async for found in self._with_variants(search, [], keys):
            yield found

    async def _with_variants(
        self, search: _Search, these: Sequence[str], of: Sequence[str]
    ) -> AsyncGenerator[list[str], None]:
        more = list(these)
        for some in slices(of):
            try:
                more += await search.layer.backend.variants(self.wish.namespace, some)
            except BackendFailure as error:
                search.pass_over(error)
                more += error.found
            await self._turns.take(len(some))
        for some in slices(more):
            yield some

    async def _fence(self, search: _Search, keys: Sequence[str]) -> None:
        if keys and search.fenced is not None:
            backend, wish = search.layer.backend, self.wish
            begun = self._begun.get(search.layer.name)
            if begun is not None and self._is_counted(search.layer):
                fences = self._engine.fences[search.layer.name]
                for key in keys:
                    again = key in begun.fenced
                    begun.fenced[key] = None
                    fences.fenced(wish.namespace, key, search.fenced, again=again)
            await backend.fence(wish.namespace, keys, generation=search.fenced, soft=wish.soft)

    def _note(self, keys: Sequence[str]) -> list[str]:
        """Note which of these something depends on; that is covered later."""
        if (index := self._index) is not None:
            self._members.update((key, None) for key in keys if index.direct((key,)))
        return []

    async def _levels(self) -> list[list[str]]:
        """List what depends on the named, also by way of others, each in a later level than all that it is made of."""
        named, _ = await self._look_up()
        if (index := self._index) is None:
            return []
        subjects = dict.fromkeys([*await self._subjects(index, named), *self._members])
        levels = await levels_of(index, list(subjects), self._turns)
        await self._note_also([key for level in levels for key in level])
        return levels

    async def _walk(self, names: Sequence[str], seen: set[str]) -> list[str]:
        """List what the registry knows to depend on these, also by way of others, and is not in `seen` yet."""
        found: list[str] = []
        if (index := self._index) is not None:
            for some in index.walk(names, seen):
                found += some
                await self._note_also(some)
                await self._turns.take(len(some) + min(len(names), SLICE))
        return found

    async def _look_up(self) -> tuple[list[str], list[str]]:
        """Tell what the registry knows to be named by a tag, and to depend on what is named, before it is removed."""
        async with self._looking:  # of layers that are busted together none removes before this is known
            if self._looked_up is None:
                named: list[str] = []
                subjects: list[str] = []
                if (index := self._index) is not None:
                    if self.wish.kind == "tag":
                        named = await self._all_of(partial(index.tagged, self.wish.target))
                    await self._note_named()
                    await self._note_also(named)
                    subjects = await self._subjects(index, named) if self._wide else []
                known, before = self._known
                found = await self._walk(subjects, set())
                self._looked_up = (list(dict.fromkeys([*known, *named])), list(dict.fromkeys([*before, *found])))
            return self._looked_up

    async def _note_also(self, keys: Sequence[str]) -> None:
        """Note what goes beside the named, and the tags of it."""
        self.also.update(dict.fromkeys(keys))
        index = self._index
        if index is None or not index.has_tags:
            return
        for some in slices(keys):
            if not self.borne.is_wanted:
                return
            self.borne.note(index, some, wide=self._wide)
            await self._turns.take(len(some))

    async def _note_named(self) -> None:
        """Note the tags of the entries that are named."""
        self.borne.begin()
        wish, index = self.wish, self._index
        if wish.kind == "all" or index is None or not index.has_tags:
            return
        if wish.kind != "tag":
            self.borne.note(index, [wish.target], wide=self._wide)
        if wish.kind == "key":
            return
        look, last = (index.under if wish.kind == "prefix" else index.tagged), None
        while self.borne.is_wanted and (some := look(wish.target, after=last, limit=SLICE)):
            # Variants of what lies below a prefix lie there, too.
            self.borne.note(index, some, wide=self._wide and wish.kind == "tag")
            last = some[-1]
            await self._turns.take(len(some))

    async def _all_of(self, look: Callable[..., list[str]]) -> list[str]:
        """List all that is found by looking again and again, behind the last of what was found."""
        found: list[str] = []
        while some := look(after=found[-1] if found else None, limit=SLICE):
            found += some
            await self._turns.take(len(some))
        return found

    async def _subjects(self, index: Index, named: list[str]) -> list[str]:
        match self.wish.kind:
            case "key":
                return [self.wish.target]
            case "prefix":
                return await self._all_of(partial(index.subjects_under, self.wish.target))
            case "tag":
                return named
            case "all":
                return []


@final
class Turns:
    """Gives the event loop its turn once a slice of keys was looked at, in however small steps."""

    def __init__(self) -> None:
        self._since = 0

    async def take(self, keys: int) -> None:
        """Count so many more."""
        self._since += keys
        if self._since >= SLICE:
            self._since = 0
            await asyncio.sleep(0)


async def levels_of(index: Index, subjects: Sequence[str], turns: Turns) -> list[list[str]]:
    """List what depends on any of `subjects`, also by way of others, each in a later level than all it is made of.

    Among it is what is gone, if its links are kept. In a circle nothing comes first: all is told twice then.
    """
    depth: dict[str, int] = {}
    ahead = list(subjects)
    for number in range(_DEEPEST):
        found: set[str] = set()
        for some in slices(ahead):
            found |= index.direct(some)
            await turns.take(len(some))
        depth.update(dict.fromkeys(found, number))
        ahead = list(found)
        if not ahead:
            break
    else:
        return await _levels_of_deep(index, ahead, depth, turns)
    levels: list[list[str]] = [[] for _ in range(max(depth.values(), default=-1) + 1)]
    for key, its in depth.items():
        levels[its].append(key)
    return [level for level in levels if level]


async def _levels_of_deep(index: Index, ahead: Sequence[str], found: Iterable[str], turns: Turns) -> list[list[str]]:
    """Do the same where it is very deep or goes in a circle: one after the other, each once all before it are told."""
    left = dict.fromkeys(found)
    for some in index.walk(ahead, set()):
        left.update(dict.fromkeys(some))
        await turns.take(len(some))
    before = Counter[str]()  # how many of those left each is made of
    for key in left:
        before.update(index.direct((key,)) - {key})
        await turns.take(1)
    levels: list[list[str]] = []
    is_circle = False
    ready = [key for key in left if not before[key]]
    while left:
        if not ready:
            is_circle = True
            ready = [next(iter(left))]
        levels.append(ready)
        for key in ready:
            del left[key]
        made: dict[str, None] = {}
        for key in ready:
            for other in index.direct((key,)) - {key}:
                before[other] -= 1
                if other in left and before[other] <= 0:
                    made[other] = None
            await turns.take(1)
        ready = list(made)
    return levels * 2 if is_circle else levels


def holdable(layer: Layer, namespace: str, keys: Iterable[str]) -> list[str]:
    """List those of `keys` that a layer could hold."""
    held = []
    for key in keys:
        try:
            layer.backend.check(namespace, key)
        except RefusedKey:
            continue
        held.append(key)
    return held


def slices(keys: Sequence[_T]) -> Iterator[list[_T]]:
    """Cut keys into slices, between which the event loop has its turn."""
    for begin in range(0, len(keys), SLICE):
        yield list(keys[begin : begin + SLICE])


async def count_removed(removing: Awaitable[int]) -> int:
    """Tell how many went; a key that is refused only when it is looked at counts as a failure of the cache."""
    try:
        return await removing
    except RefusedKey as error:
        raise BackendFailure(f"a key {error}") from error
