"""The life of the listening server: from its bind to its drained end.

This module decides where the daemon listens, what a signal does, and in which order everything closes. What is
answered, and to whom, is `app`'s affair; how many connections there may be, that of `connections`.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import signal
import socket
import stat
import threading
from contextlib import asynccontextmanager, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aiohttp import web

from pybustcall.daemon.app import DAEMON, GRACE, Daemon, DaemonSettings, check_settings, create_app
from pybustcall.daemon.backends import BackendFailure
from pybustcall.daemon.connections import Door
from pybustcall.errors import ConfigurationError
from pybustcall.topology import DaemonAddress

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Coroutine, Iterator

    from pybustcall.daemon.engine import Engine

__all__ = ["serve"]

_log = logging.getLogger("pybustcall.daemon")


async def serve(engine: Engine, settings: DaemonSettings, *, ready: Callable[[str], None] | None = None) -> None:
    """Serve until SIGTERM, SIGINT or cancellation; `ready` is told the real URL once the daemon listens.

    A signal drains: nothing new is accepted, what is under way finishes within `settings.drain` seconds (a second
    signal ends that at once), then connections close. Cancellation does not wait for requests. No task outlives this.

    Signals are heard only in the main thread; elsewhere cancel. Raises `ConfigurationError`, naming the setting, if
    the daemon cannot listen, and `BackendFailure` if a cache of this machine cannot be used. One beyond it may be away.
    """
    check_settings(settings)
    async with _listening(settings) as (sockets, url):
        app = create_app(engine, _as_bound(settings, sockets))
        daemon = app[DAEMON]
        runner = web.AppRunner(app, access_log=None, shutdown_timeout=GRACE)
        servers: list[asyncio.AbstractServer] = []
        with _signals(daemon.stop):
            try:
                await runner.setup()
                await _check_ready(engine)
                door = _door(runner, daemon, settings)
                for listener in sockets:
                    servers.append(await _accept(door, listener))  # noqa: PERF401 - those begun are closed, too
                if ready is not None:
                    ready(url)
                await daemon.wait_stopping()
                _close_all(servers)
                await daemon.wait_quiet()
            finally:
                daemon.stop()
                _close_all(servers)
                await _uninterrupted(_clean_up(runner, daemon))


def _as_bound(settings: DaemonSettings, sockets: list[socket.socket]) -> DaemonSettings:
    """Name the real port where the system chose it: by its address the daemon stands in the audit."""
    return settings if settings.socket is not None else replace(settings, port=sockets[0].getsockname()[1])


async def _check_ready(engine: Engine) -> None:
    for layer in engine.layers:
        try:
            await layer.backend.check_ready()
        except BackendFailure as error:
            if not layer.backend.traits.remote:
                raise
            _log.warning("the layer %s cannot be used yet: %s", layer.name, error)


def _door(runner: web.AppRunner, daemon: Daemon, settings: DaemonSettings) -> Door:
    server = runner.server
    assert server is not None  # noqa: S101 - made by setup
    return Door(
        server=server, most=settings.max_connections, patience=settings.read_timeout, refuse=daemon.refuse_unread
    )


async def _accept(door: Door, listener: socket.socket) -> asyncio.AbstractServer:
    loop = asyncio.get_running_loop()
    if listener.family == socket.AF_UNIX:
        return await loop.create_unix_server(door, sock=listener)
    return await loop.create_server(door, sock=listener)


def _close_all(servers: list[asyncio.AbstractServer]) -> None:
    for server in servers:
        server.close()


async def _clean_up(runner: web.AppRunner, daemon: Daemon) -> None:
    await runner.cleanup()
    await daemon.wait_gone()


async def _uninterrupted(work: Coroutine[Any, Any, None]) -> None:
    """Do `work` to its end, whoever cancels meanwhile; the cancellation arrives afterwards."""
    task = asyncio.ensure_future(work)
    interruption: asyncio.CancelledError | None = None
    while not task.done():
        try:
            await asyncio.wait({task})
        except asyncio.CancelledError as error:
            interruption = error
    task.result()
    if interruption is not None:
        raise interruption


@contextmanager
def _signals(act: Callable[[], None]) -> Iterator[None]:
    """Call `act` at each SIGTERM and SIGINT; afterwards both are as they were. Does nothing outside the main thread."""
    loop = asyncio.get_running_loop()
    heard = (signal.SIGTERM, signal.SIGINT) if threading.current_thread() is threading.main_thread() else ()
    before = {number: signal.getsignal(number) for number in heard}
    for number in before:
        loop.add_signal_handler(number, act)
    try:
        yield
    finally:
        for number, handler in before.items():
            loop.remove_signal_handler(number)
            signal.signal(number, handler)


# Listening


@asynccontextmanager
async def _listening(settings: DaemonSettings) -> AsyncIterator[tuple[list[socket.socket], str]]:
    """Bind what the settings name, and tell its URL; afterwards it is closed, and our own socket file gone."""
    if settings.socket is not None:
        with _listening_unix(settings.socket) as (listener, url):
            yield [listener], url
        return
    sockets = await _bind_tcp(settings.host, settings.port)
    try:
        address = sockets[0].getsockname()
        name = address[0] if settings.port == 0 else settings.host
        shown = f"[{name}]" if ":" in name else name
        yield sockets, DaemonAddress.parse(f"http://{shown}:{address[1]}", setting="host").url
    finally:
        for listener in sockets:
            listener.close()


@contextmanager
def _listening_unix(name: str | os.PathLike[str]) -> Iterator[tuple[socket.socket, str]]:
    path = Path(name).absolute()
    listener = _bind_unix(path)
    made = path.lstat()
    try:
        yield listener, f"unix://{path}"
    finally:
        listener.close()
        found = _lstat(path)
        if found is not None and os.path.samestat(found, made):
            path.unlink()


async def _bind_tcp(host: str, port: int) -> list[socket.socket]:
    """Bind every address of `host`; only the first with port 0, where each would get a port of its own."""
    loop = asyncio.get_running_loop()
    try:
        found = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not a host name"
        raise ConfigurationError(
            f"the host {host!r} has no address to listen on: {reason}; choose another with --host", setting="host"
        ) from error
    addresses = list(dict.fromkeys((family, address) for family, _, _, _, address in found))
    sockets: list[socket.socket] = []
    failures: list[OSError] = []
    for family, address in addresses[:1] if port == 0 else addresses:
        try:
            sockets.append(socket.create_server(address, family=family, backlog=128))
        except OSError as error:
            failures.append(error)
    # An address family that this machine lacks (::1 of localhost) is no failure as long as another serves.
    serious = [error for error in failures if not sockets or error.errno != errno.EADDRNOTAVAIL]
    if serious:
        for listener in sockets:
            listener.close()
        raise _bind_error(serious[0], host, port) from serious[0]
    return sockets


def _bind_error(error: OSError, host: str, port: int) -> ConfigurationError:
    """Say why an address cannot be listened on, and what to do."""
    match error.errno:
        case errno.EADDRINUSE:
            return ConfigurationError(
                f"port {port} on {host} is in use by another process; choose another with --port", setting="port"
            )
        case errno.EADDRNOTAVAIL:
            return ConfigurationError(
                f"{host} is not an address of this machine; choose another with --host", setting="host"
            )
        case errno.EACCES | errno.EPERM:
            return ConfigurationError(
                f"this user may not listen on port {port} of {host}; choose one above 1023 with --port", setting="port"
            )
        case _:
            return ConfigurationError(f"cannot listen on port {port} of {host}: {error.strerror}", setting="host")


def _bind_unix(path: Path) -> socket.socket:
    """Listen at `path` with mode 0600; a socket file that nobody listens on is replaced, anything else is left."""

    def refuse(why: str) -> ConfigurationError:
        return ConfigurationError(f"the socket {str(path)!r} {why}", setting="socket")

    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        if (found := _lstat(path)) is not None:
            if not stat.S_ISSOCK(found.st_mode):
                raise refuse("is a file of another kind, which is not removed; choose another path")
            if _is_alive(path):
                raise refuse("is in use by another process; stop that, or choose another path")
            path.unlink()
        listener.bind(os.fsencode(path))
        path.chmod(0o600)  # before listen: until then nobody can connect, whatever the umask
        listener.listen(128)
    except OSError as error:
        listener.close()
        if error.errno in {errno.ENOENT, errno.ENOTDIR}:
            raise refuse("is in a directory that does not exist; make it first") from error
        raise refuse(f"cannot be listened on: {error.strerror}") from error
    except ConfigurationError:
        listener.close()
        raise
    return listener


def _lstat(path: Path) -> os.stat_result | None:
    try:
        return path.lstat()
    except FileNotFoundError:
        return None


def _is_alive(path: Path) -> bool:
    """Tell whether somebody listens there, or may do so as far as we are told."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(1)
        try:
            probe.connect(os.fsencode(path))
        except (ConnectionRefusedError, FileNotFoundError):
            return False
        except OSError:
            return True
        return True
