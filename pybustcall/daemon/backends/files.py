"""A cache made of files below one directory: a key is a relative path, and removing it unlinks that file.

This module decides which keys are paths at all, and that nothing outside the root is ever touched. Which keys a bust
covers is the engine's to decide.

Theory of operation. A key is first judged as text: no segment may be empty, "." or "..", and so on. Then the
directories on its way are opened one by one, each relative to the one before (openat) and none through a symbolic link
(O_NOFOLLOW), beginning at the root. The last name is unlinked relative to the directory that is open, and unlink never
follows a link. So there is no moment at which a path is resolved a second time, and swapping a directory for a link
meanwhile leads nowhere. Names go to the system as UTF-8 bytes, whatever the locale. Only the root itself is opened by
its path, at every operation, since it may be removed and made again; the links in that path are the operator's own.
"""

from __future__ import annotations

import errno
import os
import stat
import sys
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Final, final

from pybustcall.daemon.backends import BackendFailure, RefusedKey
from pybustcall.daemon.index import is_variant
from pybustcall.errors import ConfigurationError
from pybustcall.models import redact

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["FilesBackend", "check_path"]

_MAX_SEGMENT: Final = 255  # bytes: NAME_MAX of every file system in common use
_MAX_PATH: Final = 4095  # bytes: PATH_MAX of Linux is 4096 with its closing NUL
_IN_UTF8: Final = sys.getfilesystemencoding() == "utf-8"
_OPEN_DIRECTORY: Final = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC


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

    Only regular files and links are removed (a link itself, never what it points to); directories and special files
    stay and count as nothing removed. A key whose way leads through a link is refused.

    Raises `ConfigurationError` (setting "root") if there is no such directory. A root that vanishes later is a
    `BackendFailure` of each operation until it is there again.
    """

    name: Final = "files"
    blocking: Final = True

    def __init__(self, root: str | os.PathLike[str]) -> None:
        self._root = Path(root).absolute()
        if not self._root.is_dir():
            what = "is not a directory" if self._root.exists() else "does not exist"
            raise ConfigurationError(f"the root {str(self._root)!r} {what}; make it, or name another", setting="root")

    def __repr__(self) -> str:
        return f"FilesBackend({str(self._root)!r})"

    def check(self, key: str) -> None:
        """Raise `RefusedKey` unless `key` is a sound relative path."""
        check_path(key)

    def check_ready(self) -> None:
        """Raise `BackendFailure` if the root cannot be opened."""
        with self._open_root():
            pass

    def variants(self, key: str) -> list[str]:
        """List the variants of `key` in its directory, sorted. Names that are not UTF-8 are no keys."""
        check_path(key)
        head, slash, last = key.rpartition("/")
        with _translated(key), self._open_parent(key) as parent:
            found = [] if parent is None else _names(parent, last)
        return sorted(head + slash + name for name in found if is_variant(last, name))

    def remove(self, key: str) -> bool:
        """Unlink the file; tell whether there was one."""
        check_path(key)
        with _translated(key), self._open_parent(key) as parent:
            return parent is not None and _unlink(key.rpartition("/")[2].encode(), parent)

    def size_bytes(self) -> int:
        """Tell how many bytes the files below the root have, as far as they can be read."""
        with self._open_root() as root:
            try:
                return sum(
                    found.st_size
                    for _, _, names, directory in os.fwalk(".", dir_fd=root, follow_symlinks=False)
                    for name in names
                    if (found := _stat(os.fsencode(name), directory)) is not None and stat.S_ISREG(found.st_mode)
                )
            except OSError as error:
                raise BackendFailure(f"the files cannot be counted: {_reason(error)}") from error

    @contextmanager
    def _open_root(self) -> Iterator[int]:
        try:
            root = os.open(self._root, _OPEN_DIRECTORY)
        except OSError as error:
            raise BackendFailure(f"the root directory cannot be opened: {_reason(error)}") from error
        try:
            yield root
        finally:
            os.close(root)

    @contextmanager
    def _open_parent(self, key: str) -> Iterator[int | None]:
        """Open the directory that `key` lies in; None if there is none. Raises `RefusedKey` at a link, and OSError."""
        with self._open_root() as root:
            directory = os.dup(root)
            try:
                for segment in key.encode().split(b"/")[:-1]:
                    below = _open_below(segment, directory)
                    if below is None:
                        yield None
                        return
                    above, directory = directory, below
                    os.close(above)
                yield directory
            finally:
                os.close(directory)


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


def _unlink(name: bytes, directory: int) -> bool:
    found = _stat(name, directory)
    if found is None or not (stat.S_ISREG(found.st_mode) or stat.S_ISLNK(found.st_mode)):
        return False
    try:
        os.unlink(name, dir_fd=directory)
    except (FileNotFoundError, IsADirectoryError):  # gone, or made a directory, since it was looked at
        return False
    return True


def _stat(name: bytes, directory: int) -> os.stat_result | None:
    try:
        return os.stat(name, dir_fd=directory, follow_symlinks=False)
    except FileNotFoundError:
        return None


def _names(directory: int, beginning: str) -> list[str]:
    """List the names that are UTF-8 and begin so. A directory may have very many; most are passed over cheaply."""
    # In UTF-8 the beginning of the bytes is the beginning of the text; of other encodings that is not known.
    likely = beginning if _IN_UTF8 else ""
    names = []
    for name in [name for name in os.listdir(directory) if name.startswith(likely)]:
        with suppress(UnicodeDecodeError):
            names.append(os.fsencode(name).decode())
    return names


@contextmanager
def _translated(key: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise BackendFailure(f"the file of {redact(key)} cannot be reached: {_reason(error)}") from error


def _reason(error: OSError) -> str:
    return os.strerror(error.errno) if error.errno else type(error).__name__
