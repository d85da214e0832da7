"""What the engine needs of a cache: the seam that every backend fits into.

This module decides only the shape of a backend, what it may declare of itself, and how it says no. What a bust covers,
in which order and how often, is the engine's to decide; a backend finds, removes and reads back.

A bust at one backend is a conversation: `begin` (from now on no fill that began earlier is stored, where the backend
can see to that), then any number of `select`, `variants`, `fence` and `remove`, at last `end`. What was born after
`begin` is left alone by `remove` where the backend can tell, so that a bust which is repeated, or takes long, costs no
more misses than it must. A conversation that breaks off is begun anew, from its beginning.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Final, Protocol, final

from pybustcall.errors import InvalidRequest
from pybustcall.keys import check_marks, covers
from pybustcall.models import KINDS, Kind, check_target, redact

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Mapping, Sequence

__all__ = ["NO_KEYS", "Backend", "BackendFailure", "RefusedKey", "Scope", "Traits", "check_for_readers"]

NO_KEYS: Final[Mapping[str, int]] = MappingProxyType({})
"""What a bust has fenced that nothing depends on."""


class RefusedKey(ValueError):
    """This backend could never hold such a key. The text is the reason without the key: "has an empty segment"."""


def check_for_readers(key: str) -> None:
    """Raise `RefusedKey` if no reader could store under `key`."""
    try:
        check_target(key, "key")
        check_marks(key)
    except InvalidRequest as error:
        raise RefusedKey(str(error).removeprefix("key ").removesuffix("; nothing was sent")) from None


class BackendFailure(Exception):
    """A cache could not do what was asked. The text never shows a whole key.

    - `removed`, `failed`: how many keys were removed in spite of it, and how many were not
    - `found`: the variants that were found in spite of it
    - `unreachable`: the cache as a whole cannot be used now, so that the next bust would meet the same
    """

    def __init__(
        self,
        message: str,
        *,
        removed: int = 0,
        failed: int = 1,
        unreachable: bool = False,
        found: Sequence[str] = (),
    ) -> None:
        super().__init__(message)
        self.removed = removed
        self.failed = failed
        self.found = found
        self.unreachable = unreachable


@final
@dataclass(frozen=True, slots=True)
class Scope:
    """What a target names, in one namespace: a key, a branch of keys, the entries with a tag, or everything."""

    namespace: str
    kind: Kind
    target: str

    def covers(self, key: str) -> bool:
        """Tell whether it names `key` by its text alone; of a tag that cannot be told, and it is False."""
        match self.kind:
            case "key":
                return key == self.target
            case "prefix":
                return covers(self.target, key)
            case "tag":
                return False
            case "all":
                return True

    def __str__(self) -> str:
        return f"{self.kind} {redact(self.target)}"


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Traits:
    """What a kind of cache can do.

    - `kinds`: what it can find entries by; what is not here is refused before anything is removed
    - `soft`: whether it can mark entries as stale
    - `namespaces`: whether it keeps tenants apart, or knows the default namespace only
    - `fences`: whether readers take everything that a hard bust names for a miss as soon as it has begun
    - `remote`: whether it is reached over a network, and so may be away while the daemon is well
    - `settle`: seconds after which a second bust is needed, since a fill in flight could be stored after the first;
      0 where the cache itself refuses late fills
    - `counts`: whether it can list what it holds. Where it cannot, `begin` and `fence` do all of a bust at once,
      `select` tells nothing but of one key, `variants` tells those that have names of their own, and nobody knows how
      many entries a prefix, a tag or everything covered
    - `registry`: whether it is nothing but what the engine's indexes know. Nobody reads from it, so it is busted after
      all other layers, which need what it knows, and beside them not a second time
    """

    kinds: frozenset[Kind] = frozenset(KINDS)
    soft: bool = False
    namespaces: bool = True
    fences: bool = False
    remote: bool = False
    settle: float = 0.0
    counts: bool = True
    registry: bool = False


class Backend(Protocol):
    """One cache that busts are applied to. Everything that waits raises `BackendFailure` if the cache cannot do it.

    Belongs to one event loop, from `open` to `close`. No call blocks the loop for more than a few milliseconds, however
    much the cache holds: `select` comes in batches, and the engine gives `variants`, `remove` and `held` at most 500
    keys at a time. A call that is cancelled may have done its work or not; nothing is left half done by it.
    """

    @property
    def name(self) -> str:
        """What this kind of backend is called, as in "memory"."""

    @property
    def traits(self) -> Traits:
        """What it can do."""

    def check(self, namespace: str, key: str) -> None:
        """Raise `RefusedKey` if this backend could never hold `key`."""

    async def open(self) -> None:
        """Make ready what belongs to the running event loop; a cache that does not answer is no error here."""

    async def close(self) -> None:
        """Close what `open` made. Repeating it is harmless."""

    async def check_ready(self) -> None:
        """Raise `BackendFailure` if the cache cannot be used now."""

    async def begin(self, scope: Scope, *, soft: bool, wide: bool = False) -> int:
        """Begin a bust; tell its generation, by which `remove` and `held` know what was born before.

        From now on no fill that began earlier is stored under what `scope` names, nor, if it is `wide`, as a variant of
        the key or of the prefix that it names, where the backend can refuse late fills.
        """

    async def fence(self, namespace: str, keys: Sequence[str], *, generation: int, soft: bool) -> None:
        """Refuse late fills of these keys and of their variants as well, and, unless it is soft, let readers miss them.

        They depend on what is busted. Nothing where it cannot be done.
        """

    async def end(
        self, scope: Scope, generation: int, *, named: bool = True, keys: Mapping[str, int] = NO_KEYS
    ) -> None:
        """End a bust that began as `generation`, unless not `named`, and its fences over `keys`, of these generations.

        What was begun again since, by another daemon, goes on.
        """

    def select(self, scope: Scope) -> AsyncGenerator[Sequence[str], None]:
        """Find the keys held that `scope` names, in batches of at most 500, none twice. Holds still for no writer.

        Of a key it tells it if it is held. A key that this backend could never hold is not held. Raises `RefusedKey`
        for a prefix below which it turns out, only when it is looked at, that nothing could be held, and
        `BackendFailure` for what cannot be looked through, after all the rest was.
        """

    async def estimate(self, scope: Scope) -> int | None:
        """Tell about how many keys `select` will find, if that costs little; None otherwise."""

    async def variants(self, namespace: str, keys: Sequence[str]) -> list[str]:
        """List the keys held that are variants of any of `keys`, each once; what it could never hold has none.

        A `BackendFailure` for what cannot be looked through has what was `found` in the rest.
        """

    async def remove(self, namespace: str, keys: Sequence[str], *, generation: int, soft: bool) -> int:
        """Remove these keys, or mark them as stale; tell how many of them there were.

        Left alone and not counted: what was born after `generation` began. Raises `RefusedKey` for a key that it could
        never hold, and that is the only one; several are refused one by one, and the others are removed.
        """

    async def held(
        self, namespace: str, keys: Sequence[str], *, generation: int | None = None, stale: bool = False
    ) -> list[str]:
        """List those of `keys` that are held; with a `generation`, only those born before it began.

        What is marked as stale is held, too, if `stale` says so. A key that it could never hold is not held.
        """

    async def size_bytes(self) -> int:
        """Tell how many bytes the cache holds, in all namespaces."""
