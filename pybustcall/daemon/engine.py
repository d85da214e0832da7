"""The layers of caches behind a daemon: what they can do together, in which order they are busted, and what they hold.

This module decides which busts can be done at all, in which groups layers follow one another, and what is registered
in them. What one bust covers is decided by `bust`; when it is done, retried, settled and answered by `jobs`; how
anybody asks, by the app. docs/explanation/engine.md tells why it is so.
"""

from __future__ import annotations

import asyncio
import logging
import time
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Final, final

from pybustcall.daemon.backends import BackendFailure, RefusedKey, Scope
from pybustcall.daemon.bust import Bust, Turns, count_removed, holdable, levels_of, slices
from pybustcall.daemon.fences import OpenFences
from pybustcall.daemon.registrations import read_registrations, refuse_entries, shown_name
from pybustcall.models import DEFAULT_NAMESPACE, KINDS, STRATEGIES

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Iterable, Sequence

    from pybustcall.daemon.backends import Backend
    from pybustcall.daemon.index import Indexes
    from pybustcall.daemon.journal import Wish

__all__ = ["Engine", "IndexFull", "Layer", "Removal", "Unsupported", "format_size"]

_log = logging.getLogger("pybustcall.daemon")

_SIZE_AGE: Final = 5.0  # seconds: walking a large cache for its size more often would hold up busts


class Unsupported(ValueError):
    """This daemon cannot do what is asked. `field` names what asks for it, `supported` what could stand there."""

    def __init__(self, text: str, field: str, supported: tuple[str, ...] = ()) -> None:
        super().__init__(text)
        self.field = field
        self.supported = supported


class IndexFull(Exception):
    """There are as many entries as may be, and this would be another."""

    def __init__(self, most: int) -> None:
        super().__init__(f"the registry is full: it has the most entries that it may have, {most}")


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Layer:
    """One of the caches that lie behind one another.

    - `name`: by which it is told in answers
    - `number`: its place, the innermost lowest; layers of one number are busted together
    - `settle`: seconds after which it is busted again; None is the backend's own, 0 never
    """

    name: str
    number: int
    backend: Backend
    settle: float | None = None

    def settles_after(self, asked: float | None) -> float:
        """Tell after how many seconds a bust is repeated here, `asked` being what the request says; 0 for never."""
        if asked is not None:
            return asked
        return self.backend.traits.settle if self.settle is None else self.settle


@final
@dataclass(frozen=True, slots=True)
class Removal:
    """How many entries a bust removed or marked, in all layers together. None is a success too."""

    count: int = 0


@final
class Engine:
    """Applies busts to layers of caches, by what the indexes know of entries and their dependents.

    - `direct`: exactly what is named
    - `dimensional`: that, its variants, its dependents (also by way of others) and their variants
    - `hybrid`: as `dimensional`; the direct part comes first and can be answered

    `step` is told each step of a visit once it is done: "begun", "swept" (one slice), "ended", with the layer's name.
    Belongs to one event loop, from `open` to `close`. A bust whose caller is cancelled may have been applied in part.
    """

    def __init__(
        self, layers: Sequence[Layer], indexes: Indexes, *, step: Callable[[str], None] = lambda _step: None
    ) -> None:
        self.layers = tuple(sorted(layers, key=lambda layer: layer.number))
        last_of_all = sorted(self.layers, key=lambda layer: layer.backend.traits.registry)
        grouped = groupby(last_of_all, key=lambda layer: (layer.backend.traits.registry, layer.number))
        self._groups = tuple(tuple(group) for _, group in grouped)
        self.indexes = indexes
        self.step = step
        self._measuring = asyncio.Lock()
        self._size: tuple[float, int] | None = None
        self.fences = {layer.name: OpenFences(layer.backend) for layer in self.layers}

    def __repr__(self) -> str:
        return f"Engine({', '.join(f'{layer.number} {layer.name}' for layer in self.layers)})"

    @property
    def groups(self) -> tuple[tuple[Layer, ...], ...]:
        """The layers in the order of a bust: inside out, those of one number together; a registry comes last."""
        return self._groups

    def rounds(self, asked: float | None) -> list[tuple[float, frozenset[str]]]:
        """Tell when which layers are busted a second time, in seconds from the first; `asked` as of `settles_after`.

        With a layer all that lie outside of it are, for they may have been refilled from it meanwhile. A registry
        beside other layers is not: what was registered since the first bust would be forgotten.
        """
        layers = [layer for layer in self.layers if not layer.backend.traits.registry] or self.layers
        own = {layer: seconds for layer in layers if (seconds := layer.settles_after(asked)) > 0}
        rounds = []
        for seconds in sorted(set(own.values())):
            due = {layer for layer, its in own.items() if its == seconds}
            inmost = min(layer.number for layer in due)
            outside = {layer for layer in layers if layer.number > inmost}
            rounds.append((seconds, frozenset(layer.name for layer in due | outside)))
        return rounds

    async def open(self) -> None:
        """Open the backends. One that does not answer is no error: see `check_ready`."""
        opened: list[Layer] = []
        try:
            for layer in self.layers:
                opened.append(layer)
                await layer.backend.open()
        except BaseException:
            for layer in opened:
                await layer.backend.close()
            raise

    async def close(self) -> None:
        """Close the backends, all of them; the first error is raised afterwards."""
        failures: list[Exception] = []
        for layer in self.layers:
            try:
                await layer.backend.close()
            except Exception as error:  # noqa: BLE001 - the others are closed, too
                failures.append(error)
        if failures:
            raise failures[0]

    # What can be asked

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kinds that every layer can find entries by."""
        return tuple(kind for kind in KINDS if all(kind in layer.backend.traits.kinds for layer in self.layers))

    @property
    def soft(self) -> bool:
        """Whether every layer can mark entries as stale."""
        return all(layer.backend.traits.soft for layer in self.layers)

    @property
    def namespaces(self) -> bool:
        """Whether every layer keeps tenants apart."""
        return all(layer.backend.traits.namespaces for layer in self.layers)

    @property
    def counts(self) -> bool:
        """Whether every layer can list what it holds, so that a dry run can tell what would be removed."""
        return all(layer.backend.traits.counts for layer in self.layers)

    def check(self, wish: Wish) -> None:
        """Raise `Unsupported` or `RefusedKey` if this cannot be done, before anything is removed.

        A key that some layer could hold, or that something depends on, is not refused.
        """
        if wish.strategy not in STRATEGIES:
            known = ", ".join(STRATEGIES)
            raise Unsupported(f"the strategy is not known; supported are {known}", "strategy", STRATEGIES)
        for layer in self.layers:
            traits = layer.backend.traits
            if wish.kind not in traits.kinds:
                raise Unsupported(
                    f"the layer {layer.name} ({layer.backend.name}) cannot find entries by {wish.kind}; nothing was"
                    f" removed anywhere; supported are {', '.join(self.kinds)}",
                    "kind",
                    self.kinds,
                )
            if wish.soft and not traits.soft:
                raise Unsupported(
                    f"the layer {layer.name} ({layer.backend.name}) cannot mark entries as stale; nothing was removed"
                    " anywhere; bust without soft",
                    "soft",
                )
            if wish.namespace != DEFAULT_NAMESPACE and not traits.namespaces:
                raise Unsupported(
                    f"the layer {layer.name} ({layer.backend.name}) has no namespaces; nothing was removed anywhere",
                    "namespace",
                )
        if wish.kind in {"key", "prefix"}:
            self._check_holdable(wish)

    def _check_holdable(self, wish: Wish) -> None:
        try:
            self.check_key(wish.namespace, wish.target)
        except RefusedKey:
            index = self.indexes.peek(wish.namespace)
            if wish.kind == "key":
                if index is None or not index.dependents(wish.target):
                    raise
            elif index is None or not index.subjects_under(wish.target, limit=1):
                # `a/` is no path of a file and covers some, and `..` covers `..:a`: what is below may be sound.
                self.check_key(wish.namespace, wish.target + ":")

    def check_key(self, namespace: str, key: str) -> None:
        """Raise `RefusedKey` if no layer could ever hold `key`, telling the reason of the outermost."""
        refusal: RefusedKey | None = None
        for layer in self.layers:
            try:
                layer.backend.check(namespace, key)
            except RefusedKey as error:
                refusal = error
            else:
                return
        if refusal is not None:
            raise refusal

    # Busting

    def bust(self, wish: Wish) -> Bust:
        """Make the bust of a checked wish. Nothing is done before its `visit`."""
        return Bust(self, wish)

    async def count(self, wish: Wish) -> dict[str, int]:
        """Tell for each layer how many entries the bust would remove or mark now, and change nothing.

        Raises `Unsupported` if a layer can never tell, `BackendFailure` if it cannot now, and `RefusedKey` as the bust
        would.
        """
        for layer in self.layers:
            if not layer.backend.traits.counts:
                raise Unsupported(
                    f"the layer {layer.name} ({layer.backend.name}) cannot list what it holds, so that nobody can tell"
                    " what would be removed; bust without dry_run",
                    "dry_run",
                )
        bust = Bust(self, wish)
        counts: dict[str, int] = {}
        for layer in self.layers:
            try:
                counts[layer.name] = await bust.count(layer)
            except RefusedKey:
                if len(self.layers) == 1:
                    raise
                counts[layer.name] = 0  # what one of several layers could never hold is not held there
        return counts

    async def bust_dependents(self, names: Iterable[str]) -> Removal:
        """Remove what depends on any of these names, with the variants; the names themselves need be no keys.

        In all namespaces: a dependency is the whole daemon's. Raises `BackendFailure` if a layer could not do it, after
        all the others were tried; the registry then still knows what is owed.
        """
        asked = list(names)
        removed, failures = 0, list[BackendFailure]()
        for layer in (layer for group in self.groups for layer in group):
            traits = layer.backend.traits
            if failures and traits.registry:
                continue
            # For each layer anew: something may have been registered meanwhile.
            for namespace, levels in (await self.dependents(asked)).items():
                if not traits.namespaces and namespace != DEFAULT_NAMESPACE:
                    continue
                try:
                    removed += await self._remove_levels(layer, namespace, levels)
                except BackendFailure as error:
                    failures.append(error)
        if failures:
            first = failures[0]
            removed += sum(error.removed for error in failures)
            failed = sum(error.failed for error in failures)
            raise BackendFailure(
                f"{removed} removed, {failed} not removed: {first}",
                removed=removed,
                failed=failed,
                unreachable=first.unreachable,
            ) from first
        return Removal(removed)

    async def dependents(self, names: Iterable[str]) -> dict[str, list[list[str]]]:
        """List for each namespace the entries that depend on any of these names, also by way of others, in levels.

        Each comes in a later level than all that it is made of. A registry forgets them in the other order, so that a
        removal that ends early leaves nothing behind that is not found again.
        """
        asked, turns = list(names), Turns()
        found = {namespace: await levels_of(index, asked, turns) for namespace, index in list(self.indexes)}
        return {namespace: levels for namespace, levels in found.items() if levels}

    async def _remove_levels(self, layer: Layer, namespace: str, levels: list[list[str]]) -> int:
        keys = sum(map(len, levels))
        try:
            return await self._remove_each(layer, namespace, levels[::-1] if layer.backend.traits.registry else levels)
        except BackendFailure as error:
            failed = keys - error.removed if error.unreachable else error.failed
            raise BackendFailure(
                str(error), removed=error.removed, failed=failed, unreachable=error.unreachable
            ) from error

    async def _remove_each(self, layer: Layer, namespace: str, levels: list[list[str]]) -> int:
        """Remove these keys with their variants, level by level; what fails is passed over, and told at the end."""
        backend, removed = layer.backend, 0
        failures: list[BackendFailure] = []

        def pass_over(error: BackendFailure) -> None:
            if error.unreachable:
                raise BackendFailure(str(error), removed=removed + error.removed, unreachable=True) from error
            failures.append(error)

        for some in (some for level in levels for some in slices(holdable(layer, namespace, level))):
            scope = Scope(namespace, "key", some[0])
            try:
                generation = await backend.begin(scope, soft=False, wide=True)
                if more := some[1:]:
                    await backend.fence(namespace, more, generation=generation, soft=False)
            except BackendFailure as error:
                error.failed = len(some)
                pass_over(error)
                continue
            try:
                named = [*some, *await backend.variants(namespace, some)]
            except BackendFailure as error:
                pass_over(error)
                named = [*some, *error.found]
            for each in slices(named):
                try:
                    removed += await count_removed(backend.remove(namespace, each, generation=generation, soft=False))
                except BackendFailure as error:
                    pass_over(error)
                    removed += error.removed
            await backend.end(scope, generation, keys=dict.fromkeys(more, generation))
            await asyncio.sleep(0)
        if failures:
            failed = sum(error.failed for error in failures)
            raise BackendFailure(str(failures[0]), removed=removed, failed=failed) from failures[0]
        return removed

    # Entries

    def register(
        self,
        key: str,
        depends_on: Iterable[str] = (),
        *,
        namespace: str = DEFAULT_NAMESPACE,
        tags: Iterable[str] = (),
        ttl: float | None = None,
        most: int | None = None,
    ) -> None:
        """Note that a cache holds `key`, made of what `depends_on` names; a second time replaces the first.

        Raises `RefusedKey` if no layer could ever hold `key`, and `IndexFull` if it is new and there are `most`
        entries already. What it depends on, and its tags, may be anything. Without `ttl` (seconds) it does not end.
        """
        self.check_key(namespace, key)
        index = self.indexes.peek(namespace)
        if most is not None and len(self.indexes) >= most and (index is None or key not in index):
            raise IndexFull(most)
        self.indexes.of(namespace).add(key, depends_on, tags=tags, ttl=ttl)

    def load_registrations(self, path: str | os.PathLike[str]) -> int:
        """Register what a JSON file lists, all or nothing, in the default namespace; tell how many entries.

        Raises `ConfigurationError` (setting "entries") telling the file, the key, what was expected and what found.
        """
        entries = read_registrations(path)
        for key in entries:
            try:
                self.check_key(DEFAULT_NAMESPACE, key)
            except RefusedKey as error:
                raise refuse_entries(path, f"the key {shown_name(key)} {error}") from None
        for key, depends_on in entries.items():
            self.indexes.of(DEFAULT_NAMESPACE).add(key, depends_on)
        return len(entries)

    # How the caches are

    async def check_ready(self) -> None:
        """Raise `BackendFailure` if a layer cannot be used now."""
        for layer in self.layers:
            await layer.backend.check_ready()

    async def size_text(self) -> str:
        """Tell how large the caches are together, as in "1.2MB". It may be 5 seconds old.

        Raises `BackendFailure` if it cannot be told.
        """
        async with self._measuring:
            now = time.monotonic()
            if self._size is None or now - self._size[0] >= _SIZE_AGE:
                self._size = (now, sum([await layer.backend.size_bytes() for layer in self.layers]))
            return format_size(self._size[1])


def format_size(size: int) -> str:
    """Write a number of bytes for people: "512B", "1.2KB", "1.2MB"; 1 KB is 1000 bytes."""
    if size < 1000:
        return f"{size}B"
    scaled = float(size)
    for unit in ("KB", "MB", "GB", "TB"):
        scaled /= 1000
        if round(scaled, 1) < 1000:
            return f"{scaled:.1f}{unit}"
    return f"{scaled / 1000:.1f}PB"
