"""Caches that are none of ours, kept true by what daemons tell, as far as that can be: held weakly, cleared in doubt.

This module decides how a bust reaches a cache that knows nothing of busts, when such a cache is cleared because it may
have missed one, and who of a client's near caches and attached ones is told what the client busts itself. What daemons
tell, and how far that can be trusted, is decided by `events`. docs/explanation/near-caches.md tells why it is so.

Theory of operation. A cache is held by a weak reference whose end takes away all that is known of it, so that it goes
when the application drops it. Many caches cannot be hashed, therefore they are known by their identity; a reference
that ends takes away only its own record, for another cache may have that identity by then. Such a cache is read behind
our back: it can never be bypassed, only cleared. So while the daemons are not trusted it is cleared again and again.
"""

from __future__ import annotations

import asyncio
import functools
import gc
import inspect
import logging
import os
import types
import weakref
from collections import deque
from collections.abc import Callable, Iterable
from collections.abc import Sequence as SequenceABC
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, final

from pybustcall.errors import ConfigurationError
from pybustcall.events import BustEvent, Concern, Reset, clock, silence, tags_of
from pybustcall.faults import FaultKind

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pybustcall.events import Feed
    from pybustcall.near_cache import NearCache, NearCacheStatistics

__all__ = ["Attachment", "Attachments", "Drop", "Nearby"]

_log: Final = logging.getLogger("pybustcall")

_ATTACHMENTS: weakref.WeakSet[Attachments] = weakref.WeakSet()
_INHERITED: list[object] = []
"""What a forked child must neither use nor let the garbage collector find."""


def _after_fork() -> None:
    for attachments in list(_ATTACHMENTS):
        attachments.forget_parent()


os.register_at_fork(after_in_child=_after_fork)

Drop = Callable[[Any, BustEvent | Reset], object]
"""Drops from a cache what an event concerns, or everything for a `Reset`."""


@final
@dataclass(eq=False, slots=True)
class _Attached:
    """A foreign cache, held weakly, and how a bust reaches it."""

    ref: weakref.ref[Any]
    way: Callable[[_Attached, Any, Sequence[BustEvent | Reset]], None]
    key: Callable[[Any], object] | None
    tags: Callable[[Any], str | Iterable[str]] | None
    drop: Drop | None
    is_missed: bool = False  # whether it is a mistake that the application drops it

    @property
    def is_gone(self) -> bool:
        """Whether the application has dropped it."""
        return self.ref() is None

    def apply(self, events: Sequence[BustEvent | Reset]) -> None:
        """Have the cache drop what was busted, if it is still there. What it raises is logged."""
        cache = self.ref()
        if cache is None:
            return
        try:
            self.way(self, cache, events)
        # Of somebody else's code, which must not end what tells all others. Nothing is awaited here, so that this
        # cancellation is of something that is over, and not of the task that tells.
        except (Exception, asyncio.CancelledError):  # noqa: BLE001
            _log.exception("a bust could not be applied to an attached %s", type(cache).__name__)


@final
class Attachment:
    """A cache that is attached, or an object that was. Calling it ends that; repeating it is harmless."""

    def __init__(self, held: dict[object, _Attached], ident: object, attached: _Attached, name: str) -> None:
        self._held = held
        self._ident = ident
        self._attached = attached
        self._name = name

    def __call__(self) -> None:
        """Take it away again."""
        if self._held.get(self._ident) is self._attached:
            del self._held[self._ident]

    def __repr__(self) -> str:
        is_held = self._held.get(self._ident) is self._attached
        return f"Attachment({self._name}{'' if is_held else ', ended'})"

    def check_held(self) -> None:
        """Raise `ConfigurationError` if nobody holds what was attached. To be asked when its caller has let go of it.

        From then on it is told in the log if a plain function is dropped.
        """
        for setting in ("key", "tags", "drop"):
            function = getattr(self._attached, setting)
            if isinstance(function, _Loose) and function.is_gone:
                raise ConfigurationError(
                    f"nobody else holds the object of {setting}={function.name}, which is held weakly here; keep it"
                    " under a name of its own for as long as the cache",
                    setting=setting,
                )
        if self._attached.is_gone:
            raise ConfigurationError(
                f"nobody else holds this {self._name}, so that no bust could ever reach it; keep it under a name of its"
                " own for as long as it is to be told, for it is held weakly here",
                setting="cache",
            )
        self._attached.is_missed = isinstance(self._attached.ref(), types.FunctionType) and self._attached.way is _call


@final
class Attachments:
    """Foreign caches in one namespace, held weakly, and cleared whenever what they hold cannot be trusted.

    `needed`: how many daemons must be followed. Applied by one event loop at a time, the first that the client is used
    in; by the thread that attaches or busts where there is none.
    """

    def __init__(self, namespace: str, needed: int, *, clock: Callable[[], float] = clock) -> None:
        self._namespace = namespace
        self._needed = needed
        self._clock = clock
        self._held: dict[object, _Attached] = {}
        self._missed: list[str] = []  # functions that were dropped, of which the log is to tell
        self._feed: Feed | None = None
        self._heard: list[BustEvent] = []
        self._is_trusted = False
        self._timer: asyncio.TimerHandle | None = None
        self._refused_by: set[str] = set()  # of which the log has told
        _ATTACHMENTS.add(self)

    def __len__(self) -> int:
        return len(self._held)

    def __repr__(self) -> str:
        return f"Attachments({self._namespace}, {len(self)} caches, {'trusted' if self._is_trusted else 'not trusted'})"

    def attach(
        self,
        cache: object,
        key: Callable[[Any], object] | None,
        tags: Callable[[Any], str | Iterable[str]] | None,
        drop: Drop | None,
    ) -> Attachment:
        """Hold a cache weakly; return what takes it away again. Raises `ConfigurationError` for what cannot be held."""
        for setting, function in (("key", key), ("tags", tags), ("drop", drop)):
            if function is not None:
                _check_function(setting, function, cache)
        ident: object = id(cache)
        if isinstance(cache, types.MethodType):
            ident = id(cache.__self__), id(cache.__func__)
        name = _name_of(cache)
        gone = functools.partial(_forget_dropped, self._held, self._missed, ident, name)
        way = _call_drop if drop is not None else _way_of(cache)
        attached = _Attached(_weakly(cache, gone), way, *(_loosely(it, cache) for it in (key, tags, drop)))
        self._held[ident] = attached
        return Attachment(self._held, ident, attached, name)

    @property
    def is_served(self) -> bool:
        """Whether the daemons are followed for these, in some event loop."""
        return self._feed is not None and not self._feed.loop.is_closed()

    def serve(self, shared: Callable[[str], Feed]) -> None:
        """Follow the daemons in the running loop, unless that is done in another, or there is nothing to serve."""
        if self._held and not self.is_served:
            self._leave()
            self._feed = shared(self._namespace)
            self._feed.join(self)
            self.changed()

    def forget_parent(self) -> None:
        """Begin anew in a forked child: its caches are cleared once its own streams are live."""
        _INHERITED.append((self._feed, self._timer))
        self._leave()

    def _leave(self) -> None:
        self._feed = self._timer = None
        self._is_trusted = False

    # What the feed tells

    def busted(self, event: BustEvent) -> None:
        """Take in a bust. What comes together is applied together, since that takes a look through each cache."""
        self._heard.append(event)

    def reset(self, daemon: str, reason: str, *, first: bool) -> None:  # noqa: ARG002 - a new cache is no exception
        """Clear all."""
        self._heard.clear()
        self._apply([Reset(daemon=daemon, reason=reason)])

    def changed(self) -> None:
        """Apply what was heard; clear all when the daemons are not trusted any more, and when they are again."""
        heard, self._heard = self._heard, []
        if heard:
            self._apply(heard)
        feed = self._feed
        if feed is None:
            return
        if feed.is_closed or not self._held:
            self._stop_timer()
            self._leave()
            self._apply([Reset(daemon="", reason="the daemons are not followed any more")])
            if not feed.is_closed:
                feed.leave(self)
            return
        self._tell_refusals(feed)
        until, now = feed.trusted_until(self._needed, None), self._clock()
        if (until >= now) is not self._is_trusted:
            self._is_trusted = not self._is_trusted
            self._stop_timer()
            again = "followed again" if self._is_trusted else "silent for too long"
            self._apply([Reset(daemon="", reason=f"the daemons are {again}")])
        if self._timer is None:
            wait = until - now + 0.001 if self._is_trusted else _oldest(feed)
            self._timer = feed.loop.call_later(wait, _look_again, weakref.ref(self))

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def look_again(self) -> None:
        """Do what is due: clear all, unless the daemons are trusted, and see whether they still are."""
        self._timer = None
        if not self._is_trusted:
            self._apply([Reset(daemon="", reason="the daemons are not followed")])
        self.changed()

    def _tell_refusals(self, feed: Feed) -> None:
        """Log, once of each daemon, that it tells this client nothing, where the caches can never be trusted for that.

        Nobody is there to whom it could be raised.
        """
        refused = [follower for follower in feed.followers if follower.refusal is not None]
        if len(feed.followers) - len(refused) >= self._needed:
            return
        for follower in refused:
            fault = follower.refusal
            if fault is not None and follower.url not in self._refused_by:
                self._refused_by.add(follower.url)
                _log.error(
                    "%s tells this client of no busts in the namespace %s, so that what is attached is cleared every"
                    " %g s: %s; %s",
                    follower.url,
                    self._namespace,
                    _oldest(feed),
                    fault.message,
                    _REMEDIES.get(fault.kind, "mend that, or do not attach"),
                )

    @staticmethod
    def limit(heartbeat: float) -> float:
        """Tell how long a stream may be silent."""
        return silence(heartbeat, None)

    def bust_here(self, event: BustEvent | Reset) -> None:
        """Take in what its own client busts, in whatever thread that is."""
        feed = self._feed
        if feed is None or feed.loop.is_closed() or feed.is_here:
            self._apply([event])
        else:
            feed.loop.call_soon_threadsafe(self._apply, [event])

    def _apply(self, events: Sequence[BustEvent | Reset]) -> None:
        while self._missed:
            _log.warning(
                "the attached %s was dropped by whoever held it, and is told of no bust any more; keep it under a name"
                " of its own, or end it before",
                self._missed.pop(),
            )
        for attached in list(self._held.values()):
            attached.apply(events)


def _look_again(ref: weakref.ref[Attachments]) -> None:
    """Do what is due, unless all of it is gone: a timer keeps nothing alive."""
    attachments = ref()
    if attachments is not None:
        attachments.look_again()


def _oldest(feed: Feed) -> float:
    """Tell for how many seconds a cache may hold what it cannot be told of: three heartbeats, if those are known."""
    return min(silence(follower.heartbeat, None) for follower in feed.followers)


_REMEDIES: Final = {
    FaultKind.TOKEN_REFUSED: "give the client a token that is known there (token=)",
    FaultKind.NOT_ALLOWED: "attach with the namespace that the token is for (namespace=), or use a token for this one",
    FaultKind.UNSUPPORTED: "ask a daemon that has events, or do not attach",
}


def _weakly(cache: object, gone: Callable[[weakref.ref[Any]], None]) -> weakref.ref[Any]:
    try:
        return weakref.WeakMethod(cache, gone) if isinstance(cache, types.MethodType) else weakref.ref(cache, gone)
    except TypeError:
        kind = type(cache).__name__
        raise ConfigurationError(
            f"a {kind} cannot be held weakly; make the cache of a subclass (class Cache({kind}): pass), or attach a"
            " bound method of an object that drops from it",
            setting="cache",
        ) from None


def _forget_dropped(
    held: dict[object, _Attached], missed: list[str], ident: object, name: str, ref: weakref.ref[Any]
) -> None:
    """Forget a cache that the application has dropped, in whatever thread that was."""
    attached = held.get(ident)
    if attached is not None and attached.ref is ref:
        held.pop(ident, None)
        if attached.is_missed:
            missed.append(name)


def _name_of(cache: object) -> str:
    """Tell people what it is: the name of a function, the type of anything else."""
    if isinstance(cache, types.FunctionType | types.MethodType):
        return f"function {cache.__qualname__}"
    return type(cache).__name__


def _check_function(setting: str, function: Any, cache: object) -> None:
    """Refuse what cannot be called, would have to be awaited, or would keep the cache alive."""
    if not callable(function):
        raise ConfigurationError(f"{setting} must be a callable, not {type(function).__name__}", setting=setting)
    if _is_async(function):
        raise ConfigurationError(
            f"{setting} must be a plain callable, not an async function, which nobody would await", setting=setting
        )
    if not isinstance(function, types.MethodType) and _leads_to(function, cache):
        raise ConfigurationError(
            f"{setting} holds the cache itself, if only by way of what it closes over, so that it could never be"
            " dropped; make it a function of its arguments, or a method of what has the cache",
            setting=setting,
        )


def _is_async(function: object) -> bool:
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(getattr(function, "__call__", None))  # noqa: B004 - what a call of it would run


def _leads_to(start: object, cache: object) -> bool:
    """Tell whether an object holds the cache, by itself or by way of others, if that is not too far to see."""
    left: deque[object] = deque([start])
    seen = {id(start)}
    while left and len(seen) <= _MOST_LOOKED_AT:
        it = left.popleft()
        if it is cache:
            return True
        for part in _parts(it):
            if id(part) not in seen:
                seen.add(id(part))
                left.append(part)
    return False


def _parts(it: object) -> Iterable[object]:
    """List what an object holds, without what all of its kind or module share, and nothing of what is very large."""
    if isinstance(it, types.FunctionType):
        parts = [*(it.__closure__ or ()), *(it.__defaults__ or ()), *(it.__kwdefaults__ or {}).values()]
        return [*parts, *vars(it).values()]
    if isinstance(it, list | tuple | dict | set | frozenset | deque) and len(it) > _MOST_LOOKED_AT:
        return ()
    return [held for held in gc.get_referents(it) if not isinstance(held, type | types.ModuleType)]


_MOST_LOOKED_AT: Final = 1000


@final
class _Loose:
    """A bound method whose object is held weakly, for that may be what holds the cache."""

    def __init__(self, method: types.MethodType) -> None:
        self.name = method.__qualname__
        self._ref = weakref.WeakMethod(method)

    @property
    def is_gone(self) -> bool:
        """Whether the application has dropped its object."""
        return self._ref() is None

    def __call__(self, *arguments: object) -> Any:
        """Call it. Raises `ReferenceError` once its object is gone."""
        method = self._ref()
        if method is None:
            raise ReferenceError(f"the object of {self.name} was dropped before the cache")
        return method(*arguments)


def _loosely(function: Any, cache: object) -> Any:
    """Tell how to call a function without keeping the cache alive, which the object of a method may do."""
    if not isinstance(function, types.MethodType) or not _leads_to(function, cache):
        return function
    try:
        return _Loose(function)
    except TypeError:
        return function


# The ways to drop from a foreign cache


def _way_of(cache: Any) -> Callable[[_Attached, Any, Sequence[BustEvent | Reset]], None]:
    has = {name for name in _METHODS if callable(method := getattr(cache, name, None)) and not _is_async(method)}
    if has >= _OF_MAPPING and not isinstance(cache, SequenceABC):
        return _drop_from_mapping
    if "cache_clear" in has:
        return _clear_function
    if callable(cache):
        if _is_async(cache):
            raise ConfigurationError(
                "what is attached must be a plain callable, not an async function, which nobody would await",
                setting="cache",
            )
        return _call
    raise ConfigurationError(
        f"a {type(cache).__name__} cannot be attached as it is: that can a mapping with pop and clear (a cache of"
        " cachetools, a subclass of dict), a function with cache_clear, and a callable that is given each event; say"
        " how to drop from anything else with drop=",
        setting="cache",
    )


_OF_MAPPING: Final = frozenset({"pop", "clear", "__iter__", "__getitem__"})
_METHODS: Final = (*_OF_MAPPING, "cache_clear")


def _call_drop(attached: _Attached, cache: Any, events: Sequence[BustEvent | Reset]) -> None:
    assert attached.drop is not None  # noqa: S101 - this is its way
    for event in events:
        attached.drop(cache, event)


def _call(_: _Attached, cache: Any, events: Sequence[BustEvent | Reset]) -> None:
    for event in events:
        cache(event)


def _clear_function(_attached: _Attached, cache: Any, _events: Sequence[BustEvent | Reset]) -> None:
    cache.cache_clear()  # as of functools.lru_cache, which can drop nothing less


def _drop_from_mapping(attached: _Attached, cache: Any, events: Sequence[BustEvent | Reset]) -> None:
    concern = Concern(event for event in events if isinstance(event, BustEvent))
    whole = concern.everything or (attached.tags is None and bool(concern.tags))
    if whole or any(isinstance(event, Reset) for event in events):
        cache.clear()
        return
    try:
        gone = [cached for cached in list(cache) if _is_concerned(attached, concern, cached)]
    except Exception:
        cache.clear()  # what is concerned cannot be told
        raise
    for cached in gone:
        cache.pop(cached, None)


def _is_concerned(attached: _Attached, concern: Concern, cached: Any) -> bool:
    """Tell whether what is held under a key of a foreign cache was busted. What cannot be named is dropped, too."""
    keys = cached if attached.key is None else attached.key(cached)
    if keys is None:
        return False
    tags = () if attached.tags is None else tags_of(attached.tags(cached))
    if isinstance(keys, str):
        return concern.concerns(keys, tags)
    if attached.key is None or not isinstance(keys, Iterable):
        return True
    return any(concern.concerns(key, tags) for key in keys)


# All of one client


_FEWEST: Final = 100


@final
class Nearby:
    """The near caches of one client, and the foreign ones that are attached to it, in all its event loops."""

    def __init__(self) -> None:
        self._caches: weakref.WeakSet[NearCache] = weakref.WeakSet()
        self._attachments: dict[tuple[str, int], Attachments] = {}
        self._most = _FEWEST  # namespaces; with more of them, those of which nothing is left are forgotten

    def add(self, cache: NearCache) -> None:
        """Have a near cache told what its client busts, as long as somebody holds it."""
        self._caches.add(cache)

    def attachments(self, namespace: str, needed: int) -> Attachments:
        """Tell those of one namespace."""
        place = namespace, needed
        if place not in self._attachments:
            if len(self._attachments) >= self._most:
                self._attachments = {place: found for place, found in self._attachments.items() if len(found)}
                self._most = max(_FEWEST, 2 * len(self._attachments))
            self._attachments[place] = Attachments(namespace, needed)
        return self._attachments[place]

    def serve(self, shared: Callable[[str], Feed]) -> None:
        """Have what is attached follow the daemons in the running loop, unless it does so in another."""
        for attachments in list(self._attachments.values()):
            attachments.serve(shared)

    @property
    def is_empty(self) -> bool:
        """Whether nobody is to be told."""
        return not self._caches and not any(map(len, self._attachments.values()))

    def busted(self, event: BustEvent) -> None:
        """Tell all that are of its namespace what this client busts."""
        for cache in list(self._caches):
            if cache.namespace == event.namespace:
                cache.bust_here(event)
        for (namespace, _), attachments in list(self._attachments.items()):
            if namespace == event.namespace:
                attachments.bust_here(event)

    def forget(self, reason: str) -> None:
        """Have all forgotten."""
        reset = Reset(daemon="", reason=reason)
        for cache in list(self._caches):
            cache.bust_here(reset)
        for attachments in list(self._attachments.values()):
            attachments.bust_here(reset)

    def statistics(self) -> tuple[NearCacheStatistics, ...]:
        """Take a snapshot of each near cache."""
        return tuple(cache.statistics() for cache in list(self._caches))
