"""A cache made of files below one directory: a key is a relative path, and removing it unlinks that file.

This module decides which keys are paths at all, which files are keys, and that nothing outside the root is ever
touched. Which keys a bust covers is the engine's to decide.

Theory of operation. A key is first judged as text: no segment may be empty, "." or "..", and so on. Then the
directories on its way are opened one by one, each relative to the one before (openat) and none through a symbolic link
(O_NOFOLLOW), beginning at the root. The last name is unlinked relative to the directory that is open, and unlink never
follows a link. So there is no moment at which a path is resolved a second time, and swapping a directory for a link
meanwhile leads nowhere. Names go to the system as UTF-8 bytes, whatever the locale. Only the root itself is opened by
its path, at every operation, since it may be removed and made again; the links in that path are the operator's own.
Where the root has a `{namespace}` in it, that path ends before it: a namespace, and what the root says after it, is
opened like a directory on the way of a key, so that no link leads from one tenant to another.

A branch of keys is walked the same way, depth first. Each directory on the way down stays open and is read bit by bit,
so that memory does not grow with its size; below a certain depth directories are noted instead, and opened anew from
the root once their turn comes. What goes or becomes something else meanwhile is passed over.

Everything that touches the disk runs in a few threads of the backend's own, so that a disk that hangs holds up nobody
else. A thread cannot be interrupted: a call that is cancelled waits for nothing, and what it began is completed. A walk
is taken up by one thread after the other, a batch each; one that is given up is closed behind its last batch.
"""

from __future__ import annotations

import asyncio
import errno
import os
import re
import stat
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing, closing, contextmanager, nullcontext, suppress
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Final, TypeVar, final

from pybustcall.daemon.backends import NO_KEYS, BackendFailure, RefusedKey, Scope, Traits
from pybustcall.errors import ConfigurationError, InvalidRequest
from pybustcall.keys import covers, is_variant
from pybustcall.models import DEFAULT_NAMESPACE, check_namespace, redact

if TYPE_CHECKING:
    from collections.abc import (
        AsyncGenerator,
        Callable,
        Collection,
        Generator,
        Iterable,
        Iterator,
        Mapping,
        Sequence,
    )
    from concurrent.futures import Future
    from contextlib import AbstractContextManager

    _Directories = Generator[tuple[list[str], int | Exception], None, None]
    _Entries = Generator[tuple[str, os.DirEntry[str]], None, None]

__all__ = ["FilesBackend", "check_path"]

_T = TypeVar("_T")

_PLACE: Final = "{namespace}"
_MAX_SEGMENT: Final = 255  # bytes: NAME_MAX of every file system in common use
_MAX_PATH: Final = 4095  # bytes: PATH_MAX of Linux is 4096 with its closing NUL
_BATCH: Final = 500  # keys
_LOOKED_AT: Final = 20_000  # entries of directories, after which a batch ends, so that one given up ends soon
_MOST_OPEN: Final = 16  # directories that a walk keeps open, two descriptors each
_THREADS: Final = 4
_OPEN_DIRECTORY: Final = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
_BEGIN_OF_REST: Final = re.compile(r"[.?]")


def check_path(key: str) -> None:
    """Raise `RefusedKey` unless `key` is the relative path of a file, in normal form, that stays where it begins."""
    try:
        encoded = key.encode()
    except UnicodeEncodeError:
        raise RefusedKey("has a lone surrogate, which no file name has") from None
    if "\0" in key:
        raise RefusedKey("has a NUL character, which no path has")
    if "\\" in key:
        raise RefusedKey("has a backslash; segments of a path are parted by /")
    if key.startswith("/"):
        raise RefusedKey("is an absolute path; name files relative to the daemon's root")
    if len(encoded) > _MAX_PATH:
        raise RefusedKey(f"is longer than {_MAX_PATH} bytes, the most that a path has")
    for segment in encoded.split(b"/"):
        if not segment:
            raise RefusedKey("has an empty segment")
        if segment in {b".", b".."}:
            raise RefusedKey(f'has a segment "{segment.decode()}"; name the file where it is')
        if len(segment) > _MAX_SEGMENT:
            raise RefusedKey(f"has a segment longer than {_MAX_SEGMENT} bytes")


@final
class FilesBackend:
    """Removes files below `root`, and nothing else.

    With `{namespace}` as one segment of the root each namespace has a directory of its own there, and one that does not
    exist holds nothing; without, there is only the default namespace.

    Only regular files and links are keys, and only where their names are UTF-8 and their paths pass `check_path`. They
    are removed (a link itself, never what it points to); directories and special files stay and count as nothing
    removed. A key whose way leads through a link is refused. Files do not know their tags: what is registered with one
    is for the engine to find. Generations mean nothing to files either; `traits.settle` is there for that.

    Raises `ConfigurationError` (setting "root") if there is no such directory, or none in front of the `{namespace}`.
    One that vanishes later is a `BackendFailure` of each operation until it is there again.
    """

    name: Final = "files"

    def __init__(self, root: str | os.PathLike[str]) -> None:
        self._root = Path(root).absolute()
        self._top, self._segments = _parted(self._root)
        if not self._top.is_dir():
            what = "is not a directory" if self._top.exists() else "does not exist"
            raise ConfigurationError(f"the root {str(self._top)!r} {what}; make it, or name another", setting="root")
        self.traits: Final = Traits(namespaces=bool(self._segments), settle=1.0)
        self._threads: ThreadPoolExecutor | None = None

    def __repr__(self) -> str:
        return f"FilesBackend({str(self._root)!r})"

    def check(self, namespace: str, key: str) -> None:
        """Raise `RefusedKey` unless `key` is a sound relative path, in a namespace that can be here."""
        self._check_namespace(namespace)
        check_path(key)

    async def open(self) -> None:
        """Make the threads ready."""
        if self._threads is None:
            self._threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="pybustcall-files")

    async def close(self) -> None:
        """Wait for what is under way and end the threads."""
        threads, self._threads = self._threads, None
        if threads is not None:
            await asyncio.to_thread(threads.shutdown)

    async def check_ready(self) -> None:
        """Raise `BackendFailure` if the root cannot be opened."""
        await self._in_thread(self._check_ready)

    async def begin(self, scope: Scope, *, soft: bool, wide: bool = False) -> int:  # noqa: ARG002 - as the others do
        """Tell 0: files have no generations."""
        return 0

    async def fence(self, namespace: str, keys: Sequence[str], *, generation: int, soft: bool) -> None:
        """Do nothing: whoever writes a file asks nobody."""

    async def end(
        self, scope: Scope, generation: int, *, named: bool = True, keys: Mapping[str, int] = NO_KEYS
    ) -> None:
        """Do nothing."""

    async def select(self, scope: Scope) -> AsyncGenerator[Sequence[str], None]:
        """Find the files that `scope` names, in no order; none by a tag.

        A directory that cannot be read is a `BackendFailure` after all the others have been looked through. A branch
        whose way leads through a link is a `RefusedKey`, as its keys are: readers may follow the link, and would be
        told that nothing stale is left there. A file that is removed and made again meanwhile may be told once more.
        """
        if scope.kind == "key":
            if held := await self.held(scope.namespace, [scope.target]):
                yield held
            return
        walk = self._walk_of(scope)
        if walk is None:
            return
        async with aclosing(self._work_off(walk, partial(_find, walk, scope))) as batches:
            async for batch in batches:
                if batch:
                    yield batch
        if walk.refusal is not None:
            raise walk.refusal
        if walk.unread:
            raise BackendFailure(
                f"not all files of {scope} can be listed: {_reason(walk.unread[0])}", failed=len(walk.unread)
            )

    async def estimate(self, scope: Scope) -> int | None:
        """Tell None where it would take a walk to tell."""
        match scope.kind:
            case "key":
                return 1
            case "tag":
                return 0
            case "prefix" | "all":
                return None

    async def variants(self, namespace: str, keys: Sequence[str]) -> list[str]:
        """List the variants of any of `keys`, each once, sorted. Each directory is looked through once.

        One that cannot be read is a `BackendFailure` after all the others, with what was found.
        """
        sound, _ = self._sifted(namespace, keys)
        return await self._in_thread(partial(self._variants, namespace, sound)) if sound else []

    async def remove(self, namespace: str, keys: Sequence[str], *, generation: int, soft: bool) -> int:  # noqa: ARG002
        """Unlink these files; tell how many of them there were.

        Each is tried. Raises `RefusedKey` for a single one that is no path or leads through a link, and
        `BackendFailure` if several were given and any of them could not be removed, for whatever reason.
        """
        sound, refused = self._sifted(namespace, keys)
        removed = 0
        failed: dict[str, Exception] = {}
        if sound:
            try:
                removed, failed = await self._in_thread(partial(self._remove, namespace, sound))
            except BackendFailure as error:
                raise BackendFailure(str(error), failed=len(keys), unreachable=error.unreachable) from error
        failed |= refused
        if failed:
            raise _gathered(removed, failed, alone=len(keys) == 1)
        return removed

    async def held(
        self,
        namespace: str,
        keys: Sequence[str],
        *,
        generation: int | None = None,  # noqa: ARG002 - files have none
        stale: bool = False,  # noqa: ARG002 - nor are they ever stale
    ) -> list[str]:
        """List those of `keys` that are files or links. One whose way leads through a link is none."""
        sound, _ = self._sifted(namespace, keys)
        return await self._in_thread(partial(self._held, namespace, sound)) if sound else []

    async def size_bytes(self) -> int:
        """Tell how many bytes the files of all namespaces have, as far as they can be read."""
        size = 0
        for namespace in await self._in_thread(self._namespaces):
            walk = _Walk(partial(self._open_base, namespace), "", lambda _: True)
            async with aclosing(self._work_off(walk, partial(_measure, walk))) as sizes:
                async for some in sizes:
                    size += some
            for error in walk.unread:
                with _translated("the files cannot be counted"), suppress(PermissionError):
                    raise error
        return size

    # Threads

    def _submit(self, work: Callable[[], _T]) -> Future[_T]:
        if self._threads is None:
            raise BackendFailure("the cache of files is closed", unreachable=True)
        return self._threads.submit(work)

    async def _in_thread(self, work: Callable[[], _T]) -> _T:
        return await asyncio.wrap_future(self._submit(work))

    async def _work_off(self, walk: _Walk, work: Callable[[], _T]) -> AsyncGenerator[_T, None]:
        """Do `work` in threads, again and again, until the walk is over; close it in any case."""
        at_work: Future[_T] | None = None
        try:
            while not walk.over:
                at_work = self._submit(work)
                yield await asyncio.wrap_future(at_work)
        finally:
            # A thread may still be at it, which a cancelled caller does not wait for.
            if at_work is not None:
                at_work.add_done_callback(lambda _: walk.close())

    # In threads

    def _check_ready(self) -> None:
        with self._open_top():
            pass

    def _namespaces(self) -> list[str]:
        with self._open_top() as top:
            if not self._segments:
                return [DEFAULT_NAMESPACE]
            with _translated("the namespaces cannot be listed"), os.scandir(top) as entries:
                return [it.name for it in entries if _is_namespace(it.name) and it.is_dir(follow_symlinks=False)]

    def _variants(self, namespace: str, keys: Sequence[str]) -> list[str]:
        found: list[str] = []
        unread: list[OSError] = []
        with closing(self._directories(namespace, keys)) as directories:
            for some, directory in directories:
                if isinstance(directory, Exception):
                    unread += [directory] if isinstance(directory, OSError) else []
                    continue
                head, wanted = _parts(some[0])[0], {_parts(key)[1] for key in some}
                names = _variants_in(directory, head, wanted, unread)
                found += [key for name in names if (key := _key_of(_joined(head, name))) is not None]
        if unread:
            raise BackendFailure(
                f"not all variants can be listed: {_reason(unread[0])}", failed=len(unread), found=sorted(found)
            ) from unread[0]
        return sorted(found)

    def _remove(self, namespace: str, keys: Sequence[str]) -> tuple[int, dict[str, Exception]]:
        removed, failed = 0, dict[str, Exception]()
        with closing(self._directories(namespace, keys)) as directories:
            for some, directory in directories:
                for key in some:
                    try:
                        removed += _unlink(_encoded(key), _opened(directory))
                    except (OSError, RefusedKey) as error:
                        failed[key] = error
        return removed, failed

    def _held(self, namespace: str, keys: Sequence[str]) -> list[str]:
        there: set[str] = set()
        with closing(self._directories(namespace, keys)) as directories:
            for some, directory in directories:
                with _translated(_of(some[0])), suppress(RefusedKey):
                    there.update(key for key in some if _is_file_at(_encoded(key), _opened(directory)))
        return [key for key in keys if key in there]

    def _directories(self, namespace: str, keys: Sequence[str]) -> _Directories:
        """Open the directories that these keys lie in, one at a time, and tell each with its keys.

        Where there is none nothing is told, and where it cannot be opened the reason.
        """
        groups: dict[str, list[str]] = {}
        for key in keys:
            groups.setdefault(_parts(key)[0], []).append(key)
        with self._open_base(namespace) as base:
            if base is None:
                return
            for head, some in groups.items():
                try:
                    directory = _descend(base, head)
                except (OSError, RefusedKey) as error:
                    yield some, error
                    continue
                if directory is not None:
                    try:
                        yield some, directory
                    finally:
                        os.close(directory)

    @contextmanager
    def _open_base(self, namespace: str) -> Iterator[int | None]:
        """Open the directory of a namespace; None if there is none. Raises `BackendFailure`."""
        with self._open_top() as top:
            way = "/".join([namespace, *self._segments[1:]]) if self._segments else ""
            try:
                base = _descend(top, way)
            except RefusedKey as error:
                raise BackendFailure(f"the directory of the namespace {namespace} {error}") from None
            except OSError as error:
                raise BackendFailure(
                    f"the directory of the namespace {namespace} cannot be opened: {_reason(error)}"
                ) from error
            try:
                yield base
            finally:
                if base is not None:
                    os.close(base)

    @contextmanager
    def _open_top(self) -> Iterator[int]:
        try:
            top = os.open(self._top, _OPEN_DIRECTORY)
        except OSError as error:
            raise BackendFailure(f"the root directory cannot be opened: {_reason(error)}", unreachable=True) from error
        try:
            yield top
        finally:
            os.close(top)

    # What is a key

    def _check_namespace(self, namespace: str) -> None:
        if not self._segments:
            if namespace != DEFAULT_NAMESPACE:
                raise RefusedKey(f"lies in a namespace, of which these files have none; put {_PLACE} into the root")
        elif not _is_namespace(namespace):
            raise RefusedKey("lies in a namespace that no directory is named after")

    def _sifted(self, namespace: str, keys: Iterable[str]) -> tuple[list[str], dict[str, Exception]]:
        """Part the keys, each once, into those that can be held, and those that are refused, with the reasons."""
        sound: list[str] = []
        refused: dict[str, Exception] = {}
        for key in dict.fromkeys(keys):
            try:
                self.check(namespace, key)
            except RefusedKey as error:
                refused[key] = error
            else:
                sound.append(key)
        return sound, refused

    def _walk_of(self, scope: Scope) -> _Walk | None:
        """Prepare the walk that meets all files of a branch, or all there are; None if there can be none."""
        head, slash, _ = scope.target.rpartition("/") if scope.kind == "prefix" else ("", "", "")
        try:
            self._check_namespace(scope.namespace)
            if scope.kind == "tag":
                return None
            if slash:
                check_path(head)
        except RefusedKey:
            return None

        def leads_to_some(directory: str) -> bool:
            key = _key_of(directory)
            return key is not None and (scope.kind == "all" or covers(scope.target, key + "/"))

        return _Walk(partial(self._open_base, scope.namespace), os.fsdecode(head.encode()), leads_to_some)


@final
class _Walk:
    """Goes through all that lies below the directory `head` of a base: its path from the base, and itself.

    - `goes_into`: tells of the path of a directory whether to go on in there
    - `unread`: what could not be read on the way
    - `refusal`: why `head` cannot be gone to, if a link is on the way
    - `over`: whether all has been told

    May be taken up by one thread after the other. Links are never followed.
    """

    def __init__(
        self,
        open_base: Callable[[], AbstractContextManager[int | None]],
        head: str,
        goes_into: Callable[[str], bool],
    ) -> None:
        self.unread: list[OSError] = []
        self.refusal: RefusedKey | None = None
        self.over = False
        self._open_base = open_base
        self._goes_into = goes_into
        self._head = head
        self._ahead = [head]
        self._entries = self._go()

    def __iter__(self) -> Iterator[tuple[str, os.DirEntry[str]]]:
        return self._entries

    def close(self) -> None:
        """Close what is open."""
        self._entries.close()

    def _go(self) -> _Entries:
        with self._open_base() as base:
            while base is not None and self._ahead:
                path = self._ahead.pop()
                yield from self._enter(base, path, path, depth=1)
        self.over = True

    def _enter(self, directory: int, way: str, path: str, *, depth: int) -> _Entries:
        """Go through what lies that way below a directory; all of it has this path from the base."""
        try:
            below = _descend(directory, way)
        except RefusedKey as error:
            if path == self._head:
                self.refusal = error
            return  # below the head it has become a link meanwhile
        except OSError as error:
            self.unread.append(error)
            return
        if below is not None:
            try:
                yield from self._read(below, path, depth=depth)
            except OSError as error:
                self.unread.append(error)
            finally:
                os.close(below)

    def _read(self, directory: int, path: str, *, depth: int) -> _Entries:
        with os.scandir(directory) as entries:
            for entry in entries:
                found = _joined(path, entry.name)
                yield found, entry
                if entry.is_dir(follow_symlinks=False) and self._goes_into(found):
                    if depth < _MOST_OPEN:
                        yield from self._enter(directory, entry.name, found, depth=depth + 1)
                    else:
                        self._ahead.append(found)


def _find(walk: _Walk, scope: Scope) -> list[str]:
    """Find the next files that are keys and named; none is no sign of the end."""
    found = []
    with _translated(f"the files of {scope} cannot be listed"):
        for path, entry in islice(walk, _LOOKED_AT):
            key = _key_of(path)
            if key is not None and scope.covers(key) and _is_file(entry):
                found.append(key)
                if len(found) == _BATCH:
                    break
    return found


def _measure(walk: _Walk) -> int:
    """Sum up the bytes of the next files."""
    size = 0
    with _translated("the files cannot be counted"):
        for _, entry in islice(walk, _LOOKED_AT):
            with suppress(FileNotFoundError, PermissionError):
                found = entry.stat(follow_symlinks=False)
                size += found.st_size if stat.S_ISREG(found.st_mode) else 0
    return size


def _parted(root: Path) -> tuple[Path, tuple[str, ...]]:
    """Part a root at its `{namespace}`: the directory in front of it, and the segments from there on, if any."""
    places = [place for place, part in enumerate(root.parts) if _PLACE in part]
    if not places:
        return root, ()
    top, segments = Path(*root.parts[: places[0]]), root.parts[places[0] :]
    why = ""
    if len(places) > 1:
        why = f"has {_PLACE} twice; a namespace has one directory"
    elif segments[0] != _PLACE:
        why = f"has {_PLACE} in the segment {segments[0]!r}; it must be a whole one, as in '/var/cache/{_PLACE}'"
    elif ".." in segments:
        why = f"leads up again behind {_PLACE}; name the directory where it is"
    if why:
        raise ConfigurationError(f"the root {str(root)!r} {why}", setting="root")
    return top, segments


def _is_namespace(name: str) -> bool:
    try:
        check_namespace(name)
    except InvalidRequest:
        return False
    return True


def _parts(key: str) -> tuple[str, str]:
    """Part a key into directory and name, as the system's functions give them."""
    head, _, last = os.fsdecode(key.encode()).rpartition("/")
    return head, last


def _encoded(key: str) -> bytes:
    return key.encode().rpartition(b"/")[2]


def _joined(head: str, name: str) -> str:
    return f"{head}/{name}" if head else name


def _key_of(path: str) -> str | None:
    """Tell the key of a path that the system gave; None if it can be none."""
    try:
        key = os.fsencode(path).decode()
    except UnicodeDecodeError:
        return None
    if "\\" in key or (len(key) * 4 > _MAX_PATH and len(key.encode()) > _MAX_PATH):
        return None
    return key


def _is_variant_of_any(keys: Collection[str], name: str) -> bool:
    """Tell whether `name` is a variant of any of `keys`: that one is the beginning of it, up to a dot or a query."""
    return any(
        name[: rest.start()] in keys and is_variant(name[: rest.start()], name)
        for rest in _BEGIN_OF_REST.finditer(name)
    )


def _descend(directory: int, way: str) -> int | None:
    """Open what lies that way below a directory, or itself; None if there is nothing.

    Raises `RefusedKey` at a link, and OSError.
    """
    here = os.dup(directory)
    for segment in way.split("/") if way else ():
        try:
            below = _open_below(os.fsencode(segment), here)
        finally:
            os.close(here)
        if below is None:
            return None
        here = below
    return here


def _open_below(segment: bytes, directory: int) -> int | None:
    try:
        return os.open(segment, _OPEN_DIRECTORY | os.O_NOFOLLOW, dir_fd=directory)
    except FileNotFoundError:
        return None
    except OSError as error:
        if error.errno not in {errno.ENOTDIR, errno.ELOOP}:
            raise
    # Linux says ENOTDIR of a link and of a file alike.
    found = _stat(segment, directory)
    if found is not None and stat.S_ISLNK(found.st_mode):
        raise RefusedKey("leads through a link, which is never followed")
    return None


def _opened(directory: int | Exception) -> int:
    if isinstance(directory, Exception):
        raise directory
    return directory


def _unlink(name: bytes, directory: int) -> bool:
    if not _is_file_at(name, directory):
        return False
    try:
        os.unlink(name, dir_fd=directory)
    except (FileNotFoundError, IsADirectoryError):  # gone, or made a directory, since it was looked at
        return False
    return True


def _is_file_at(name: bytes, directory: int) -> bool:
    found = _stat(name, directory)
    return found is not None and (stat.S_ISREG(found.st_mode) or stat.S_ISLNK(found.st_mode))


def _is_file(entry: os.DirEntry[str]) -> bool:
    return entry.is_symlink() or entry.is_file(follow_symlinks=False)


def _variants_in(directory: int, head: str, wanted: Collection[str], unread: list[OSError]) -> Iterator[str]:
    """Go through the files below a directory (`head` is its path) whose names are variants of any of `wanted`.

    A query may have slashes, as in `page?next=/a/b`, so that directories are gone into in whose names one begins. What
    cannot be read is noted as `unread`.
    """
    try:
        with os.scandir(directory) as entries:
            for entry in entries:
                if not _is_variant_of_any(wanted, entry.name):
                    continue
                if _is_file(entry):
                    yield entry.name
                elif "?" in entry.name and entry.is_dir(follow_symlinks=False):
                    query = _Walk(partial(nullcontext, directory), entry.name, partial(_leads_to_keys, head))
                    yield from (path for path, below in query if _is_variant_of_any(wanted, path) and _is_file(below))
                    unread += query.unread
    except OSError as error:
        unread.append(error)


def _leads_to_keys(head: str, directory: str) -> bool:
    return _key_of(_joined(head, directory)) is not None


def _stat(name: bytes, directory: int) -> os.stat_result | None:
    try:
        return os.stat(name, dir_fd=directory, follow_symlinks=False)
    except FileNotFoundError:
        return None


def _gathered(removed: int, failed: dict[str, Exception], *, alone: bool) -> Exception:
    """Make one error of all: of a single key that is refused, that."""
    key, first = next(iter(failed.items()))
    if alone and isinstance(first, RefusedKey):
        return first
    reason = f"{_of(key)}: {_reason(first)}" if isinstance(first, OSError) else f"a key {first}"
    error = BackendFailure(reason, removed=removed, failed=len(failed))
    error.__cause__ = first
    return error


def _of(key: str) -> str:
    return f"the file of {redact(key)} cannot be reached"


@contextmanager
def _translated(what: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise BackendFailure(f"{what}: {_reason(error)}") from error


def _reason(error: OSError) -> str:
    return os.strerror(error.errno) if error.errno else type(error).__name__
