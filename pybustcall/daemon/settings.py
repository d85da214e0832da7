"""Where the daemon listens, whom it lets in, how much it takes, and what it keeps where.

This module decides which settings there are, their defaults, and which values cannot be. Where they come from (a file,
the command line) is `configuration`'s and the command line's affair, what they do that of the rooms that they are for.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, final

from pybustcall.capabilities import check_requirements
from pybustcall.daemon.access import check_access, check_meeting, check_token, is_loopback
from pybustcall.daemon.events import HEARTBEAT, MOST_EVENTS
from pybustcall.daemon.journal import MOST, RETENTION
from pybustcall.errors import ConfigurationError, InvalidRequest
from pybustcall.models import Access, Requirements, check_namespace

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Iterator, Mapping

__all__ = ["BESIDE", "DaemonSettings", "check_values", "files_of", "refuse_sharing", "shared_files"]

BESIDE: Final = ("-wal", "-shm", "-journal")
"""What the names of the files end in that SQLite has beside a database."""
_MAX_SOCKET_PATH: Final = 107  # bytes: sun_path of Linux is 108 with its closing NUL
_HOST_NAME: Final = re.compile(r"[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+)*\.?")


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class DaemonSettings:
    """Where the daemon listens, whom it lets in, and how much it takes.

    - `host`, `port`: the address; port 0 lets the system choose
    - `socket`: path of a Unix socket to listen on instead (mode 0600)
    - `token`: asked for as `Authorization: Bearer` by every capability that is protected; never in the repr
    - `operator_token`: another one, which opens what is private, too; never in the repr
    - `tenants`: tokens by namespace, each of which opens what is protected for that namespace only; never in the repr
    - `access`: the tiers of capabilities, for those that shall have others than these: public for the capabilities
      themselves, protected for everything else
    - `requires`: what clients must have before they may do more than ask
    - `allowed_hosts`: names, beyond IP addresses, localhost and `host`, that a `Host` header may say
    - `max_body_bytes`: of one request
    - `read_timeout`: seconds that the head of a request may take to arrive, and again its body
    - `max_connections`: at once; further ones are closed without an answer
    - `max_entries`: in the registry; a new one beyond it is refused
    - `drain`: seconds that requests under way have to finish when the daemon is told to stop
    - `state`: file in which to remember idempotency keys (mode 0600, this daemon's alone), so that a restarted daemon
      still knows them; without one they are forgotten at the end
    - `registry`: file in which to keep registered entries, dependencies and hot swaps (likewise private), so that a
      restarted daemon still knows them
    - `journal`: file in which busts are written down before they are applied (likewise private), so that what was
      answered survives a kill; without one nothing is left for later
    - `journal_retention`, `journal_most`: for how many seconds, and how many, busts that are over are kept there
    - `namespaces`: those that may be used; empty for any
    - `max_namespaces`: with registered entries at once
    - `max_readers`: that may follow the events at a time, with one token
    - `events_most`: how many events are kept for readers that come back
    - `events_heartbeat`: seconds after which a stream that has nothing to say says so
    - `answer_within`: seconds after which a bust that goes on is answered as a job
    """

    host: str = "127.0.0.1"
    port: int = 8989
    socket: str | os.PathLike[str] | None = None
    token: str | None = field(default=None, repr=False)
    operator_token: str | None = field(default=None, repr=False)
    tenants: Mapping[str, str] = field(default_factory=dict, repr=False)
    access: Mapping[str, Access] = field(default_factory=dict)
    requires: Requirements = field(default_factory=Requirements)
    allowed_hosts: tuple[str, ...] = ()
    max_body_bytes: int = 65536
    read_timeout: float = 10.0
    max_connections: int = 1000
    max_entries: int = 1_000_000
    drain: float = 10.0
    state: str | os.PathLike[str] | None = None
    registry: str | os.PathLike[str] | None = None
    journal: str | os.PathLike[str] | None = None
    journal_retention: float = RETENTION
    journal_most: int = MOST
    namespaces: tuple[str, ...] = ()
    max_namespaces: int = 1000
    max_readers: int = 500
    events_most: int = MOST_EVENTS
    events_heartbeat: float = HEARTBEAT
    answer_within: float = 1.0

    @property
    def registry_file(self) -> str | os.PathLike[str] | None:
        """Where the registry is kept: beside the journal unless `registry` says it, in memory if there is neither.

        What a bust by tag or with dependents reaches is known to the registry; a promise that outlives the process
        needs that, too.
        """
        if self.registry is not None or self.journal is None:
            return self.registry
        return f"{os.fspath(self.journal)}.registry"


_LEAST: Final = {
    "max_body_bytes": ("the largest body must be 1 byte or more", 1),
    "max_connections": ("the most connections must be 1 or more", 1),
    "max_entries": ("the most entries must be 0 or more", 0),
    "max_namespaces": ("the most namespaces must be 1 or more", 1),
    "max_readers": ("the most readers of events must be 0 or more", 0),
    "events_most": ("1 event or more must be kept", 1),
    "journal_most": ("the journal must keep 1 bust or more", 1),
}
_SECONDS: Final = {
    "read_timeout": ("the time to read a request must be more than 0 seconds", False),
    "journal_retention": ("the journal's retention must be more than 0 seconds", False),
    "events_heartbeat": ("the heartbeat of events must be more than 0 seconds", False),
    "drain": ("the drain must be 0 seconds or more", True),
    "answer_within": ("the time to answer must be 0 seconds or more", True),
}  # and whether 0 is possible


def check_values(settings: DaemonSettings, capabilities: Collection[str]) -> None:
    """Raise `ConfigurationError`, naming the setting, if the daemon cannot or must not run with these settings.

    `capabilities` are the names of all that can be given access to.
    """
    check_token(settings.token, "token")
    check_token(settings.operator_token, "operator_token")
    if settings.operator_token is not None and settings.operator_token == settings.token:
        raise ConfigurationError("the operator token must be another than the token", setting="operator_token")
    _check_tenants(settings)
    check_access(settings.access, capabilities)
    check_requirements(settings.requires)
    check_meeting(settings.requires, settings.access, settings.operator_token)
    _check_place(settings)
    for setting, (text, least) in _LEAST.items():
        value = getattr(settings, setting)
        if value < least:
            raise ConfigurationError(f"{text}, not {value!r}", setting=setting)
    for setting, (text, may_be_zero) in _SECONDS.items():
        value = getattr(settings, setting)
        if not (0 < value < float("inf") or (may_be_zero and value == 0)):
            raise ConfigurationError(f"{text}, not {value!r}", setting=setting)
    for name in settings.namespaces:
        try:
            check_namespace(name)
        except InvalidRequest as error:
            told = str(error).removesuffix("; nothing was sent")
            raise ConfigurationError(f"namespace {name!r}: {told}", setting="namespaces") from None
    _check_files(settings)


def _check_tenants(settings: DaemonSettings) -> None:
    """Raise `ConfigurationError` for tenants that cannot be, or whose token says not who they are."""
    seen = {settings.token, settings.operator_token}
    for namespace, token in settings.tenants.items():
        try:
            check_namespace(namespace)
        except InvalidRequest as error:
            told = str(error).removesuffix("; nothing was sent")
            raise ConfigurationError(f"tenant {namespace!r}: {told}", setting="tenants") from None
        if settings.namespaces and namespace not in settings.namespaces:
            raise ConfigurationError(f"tenant {namespace}: this namespace is not allowed", setting="tenants")
        check_token(token, "tenants")
        if token in seen:
            raise ConfigurationError(f"tenant {namespace}: its token must be no other's, too", setting="tenants")
        seen.add(token)


def _check_place(settings: DaemonSettings) -> None:
    if settings.socket is not None and len(os.fsencode(settings.socket)) > _MAX_SOCKET_PATH:
        raise ConfigurationError(
            f"the socket {os.fspath(settings.socket)!r} is longer than {_MAX_SOCKET_PATH} bytes, the most that the"
            " system takes; choose a shorter path",
            setting="socket",
        )
    if settings.socket is None:
        if type(settings.port) is not int or not 0 <= settings.port <= 65535:
            raise ConfigurationError(f"the port must be 0 to 65535, not {settings.port!r}", setting="port")
        tokens = (settings.token, settings.operator_token, *settings.tenants.values())
        if tokens == (None, None) and not is_loopback(settings.host):
            raise ConfigurationError(
                f"listening on {settings.host!r} lets other machines in, which needs a token; set one (BUSTCALL_TOKEN),"
                " or listen on 127.0.0.1",
                setting="token",
            )
    for name in settings.allowed_hosts:
        if not _HOST_NAME.fullmatch(name):
            raise ConfigurationError(
                f"allowed host {name!r} is not a host name; give names only, without scheme and port",
                setting="allowed_hosts",
            )


def _check_files(settings: DaemonSettings) -> None:
    """Raise `ConfigurationError` if two databases would share a file."""
    own = [(setting, path, BESIDE) for setting, path in files_of(settings).items()]
    for setting, other, path in shared_files(own):
        raise ConfigurationError(
            refuse_sharing(f"the {other}", f"the {setting}", path),
            setting=setting,
        )


def files_of(settings: DaemonSettings) -> dict[str, str | os.PathLike[str]]:
    """Tell where the daemon keeps what lasts, by the names of the settings."""
    files = {"state": settings.state, "registry": settings.registry_file, "journal": settings.journal}
    return {setting: path for setting, path in files.items() if path is not None}


def shared_files(
    files: Iterable[tuple[str, str | os.PathLike[str], tuple[str, ...]]],
) -> Iterator[tuple[str, str, str | os.PathLike[str]]]:
    """Find the files that another before them in the list lies upon: whose each is, whose the other, and the path.

    `files` are whose they are, the paths, and what the names of those end in that lie beside them.
    """
    seen: dict[str, str] = {}
    for whose, path, beside in files:
        real = os.path.realpath(path)
        names = [real, *(real + end for end in beside)]
        other = next((seen[name] for name in names if name in seen), None)
        for name in names:
            seen.setdefault(name, whose)
        if other is not None:
            yield whose, other, path


def refuse_sharing(one: str, other: str, path: str | os.PathLike[str]) -> str:
    """Say that two cannot have one file."""
    return f"{one} and {other} cannot both be kept in {os.fspath(path)!r}; give each a file of its own"
