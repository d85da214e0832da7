"""The daemon's configuration: one TOML file that says everything, checked with precise errors.

This module decides what the file may hold, says exactly what is wrong with one (which file, which key, what was
expected, what was found), and makes of it what the daemon is started with. What a setting means is decided where it is
used, and its value is checked there once more. What can be found out without serving is `checking`'s affair, and how
the file is told to people `settings_page`'s.

The file holds no secret, so that it may be copied, printed and kept with the code: a token or a URL with a password is
named by a file or a variable that has it. Paths are relative to the directory of the file that names them.
"""

from __future__ import annotations

import json
import os
import re
import tomllib
from collections import Counter
from dataclasses import dataclass, field, fields, replace
from datetime import date, datetime, time
from difflib import get_close_matches
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal, TypeVar, final
from urllib.parse import parse_qsl, urlsplit

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    model_validator,
)

from pybustcall.daemon.app import check_settings
from pybustcall.daemon.backends.files import FilesBackend
from pybustcall.daemon.backends.memcached import MemcachedBackend
from pybustcall.daemon.backends.memory import MemoryBackend
from pybustcall.daemon.backends.sqlite import SqliteBackend
from pybustcall.daemon.engine import Layer
from pybustcall.daemon.events import HEARTBEAT, MOST_EVENTS
from pybustcall.daemon.settings import BESIDE, DaemonSettings, files_of, refuse_sharing, shared_files
from pybustcall.errors import ConfigurationError, InvalidRequest
from pybustcall.models import MAX_SETTLE, Access, Requirements, check_namespace
from pybustcall.redis_layout import DEFAULT_PREFIX, MAX_FENCES
from pybustcall.sqlite_file import LONGEST_TIMEOUT

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Mapping

    from pydantic_core import ErrorDetails

    from pybustcall.daemon.backends import Backend
    from pybustcall.daemon.index import Indexes

__all__ = [
    "Configuration",
    "Document",
    "FilesLayer",
    "Finding",
    "InvalidConfiguration",
    "MemcachedLayer",
    "MemoryLayer",
    "RedisLayer",
    "SqliteLayer",
    "load",
    "read",
    "read_secret",
]

_T = TypeVar("_T")

_TOKENS: Final = {"token": "BUSTCALL_TOKEN", "operator_token": "BUSTCALL_OPERATOR_TOKEN"}
_STAND_INS: Final = {"token": "unread", "operator_token": "likewise-unread"}  # never served with
_LAYER_NAME: Final = re.compile(r"[a-z0-9._-]{1,64}")
_PLAIN: Final = re.compile(r"[A-Za-z0-9_.-]+")
_VARIABLE: Final = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_URLS: Final = frozenset({"url", "url_file", "url_env"})  # what stands there by mistake may be a secret
_SCHEMES: Final = ("redis", "rediss", "unix")
_BESIDE_CACHE: Final = (*BESIDE, ".lock", ".new", ".corrupt")
_MAX_SHOWN: Final = 60  # characters of a value that is not as expected


# What is wrong


@final
@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that is wrong: in which file, at which key, and what. No secret is in its text.

    Either of `file` and `key` is empty where there is none: an option is in no file, and what is no TOML has no keys.
    """

    file: str
    key: str
    text: str

    def __str__(self) -> str:
        whole = ": ".join(part for part in (self.file, self.key, self.text) if part)
        return "".join(character if character.isprintable() else "?" for character in whole)


@final
class InvalidConfiguration(ConfigurationError):
    """The daemon cannot start with this configuration. `findings` are all the reasons, the text has one a line."""

    def __init__(self, findings: Iterable[Finding]) -> None:
        self.findings = tuple(findings)
        super().__init__("\n".join(map(str, self.findings)), setting=self.findings[0].key or None)


# The tables of the file


def _as_tuple(value: object) -> object:
    return tuple(value) if isinstance(value, list) else value


def _at_home(path: str, info: ValidationInfo) -> str:
    """Take a relative path from the directory of the file that names it."""
    if "\0" in path:
        raise ValueError("expected a path without the character NUL")
    home = (info.context or {}).get("home")
    return path if home is None else str(Path(home, path))


def _joined(value: object) -> object:
    """Read `cache.bust = "public"` as `"cache.bust" = "public"`: TOML takes a dot for a table within a table."""
    if not isinstance(value, dict):
        return value
    flat: dict[object, object] = {}
    for name, below in value.items():
        inner = _joined(below)
        flat.update(
            {f"{name}.{key}": what for key, what in inner.items()} if isinstance(inner, dict) else {name: below}
        )
    return flat


def _is_namespace(name: str) -> str:
    try:
        return check_namespace(name)
    except InvalidRequest:
        raise ValueError(
            "expected 1 to 64 ASCII letters, digits, dots, dashes and underscores, no mark at the beginning"
        ) from None


def _is_layer_name(name: str) -> str:
    if not _LAYER_NAME.fullmatch(name):
        raise ValueError("expected 1 to 64 of a to z, 0 to 9, dot, dash and underscore")
    return name


def _is_redis_url(url: str) -> str:
    """Refuse what is no URL of Redis, and a password in it. No text shows any of it."""
    try:
        parts = urlsplit(url)
        secret = parts.password or dict(parse_qsl(parts.query)).get("password")
    except ValueError:
        raise ValueError("expected a URL such as redis://cache.internal:6379/0") from None
    if parts.scheme not in _SCHEMES or not (parts.hostname or parts.path):
        raise ValueError("expected a URL that begins with redis://, rediss:// or unix://")
    if secret:
        raise ValueError("a password is never kept in this file; name a file or a variable with url_file or url_env")
    return url


def _is_variable(name: str) -> str:
    if not _VARIABLE.fullmatch(name):
        raise ValueError("expected the name of a variable, such as REDIS_URL")
    return name


def _is_no_url(path: object) -> object:
    if isinstance(path, str) and "://" in path:
        raise ValueError("expected the path of a file; a URL stands in url, or in that file")
    return path


_File = Annotated[str, Field(min_length=1), AfterValidator(_at_home)]
_Text = Annotated[str, Field(min_length=1)]
_Name = Annotated[str, AfterValidator(_is_layer_name)]
_Namespace = Annotated[str, AfterValidator(_is_namespace)]
_Positive = Annotated[float, Field(gt=0)]


class _Table(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False, hide_input_in_errors=True)


@final
class ListenTable(_Table):
    """Where the daemon listens."""

    host: _Text = Field("127.0.0.1", description="the address; beyond loopback a token is needed")
    port: int = Field(8989, ge=0, le=65535, description="the port; 0 lets the system choose")
    socket: _File | None = Field(
        None, description="a Unix socket to listen on, mode 0600; it stands instead of `host` and `port`"
    )
    allowed_hosts: Annotated[tuple[_Text, ...], BeforeValidator(_as_tuple)] = Field(
        (), description="names that a `Host` header may say, beside IP addresses, localhost and `host`"
    )

    @model_validator(mode="after")
    def _is_one_place(self) -> ListenTable:
        if self.socket is not None and self.model_fields_set & {"host", "port"}:
            raise ValueError("expected either socket, or host and port; found both")
        return self


@final
class AccessTable(_Table):
    """Who may do what. Tokens are in files of their own, or in the environment; the files win."""

    token_file: _File | None = Field(
        None, description="the file with the token that protected capabilities ask for; without it, `BUSTCALL_TOKEN`"
    )
    operator_token_file: _File | None = Field(
        None,
        description="the file with a second token, which opens what is private, too; without it,"
        " `BUSTCALL_OPERATOR_TOKEN`",
    )
    tenants: dict[_Namespace, _File] = Field(
        {},
        description="for each of these namespaces the file with a token that opens what is protected for it only, such"
        ' as `shop = "secrets/shop"`',
    )
    tiers: Annotated[dict[str, Access], BeforeValidator(_joined)] = Field(
        {},
        description='capabilities that shall be "public", "protected" or "private"; otherwise `daemon.capabilities` is'
        " public, and everything else protected",
    )


@final
class RequiresTable(_Table):
    """What clients must have before they may do more than ask."""

    semverx: _Text = Field("*", description="the range of SemverX versions that a client must have; `*` is any")
    capabilities: Annotated[tuple[_Text, ...], BeforeValidator(_as_tuple)] = Field(
        (), description="the names of the capabilities that a client must have"
    )


@final
class LimitsTable(_Table):
    """How much the daemon takes, and for how long."""

    max_body_bytes: int = Field(65536, ge=1, description="bytes of the body of one request")
    max_connections: int = Field(1000, ge=1, description="connections at once; further ones are closed")
    max_entries: int = Field(1_000_000, ge=0, description="entries in the registry; a new one beyond it is refused")
    read_timeout: _Positive = Field(
        10.0, description="seconds that the head of a request may take to arrive, and again its body"
    )
    answer_within: float = Field(
        1.0, ge=0, description="seconds after which a bust that goes on is answered with 202, and ends as a job"
    )
    drain: float = Field(10.0, ge=0, description="seconds that what is under way may take after SIGTERM")


@final
class FilesTable(_Table):
    """What the daemon reads at its start, and keeps over restarts. Each daemon needs files of its own."""

    state: _File | None = Field(None, description="where to remember idempotency keys; without it, in memory")
    registry: _File | None = Field(
        None,
        description="where to keep registered entries, dependencies and hot swaps; without it, beside the journal"
        " (`PATH.registry`), or in memory if there is none",
    )
    register_: _File | None = Field(
        None,
        alias="register",
        description='JSON `{"entry": ["what it depends on"]}` that is registered at the start; only read',
    )


@final
class JournalTable(_Table):
    """What is still to be done, and what was: busts survive a crash, and can be looked up."""

    path: _File | None = Field(
        None, description="the journal's file; without it the journal is in memory, and nothing is answered with 202"
    )
    retention: _Positive = Field(604800.0, description="seconds that a bust which is over is kept; 7 days by default")
    most: int = Field(100_000, ge=1, description="busts that are kept at most once they are over")


@final
class EventsTable(_Table):
    """Who follows what is busted."""

    kept: int = Field(
        MOST_EVENTS,
        ge=1,
        description="events that are kept for readers that come back; in the journal, if it is a file",
    )
    readers: int = Field(500, ge=0, description="readers that may follow at a time with one token; one more gets 429")
    heartbeat: _Positive = Field(HEARTBEAT, description="seconds after which a stream with nothing to say says so")


@final
class NamespacesTable(_Table):
    """Which tenants there may be."""

    allowed: Annotated[tuple[_Namespace, ...], BeforeValidator(_as_tuple)] = Field(
        (),
        description="the namespaces that there may be, `default` among them if it is used; empty is any, up to `most`",
    )
    most: int = Field(1000, ge=1, description="namespaces that the daemon remembers entries of at once")


class _LayerTable(_Table):
    name: _Name | None = Field(
        None,
        description="what answers call this layer; by default as its backend, if there is no other layer called so",
    )
    number: int | None = Field(
        None, ge=0, description="the lower, the further inside: busted first; by default its place in the list, from 0"
    )
    settle: float | None = Field(
        None,
        ge=0,
        le=MAX_SETTLE,
        description="seconds until the second bust; 0 is none, by default as the backend says",
    )


@final
class MemoryLayer(_LayerTable):
    """Holds what was registered, and nothing else."""

    backend: Literal["memory"] = Field(description='"memory": the registry itself')


@final
class FilesLayer(_LayerTable):
    """Files below a directory: a key is a path."""

    backend: Literal["files"] = Field(description='"files": a directory of files')
    root: _File = Field(
        description="the directory, which must exist; `{namespace}` as a segment of it stands for the namespace, and"
        " without that there is the default one only"
    )


@final
class RedisLayer(_LayerTable):
    """What a Redis server holds. It needs the extra: `pip install 'pybustcall[redis]'`."""

    backend: Literal["redis"] = Field(description='"redis": a Redis server')
    url: Annotated[str, AfterValidator(_is_redis_url)] | None = Field(
        None, description="the server, as `redis://`, `rediss://` or `unix://`; without a password"
    )
    url_file: Annotated[_File, BeforeValidator(_is_no_url)] | None = Field(
        None, description="instead: a file with the URL, which may have a password"
    )
    url_env: Annotated[str, AfterValidator(_is_variable)] | None = Field(
        None, description="instead: the variable with the URL, which may have a password"
    )
    prefix: _Text = Field(
        DEFAULT_PREFIX, description="what the names of our keys in Redis begin with; `RedisCache` has the same"
    )
    foreign: _Text | None = Field(
        None,
        description="what the keys of other programs look like that are busted, too, such as `shop:{namespace}:{key}`;"
        " nothing can be marked as stale then",
    )
    timeout: _Positive = Field(1.0, description="seconds that the server may take to answer")
    connect_timeout: _Positive = Field(1.0, description="seconds that a connection to the server may take")
    connections: int = Field(16, ge=1, description="connections that are open at most")
    fences: int = Field(
        MAX_FENCES, ge=1, description="busted things that are remembered in each namespace, to refuse late fills"
    )

    @model_validator(mode="after")
    def _has_one_url(self) -> RedisLayer:
        said = [name for name in ("url", "url_file", "url_env") if getattr(self, name) is not None]
        if len(said) != 1:
            raise ValueError(f"expected one of url, url_file and url_env; found {' and '.join(said) or 'none'}")
        return self

    @property
    def url_key(self) -> str:
        """Which of the three keys says the URL."""
        return next(name for name in ("url", "url_file", "url_env") if getattr(self, name) is not None)

    def find_url(self, environ: Mapping[str, str]) -> str:
        """Tell the server's URL, wherever it is kept. Raises `ConfigurationError` if it is not there."""
        if self.url_file is not None:
            return read_secret(self.url_file, "url_file")
        if self.url_env is not None and not environ.get(self.url_env):
            raise ConfigurationError(f"the variable {self.url_env} is not set", setting="url_env")
        return environ[self.url_env] if self.url_env is not None else self.url or ""


@final
class SqliteLayer(_LayerTable):
    """What `SqliteCache` holds in a file of this machine."""

    backend: Literal["sqlite"] = Field(description='"sqlite": an SQLite file')
    path: _File = Field(
        description="the file, which `SqliteCache` names, too, on a local disk; it is made if it is missing, in a"
        " directory that must exist"
    )
    timeout: _Positive = Field(
        1.0, le=LONGEST_TIMEOUT, description="seconds that another process may keep the file locked"
    )
    fences: int = Field(
        MAX_FENCES, ge=1, description="busted things that are remembered in each namespace, to refuse late fills"
    )


@final
class MemcachedLayer(_LayerTable):
    """What `MemcachedCache` holds in a memcached server, 1.6.10 or later. Nobody can list it: there are no dry runs."""

    backend: Literal["memcached"] = Field(description='"memcached": a memcached server')
    url: _Text = Field(description="the server, as `memcached://HOST`, `memcached://HOST:PORT` or `unix:///PATH`")
    prefix: _Text = Field(
        DEFAULT_PREFIX, description="what the names of our items begin with; `MemcachedCache` has the same"
    )
    timeout: _Positive = Field(1.0, description="seconds that the server may take to answer")
    connect_timeout: _Positive = Field(1.0, description="seconds that a connection to the server may take")
    connections: int = Field(16, ge=1, description="connections that are open at most")


_SomeLayer = MemoryLayer | FilesLayer | RedisLayer | SqliteLayer | MemcachedLayer
_KINDS: Final[Mapping[str, type[_LayerTable]]] = {
    "memory": MemoryLayer,
    "files": FilesLayer,
    "redis": RedisLayer,
    "sqlite": SqliteLayer,
    "memcached": MemcachedLayer,
}
_AnyLayer = Annotated[_SomeLayer, Field(discriminator="backend")]


@final
class Document(_Table):
    """All that the file may hold. Everything has a default: an empty file is the daemon without options."""

    listen: ListenTable = ListenTable()
    access: AccessTable = AccessTable()
    requires: RequiresTable = RequiresTable()
    limits: LimitsTable = LimitsTable()
    files: FilesTable = FilesTable()
    journal: JournalTable = JournalTable()
    namespaces: NamespacesTable = NamespacesTable()
    events: EventsTable = EventsTable()
    layers: Annotated[tuple[_AnyLayer, ...], BeforeValidator(_as_tuple)] = Field(
        (), description="the caches, one behind the other; none is one layer in memory"
    )


_PLACES: Final[Mapping[str, str]] = {
    "host": "listen.host",
    "port": "listen.port",
    "socket": "listen.socket",
    "allowed_hosts": "listen.allowed_hosts",
    "token": "access.token_file",
    "operator_token": "access.operator_token_file",
    "tenants": "access.tenants",
    "access": "access.tiers",
    "requires": "requires",
    "max_body_bytes": "limits.max_body_bytes",
    "max_connections": "limits.max_connections",
    "max_entries": "limits.max_entries",
    "read_timeout": "limits.read_timeout",
    "answer_within": "limits.answer_within",
    "drain": "limits.drain",
    "state": "files.state",
    "registry": "files.registry",
    "entries": "files.register",
    "journal": "journal.path",
    "journal_retention": "journal.retention",
    "journal_most": "journal.most",
    "namespaces": "namespaces.allowed",
    "max_namespaces": "namespaces.most",
    "events_most": "events.kept",
    "max_readers": "events.readers",
    "events_heartbeat": "events.heartbeat",
}
"""Where the file says what `DaemonSettings` calls so."""


# Using it


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Configuration:
    """What one file says, or no file: then `file` is empty, and everything has its default.

    - `layer`: the only layer if an option named one
    - `findings`: what is wrong in the file; nothing is served while there is any
    - `left_out`: what of the file is not in `document` because of that, such as "limits.drain", or "layers.1"
    """

    file: str = ""
    document: Document = field(default_factory=Document)
    layer: FilesLayer | MemoryLayer | None = None
    findings: tuple[Finding, ...] = ()
    left_out: frozenset[str] = frozenset()

    @property
    def register(self) -> str | None:
        """The file with entries to register at the start."""
        return self.document.files.register_

    def lacks(self, table: str) -> bool:
        """Tell whether anything of this table, or all of it, is left out."""
        return any(key == table or key.startswith(f"{table}.") for key in self.left_out)

    @property
    def _may_say_tokens(self) -> bool:
        """Whether a token may be meant by what is left out: in its table, or in one whose name is misspelt."""
        unknown = {key.partition(".")[0] for key in self.left_out} - Document.model_fields.keys()
        return bool(unknown) or self.lacks("access")

    def tables_of_layers(self) -> dict[str, _SomeLayer]:
        """Tell the tables of the layers by their keys in the file; without any there is one layer in memory."""
        if self.layer is not None:
            return {"layers.0": self.layer}
        if not self.document.layers and not self.lacks("layers"):
            return {"layers.0": MemoryLayer(backend="memory")}
        return {f"layers.{place}": table for place, table in _placed(self.document.layers, self.left_out)}

    def finding(self, setting: str | None, text: str, given: Iterable[str] = ()) -> Finding:
        """Say what is wrong with a setting, at its key; what an option has `given` is in no file."""
        of_layer = self.layer is not None and (setting or "").startswith("layers.")
        by_option = of_layer or (setting is not None and setting in given)
        if setting is None or by_option or not self.file:
            return Finding("", "", text)
        return Finding(self.file, _PLACES.get(setting, setting), text)

    def draft(self, environ: Mapping[str, str], **given: Any) -> tuple[DaemonSettings, list[Finding]]:
        """Make the daemon's settings, and tell all that is wrong with them; see `settings`."""
        document, findings = self.document, list[Finding]()
        said: dict[str, Any] = {
            **document.listen.model_dump(),
            **document.limits.model_dump(),
            "access": document.access.tiers,
            "requires": Requirements(**document.requires.model_dump()),
            "state": document.files.state,
            "registry": document.files.registry,
            "journal": document.journal.path,
            "journal_retention": document.journal.retention,
            "journal_most": document.journal.most,
            "namespaces": document.namespaces.allowed,
            "max_namespaces": document.namespaces.most,
            "events_most": document.events.kept,
            "max_readers": document.events.readers,
            "events_heartbeat": document.events.heartbeat,
        }
        given = {name: value for name, value in given.items() if value is not None}
        if given.keys() & {"host", "port"}:
            said["socket"] = None
        for name, variable in _TOKENS.items():
            place = f"{name}_file"
            path = given.pop(place, None)
            by_option = path is not None
            path = path or getattr(document.access, place)
            if name in given:
                continue
            try:
                said[name] = environ.get(variable) or None if path is None else read_secret(path, name)
            except ConfigurationError as error:
                findings.append(self.finding(name, str(error), {name} if by_option else ()))
                said[name] = _STAND_INS[name]  # there is one: that none is set is not what is wrong
            if said[name] is None and self._may_say_tokens:
                said[name] = _STAND_INS[name]  # likewise
        said["tenants"] = tenants = {}
        for namespace, path in document.access.tenants.items():
            try:
                tenants[namespace] = read_secret(path, f"{namespace} token")
            except ConfigurationError as error:
                findings.append(self.finding("tenants", str(error)))
                tenants[namespace] = f"unread-{namespace}"
        settings = DaemonSettings(**(said | given))
        findings += [self.finding(error.setting, str(error), given) for error in _all_wrong(settings)]
        return settings, findings + list(self._shared_files(settings, given))

    def _shared_files(self, settings: DaemonSettings, given: Collection[str]) -> Iterable[Finding]:
        """Tell of layers whose file is that of another layer, or one of the daemon's own."""
        caches = {f"{key}.path": it for key, it in self.tables_of_layers().items() if isinstance(it, SqliteLayer)}
        told = {key: f"the layer {it.name or it.backend} ({key})" for key, it in caches.items()}
        files = files_of(settings)
        for setting in files:
            is_written = self.file and setting not in given and (setting != "registry" or settings.registry is not None)
            told[setting] = f"the {setting} ({_PLACES[setting]})" if is_written else f"the {setting}"
        own = [(setting, path, BESIDE) for setting, path in files.items()]
        for whose, other, path in shared_files([*own, *((key, it.path, _BESIDE_CACHE) for key, it in caches.items())]):
            if whose in caches:
                yield self.finding(whose, refuse_sharing(told[other], told[whose], path))

    def settings(self, environ: Mapping[str, str], **given: Any) -> DaemonSettings:
        """Make the daemon's settings: what options have `given` (None is not given), or else the file, or the defaults.

        `given` are names of `DaemonSettings`, or `token_file` and `operator_token_file`. A token comes from the file
        that is named for it, or else from `environ`; an option for an address stands instead of the file's socket.
        Raises `InvalidConfiguration` if the daemon must not run with them.
        """
        settings, findings = self.draft(environ, **given)
        if self.findings or findings:
            raise InvalidConfiguration([*self.findings, *findings])
        return settings

    def draft_layers(self, indexes: Indexes, environ: Mapping[str, str]) -> tuple[dict[str, Layer], list[Finding]]:
        """Make the layers that can be made, by their keys in the file, and tell what is wrong with the others."""
        made: dict[str, Layer] = {}
        findings: list[Finding] = []
        for key, table in self.tables_of_layers().items():
            try:
                backend = _backend_of(table, indexes, environ)
            except ConfigurationError as error:
                findings.append(self.finding(f"{key}.{error.setting or 'backend'}", str(error)))
                continue
            made[key] = Layer(
                name=table.name or table.backend,
                number=int(key.rpartition(".")[2]) if table.number is None else table.number,
                backend=backend,
                settle=table.settle,
            )
        return made, findings

    def layers(self, indexes: Indexes, environ: Mapping[str, str]) -> list[Layer]:
        """Make the layers, inside out; nothing is connected to.

        Raises `InvalidConfiguration` for what is not there: a root, a file or variable with a URL, an extra.
        """
        made, findings = self.draft_layers(indexes, environ)
        if self.findings or findings:
            raise InvalidConfiguration([*self.findings, *findings])
        return sorted(made.values(), key=lambda layer: layer.number)

    def with_layer(self, layer: FilesLayer | MemoryLayer) -> Configuration:
        """Say the same with this one layer, which an option gave. Raises `InvalidConfiguration` if there are some."""
        if self.document.layers or self.lacks("layers"):
            raise InvalidConfiguration(
                [Finding(self.file, "layers", "the file says which layers there are; leave --root and --backend out")]
            )
        return replace(self, layer=layer)


def _all_wrong(settings: DaemonSettings) -> list[ConfigurationError]:
    """Tell all that `check_settings` has against them: what it names is set to what is harmless, and it asked again."""
    defaults = DaemonSettings()
    harmless = {each.name: getattr(defaults, each.name) for each in fields(defaults)} | _STAND_INS
    wrong: dict[str, ConfigurationError] = {}
    while True:
        try:
            check_settings(settings)
        except ConfigurationError as error:
            setting = error.setting or ""
            if setting in wrong:
                return list(wrong.values())
            wrong[setting] = error
            settings = replace(settings, **({setting: harmless[setting]} if setting in harmless else {}))
        else:
            return list(wrong.values())


def _backend_of(table: _SomeLayer, indexes: Indexes, environ: Mapping[str, str]) -> Backend:
    match table:
        case MemoryLayer():
            return MemoryBackend(indexes)
        case FilesLayer():
            return FilesBackend(table.root)
        case SqliteLayer():
            return SqliteBackend(table.path, timeout=table.timeout, fences=table.fences)
        case MemcachedLayer():
            return MemcachedBackend(
                table.url,
                prefix=table.prefix,
                timeout=table.timeout,
                connect_timeout=table.connect_timeout,
                connections=table.connections,
            )
        case _:
            try:
                from pybustcall.daemon.backends.redis import RedisBackend  # noqa: PLC0415 - needs an extra
            except ImportError as error:
                raise ConfigurationError(str(error), setting="backend") from error
            url = table.find_url(environ)
            try:
                return RedisBackend(
                    url,
                    prefix=table.prefix,
                    foreign=table.foreign,
                    timeout=table.timeout,
                    connect_timeout=table.connect_timeout,
                    connections=table.connections,
                    fences=table.fences,
                )
            except ConfigurationError as error:
                if error.setting != "url":
                    raise
                raise ConfigurationError(str(error), setting=table.url_key) from None


def read_secret(path: str | os.PathLike[str], setting: str) -> str:
    """Read a token, or a URL with a password, from a file of its own; blanks around it do not count.

    Raises `ConfigurationError`, whose text does not show it.
    """
    file = f"{setting.removesuffix('_file').replace('_', ' ')} file {os.fspath(path)}"
    try:
        secret = Path(path).read_text(encoding="ascii").strip()
    except OSError as error:
        raise ConfigurationError(f"{file}: cannot be read ({error.strerror})", setting=setting) from error
    except UnicodeDecodeError:
        raise ConfigurationError(f"{file}: holds more than visible ASCII", setting=setting) from None
    if not secret:
        raise ConfigurationError(f"{file}: is empty", setting=setting)
    return secret


# Reading it


def load(path: str | os.PathLike[str]) -> Configuration:
    """Read a configuration from a TOML file. Raises `InvalidConfiguration` with all that is wrong in it."""
    configuration = read(path)
    if configuration.findings:
        raise InvalidConfiguration(configuration.findings)
    return configuration


def read(path: str | os.PathLike[str]) -> Configuration:
    """Read of a TOML file what can be, so that it can be checked; the `findings` are what is wrong in it.

    Raises `InvalidConfiguration` for what is no TOML: then nothing can be told of the rest.
    """
    file = os.fspath(path)
    try:
        document = tomllib.loads(Path(path).read_bytes().decode("utf-8-sig"))  # some editors write a mark
    except OSError as error:
        raise InvalidConfiguration([Finding(file, "", f"cannot be read ({error.strerror})")]) from error
    except UnicodeDecodeError as error:
        found = f"expected UTF-8, found the byte 0x{error.object[error.start]:02x} at {error.start}"
        raise InvalidConfiguration([Finding(file, "", found)]) from None
    except ValueError as error:  # most are TOMLDecodeError; a number may be too long for Python
        raise InvalidConfiguration([Finding(file, *_syntax(str(error)))]) from None
    except RecursionError:
        raise InvalidConfiguration([Finding(file, "", "is nested too deeply")]) from None
    findings: list[Finding] = []
    left_out: set[str] = set()
    while True:
        try:
            kept = Document.model_validate(document, context={"home": Path(path).absolute().parent})
        except ValidationError as error:
            errors = error.errors(include_url=False)
        else:
            break
        if not left_out:  # what is found later may come of what was left out before
            findings = [_finding(file, document, problem) for problem in errors]
        left_out |= _leave_out(document, [_place_of(problem) for problem in errors], left_out)
    findings += [Finding(file, key, text) for key, text in _same_names(kept, left_out)]
    return Configuration(file=file, document=kept, findings=tuple(findings), left_out=frozenset(left_out))


def _placed(tables: Iterable[_T], left_out: Collection[str]) -> Iterable[tuple[int, _T]]:
    """Tell of the tables of layers that are left where in the file each stands."""
    return zip((place for place in count() if f"layers.{place}" not in left_out), tables, strict=False)


def _leave_out(document: dict[str, Any], wrong: list[list[Any]], left_out: Collection[str]) -> set[str]:
    """Take away what cannot be read, which is a key of a table, or all of one that lacks something; tell the keys."""
    layers = dict(_placed(_listed(document), left_out))
    tables: dict[str, Any] = {**document, **{f"layers.{place}": table for place, table in layers.items()}}
    numbers = list(layers)
    gone: set[str] = set()
    for first, *below in wrong:
        name = f"layers.{numbers[below.pop(0)]}" if first == "layers" and below else first
        whole = not below or not isinstance(tables[name], dict) or below[0] not in tables[name]
        gone.add(name if whole else f"{name}.{below[0]}")
    for name, table in tables.items():
        if isinstance(table, dict):
            for key in [key for key in table if f"{name}.{key}" in gone]:
                del table[key]
        if name in gone:
            document.pop(name, None)
    if "layers" in document:
        document["layers"] = [table for place, table in layers.items() if f"layers.{place}" not in gone]
    return gone


def _listed(document: dict[str, Any]) -> list[Any]:
    layers = document.get("layers", [])
    return layers if isinstance(layers, list) else []


def _place_of(problem: ErrorDetails) -> list[Any]:
    """Tell where the file says it: without the kind of layer, which it says elsewhere, and a mark for names of keys."""
    place = list(problem["loc"])
    if place[0] == "layers" and len(place) > 2:
        del place[2]
    if place[-1] == "[key]" and len(place) > 3:  # what is wrong is the name, and not what it stands for
        del place[-1]
    return place


def _spelled(place: Iterable[int | str]) -> str:
    """Write a key as the file has it: a name that TOML takes only so is in quotes."""
    return ".".join(
        name if _PLAIN.fullmatch(name) else json.dumps(name, ensure_ascii=False) for name in map(str, place)
    )


def _syntax(text: str) -> tuple[str, str]:
    """Part what tomllib says into the place, as in "line 3, column 7", and what is wrong there."""
    message, at, place = text.removesuffix(")").rpartition(" (at ")
    return (place, message) if at else ("", f"is no TOML: {text}")


def _same_names(document: Document, left_out: Collection[str]) -> Iterable[tuple[str, str]]:
    placed = [
        (f"layers.{place}.name", layer)
        for place, layer in _placed(document.layers, left_out)
        if f"layers.{place}.name" not in left_out
    ]
    often = Counter(layer.name or layer.backend for _, layer in placed)
    seen: set[str] = set()
    for key, layer in placed:
        name = layer.name or layer.backend
        if often[name] > 1 and layer.name is None:
            yield key, f'is needed, since another layer would be called "{name}", too'
        elif name in seen:
            yield key, f'expected another name, found "{name}" a second time'
        seen.add(name)


def _finding(file: str, document: dict[str, Any], problem: ErrorDetails) -> Finding:
    """Say in our words what pydantic found."""
    place = _place_of(problem)
    found = problem["input"]
    if problem["type"].startswith("union_tag"):
        place.append("backend")
        found = found.get("backend")
    key = _spelled(place)
    if problem["type"] == "extra_forbidden":
        return Finding(file, key, _unknown(document, place))
    if key == "layers" and isinstance(found, dict):
        return Finding(file, key, "expected a list of tables, each [[layers]]; found one table, [layers]")
    added = "" if _is_telling(problem) or place[-1] in _URLS else f", found {_shown(found)}"
    return Finding(file, key, f"{_expected(problem)}{added}")


def _is_telling(problem: ErrorDetails) -> bool:
    """Tell whether what pydantic says needs no addition of what was found."""
    text = problem["msg"].removeprefix("Value error, ")
    alone = problem["type"] == "value_error" and (not text.startswith("expected") or "; found" in text)
    return alone or problem["type"] in {"missing", "union_tag_not_found"}


_EXPECTED: Final[Mapping[str, str]] = {
    "string_type": "expected a string",
    "string_too_short": "expected a string that is not empty",
    "int_type": "expected a whole number",
    "int_from_float": "expected a whole number",
    "float_type": "expected a number",
    "finite_number": "expected a number that is finite",
    "tuple_type": "expected a list",
    "dict_type": "expected a table",
    "model_type": "expected a table",
    "model_attributes_type": "expected a table",
    "greater_than": "expected a number above {gt:g}",
    "greater_than_equal": "expected {ge:g} or more",
    "less_than_equal": "expected {le:g} or less",
    "literal_error": "expected {expected}",
    "union_tag_invalid": "expected {expected_tags}",
    "union_tag_not_found": "is missing; it says which kind of cache this is: memory, files, redis, sqlite or memcached",
    "missing": "is missing",
}


def _expected(problem: ErrorDetails) -> str:
    text = problem["msg"].removeprefix("Value error, ").replace("Input should be", "expected")
    return _EXPECTED.get(problem["type"], text.replace("{", "{{").replace("}", "}}")).format(**problem.get("ctx", {}))


def _shown(value: object) -> str:
    """Write a value as TOML would, or what kind of value it is."""
    match value:
        case bool() | str():
            text = json.dumps(value, ensure_ascii=False)
            return text if len(text) <= _MAX_SHOWN else f"{text[:_MAX_SHOWN]}..."
        case int():
            return str(value) if abs(value) < 10**_MAX_SHOWN else "a larger one"
        case float():
            return str(value)
        case datetime() | date() | time():
            return f"the date or time {value}"
        case dict():
            return "a table"
        case _:
            return "a list"


def _unknown(document: dict[str, Any], place: list[int | str]) -> str:
    """Say of a key that there is no such setting, and which was meant."""
    name = str(place[-1])
    if name in _TOKENS:
        return (
            "a token is never kept in this file; put it into a file of its own, and name that with"
            f" access.{name}_file, or set {_TOKENS[name]}"
        )
    if name in {"password", "username"} and place[0] == "layers":
        return "a password is never kept in this file; name a file or a variable with url_file or url_env"
    here = _keys_at(document, place)
    if alike := get_close_matches(name, here, n=1):
        return f"is no setting; did you mean {alike[0]}?"
    if place[0] == "layers":
        owners = [kind for kind, model in _KINDS.items() if name in model.model_fields]
        of = f" of this kind of layer, but of {owners[0]}" if owners else ""
        return f"is no setting{of}; there are {', '.join(here)}"
    known = {**{key.rpartition(".")[2]: key for key in _PLACES.values()}, **_PLACES}  # by either of its names
    if alike := get_close_matches(name, known, n=1, cutoff=0.75):
        return f"is no setting here; did you mean {known[alike[0]]}?"
    return f"is no setting; there are {', '.join(here)}"


def _keys_at(document: dict[str, Any], place: list[int | str]) -> list[str]:
    """List the keys that could stand beside this one."""
    if len(place) == 1:
        model: type[_Table] = Document
    elif place[0] == "layers":
        model = _KINDS[document["layers"][place[1]]["backend"]]
    else:
        model = type(getattr(Document(), str(place[0])))
    return [told.alias or name for name, told in model.model_fields.items()]
