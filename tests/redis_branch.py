"""A large branch of entries in a Redis server, put there in seconds, beside all kinds of keys that no bust may touch.

Entries are stored by the script that readers store with, only many at a time. Tests and benches share this.
"""

from __future__ import annotations

import itertools
import secrets
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Final

from redis import Redis

from pybustcall.models import DEFAULT_NAMESPACE
from pybustcall.redis_layout import DEFAULT_PREFIX, STORE, Layout

__all__ = ["PLAIN", "PREFIX", "branch", "connect", "contents", "put_others", "put_plain", "store"]

PREFIX: Final = "users"
"""What is busted."""
PLAIN: Final = "shop:"
"""What the names of another program's keys begin with that a daemon may be told of."""

_AT_ONCE: Final = 1000
_READING: Final[dict[bytes, Callable[[Redis, bytes], Any]]] = {
    b"none": lambda redis, name: redis.get(name),
    b"string": lambda redis, name: redis.get(name),
    b"hash": lambda redis, name: redis.hgetall(name),
    b"list": lambda redis, name: redis.lrange(name, 0, -1),
    b"zset": lambda redis, name: redis.zrange(name, 0, -1, withscores=True),
}
_NEIGHBOURS: Final = ("usersAbc:{}", "users2/{}", "users.old/{}", "users*/{}", "USERS/{}", "user/{}", "a/users/{}")


def connect(port: int) -> Redis:
    """Open a connection to a server of this machine."""
    return Redis(port=port, protocol=2)


def branch(entries: int) -> list[str]:
    """List so many keys that the prefix covers: pages of a thousand users, and the prefix itself."""
    marks = "/:?#"
    return [PREFIX, *(f"{PREFIX}{marks[n % 4]}{n % 1000}/orders?page={n // 1000}" for n in range(entries - 1))]


def store(redis: Redis, keys: Iterable[str], *, namespace: str = DEFAULT_NAMESPACE) -> None:
    """Store entries as readers do, each with a tag and a lifetime of an hour."""
    layout, fresh = Layout(DEFAULT_PREFIX, namespace), secrets.token_hex(8)
    redis.script_load(STORE.source)
    for some in _cut(keys):
        with redis.pipeline(transaction=False) as pipeline:
            for key in some:
                tags = [key.partition("/")[0]]
                call = layout.store(fresh, None, key, key.encode() * 5, tags=tags, ttl=3600.0, token=None)
                pipeline.evalsha(call.script.digest, len(call.keys), *call.keys, *call.arguments)
            pipeline.execute()


def put_plain(redis: Redis, keys: Iterable[str]) -> None:
    """Store plain keys as a program does that knows nothing of us."""
    for some in _cut(keys):
        with redis.pipeline(transaction=False) as pipeline:
            for key in some:
                pipeline.set(PLAIN + key, key * 5, ex=3600)
            pipeline.execute()


def put_others(redis: Redis, count: int) -> list[bytes]:
    """Put beside the branch about so many keys that are not of it; tell their names in the server.

    Entries with similar keys and of another tenant; plain keys with similar names, and with names of the branch;
    and keys of other programs that nobody registered, of each type, some with names that are no text.
    """
    each = max(1, count // 27)
    before = set(redis.keys())
    neighbours = [it.format(number) for it in _NEIGHBOURS for number in range(each)]
    store(redis, neighbours)
    store(redis, [f"{PREFIX}/{number}" for number in range(3 * each)], namespace="theirs")
    put_plain(redis, neighbours)
    with redis.pipeline(transaction=False) as pipeline:
        for number in range(each):
            for name in ("{}/{}", "{}:{}", "shopping:{}/{}", "bustcall:{{default}}x:e:{}/{}", "bustcall.old:e:{}/{}"):
                pipeline.set(name.format(PREFIX, number), number)
            pipeline.set(b"\xff%d" % number, b"\xff")
            pipeline.set(PLAIN.encode() + PREFIX.encode() + b"/\xff%d" % number, b"\xff")
            pipeline.hset(f"cart:{number}", mapping={"a": number, "b": "\n"})
            pipeline.rpush(f"queue:{number}", "a", number)
            pipeline.zadd(f"top:{number}", {"a": number})
        pipeline.execute()
    own = tuple(b"bustcall:{%s}:" % it for it in (DEFAULT_NAMESPACE.encode(), b"theirs"))
    names: set[Any] = set(redis.keys()) - before
    return sorted(it for it in names if not it.startswith(own) or b":e:" in it)


def contents(redis: Redis, names: Sequence[bytes]) -> dict[bytes, Any]:
    """Tell what each of these keys holds, and whether it ends one day; None of one that is gone.

    Not by DUMP: how the server packs a value may differ from one time to the next.
    """
    found: dict[bytes, Any] = {}
    for some in _cut(names):
        with redis.pipeline(transaction=False) as pipeline:
            for name in some:
                pipeline.type(name)
            types = pipeline.execute()
            for name, kind in zip(some, types, strict=True):
                _READING[kind](pipeline, name)
                pipeline.ttl(name)
            told = iter(pipeline.execute())
        for name, kind, value, ttl in zip(some, types, told, told, strict=True):
            found[name] = None if kind == b"none" else (kind, value, ttl >= 0)
    return found


def _cut(keys: Iterable[Any]) -> Iterator[list[Any]]:
    rest = iter(keys)
    while some := list(itertools.islice(rest, _AT_ONCE)):
        yield some
