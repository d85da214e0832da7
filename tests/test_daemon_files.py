"""The files backend: it removes what is named below its root, and never anything else."""

from __future__ import annotations

import errno
import os
import shutil
import socket
import tempfile
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from pybustcall.daemon import BackendFailure, FilesBackend, RefusedKey
from pybustcall.daemon.backends.files import check_path
from pybustcall.daemon.index import is_variant
from pybustcall.errors import ConfigurationError

if TYPE_CHECKING:
    from collections.abc import Iterator

INSIDE = [
    "main.css",
    "main.css.gz",
    "main.css?v=2",
    "main.css.map",
    "cdn/main.css",
    "cdn/main.css.br",
    "cdn/deep/é.js",
    "\uff0e\uff0e",
    "\u2024\u2024",
    "a\u2215b",
]
OUTSIDE = ["secret", "main.css", "main.css.gz", "below/secret", "below/main.css"]


@contextmanager
def world() -> Iterator[tuple[Path, Path]]:
    """Make a root with files and links that lead out of it, and a sentinel tree outside."""
    with tempfile.TemporaryDirectory() as made:
        top = Path(made)
        outside, root = top / "outside", top / "root"
        for base, names in ((outside, OUTSIDE), (root, INSIDE)):
            for name in names:
                (base / name).parent.mkdir(parents=True, exist_ok=True)
                (base / name).write_text(name)
        (root / "directory.gz").mkdir()
        (root / "out").symlink_to(outside)
        (root / "up").symlink_to("..")
        (root / "absolute").symlink_to("/")
        (root / "link.css").symlink_to(outside / "secret")
        (root / "link.css.gz").symlink_to(outside / "main.css")
        (root / "cdn" / "out").symlink_to(outside / "below")
        yield root, outside


def content(top: Path) -> dict[str, str]:
    """Tell everything below a directory, without following links."""
    found = {}
    for folder, folders, files in os.walk(top):
        for name in folders + files:
            path = Path(folder, name)
            kind = "link" if path.is_symlink() else "file" if path.is_file() else "directory"
            found[str(path.relative_to(top))] = f"file {path.read_text()}" if kind == "file" else kind
    return found


@pytest.fixture
def root(tmp_path: Path) -> Path:
    path = tmp_path / "root"
    path.mkdir()
    return path


SEGMENTS = st.one_of(
    st.sampled_from(
        [
            "..",
            ".",
            "",
            "out",
            "up",
            "absolute",
            "cdn",
            "deep",
            "secret",
            "main.css",
            "main.css.gz",
            "link.css",
            "root",
            "below",
            "outside",
            "etc",
            "\uff0e\uff0e",
            "\u2024\u2024",
            "a\u2215b",
            "..\0",
            "..\\",
            "\u00e9",
            "e\u0301",
            "\u202e..",
            "%2e%2e",
            "~",
        ]
    ),
    st.text(max_size=4),
    st.text(alphabet=st.characters(codec=None, categories=["Cs", "Mn", "Cf", "Po"]), max_size=4),
)
TARGETS = st.one_of(
    st.lists(SEGMENTS, min_size=1, max_size=5).map("/".join),
    st.lists(SEGMENTS, min_size=1, max_size=5).map(lambda parts: "/" + "/".join(parts)),
    st.sampled_from(INSIDE),
    st.text(max_size=20),
)


@given(TARGETS)
@example("../outside/secret")
@example("out/secret")
@example("cdn/out/secret")
@example("cdn/../../outside/secret")
@example("link.css")
@example("up/outside/main.css")
@example("absolute/etc/hostname")
@settings(max_examples=300, deadline=None)
def test_nothing_outside_the_root_is_ever_touched(target: str) -> None:
    """Whatever is named, nothing outside changes, and inside only the named file and its variants go."""
    with world() as (root, outside):
        before, sentinel = content(root), content(outside)
        backend = FilesBackend(root)
        named: set[str] = set()
        try:
            named = {target, *backend.variants(target)}
            for key in sorted(named):
                backend.remove(key)
        except RefusedKey:
            named.discard(target)
        after = content(root)
        assert content(outside) == sentinel
        assert after.items() <= before.items()
        gone = before.keys() - after.keys()
        assert gone <= named
        assert all(key == target or is_variant(target, key) for key in gone)
        assert gone == {key for key in named if before.get(key, "directory") != "directory"}


@pytest.mark.parametrize(
    "key",
    [
        "",
        "/etc/passwd",
        "..",
        ".",
        "../x",
        "a/../b",
        "a//b",
        "a/",
        "./a",
        "a/.",
        "a\\b",
        "a\0b",
        "\ud800",
        "x" * 256,
        "é" * 128,
        "/".join(["abc"] * 1025),
    ],
)
def test_a_key_that_is_no_path_is_refused(key: str) -> None:
    """Keys that could leave the root, or that no file can have, are refused before anything is opened."""
    with pytest.raises(RefusedKey) as caught:
        check_path(key)
    assert "passwd" not in str(caught.value)


@pytest.mark.parametrize(
    "key", ["a", "a/b", "...", "..a", "a..", "\uff0e\uff0e", "x" * 255, "é" * 127, "product:7", "\u202ea"]
)
def test_an_ordinary_or_odd_name_is_a_path(root: Path, key: str) -> None:
    """Names that only look like a way out are names."""
    FilesBackend(root).check(key)


def test_a_file_is_removed_once(root: Path) -> None:
    """Removing tells whether there was a file, and nothing there is no failure."""
    backend = FilesBackend(root)
    (root / "a").mkdir()
    (root / "a" / "b").write_text("x")
    assert backend.remove("a/b")
    assert not backend.remove("a/b")
    assert not backend.remove("missing/b")
    assert (root / "a").is_dir()


def test_variants_are_found_in_the_directory_of_the_key(root: Path) -> None:
    """One directory is looked through, and names that are not UTF-8 do no harm."""
    (root / "a").mkdir()
    for name in ("m.css", "m.css.gz", "m.css?v=2", "m.css.map"):
        (root / "a" / name).touch()
    Path(os.fsdecode(os.fsencode(root) + b"/a/m.css?\xff.gz")).touch()
    backend = FilesBackend(root)
    assert backend.variants("a/m.css") == ["a/m.css.gz", "a/m.css?v=2"]
    assert backend.variants("b/m.css") == []


def test_variants_are_found_whatever_the_encoding_of_file_names(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The shortcut that passes names over is taken in UTF-8 only, and changes nothing."""
    for name in ("é.css", "é.css.gz", "è.css.gz", "other"):
        (root / name).touch()
    with_shortcut = FilesBackend(root).variants("é.css")
    monkeypatch.setattr("pybustcall.daemon.backends.files._IN_UTF8", False)
    assert with_shortcut == FilesBackend(root).variants("é.css") == ["é.css.gz"]


def test_directories_and_special_files_stay(root: Path) -> None:
    """Only regular files and links are removed."""
    (root / "directory").mkdir()
    os.mkfifo(root / "fifo")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(root / "socket"))
    backend = FilesBackend(root)
    assert [backend.remove(name) for name in ("directory", "fifo", "socket")] == [False] * 3
    assert sorted(path.name for path in root.iterdir()) == ["directory", "fifo", "socket"]


def test_a_link_is_removed_and_what_it_points_to_stays(root: Path, tmp_path: Path) -> None:
    """The last segment may be a link: the link goes."""
    (tmp_path / "secret").write_text("x")
    (root / "link").symlink_to(tmp_path / "secret")
    assert FilesBackend(root).remove("link")
    assert (tmp_path / "secret").read_text() == "x"
    assert not (root / "link").is_symlink()


def test_a_way_through_a_link_is_refused(root: Path) -> None:
    """A link on the way is never followed, not even to a place inside."""
    (root / "real").mkdir()
    (root / "real" / "file").touch()
    (root / "link").symlink_to("real")
    backend = FilesBackend(root)
    with pytest.raises(RefusedKey, match="leads through a link"):
        backend.remove("link/file")
    with pytest.raises(RefusedKey, match="leads through a link"):
        backend.variants("link/file")
    assert (root / "real" / "file").exists()


def test_a_file_on_the_way_means_that_there_is_nothing(root: Path) -> None:
    """Below a file there are no files."""
    (root / "file").touch()
    assert not FilesBackend(root).remove("file/below/it")


def test_a_root_that_is_a_link_is_the_operators_choice(root: Path, tmp_path: Path) -> None:
    """The links in the root's own path are followed."""
    (tmp_path / "current").symlink_to(root)
    (root / "a").touch()
    assert FilesBackend(tmp_path / "current").remove("a")


def test_the_root_must_be_a_directory(tmp_path: Path) -> None:
    """A missing root is a mistake in the settings, told by name."""
    with pytest.raises(ConfigurationError, match=r"missing' does not exist") as caught:
        FilesBackend(tmp_path / "missing")
    assert caught.value.setting == "root"
    (tmp_path / "file").touch()
    with pytest.raises(ConfigurationError, match="is not a directory"):
        FilesBackend(str(tmp_path / "file"))


def test_a_vanished_root_is_a_failure_until_it_is_back(root: Path) -> None:
    """Without its root the backend never says that there was nothing."""
    backend = FilesBackend(root)
    backend.check_ready()
    shutil.rmtree(root)
    for act in (backend.check_ready, backend.size_bytes, lambda: backend.remove("a"), lambda: backend.variants("a")):
        with pytest.raises(BackendFailure, match="root directory cannot be opened: No such file"):
            act()
    root.mkdir()
    (root / "a").touch()
    assert backend.remove("a")


@pytest.mark.parametrize("call", ["unlink", "stat", "listdir", "open"])
def test_an_error_of_the_system_is_a_failure_without_the_key(
    root: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    """A failing disk is a failure, told without the whole key, and every descriptor is closed."""
    (root / "cdn").mkdir()
    (root / "cdn" / "private-name").touch()
    backend = FilesBackend(root)
    real_open, descriptors = os.open, len(os.listdir("/proc/self/fd"))

    def broken(*args: object, **more: object) -> int:
        if call == "open" and not more:
            return real_open(*args)  # type: ignore[arg-type]
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, call, broken)
    with pytest.raises(BackendFailure, match="cannot be reached: Input/output error") as caught:
        (backend.variants if call == "listdir" else backend.remove)("cdn/private-name")
    monkeypatch.undo()
    assert "private-name" not in str(caught.value)
    assert len(os.listdir("/proc/self/fd")) == descriptors


def test_a_file_that_goes_meanwhile_counts_as_nothing(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between looking and removing somebody else may have removed it."""
    (root / "a").touch()
    real = os.unlink

    def late(name: bytes, *, dir_fd: int) -> None:
        real(name, dir_fd=dir_fd)
        real(name, dir_fd=dir_fd)

    monkeypatch.setattr(os, "unlink", late)
    assert not FilesBackend(root).remove("a")


def test_an_error_without_a_number_is_named(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Even an error that says nothing of itself is told."""

    def broken(*args: object, **more: object) -> int:
        raise OSError

    (root / "a").touch()
    monkeypatch.setattr(os, "unlink", broken)
    with pytest.raises(BackendFailure, match="cannot be reached: OSError"):
        FilesBackend(root).remove("a")


def test_the_size_is_that_of_the_files_below(root: Path, tmp_path: Path) -> None:
    """Links are not followed and directories do not count."""
    (root / "a").mkdir()
    (root / "a" / "b").write_bytes(b"x" * 700)
    (root / "c").write_bytes(b"x" * 300)
    (tmp_path / "large").write_bytes(b"x" * 5000)
    (root / "link").symlink_to(tmp_path / "large")
    (root / "loop").symlink_to(root)
    backend = FilesBackend(root)
    assert backend.size_bytes() == 1000
    assert repr(backend) == f"FilesBackend('{root}')"


def test_a_size_that_cannot_be_told_is_a_failure(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An error while counting is told, not counted as nothing."""
    (root / "a").touch()
    backend = FilesBackend(root)

    def broken(*args: object, **more: object) -> object:
        raise OSError(errno.EIO, "Input/output error")
        yield

    monkeypatch.setattr(os, "fwalk", broken)
    with pytest.raises(BackendFailure, match="cannot be counted"):
        backend.size_bytes()


def test_many_operations_leave_no_descriptor_open(root: Path) -> None:
    """Every descriptor is closed, after removals, refusals and failures alike."""
    (root / "link").symlink_to("/")
    (root / "d" / "e").mkdir(parents=True)
    backend = FilesBackend(root)
    before = len(os.listdir("/proc/self/fd"))
    for number in range(50):
        (root / "d" / "e" / str(number)).touch()
        assert backend.remove(f"d/e/{number}")
        assert not backend.remove(f"d/x/{number}")
        with pytest.raises(RefusedKey):
            backend.remove(f"link/{number}")
        backend.variants(f"d/e/{number}")
        backend.size_bytes()
    assert len(os.listdir("/proc/self/fd")) == before
