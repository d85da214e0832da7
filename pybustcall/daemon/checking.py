"""What can be found out about a configuration without serving, and without changing anything.

This module decides what is looked at before a daemon is started: what could be read of the file, the settings, the
files that it would keep, what it would read, and whether each cache answers. It tells all that it finds, not only the
first. What may stand in the file is `configuration`'s to decide. Whether the address is free is not asked: the daemon
that runs now has it.

What a daemon would serve with all the same is a warning. Those of a cache are heard where they are said, so that a
check and a daemon that starts say the same.

Files are looked at from outside, by their first bytes; which of them are texts, or databases at all, is `database`'s
to say, and which are caches `sqlite_file`'s, as it is when the daemon opens them. To open one with SQLite would make
files beside it, and would wait for whoever has it locked.
"""

from __future__ import annotations

import asyncio
import logging
import os
import stat
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, final

from pybustcall.daemon.backends import BackendFailure
from pybustcall.daemon.backends.sqlite import SqliteBackend
from pybustcall.daemon.database import HEAD_BYTES, is_header, refuse_text
from pybustcall.daemon.engine import Engine, Layer
from pybustcall.daemon.index import Indexes
from pybustcall.daemon.registrations import read_registrations
from pybustcall.errors import ConfigurationError
from pybustcall.locked_file import WITH_IT
from pybustcall.models import DEFAULT_NAMESPACE
from pybustcall.sqlite_file import HEAD_BYTES as CACHE_HEAD_BYTES
from pybustcall.sqlite_file import refuse_content

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from pybustcall.daemon.backends import Backend
    from pybustcall.daemon.configuration import Configuration, Finding
    from pybustcall.daemon.settings import DaemonSettings

__all__ = ["Checked", "check", "look_at_cache", "look_at_database", "look_at_socket"]

_COOKIE: Final = slice(40, 44)  # changes with the schema, 0 where there never was one
_APPLICATION: Final = slice(68, 72)
_OURS: Final = {"state": b"pbId", "registry": b"pbRg", "journal": b"pbJn"}
_NONE: Final = bytes(4)
_MOST_NAMED: Final = 5  # namespaces in a text

_log = logging.getLogger("pybustcall.daemon")


@final
@dataclass(frozen=True, slots=True)
class Checked:
    """What a check found.

    - `findings`: everything that is wrong, and would keep a daemon from serving
    - `warnings`: what it would serve with, and not as may be expected
    - `layers`: those that could be made, inside out
    """

    findings: tuple[Finding, ...]
    warnings: tuple[Finding, ...]
    layers: tuple[Layer, ...]

    @property
    def lacking(self) -> dict[str, tuple[str, ...]]:
        """The capabilities that a daemon would not have with these layers, and the names of those that lack each."""
        lacks = {
            "cache.bust.dry_run": [layer.name for layer in self.layers if not layer.backend.traits.counts],
            "cache.bust.namespace": [layer.name for layer in self.layers if not layer.backend.traits.namespaces],
            "cache.bust.soft": [layer.name for layer in self.layers if not layer.backend.traits.soft],
        }
        return {name: tuple(layers) for name, layers in lacks.items() if layers}


async def check(
    configuration: Configuration,
    environ: Mapping[str, str],
    *,
    register: str | os.PathLike[str] | None = None,
    patience: float = 5.0,
    **given: Any,
) -> Checked:
    """Find out what would keep a daemon from serving with this, as far as that can be told.

    - `register`: the file with entries that an option names instead
    - `patience`: seconds that a cache may take to answer
    - `given`: as of `Configuration.settings`
    """
    settings, wrong = configuration.draft(environ, **given)
    findings = [*configuration.findings, *wrong]
    for setting, text in await asyncio.to_thread(lambda: [*_look_at_files(settings)]):
        findings.append(configuration.finding(setting, text, given))
    indexes = Indexes(most=max(settings.max_namespaces, 1))
    made, unmade = configuration.draft_layers(indexes, environ)
    findings += unmade
    if file := register or configuration.register:
        try:
            if unmade or configuration.lacks("layers"):
                read_registrations(file)
            else:
                Engine(list(made.values()), indexes).load_registrations(file)
        except ConfigurationError as error:
            findings.append(configuration.finding(error.setting, str(error), () if register is None else {"entries"}))
    warnings = [*_doubt_namespaces(configuration, settings, made)]
    wrong_already = {finding.key for finding in findings}
    sound = {key: layer for key, layer in made.items() if f"{key}.path" not in wrong_already}
    with _Ear() as ear:
        async with asyncio.TaskGroup() as group:
            asked = {key: group.create_task(_find_out(layer.backend, patience, ear)) for key, layer in sound.items()}
    for key, layer in sound.items():
        answer, warned = asked[key].result()
        if answer is not None:
            findings.append(configuration.finding(key, f"the layer {layer.name} cannot be used now: {answer}"))
        warnings += [configuration.finding(key, f"the layer {layer.name}: {text}") for text in warned]
    layers = sorted(made.values(), key=lambda layer: layer.number)
    return Checked(tuple(findings), tuple(warnings), tuple(layers))


async def _find_out(backend: Backend, patience: float, ear: _Ear) -> tuple[str | None, list[str]]:
    """Find out why a cache cannot be used, None if it can, and what is warned of; nothing of it is changed."""
    if isinstance(backend, SqliteBackend):
        why = await asyncio.to_thread(look_at_cache, backend.path)
        return None if why is None else f"the file {backend.path!r} {why}", []
    return await _ask(backend, patience, ear)


async def _ask(backend: Backend, patience: float, ear: _Ear) -> tuple[str | None, list[str]]:
    """Ask a cache whether it can be used; tell why not, None if it can, and what it warns of."""
    warned = ear.listen()
    try:
        async with asyncio.timeout(patience):
            await backend.open()
            await backend.check_ready()
    except BackendFailure as error:
        return str(error), warned
    except TimeoutError:
        return f"it did not answer within {patience:g} s", warned
    finally:
        await backend.close()
    return None, warned


@final
class _Ear(logging.Handler):
    """Hears what is warned of in the daemon's log, each task what is said in its own course."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self._heard: ContextVar[list[str]] = ContextVar("heard")

    def __enter__(self) -> _Ear:
        _log.addHandler(self)
        return self

    def __exit__(self, *_: object) -> None:
        _log.removeHandler(self)

    def listen(self) -> list[str]:
        """Begin to hear for this task: what is said goes into the list."""
        heard: list[str] = []
        self._heard.set(heard)
        return heard

    def emit(self, record: logging.LogRecord) -> None:
        """Note what was said, if somebody listens here."""
        self._heard.get([]).append(record.getMessage())


def _doubt_namespaces(
    configuration: Configuration, settings: DaemonSettings, made: Mapping[str, Layer]
) -> Iterator[Finding]:
    """Doubt layers without namespaces where the settings name some: no bust is done at a part of the layers."""
    others = [name for name in settings.namespaces if name != DEFAULT_NAMESPACE]
    for key, layer in made.items():
        if others and not layer.backend.traits.namespaces:  # which are files without a place for it in their root
            named = ", ".join([*others[:_MOST_NAMED], *(["..."] if len(others) > _MOST_NAMED else [])])
            yield configuration.finding(
                f"{key}.root",
                f"the layer {layer.name} knows the namespace {DEFAULT_NAMESPACE} only: busts in others ({named}) are"
                " refused, at all layers; put {namespace} into its root",
            )


def _look_at_files(settings: DaemonSettings) -> Iterator[tuple[str, str]]:
    found = {}
    for setting in _OURS:
        path = settings.registry_file if setting == "registry" else getattr(settings, setting)
        if path is not None and (why := look_at_database(path, setting)) is not None:
            found[setting] = path, why
    if settings.registry is None and "registry" in found and "journal" in found:
        del found["registry"]  # it is beside the journal, so that the two are mended together
    for setting, (path, why) in found.items():
        yield setting, f"the {setting} file {os.fspath(path)!r} {why}"
    if settings.socket is not None and (why := look_at_socket(settings.socket)) is not None:
        yield "socket", f"the socket {os.fspath(settings.socket)!r} {why}"


def look_at_database(path: str | os.PathLike[str], setting: str) -> str | None:
    """Tell why the daemon could not keep its `setting` (state, registry, journal) there; None if it can.

    Nothing is made or changed. A file of ours that is damaged is none of this: the daemon sets it aside.
    """
    file = Path(path)
    try:
        why = _look_at_directory(file) or _look_at_mode(file, file.stat())
        if why is not None:
            return why
        with file.open("rb") as opened:
            head = opened.read(HEAD_BYTES)
    except FileNotFoundError:
        return None
    except OSError as error:
        return f"cannot be used: {error.strerror}"
    return _judge(head, setting, is_settled=not _size_of(Path(f"{file}-wal")))


def _look_at_mode(file: Path, found: os.stat_result) -> str | None:
    if not stat.S_ISREG(found.st_mode):
        return "is not a regular file; choose another path"
    if not os.access(file, os.R_OK | os.W_OK):
        return "may not be read and written by this user; choose another path, or change its mode"
    if stat.S_IMODE(found.st_mode) != 0o600 and os.geteuid() not in {0, found.st_uid}:
        return "belongs to another user, so that its mode cannot be made 0600; choose another path"
    return None


def _judge(head: bytes, setting: str, *, is_settled: bool) -> str | None:
    """Judge a file by its first bytes. What is not `is_settled` has newer pages beside it, which may say otherwise."""
    if not is_header(head):
        return refuse_text(head, setting)
    application = head[_APPLICATION]
    if application == _OURS[setting]:
        return None
    if application == _NONE and (not is_settled or head[_COOKIE] == _NONE):
        return None  # nothing is in it yet, or not in this file
    other = next((name for name, mark in _OURS.items() if mark == application), None)
    return f"is a database of {'something else' if other is None else f'the {other}'}; choose another path"


def look_at_cache(path: str | os.PathLike[str]) -> str | None:
    """Tell why a layer could not have its entries in an SQLite file there; None if it can.

    Nothing is made or changed. A file of ours that is damaged is none of this: whoever opens it sets it aside.
    """
    file = Path(path)
    try:
        if (why := _look_at_directory(file) or _look_at_lock(Path(f"{file}.lock"))) is not None:
            return why
        found = file.lstat().st_mode
        if not stat.S_ISREG(found):
            return f"is {'a symbolic link' if stat.S_ISLNK(found) else 'not a regular file'}; choose another path"
        if not all(os.access(it, os.R_OK | os.W_OK) for end in ("", *WITH_IT) if (it := Path(f"{file}{end}")).exists()):
            return "may not be read and written by this user; choose another path, or change its mode"
        with file.open("rb") as opened:
            why = refuse_content(opened.read(CACHE_HEAD_BYTES))
    except FileNotFoundError:
        return None
    except OSError as error:
        return f"cannot be used: {error.strerror}"
    return None if why is None else f"{why}; choose another path"


def _look_at_lock(lock: Path) -> str | None:
    try:
        found = lock.lstat().st_mode
    except FileNotFoundError:
        return None
    if not stat.S_ISREG(found):
        return f"has no regular file beside it as {lock.name}; choose another path"
    if not os.access(lock, os.R_OK | os.W_OK):
        return f"has {lock.name} beside it, which this user may not read and write; change its mode"
    return None


def look_at_socket(path: str | os.PathLike[str]) -> str | None:
    """Tell why the daemon could not listen there, but for another that does; None if it can."""
    file = Path(path)
    if (why := _look_at_directory(file)) is not None:
        return why
    try:
        mode = file.lstat().st_mode
    except FileNotFoundError:
        return None
    return None if stat.S_ISSOCK(mode) else "is a file of another kind, which is not removed; choose another path"


def _look_at_directory(file: Path) -> str | None:
    directory = file.absolute().parent
    if not directory.is_dir():
        return "is in a directory that does not exist; make it first"
    if not os.access(directory, os.W_OK | os.X_OK):
        return "is in a directory that this user may not write to; choose another path"
    return None


def _size_of(file: Path) -> int:
    try:
        return file.stat().st_size
    except OSError:
        return 0
