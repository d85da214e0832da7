"""Which fences the busts under way have put up, and when the last bust that needs one has ended.

This module decides when a fence is taken away. What a fence does is the backends' to know, which busts put one up, over
what and when, the engine's.

Theory of operation. Two busts may have begun the same at a layer, or have the same dependent, and there is one fence
for both: it has the generation of the last one, and what it hides is needed by either. So all that were put up are
counted, by layer and by what they are over. One that nobody needs any more is ended by the newest generation that it
was put up with; if another daemon has put up the same since, the cache leaves it alone. What cannot be ended, since the
cache is away, is ended before the next bust begins there: readers miss more than they need to until then, and see
nothing old.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar, final

if TYPE_CHECKING:
    from collections.abc import Iterable

    from pybustcall.daemon.backends import Backend, Scope

__all__ = ["OpenFences"]

_Name = TypeVar("_Name")


@final
@dataclass(slots=True)
class _Fence:
    """How many busts need it, and the newest generation of theirs."""

    busts: int = 0
    newest: int = 0


@final
@dataclass(frozen=True, slots=True)
class _Owed:
    """What is to be ended: a scope, if its generation is not None, and fences over keys, by theirs."""

    scope: Scope
    generation: int | None
    keys: dict[str, int]


@final
class OpenFences:
    """The fences over one cache that busts under way need. Belongs to one event loop."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self._scopes: dict[Scope, _Fence] = {}
        self._keys: dict[tuple[str, str], _Fence] = {}  # by namespace and key
        self._owed: list[_Owed] = []

    def __len__(self) -> int:
        """How many there are, those that are owed an end not counted."""
        return len(self._scopes) + len(self._keys)

    def begun(self, scope: Scope, generation: int, *, again: bool) -> None:
        """Note that a bust has begun, or begun once more."""
        _put_up(self._scopes.setdefault(scope, _Fence()), generation, again=again)

    def fenced(self, namespace: str, key: str, generation: int, *, again: bool) -> None:
        """Note that a bust has a fence over a key, or has put it up once more."""
        _put_up(self._keys.setdefault((namespace, key), _Fence()), generation, again=again)

    async def end(self, scope: Scope, keys: Iterable[str]) -> None:
        """End a bust, and its fences over these keys, as far as no other bust needs them.

        Raises `BackendFailure` if the cache cannot do it; then it is owed.
        """
        own = _taken_down(self._scopes, scope)
        ended = {key: newest for key in keys if (newest := _taken_down(self._keys, (scope.namespace, key))) is not None}
        if own is not None or ended:
            self._owed.append(_Owed(scope, own, ended))
            await self.end_owed()

    async def end_owed(self) -> None:
        """End what could not be ended before. Raises `BackendFailure` if it still cannot be."""
        owed, self._owed = self._owed, []  # nobody else is at it meanwhile
        try:
            while owed:
                it = owed[0]
                named = it.generation is not None
                await self._backend.end(it.scope, it.generation or 0, named=named, keys=it.keys)
                owed.pop(0)
        finally:
            self._owed += owed


def _put_up(fence: _Fence, generation: int, *, again: bool) -> None:
    fence.busts += not again
    fence.newest = max(fence.newest, generation)


def _taken_down(fences: dict[_Name, _Fence], name: _Name) -> int | None:
    """Note that one bust less needs a fence; tell its generation if that was the last one."""
    fence = fences.get(name)
    if fence is None:
        return None
    fence.busts -= 1
    if fence.busts > 0:
        return None
    del fences[name]
    return fence.newest
