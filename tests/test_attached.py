"""Caches that are none of ours: how busts reach them, when they are cleared, and that they are gone when dropped."""

from __future__ import annotations

import asyncio
import functools
import gc
import logging
import re
import resource
import subprocess
import sys
import textwrap
import types
import warnings
import weakref
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pybustcall import BustcallClient
from pybustcall.attached import Attachments, Nearby
from pybustcall.errors import ClientClosed, ConfigurationError, InvalidRequest
from pybustcall.events import BustEvent, Feed, Open, Reset, Wanted
from pybustcall.faults import Fault, FaultKind
from pybustcall.testing import FakeDaemon
from tests.conftest import PATIENCE, eventually, virtual_time
from tests.event_wires import Line, Wire, live, told
from tests.test_events import fake


class Cache(dict[Any, Any]):
    """A dict that can be held weakly; as little as a cache of cachetools it can be hashed."""


async def ready(client: BustcallClient) -> None:
    """Wait until the client's streams are live, and whatever is attached was cleared by that."""
    near = client.near_cache(ttl=None)
    await near.wait_trusted(5)


@pytest.mark.parametrize(
    ("told_of", "left"),
    [
        (BustEvent(target="a/b"), ["a", "a/b/c", "x"]),
        (BustEvent(target="a", kind="prefix"), ["x"]),
        (BustEvent(target="t", kind="tag"), []),
        (BustEvent(target="*", kind="all"), []),
        (BustEvent(target="y", also=("x",)), ["a", "a/b", "a/b.gz", "a/b/c"]),
    ],
)
async def test_a_bust_drops_from_a_mapping(told_of: BustEvent, left: list[str]) -> None:
    """By its keys; of a tag nothing is known, so that it clears."""
    async with fake() as daemon, BustcallClient(daemon.url) as client:
        cache = Cache()
        client.attach(cache)
        await ready(client)
        cache.update(dict.fromkeys(("a", "a/b", "a/b.gz", "a/b/c", "x"), 1))
        daemon.tell("a/b", namespace="other")
        daemon.tell(told_of.target, kind=told_of.kind, also=told_of.also)
        await eventually(lambda: len(cache) < 5)
        assert sorted(cache) == left


async def test_keys_and_tags_of_a_cache_can_be_told() -> None:
    """As cachetools makes keys of arguments: one key, several, or none that is busted."""
    async with fake() as daemon, BustcallClient(daemon.url) as client:
        cache = Cache()

        def key(held: tuple[Any, ...]) -> Any:
            return None if held[0] == "private" else (f"{held[0]}/{held[1]}", held[0])

        client.attach(cache, key=key, tags=lambda held: [f"tag:{held[1]}"])
        await ready(client)
        cache.update(dict.fromkeys([("user", 1), ("user", 2), ("private", 1), ("item", 2)], 1))
        daemon.tell("user/1")
        await eventually(lambda: ("user", 1) not in cache)
        daemon.tell("tag:2", kind="tag")
        await eventually(lambda: len(cache) < 3)
        assert list(cache) == [("private", 1)]
        cache["item", 1] = 1
        daemon.tell("item")
        await eventually(lambda: len(cache) < 2)


async def test_what_cannot_be_named_goes_with_any_bust() -> None:
    """A key that is no text, where nobody says how to name it; and where naming fails, all."""
    cache, other = Cache(), Cache()

    def fail(held: Any) -> str:
        raise KeyError(held)

    async with fake() as daemon, BustcallClient(daemon.url) as client:
        client.attach(cache)
        client.attach(other, key=fail)
        await ready(client)
        cache.update({("a", 1): 1, "a": 1, "b": 1})
        other["b"] = 1
        await client.bust("a")
        assert (list(cache), list(other)) == (["b"], [])


async def test_one_tag_may_be_told_as_a_text(caplog: pytest.LogCaptureFixture) -> None:
    """It is not taken apart; what tells no tags clears the cache with any bust, and the log says why."""
    async with fake() as daemon, BustcallClient(daemon.url) as client:
        caches = [Cache(), Cache(), Cache()]
        client.attach(caches[0], key=lambda key: [key, key], tags=lambda key: "t1" if key == "a" else "t")
        client.attach(caches[1], tags=lambda _: None)  # type: ignore[arg-type, return-value]
        client.attach(caches[2], tags=lambda _: (tag for tag in ("t1", 1)))  # type: ignore[misc]
        await ready(client)
        for cache in caches:
            cache.update(a=1, b=1)
        await client.bust("t1", kind="tag", fault_tolerance=12)
        assert [list(cache) for cache in caches] == [["b"], [], []]
        assert "tags must be a text, or several, not None" in caplog.text
        assert "tags must be a text, or several, not <generator" in caplog.text


async def test_a_function_of_functools_is_cleared() -> None:
    """It can drop nothing less."""
    async with fake() as daemon, BustcallClient(daemon.url) as client:
        calls = []

        @functools.lru_cache
        def load(number: int) -> int:
            calls.append(number)
            return number

        client.attach(load)
        await ready(client)
        for _ in range(2):
            load(1)
        await client.bust("whatever")
        load(1)
        assert calls == [1, 1]


async def test_callables_are_given_each_event() -> None:
    """A bound method as long as its object lives, or what is said with `drop`."""

    class Holder:
        def __init__(self) -> None:
            self.told: list[str] = []

        def drop(self, event: BustEvent | Reset) -> None:
            self.told.append(event.target if isinstance(event, BustEvent) else "reset")

    async with fake() as daemon, BustcallClient(daemon.url) as client:
        holder, other = Holder(), Holder()
        client.attach(holder.drop)
        client.attach(holder.drop)  # which is the same one
        client.attach(other, drop=Holder.drop)
        await ready(client)
        holder.told.clear()
        other.told.clear()
        daemon.tell("a")
        await eventually(lambda: other.told)
        assert (holder.told, other.told) == (["a"], ["a"])
        gone = weakref.ref(holder)
        del holder
        assert gone() is None


async def test_what_a_foreign_cache_raises_harms_no_other(caplog: pytest.LogCaptureFixture) -> None:
    """It is logged."""

    class Broken(Cache):
        def clear(self) -> None:
            raise OSError("of the test")

    async with fake() as daemon, BustcallClient(daemon.url) as client:
        broken, cache = Broken(a=1), Cache(a=1)
        client.attach(broken)
        client.attach(cache)
        await ready(client)
        assert "a bust could not be applied to an attached Broken" in caplog.text
        assert not cache


async def test_it_can_be_taken_away_again() -> None:
    """Twice does no harm; and what was attached anew is another matter."""
    async with fake() as daemon, BustcallClient(daemon.url) as client:
        cache = Cache()
        end = client.attach(cache)
        await ready(client)
        cache["a"] = 1
        end()
        end()
        await client.bust("a")
        assert cache
        client.attach(cache)
        end()
        await client.bust("a")
        assert not cache


async def test_own_busts_reach_it_before_they_return_and_wherever_it_lives() -> None:
    """In its namespace; also where no stream is followed yet."""
    client = BustcallClient("http://127.0.0.1:1", retry=None)
    cache, other = Cache(a=1), Cache(a=1)
    client.attach(cache)
    client.attach(other, namespace="other")
    await client.bust("a", fault_tolerance=12)
    assert (len(cache), len(other)) == (0, 1)
    cache["a"] = 1
    await asyncio.to_thread(asyncio.run, _bust(client))
    await eventually(lambda: not cache)
    await client.aclose()


async def _bust(client: BustcallClient) -> None:
    await client.bust("a", fault_tolerance=12)


def test_a_disabled_client_takes_it_and_does_nothing() -> None:
    """But it says what cannot be held."""
    cache = Cache(a=1)
    BustcallClient.disabled().attach(cache)()
    with pytest.raises(ConfigurationError, match="cannot be held weakly"):
        BustcallClient.disabled().attach({})


def test_what_cannot_be_attached_is_refused() -> None:
    """With what to do instead."""
    client = BustcallClient()
    with pytest.raises(ConfigurationError, match=r"make the cache of a subclass \(class Cache\(dict\): pass\)"):
        client.attach({})
    things: list[object] = [[], set(), deque([1]), type("Thing", (), {})(), 5]
    for thing in things:
        with pytest.raises(ConfigurationError, match=r"cannot be attached as it is: that can a mapping .* with drop="):
            client.attach(thing)
    with pytest.raises(ConfigurationError, match=r"make the cache of a subclass \(class Cache\(list\): pass\)"):
        client.attach([], drop=_nothing)
    with pytest.raises(ConfigurationError, match="key must be a callable, not str"):
        client.attach(Cache(), key="a")  # type: ignore[arg-type]
    with pytest.raises(InvalidRequest):
        client.attach(Cache(), namespace="")


def test_what_would_have_to_be_awaited_is_refused() -> None:
    """For nobody would."""

    async def told(*_: object) -> None: ...

    class Told:
        async def __call__(self, event: object) -> None: ...

        async def method(self, event: object) -> None: ...

    client, cache, other = BustcallClient(), Cache(), Told()
    for function in (told, other, other.method, functools.partial(told, 1)):
        with pytest.raises(ConfigurationError, match="an async function, which nobody would await"):
            client.attach(function)
        for name in ("key", "tags", "drop"):
            with pytest.raises(ConfigurationError, match=f"{name} must be a plain callable, not an async function"):
                client.attach(cache, **{name: function})  # type: ignore[arg-type]


@pytest.mark.parametrize("client", [BustcallClient(), BustcallClient.disabled()], ids=repr)
def test_what_nobody_else_holds_is_refused(client: BustcallClient) -> None:
    """It would be gone at once, and never told anything."""

    class Held:
        def told(self, event: object) -> None: ...

    with pytest.raises(ConfigurationError, match=r"nobody else holds this function .*<lambda>, .*keep it under a name"):
        client.attach(lambda _: None)
    with pytest.raises(ConfigurationError, match="nobody else holds this Cache"):
        client.attach(cache=Cache(), drop=_nothing)
    with pytest.raises(ConfigurationError, match=r"nobody else holds this function .*Held\.told"):
        client.attach(Held().told)
    held = Held()
    end = client.attach(held.told)
    assert repr(end).endswith("Held.told)")
    end()
    assert repr(end).endswith("Held.told, ended)")
    cache = Cache()
    assert repr(client.attach(cache)) == "Attachment(Cache)"


async def test_a_function_that_is_dropped_is_told_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    """Once, with the next bust; not if it was ended before, nor a cache, which may be dropped."""
    client = BustcallClient("http://127.0.0.1:1", retry=None)

    def attach(*, ended: bool) -> None:
        def told(_: object) -> None: ...

        end = client.attach(told)
        if ended:
            end()
        cache = Cache()
        client.attach(cache)

    attach(ended=True)
    await client.bust("a", fault_tolerance=12)
    assert "dropped" not in caplog.text
    attach(ended=False)
    for _ in range(2):
        await client.bust("a", fault_tolerance=12)
    assert caplog.text.count("attach.<locals>.told was dropped by whoever held it") == 1
    await client.aclose()


def test_what_would_hold_the_cache_is_refused() -> None:
    """A function that closes over it, one of its methods, or one with it for an argument."""
    client = BustcallClient()
    cache = Cache()

    def of_default(event: Any, held: Any = cache) -> None: ...

    for function in (lambda _: cache.get("a"), cache.get, functools.partial(Cache.get, cache), of_default):
        for name in ("key", "tags", "drop"):
            with pytest.raises(ConfigurationError, match="holds the cache itself"):
                client.attach(cache, **{name: function})  # type: ignore[arg-type]
    owner = types.SimpleNamespace(cache=cache, prefix="p/")
    for name in ("key", "tags", "drop"):
        with pytest.raises(ConfigurationError, match="if only by way of what it closes over"):
            client.attach(cache, **{name: lambda it: owner.prefix + it})  # type: ignore[arg-type]
    of_attribute = functools.wraps(_nothing)(lambda *_: None)
    of_attribute.cache = cache  # type: ignore[attr-defined]
    with pytest.raises(ConfigurationError, match="holds the cache itself"):
        client.attach(cache, key=of_attribute)
    client.attach(cache, key=lambda key: f"{key}{client}")


class Owner:
    """What has a cache, and says how it is busted by methods of its own."""

    def __init__(self) -> None:
        self.cache = Cache(a=1, b=2)
        self.others = [object() for _ in range(2000)]  # far more than is looked through

    def key(self, key: str) -> str:
        return f"p/{key}"

    def tags(self, key: str) -> str:
        return f"t/{key}"

    def drop(self, cache: Cache, _: object) -> None:
        cache.clear()


@pytest.mark.parametrize("name", ["key", "tags", "drop"])
@pytest.mark.requirement("INT-07")
async def test_methods_of_what_has_the_cache_do_not_keep_it(name: str) -> None:
    """Both are gone when the application drops them."""
    async with BustcallClient("http://127.0.0.1:1", retry=None) as client:
        owner = Owner()
        gone = weakref.ref(owner.cache), weakref.ref(owner)
        client.attach(owner.cache, **{name: getattr(owner, name)})
        await client.bust(
            "p/a" if name == "key" else "t/a", kind="tag" if name == "tags" else "key", fault_tolerance=12
        )
        assert "a" not in owner.cache
        assert ("b" in owner.cache) is (name != "drop")
        del owner
        gc.collect()
        assert [ref() for ref in gone] == [None, None]


async def test_a_cache_that_outlives_the_object_of_its_methods_is_cleared(caplog: pytest.LogCaptureFixture) -> None:
    """It cannot be told any more what is concerned."""
    async with BustcallClient("http://127.0.0.1:1", retry=None) as client:
        owner = Owner()
        cache = owner.cache
        client.attach(cache, key=owner.key)
        del owner
        gc.collect()
        await client.bust("elsewhere", fault_tolerance=12)
        assert not cache
    assert "the object of Owner.key was dropped before the cache" in caplog.text


def test_a_method_of_an_object_that_nobody_holds_is_refused() -> None:
    """If it has the cache; else it is held here."""
    client, cache = BustcallClient(), Cache()

    class Maker:
        def __init__(self, cache: Cache | None) -> None:
            self.cache = cache

        def key(self, key: str) -> str:
            return key

    client.attach(cache, key=Maker(None).key)
    with pytest.raises(ConfigurationError, match=r"nobody else holds the object of key=.*Maker\.key"):
        client.attach(cache, key=Maker(cache).key)


async def test_what_is_over_in_a_callable_does_not_end_what_tells_it() -> None:
    """The result of something that was cancelled, say."""
    over: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    over.cancel()

    class Told:
        count = 0

        def __call__(self, event: object) -> None:
            self.count += 1
            over.result()

    async with fake() as daemon, BustcallClient(daemon.url) as client:
        told, cache = Told(), Cache()
        client.attach(told)
        client.attach(cache)
        await eventually(lambda: told.count)
        cache["a"] = 1
        await asyncio.sleep(0)
        daemon.tell("a")
        await eventually(lambda: not cache)
        await eventually(lambda: told.count > 1)


async def test_namespaces_of_which_nothing_is_left_are_forgotten() -> None:
    """However many there were."""
    async with BustcallClient("http://127.0.0.1:1") as client:
        kept = Cache()
        client.attach(kept, namespace="kept")
        for number in range(1000):
            cache = Cache()
            client.attach(cache, namespace=f"n{number}")
            del cache
        assert client._core is not None
        assert len(client._core.near._attachments) <= 200
        assert ("kept", 1) in client._core.near._attachments


# Where it is followed


async def test_it_is_followed_from_when_it_is_attached_in_a_loop() -> None:
    """No block and no call is needed, only the end of the client."""
    async with fake() as daemon:
        client, cache = BustcallClient(daemon.url), Cache(a=1)
        client.attach(cache)
        await eventually(lambda: not cache)
        cache["a"] = cache["b"] = 1
        daemon.tell("a")
        await eventually(lambda: len(cache) < 2)
        await client.aclose()
        assert not cache
        assert client.statistics().pool.sessions == 0


def test_where_no_loop_runs_it_is_followed_from_the_first_call_on() -> None:
    """In the loop of that call, as long as it lasts, and then in the next."""
    client, cache = BustcallClient("http://127.0.0.1:1", retry=None), Cache()
    client.attach(cache)
    [attachments] = client._core.near._attachments.values()  # type: ignore[union-attr]

    async def use() -> None:
        await client.bust("a", fault_tolerance=12)
        assert attachments.is_served

    for _ in range(2):
        assert not attachments.is_served
        asyncio.run(use())
    asyncio.run(client.aclose())


async def test_a_client_that_is_dropped_follows_nobody_for_it() -> None:
    """Also where no connection was made yet: nothing of it is left in the loop."""
    client, cache = BustcallClient("http://127.0.0.1:1"), Cache()
    client.attach(cache)
    core = weakref.ref(client._core)
    assert repr(client).endswith("; open)")

    def is_gone() -> bool:
        gc.collect()
        return core() is None and len(asyncio.all_tasks()) == 1

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # one that is recorded would hold the client
        del client
        await eventually(is_gone)


async def test_nothing_is_attached_to_a_client_that_is_closed() -> None:
    """As nothing is loaded by way of it."""
    async with BustcallClient("http://127.0.0.1:1") as client:
        pass
    with pytest.raises(ClientClosed, match="the client is closed"):
        client.attach(Cache())
    await asyncio.to_thread(_expect_closed, client)


def _expect_closed(client: BustcallClient) -> None:
    with pytest.raises(ClientClosed, match="the client is closed"):
        client.attach(Cache())


# Trust


@virtual_time
async def test_it_is_cleared_when_the_daemons_are_silent_and_when_they_are_back() -> None:
    """It cannot be bypassed; what is put into it meanwhile goes, too."""
    line, cache, log = Line(), Cache(), []
    now = asyncio.get_running_loop().time
    feed = Feed([("http://0", line)], Wanted(), random=lambda: 1.0, clock=now)
    attachments = Attachments("default", 1, clock=now)
    attachments.attach(cache, None, None, None)
    attachments.attach(Cache, None, None, lambda _, event: log.append(event))
    attachments.serve(lambda _: feed)
    attachments.serve(lambda _: pytest.fail("it is served already"))
    feed.start()
    await asyncio.sleep(0)
    cache["a"] = 1
    line.say(live(0))
    await asyncio.sleep(0.1)
    assert not cache
    cache["a"] = 1
    for _ in range(6):
        await asyncio.sleep(1.4)
        line.say(b"id: e-0\n\n")
    assert cache
    assert repr(attachments) == "Attachments(default, 2 caches, trusted)"
    line.cut()
    await asyncio.sleep(2.9)
    assert cache
    await asyncio.sleep(0.2)
    assert not cache
    cache["a"] = 1
    line.is_up = True
    await eventually(lambda: len(line.opened) == 2)
    line.say(told(1), live(1))
    await asyncio.sleep(0.1)
    assert not cache
    cache["a"] = 1
    await feed.aclose()
    assert not cache
    assert repr(attachments).endswith("not trusted)")
    reasons = [event.reason for event in log if isinstance(event, Reset)]
    assert reasons == [
        "followed from now on",
        "the daemons are followed again",
        "the daemons are silent for too long",
        "the daemons are not followed",
        "the daemons are followed again",
        "the daemons are not followed any more",
    ]


@virtual_time
async def test_while_the_daemons_are_not_followed_nothing_in_it_is_older_than_three_heartbeats() -> None:
    """From when it is attached, however long that lasts; of a heartbeat that is known, three of those."""
    line, cache = Line(), Cache()
    line.is_up = False
    now = asyncio.get_running_loop().time
    feed = Feed([("http://0", line)], Wanted(), random=lambda: 1.0, clock=now)
    attachments = Attachments("default", 1, clock=now)
    attachments.attach(cache, None, None, None)
    attachments.serve(lambda _: feed)
    feed.start()

    async def seconds_until_cleared() -> float:
        cache["a"], begun = 1, now()
        while cache:
            await asyncio.sleep(0.25)
        return now() - begun

    assert [await seconds_until_cleared() for _ in range(3)] == pytest.approx([15.0] * 3, abs=0.6)
    line.is_up = True
    await eventually(lambda: line.opened)
    line.say(live(0))
    await eventually(lambda: attachments._is_trusted)
    line.cut()
    assert [await seconds_until_cleared() for _ in range(3)] == pytest.approx([3.0] * 3, abs=0.6)
    await feed.aclose()
    assert attachments._timer is None


@virtual_time
async def test_no_timer_keeps_what_is_attached_alive() -> None:
    """Nor what is known of it; while nobody is followed none is ever cancelled."""
    line, cache = Line(), Cache()
    line.is_up = False
    feed = Feed([("http://0", line)], Wanted(), random=lambda: 1.0)
    attachments = Attachments("default", 1)
    attachments.attach(cache, None, None, None)
    attachments.serve(lambda _: feed)
    refs: list[weakref.ref[Any]] = [weakref.ref(cache), weakref.ref(attachments)]
    del cache, attachments
    assert [ref() for ref in refs] == [None, None]
    await asyncio.sleep(20)
    await feed.aclose()


@pytest.mark.parametrize(
    ("kind", "remedy"),
    [
        (FaultKind.TOKEN_REFUSED, r"give the client a token that is known there \(token=\)"),
        (FaultKind.NOT_ALLOWED, r"attach with the namespace that the token is for \(namespace=\), or use a token"),
        (FaultKind.UNSUPPORTED, "ask a daemon that has events, or do not attach"),
        (FaultKind.INCOMPATIBLE, "mend that, or do not attach"),
    ],
)
@virtual_time
async def test_that_a_daemon_says_no_is_an_error_of_the_log(
    kind: FaultKind, remedy: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Once, with the namespace that was asked for and what can be done; one that is merely away is none."""
    said, cache = Fault(kind, "http://0", "it says no", "no"), Cache()
    away = Fault(FaultKind.UNREACHABLE, "http://1", "nobody is there", "no")
    for needed in (2, 1):
        caplog.clear()
        wires: list[tuple[str, Open]] = [
            (f"http://{number}", Wire(*[[fault]] * 20)) for number, fault in enumerate((said, away))
        ]
        feed = Feed(wires, Wanted("shop"), random=lambda: 1.0)
        attachments = Attachments("shop", needed)
        attachments.attach(cache, None, None, None)
        attachments.serve(lambda _, feed=feed: feed)  # type: ignore[misc]
        feed.start()
        await asyncio.sleep(100)
        await feed.aclose()
        errors = [record.getMessage() for record in caplog.records if record.levelno == logging.ERROR]
        if needed == 1:  # the other may be followed one day
            assert not errors
            continue
        [error] = errors
        assert re.fullmatch(rf"http://0 tells .* in the namespace shop, .* every 15 s: it says no; {remedy}.*", error)


@virtual_time
async def test_where_nothing_is_attached_any_more_nothing_is_followed() -> None:
    """Until something is again."""
    line, cache = Line(), Cache()
    ended: list[Feed] = []
    feed = Feed([("http://0", line)], Wanted(), random=lambda: 1.0, idle=ended.append)
    attachments = Attachments("default", 1)
    attachments.attach(cache, None, None, None)
    attachments.serve(lambda _: feed)
    feed.start()
    await asyncio.sleep(0)
    line.say(live(0))
    await asyncio.sleep(0.1)
    del cache
    line.say(told(1))
    await asyncio.sleep(0.1)
    assert ended == [feed]
    assert len(attachments) == 0
    await feed.aclose()


def test_it_is_served_by_the_next_loop_when_one_has_ended() -> None:
    """And is cleared in between."""
    client_of: list[BustcallClient] = []

    async def use(cache: Cache) -> None:
        async with fake() as daemon, BustcallClient(daemon.url) as client:
            client.attach(cache)
            await ready(client)
            cache["a"] = 1
        assert not cache

    cache = Cache()
    for _ in range(2):
        asyncio.run(use(cache))

    async def twice(url: str) -> None:
        client = client_of[0] if client_of else BustcallClient(url)
        client_of[:] = [client]
        client.attach(cache)
        await ready(client)
        cache["a"] = 1

    async def with_daemon() -> None:
        async with fake() as daemon:
            await asyncio.to_thread(asyncio.run, twice(daemon.url))
            assert not cache
            await asyncio.to_thread(asyncio.run, twice(daemon.url))
            assert not cache
            await client_of[0].aclose()

    asyncio.run(with_daemon())


async def test_a_forked_child_clears_it_once_its_own_stream_is_live() -> None:
    """What the parent holds stays."""
    program = """
    import asyncio, os, sys
    from pybustcall import BustcallClient

    class Cache(dict): pass
    cache = Cache()
    client = BustcallClient(sys.argv[1])
    client.attach(cache)

    async def ready():
        await client.near_cache(ttl=None).wait_trusted(10)

    with asyncio.Runner() as runner:
        runner.run(ready())
        cache["a"] = 1
        child = os.fork()
        if not child:
            with asyncio.Runner() as own:
                own.run(ready())
                print(len(cache), flush=True)
                own.run(client.aclose())
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0
        runner.run(asyncio.sleep(0.01))
        print(len(cache))
        runner.run(client.aclose())
    """
    async with fake() as daemon:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-W", "error", "-c", textwrap.dedent(program), daemon.url),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        async with asyncio.timeout(PATIENCE):
            out, err = await process.communicate()
    assert (process.returncode, err.decode(), out.decode().split()) == (0, "", ["0", "1"])


# Memory


@pytest.mark.requirement("INT-07")
async def test_caches_that_the_application_drops_are_gone() -> None:
    """At once, or with the collection that finds them in a circle; nothing is told to them any more."""
    async with fake() as daemon, BustcallClient(daemon.url) as client:
        cache, ring = Cache(), Cache()
        ring["itself"] = ring
        refs = [weakref.ref(cache), weakref.ref(ring)]
        for held in (cache, ring):
            client.attach(held, key=str, tags=lambda _: (), drop=lambda held, _: held.clear())
        await client.bust("b", kind="tag", dry_run=True, fault_tolerance=12)
        near = client.near_cache(ttl=None)
        await near.wait_trusted(5)
        await near.get_or_load("a", lambda: 1)
        refs.append(weakref.ref(near))  # type: ignore[arg-type]
        ring["itself"] = ring
        del cache, ring, held, near
        gc.collect()
        assert [ref() for ref in refs] == [None, None, None]
        [attachments] = client._core.near._attachments.values()  # type: ignore[union-attr]
        assert len(attachments) == 0


def resident() -> int:
    """Tell the memory that this process has now, in KB."""
    return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * resource.getpagesize() // 1024


@pytest.mark.requirement("INT-07")
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs /proc")
async def test_memory_is_flat_over_a_million_attached_and_dropped_caches() -> None:
    """While the client follows its daemon."""

    class Small:
        def clear(self) -> None: ...

    async with fake() as daemon, BustcallClient(daemon.url) as client:
        await ready(client)

        def churn(count: int) -> None:
            for _ in range(count):
                cache = Small()
                client.attach(cache, drop=_nothing)

        churn(10_000)
        gc.collect()
        before = resident()
        for _ in range(10):
            churn(100_000)
            await asyncio.sleep(0)
        gc.collect()
        assert resident() - before < 4000
        [attachments] = client._core.near._attachments.values()  # type: ignore[union-attr]
        assert len(attachments) == 0
        await client.bust("a")


def _nothing(_cache: object, _event: BustEvent | Reset) -> None:
    pass


def test_the_identity_of_one_that_is_gone_may_be_that_of_another() -> None:
    """What is told of its end late takes away nothing of the other's."""
    attachments = Attachments("default", 1)
    first, second = Cache(), Cache()
    attachments.attach(first, None, None, None)
    [(ident, old)] = attachments._held.items()
    attachments.attach(second, None, None, None)
    new = attachments._held[id(second)]
    attachments._held[ident] = new
    ended: Callable[[Any], None] = old.ref.__callback__
    ended(old.ref)
    assert attachments._held[ident] is new


async def test_what_is_busted_in_a_loop_that_has_ended_is_applied_here(caplog: pytest.LogCaptureFixture) -> None:
    """There is no other thread to do it then; and where nothing is near, nothing is told."""
    caplog.set_level(logging.ERROR)
    nearby = Nearby()
    assert nearby.is_empty
    cache = Cache(a=1)
    nearby.attachments("default", 1).attach(cache, None, None, None)
    nearby.busted(BustEvent(target="a"))
    assert not cache
    cache["b"] = 1
    nearby.forget("a hot swap")
    assert not cache
    assert not caplog.records


async def test_a_daemon_without_events_is_an_error_of_the_log(caplog: pytest.LogCaptureFixture) -> None:
    """And the cache is not kept from being used; the client's own busts reach it."""
    async with FakeDaemon() as daemon, BustcallClient(daemon.url) as client:
        cache = Cache(a=1, b=1)
        client.attach(cache, namespace="shop")
        await client.bust("b", fault_tolerance=12)
        await eventually(lambda: "do not attach" in caplog.text)
        assert f"{daemon.url} tells this client of no busts in the namespace shop, so that" in caplog.text
        assert "is cleared every 15 s: it does not advertise events.stream" in caplog.text
        assert sorted(cache) == ["a", "b"]
