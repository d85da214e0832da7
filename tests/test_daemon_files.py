"""The files backend: it finds and removes what is named below its root, and never anything else."""

from __future__ import annotations

import asyncio
import errno
import os
import shutil
import socket
import tempfile
import threading
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from contextlib import aclosing, asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any, cast

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from pybustcall.daemon.backends import BackendFailure, RefusedKey, Scope, files
from pybustcall.daemon.backends.files import FilesBackend, check_path
from pybustcall.errors import ConfigurationError
from pybustcall.keys import covers, is_variant
from pybustcall.models import DEFAULT_NAMESPACE, EVERYTHING, Kind
from tests.conftest import PATIENCE, eventually

HERE = DEFAULT_NAMESPACE

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
    for folder, folders, names in os.walk(top):
        for name in folders + names:
            path = Path(folder, name)
            kind = "link" if path.is_symlink() else "file" if path.is_file() else "directory"
            found[str(path.relative_to(top))] = f"file {path.read_text()}" if kind == "file" else kind
    return found


@pytest.fixture
def root(tmp_path: Path) -> Path:
    path = tmp_path / "root"
    path.mkdir()
    return path


@asynccontextmanager
async def opened(root: Path | str) -> AsyncIterator[FilesBackend]:
    """Open a backend of files, and close it."""
    backend = FilesBackend(root)
    await backend.open()
    try:
        yield backend
    finally:
        await backend.close()


async def remove(backend: FilesBackend, *keys: str, namespace: str = HERE) -> int:
    """Remove keys as the engine does."""
    return await backend.remove(namespace, keys, generation=0, soft=False)


async def select(backend: FilesBackend, kind: Kind, target: str, namespace: str = HERE) -> list[str]:
    """Tell all that is found, sorted."""
    return sorted([key async for batch in backend.select(Scope(namespace, kind, target)) for key in batch])


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def make(root: Path, *keys: str) -> None:
    """Make files, with the directories on their way."""
    for key in keys:
        (root / key).parent.mkdir(parents=True, exist_ok=True)
        (root / key).write_bytes(os.fsencode(key))


def failing(real: Callable[..., Any], number: int, *names: str) -> Callable[..., Any]:
    """Make a function of the system that fails for files with these names, or for all."""

    def fail(path: Any, *args: Any, **more: Any) -> Any:
        if not isinstance(path, int) and (not names or os.fsdecode(path) in names):
            raise OSError(number, os.strerror(number))
        return real(path, *args, **more)

    return fail


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


@given(TARGETS, st.sampled_from(["key", "prefix"]))
@example("../outside/secret", "key")
@example("../outside", "prefix")
@example("out/secret", "key")
@example("out", "prefix")
@example("out/", "prefix")
@example("cdn/out/secret", "key")
@example("cdn", "prefix")
@example("cdn/../../outside/secret", "key")
@example("cdn/../../outside/", "prefix")
@example("link.css", "key")
@example("up/outside/main.css", "key")
@example("up/", "prefix")
@example("absolute/etc/hostname", "key")
@example("/", "prefix")
@settings(max_examples=300, deadline=None)
async def test_nothing_outside_the_root_is_ever_touched(target: str, kind: Kind) -> None:
    """Whatever is named, nothing outside changes, and inside only the named files and their variants go."""
    if not target:
        return
    with world() as (root, outside):
        before, sentinel = content(root), content(outside)
        async with opened(root) as backend:
            try:
                named = {target} if kind == "key" else set(await select(backend, kind, target))
            except RefusedKey:
                assert kind == "prefix"
                named = set()
            named |= set(await backend.variants(HERE, [target]))
            try:
                for key in sorted(named):
                    await remove(backend, key)
            except RefusedKey:
                assert named == {target}
        after = content(root)
        assert content(outside) == sentinel
        assert after.items() <= before.items()
        gone = before.keys() - after.keys()
        assert gone <= named
        assert all(Scope(HERE, kind, target).covers(key) or is_variant(target, key) for key in gone)
        assert gone == {key for key in named if before.get(key, "directory") != "directory"}


# What is a key


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
    FilesBackend(root).check(HERE, key)


@given(st.text(max_size=12))
def test_a_name_of_a_file_is_a_key_or_refused(name: str) -> None:
    """Whatever passes is one path in normal form below where it begins."""
    try:
        check_path(name)
    except RefusedKey:
        return
    assert os.path.normpath(name) == name
    assert not os.path.isabs(name)
    assert ".." not in name.split("/")


async def test_names_that_are_no_text_or_no_path_are_no_keys(root: Path) -> None:
    """Names that are not UTF-8, or have a backslash, are not found; nor is what lies below such a directory."""
    make(root, "a/m.css", "a/m.css.gz", "a/m\\.css", "a/m.css?\\.gz", "a\\b/c")
    make(root, *map(os.fsdecode, (b"a/m.css?\xff.gz", b"a/\xff", b"\xff/c")))
    async with opened(root) as backend:
        assert await select(backend, "all", EVERYTHING) == ["a/m.css", "a/m.css.gz"]
        assert await select(backend, "prefix", "a/m.css") == ["a/m.css"]
        assert await backend.variants(HERE, ["a/m.css"]) == ["a/m.css.gz"]


async def test_the_query_of_a_variant_may_have_slashes(tmp_path: Path) -> None:
    """Then it lies in directories, of which none is left out, and none is entered by a link."""
    names = ["page", "page?next=/a/b", "page.gz?to=x/y.html", "page?v=2", "page.gz/other", "page2?v=/a", "p/page?a=/b"]
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x")
    (tmp_path / "page?next=" / "link").symlink_to(tmp_path / "p")
    async with opened(tmp_path) as backend:
        found = await backend.variants(HERE, ["page"])
        assert found == ["page.gz?to=x/y.html", "page?next=/a/b", "page?next=/link", "page?v=2"]
        assert await backend.variants(HERE, ["p/page"]) == ["p/page?a=/b"]


async def test_the_query_of_a_variant_may_lie_deep(root: Path) -> None:
    """Very many directories below one another are gone through with few descriptors and no recursion."""
    way = "page?" + "/a" * 1200
    here = os.open(root, os.O_RDONLY)
    for name in way.split("/"):
        os.mkdir(name, dir_fd=here)
        below = os.open(name, os.O_RDONLY, dir_fd=here)
        os.close(here)
        here = below
    os.close(os.open("b", os.O_CREAT | os.O_WRONLY, dir_fd=here))
    os.close(here)
    before = descriptors()
    async with opened(root) as backend:
        assert await backend.variants(HERE, ["page"]) == [f"{way}/b"]
    assert descriptors() == before


async def test_what_is_beside_an_unreadable_directory_is_found_as_a_variant(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What cannot be read is told when all else was looked through, with what was found."""
    make(root, "page.gz", "page?a=/b", "page?c=/d", "private/page.gz", "x/page.gz")
    (root / "link").symlink_to("x")
    monkeypatch.setattr(os, "open", failing(os.open, errno.EACCES, "private", "page?c="))
    async with opened(root) as backend:
        with pytest.raises(BackendFailure, match="not all variants can be listed: Permission denied") as caught:
            await backend.variants(HERE, ["private/page", "page", "link/page", "x/page"])
    assert caught.value.found == ["page.gz", "page?a=/b", "x/page.gz"]
    assert (caught.value.failed, caught.value.unreachable) == (2, False)


async def test_the_query_of_a_variant_that_goes_meanwhile_is_none(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A directory that vanishes, or is swapped for a link, between the listing and a look into it holds nothing."""
    make(root, "page.gz", "page?a=/b", "page?c=/d", "else/d")
    real = os.open

    def swapping(path: Any, *args: Any, **more: Any) -> int:
        if path == b"page?a=":
            shutil.rmtree(root / "page?a=")
        elif path == b"page?c=" and not (root / "page?c=").is_symlink():
            shutil.rmtree(root / "page?c=")
            (root / "page?c=").symlink_to("else")
        return real(path, *args, **more)

    async with opened(root) as backend:
        with monkeypatch.context() as patched:
            patched.setattr(os, "open", swapping)
            assert await backend.variants(HERE, ["page"]) == ["page.gz"]


async def test_a_path_that_is_too_long_is_no_key(root: Path) -> None:
    """Below a directory that no path leads to there is nothing that could be named."""
    here = os.open(root, os.O_RDONLY)
    name = "d" * 250
    for _ in range(17):
        os.close(os.open("file", os.O_CREAT | os.O_WRONLY, dir_fd=here))
        os.mkdir(name, dir_fd=here)
        below = os.open(name, os.O_RDONLY, dir_fd=here)
        os.close(here)
        here = below
    os.close(os.open("file", os.O_CREAT | os.O_WRONLY, dir_fd=here))
    os.close(here)
    async with opened(root) as backend:
        found = await select(backend, "all", EVERYTHING)
        assert len(found) == 17
        assert max(map(len, found)) == 16 * 251 + 4
        for key in found:
            check_path(key)


async def test_directories_and_special_files_stay(root: Path) -> None:
    """Only regular files and links are keys."""
    (root / "directory.gz").mkdir()
    os.mkfifo(root / "fifo")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(root / "socket"))
    names = ["directory.gz", "fifo", "socket"]
    async with opened(root) as backend:
        assert await remove(backend, *names) == 0
        assert await select(backend, "all", EVERYTHING) == []
        assert await backend.held(HERE, names) == []
        assert await backend.variants(HERE, ["directory"]) == []
    assert sorted(os.listdir(root)) == names


async def test_a_link_is_removed_and_what_it_points_to_stays(root: Path, tmp_path: Path) -> None:
    """The last segment may be a link, to a file or a directory or nothing: the link goes."""
    make(tmp_path, "secret/a")
    (root / "file").symlink_to(tmp_path / "secret" / "a")
    (root / "directory").symlink_to(tmp_path / "secret")
    (root / "nothing").symlink_to("missing")
    async with opened(root) as backend:
        assert await select(backend, "all", EVERYTHING) == ["directory", "file", "nothing"]
        assert await remove(backend, "file", "directory", "nothing") == 3
    assert (tmp_path / "secret" / "a").read_text() == "secret/a"
    assert os.listdir(root) == []


async def test_a_way_through_a_link_is_refused(root: Path) -> None:
    """A link on the way is never followed, not even to a place inside; so nothing is held there."""
    make(root, "real/file", "real/file.gz", "other")
    (root / "link").symlink_to("real")
    async with opened(root) as backend:
        with pytest.raises(RefusedKey, match="leads through a link"):
            await remove(backend, "link/file")
        with pytest.raises(BackendFailure, match="a key leads through a link") as caught:
            await remove(backend, "link/file", "other", "link/x")
        assert (caught.value.removed, caught.value.failed, caught.value.unreachable) == (1, 2, False)
        assert await backend.held(HERE, ["link/file", "real/file"]) == ["real/file"]
        assert await backend.variants(HERE, ["link/file", "real/file"]) == ["real/file.gz"]
        for branch in ("link/", "link/file", "link/sub/"):
            with pytest.raises(RefusedKey, match="leads through a link"):
                await select(backend, "prefix", branch)
        assert await select(backend, "prefix", "link") == ["link"]
    assert (root / "real" / "file").exists()


async def test_a_file_on_the_way_means_that_there_is_nothing(root: Path) -> None:
    """Below a file there are no files."""
    make(root, "file")
    async with opened(root) as backend:
        assert await remove(backend, "file/below/it") == 0
        assert await select(backend, "prefix", "file/below") == []


# The root


async def test_a_root_that_is_a_link_is_the_operators_choice(root: Path, tmp_path: Path) -> None:
    """The links in the root's own path are followed."""
    (tmp_path / "current").symlink_to(root)
    make(root, "a")
    async with opened(tmp_path / "current") as backend:
        assert await remove(backend, "a") == 1


def test_the_root_must_be_a_directory(tmp_path: Path) -> None:
    """A missing root is a mistake in the settings, told by name."""
    with pytest.raises(ConfigurationError, match=r"missing' does not exist") as caught:
        FilesBackend(tmp_path / "missing")
    assert caught.value.setting == "root"
    (tmp_path / "file").touch()
    with pytest.raises(ConfigurationError, match="is not a directory"):
        FilesBackend(str(tmp_path / "file"))
    with pytest.raises(ConfigurationError, match=r"missing' does not exist"):
        FilesBackend(tmp_path / "missing" / "{namespace}")


@pytest.mark.parametrize(
    ("below", "why"),
    [
        ("cache-{namespace}", "in the segment 'cache-{namespace}'; it must be a whole one, as in '/var/cache/{name"),
        ("{namespace}.d/x", "it must be a whole one"),
        ("{namespace}/{namespace}", "has {namespace} twice; a namespace has one directory"),
        ("{namespace}/x{namespace}", "has {namespace} twice"),
        ("{namespace}/../x", "leads up again behind {namespace}; name the directory where it is"),
    ],
)
def test_the_place_of_the_namespace_is_a_whole_segment(root: Path, below: str, why: str) -> None:
    """Anything else is a mistake in the settings."""
    with pytest.raises(ConfigurationError) as caught:
        FilesBackend(root / below)
    assert why in str(caught.value)
    assert caught.value.setting == "root"


def test_the_traits_are_those_of_the_root(root: Path) -> None:
    """There are namespaces where the root has a place for them."""
    plain, tenants = FilesBackend(root), FilesBackend(root / "{namespace}")
    assert (plain.traits.namespaces, tenants.traits.namespaces) == (False, True)
    assert plain.traits.kinds == {"key", "prefix", "tag", "all"}
    assert (plain.traits.soft, plain.traits.fences, plain.traits.settle) == (False, False, 1.0)
    assert repr(plain) == f"FilesBackend('{root}')"
    plain.check(HERE, "a")
    with pytest.raises(RefusedKey, match=r"put \{namespace\} into the root"):
        plain.check("tenant", "a")
    tenants.check("tenant", "a")
    for name in ("..", ".", "", "a/b", "é", "x" * 65):
        with pytest.raises(RefusedKey, match="lies in a namespace that no directory is named after"):
            tenants.check(name, "a")


async def test_a_namespace_is_no_way_out(root: Path, tmp_path: Path) -> None:
    """A name that is no namespace reaches nothing, not even where it would lead."""
    make(tmp_path, "secret", "root/deep/a")
    async with opened(root / "{namespace}") as backend:
        for name in ("..", ".", "deep/..", ""):
            assert await select(backend, "all", EVERYTHING, name) == []
            assert await backend.held(name, ["secret", "deep/a"]) == []
            with pytest.raises(RefusedKey):
                await remove(backend, "secret", namespace=name)
    assert (tmp_path / "secret").exists()


async def test_a_link_never_leads_from_one_tenant_to_another(root: Path) -> None:
    """Neither the directory of a namespace nor what the root says after it may be a link."""
    make(root, "a/pages/x", "a/pages/x.gz", "c/x")
    (root / "b").symlink_to("a")
    (root / "c" / "pages").symlink_to("../a/pages")
    async with opened(root / "{namespace}" / "pages") as backend:
        for namespace in ("b", "c"):
            acts: list[Callable[[str], Any]] = [
                lambda name: remove(backend, "x", namespace=name),
                lambda name: select(backend, "all", EVERYTHING, name),
                lambda name: select(backend, "prefix", "x", name),
                lambda name: backend.held(name, ["x"]),
                lambda name: backend.variants(name, ["x"]),
            ]
            for act in acts:
                with pytest.raises(BackendFailure, match=f"the namespace {namespace} leads through a link") as caught:
                    await act(namespace)
                assert not caught.value.unreachable
        assert await backend.held("a", ["x"]) == ["x"]


async def test_a_vanished_root_is_a_failure_until_it_is_back(root: Path) -> None:
    """Without its root the backend never says that there was nothing, and the engine need not try each key."""
    for place in (root, root / "{namespace}"):
        async with opened(place) as backend:
            await backend.check_ready()
            shutil.rmtree(root)
            acts: list[Callable[[], Any]] = [
                backend.check_ready,
                backend.size_bytes,
                lambda: remove(backend, "a", "b"),
                lambda: backend.variants(HERE, ["a"]),
                lambda: backend.held(HERE, ["a"]),
                lambda: select(backend, "key", "a"),
                lambda: select(backend, "prefix", "a"),
                lambda: select(backend, "all", EVERYTHING),
            ]
            for act in acts:
                with pytest.raises(BackendFailure, match="root directory cannot be opened: No such file") as caught:
                    await act()
                assert caught.value.unreachable
            with pytest.raises(BackendFailure) as caught:
                await remove(backend, "a", "b", "..")
            assert (caught.value.removed, caught.value.failed) == (0, 3)
            make(root, "a", "default/a")
            assert await remove(backend, "a") == 1


async def test_what_is_not_open_cannot_be_used(root: Path) -> None:
    """Before and after, each call is a failure of the cache, and no thread is left."""
    backend = FilesBackend(root)
    with pytest.raises(BackendFailure, match="the cache of files is closed") as caught:
        await backend.check_ready()
    assert caught.value.unreachable
    await backend.open()
    await backend.open()
    await backend.check_ready()
    await backend.close()
    await backend.close()
    with pytest.raises(BackendFailure, match="is closed"):
        await select(backend, "all", EVERYTHING)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("pybustcall-files")]


# Finding


PARTS = st.lists(
    st.sampled_from(["a", "b", "ab", ":", "?", "#", ".", "*", "[", "\\", "é", ".gz", "?v", "\udcff", "\ud800"]),
    min_size=1,
    max_size=3,
).map("".join)
KEYS = st.lists(PARTS, min_size=1, max_size=4).map("/".join)


@contextmanager
def tree(keys: Iterable[str], links: Iterable[str]) -> Iterator[Path]:
    """Make files, and links to a directory, as far as there can be some with these names."""
    with tempfile.TemporaryDirectory() as made:
        top = Path(made)
        root = top / "root"
        root.mkdir()
        make(top, "outside/a/b", "outside/a.gz")
        for keys_of, act in ((links, lambda path: path.symlink_to(top / "outside")), (keys, Path.touch)):
            for key in keys_of:
                try:
                    (root / key).parent.mkdir(parents=True, exist_ok=True)
                    if not any(path.is_symlink() for path in (root / key).parents if path.is_relative_to(root)):
                        act(root / key)
                except (OSError, ValueError):
                    continue
        yield root


def held_in(root: Path) -> list[str]:
    """List all keys the plain way."""
    found = []
    for folder, folders, names in os.walk(root):
        for name in folders + names:
            path = Path(folder, name)
            key = str(path.relative_to(root))
            try:
                check_path(key)
            except RefusedKey:
                continue
            if path.is_symlink() or path.is_file():
                found.append(key)
    return sorted(found)


@given(st.lists(KEYS, max_size=12), st.lists(KEYS, max_size=2), st.data())
@settings(max_examples=150, deadline=None)
async def test_a_branch_is_what_a_filter_over_all_files_finds(
    keys: list[str], links: list[str], data: st.DataObject
) -> None:
    """For any files and any prefix, whether or not it could be a key; and so are variants."""
    with tree(keys, links) as root:
        everything = held_in(root)
        cuts = [key[:place] for key in keys for place in range(1, len(key) + 1)]
        prefixes = data.draw(st.lists(st.one_of(KEYS, st.sampled_from([*cuts, "a"])), min_size=1, max_size=4))
        async with opened(root) as backend:
            assert await select(backend, "all", EVERYTHING) == everything
            for prefix in prefixes:
                if _leads_through_a_link(root, prefix):
                    with pytest.raises(RefusedKey):
                        await select(backend, "prefix", prefix)
                else:
                    assert await select(backend, "prefix", prefix) == [key for key in everything if covers(prefix, key)]
            sound = [key for key in prefixes if _sound(key)]
            there = [key for key in everything if any(is_variant(one, key) for one in sound)]
            assert await backend.variants(HERE, prefixes) == there
            assert await backend.held(HERE, [*prefixes, *everything]) == list(
                dict.fromkeys(key for key in [*prefixes, *everything] if key in everything)
            )


def _leads_through_a_link(root: Path, prefix: str) -> bool:
    way = prefix.split("/")[:-1]
    heads = ["/".join(way[:number]) for number in range(1, len(way) + 1)]
    return bool(way) and _sound(heads[-1]) and any((root / head).is_symlink() for head in heads)


def _sound(key: str) -> bool:
    try:
        check_path(key)
    except RefusedKey:
        return False
    return True


async def test_each_directory_is_listed_once(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many keys lie in it."""
    keys = [f"{folder}/{number}.css" for folder in ("a", "b/c") for number in range(50)]
    make(root, *keys, *(f"{key}.gz" for key in keys))
    listed, real = [], os.scandir

    def scandir(directory: int) -> Any:
        listed.append(directory)
        return real(directory)

    monkeypatch.setattr(os, "scandir", scandir)
    async with opened(root) as backend:
        assert len(await backend.variants(HERE, [*keys, "missing/a"])) == 100
    assert len(listed) == 2


async def test_a_deep_tree_takes_few_descriptors(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Below a certain depth directories are opened anew."""
    keys = ["/".join(["d"] * depth) + "/file" for depth in range(1, 60)]
    make(root, *keys)
    most, real, before = [0], os.scandir, descriptors()

    def scandir(directory: Any) -> Any:
        if isinstance(directory, int):
            most.append(descriptors() - before)
        return real(directory)

    monkeypatch.setattr(os, "scandir", scandir)
    async with opened(root) as backend:
        assert await select(backend, "prefix", "d") == sorted(keys)
        assert await backend.size_bytes() == sum(map(len, keys))
    assert max(most) < 45
    assert descriptors() == before


async def test_a_batch_ends_where_little_is_found(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A walk through very many other files comes up for air, and finds all the same."""
    monkeypatch.setattr(files, "_LOOKED_AT", 7)
    make(root, *(f"a/other{number}" for number in range(100)), "a/this", "a/this:1", "a/this#/x")
    async with opened(root) as backend:
        assert await select(backend, "prefix", "a/this") == ["a/this", "a/this#/x", "a/this:1"]
        assert await backend.size_bytes() == sum(len(f"a/other{number}") for number in range(100)) + 23


async def test_what_becomes_something_else_meanwhile_is_passed_over(root: Path, tmp_path: Path) -> None:
    """Directories that vanish, or are swapped for links that lead out, are never gone into."""
    make(tmp_path, *(f"outside/secret{number}" for number in range(10)))
    keys = [f"top/{number}/{name}" for number in range(300) for name in ("x", "y", "deep/z")]
    make(root, *keys)
    async with opened(root) as backend:
        found: list[str] = []
        async for batch in backend.select(Scope(HERE, "prefix", "top")):
            if not found:
                entered = {key.split("/")[1] for key in batch}
                for number in set(map(str, range(300))) - entered:
                    shutil.rmtree(root / "top" / number)
                    if int(number) % 2:
                        (root / "top" / number).symlink_to(tmp_path / "outside")
            found += batch
        assert len(found) >= 500
        assert not any("secret" in key for key in found)
        assert {key for key in found if key.count("/") > 1} <= set(keys)
    assert len(list((tmp_path / "outside").iterdir())) == 10


async def test_a_directory_that_cannot_be_read_is_told_after_all_the_others(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What can be found is found, and then it is a failure; so the bust stays undone, and does what it can."""
    make(root, *(f"a/{number}/x" for number in range(5)), "a/private/x", "a/private/more/x")
    monkeypatch.setattr(os, "open", failing(os.open, errno.EACCES, "private"))
    async with opened(root) as backend:
        found: list[str] = []

        async def gather() -> None:
            async for batch in backend.select(Scope(HERE, "prefix", "a")):
                found.extend(batch)

        with pytest.raises(BackendFailure, match=r"not all files of prefix .* can be listed: Permission d") as caught:
            await gather()
        assert sorted(found) == [f"a/{number}/x" for number in range(5)]
        assert (caught.value.failed, caught.value.unreachable) == (1, False)
        assert "private" not in str(caught.value)
        assert await backend.size_bytes() == 5 * len("a/0/x")


async def test_a_disk_that_fails_while_a_directory_is_read_is_told(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By whoever reads: finding, looking for variants, counting."""
    make(root, "a/private")

    def scandir(directory: int) -> Any:
        raise OSError(errno.EIO, "Input/output error")

    before = descriptors()
    async with opened(root) as backend:
        with monkeypatch.context() as patched:
            patched.setattr(os, "scandir", scandir)
            with pytest.raises(BackendFailure, match="can be listed: Input/output error"):
                await select(backend, "prefix", "a")
            with pytest.raises(BackendFailure, match="not all variants can be listed: Input/output error"):
                await backend.variants(HERE, ["a/private"])
            with pytest.raises(BackendFailure, match="cannot be counted: Input/output error"):
                await backend.size_bytes()
    async with opened(root / "{namespace}") as backend:
        monkeypatch.setattr(os, "scandir", scandir)
        with pytest.raises(BackendFailure, match="namespaces cannot be listed: Input/output error"):
            await backend.size_bytes()
    monkeypatch.undo()
    assert descriptors() == before


# Removing


async def test_a_file_is_removed_once(root: Path) -> None:
    """Removing tells how many files there were, and nothing there is no failure. Directories stay."""
    make(root, "a/b", "a/c", "d")
    async with opened(root) as backend:
        assert await remove(backend, "a/b", "missing/b", "d", "a/b", "a") == 2
        assert await remove(backend, "a/b") == 0
        assert await remove(backend) == 0
    assert (root / "a" / "c").exists()


async def test_failures_are_gathered_after_all_were_tried(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What can be removed is; the failure counts the rest, and tells the first reason without a key."""
    make(root, "a/private-1", "a/b", "private-2", "c", "private-d/x", "private-d/y")
    monkeypatch.setattr(os, "unlink", failing(os.unlink, errno.EIO, "private-1", "private-2"))
    monkeypatch.setattr(os, "open", failing(os.open, errno.EACCES, "private-d"))
    keys = ["a/private-1", "..", "a/b", "private-2", "c", "private-d/x", "private-d/y"]
    async with opened(root) as backend:
        with pytest.raises(BackendFailure, match="cannot be reached: Input/output error") as caught:
            await remove(backend, *keys)
        assert (caught.value.removed, caught.value.failed, caught.value.unreachable) == (2, 5, False)
        assert isinstance(caught.value.__cause__, OSError)
        assert "private" not in str(caught.value)
        with pytest.raises(BackendFailure, match='a key has a segment "'):
            await remove(backend, "..", "c")
        with pytest.raises(RefusedKey, match="has a segment"):
            await remove(backend, "..")
    assert held_in(root) == ["a/private-1", "private-2", "private-d/x", "private-d/y"]


@pytest.mark.parametrize("call", ["unlink", "stat", "open"])
async def test_an_error_of_the_system_is_a_failure_without_the_key(
    root: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    """A failing disk is a failure, told without the whole key, and every descriptor is closed."""
    make(root, "cdn/private-name")
    before = descriptors()
    async with opened(root) as backend:
        name = "cdn" if call == "open" else "private-name"
        with monkeypatch.context() as patched:
            patched.setattr(os, call, failing(getattr(os, call), errno.EIO, name))
            acts: list[Callable[[], Any]] = [lambda: remove(backend, "cdn/private-name")]
            if call != "unlink":
                acts.append(lambda: backend.held(HERE, ["cdn/private-name"]))
                acts.append(lambda: select(backend, "key", "cdn/private-name"))
            if call == "open":
                acts.append(lambda: backend.variants(HERE, ["cdn/private-name"]))
            for act in acts:
                with pytest.raises(BackendFailure, match=r" be (?:reached|listed): Input/output error") as caught:
                    await act()
                assert "private-name" not in str(caught.value)
    assert descriptors() == before


async def test_a_directory_of_a_namespace_that_cannot_be_opened_is_a_failure(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of that namespace; the others can be used."""
    make(root, "a/x", "b/x")
    monkeypatch.setattr(os, "open", failing(os.open, errno.EACCES, "a"))
    async with opened(root / "{namespace}") as backend:
        with pytest.raises(BackendFailure, match="the namespace a cannot be opened: Permission denied") as caught:
            await remove(backend, "x", "y", namespace="a")
        assert (caught.value.failed, caught.value.unreachable) == (2, False)
        assert await remove(backend, "x", namespace="b") == 1


async def test_a_file_that_goes_meanwhile_counts_as_nothing(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between looking and removing somebody else may have removed it."""
    make(root, "a")
    real = os.unlink

    def late(name: bytes, *, dir_fd: int) -> None:
        real(name, dir_fd=dir_fd)
        real(name, dir_fd=dir_fd)

    monkeypatch.setattr(os, "unlink", late)
    async with opened(root) as backend:
        assert await remove(backend, "a") == 0


async def test_an_error_without_a_number_is_named(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Even an error that says nothing of itself is told."""

    def broken(*args: object, **more: object) -> int:
        raise OSError

    make(root, "a")
    monkeypatch.setattr(os, "unlink", broken)
    async with opened(root) as backend:
        with pytest.raises(BackendFailure, match="cannot be reached: OSError"):
            await remove(backend, "a")


# The size


async def test_the_size_is_that_of_the_files_below(root: Path, tmp_path: Path) -> None:
    """Links are not followed and directories do not count; names that are no keys do."""
    (root / "a\\b").mkdir()
    (root / "a\\b" / "b").write_bytes(b"x" * 700)
    (root / "c").write_bytes(b"x" * 300)
    (tmp_path / "large").write_bytes(b"x" * 5000)
    (root / "link").symlink_to(tmp_path / "large")
    (root / "loop").symlink_to(root)
    async with opened(root) as backend:
        assert await backend.size_bytes() == 1000


async def test_the_size_is_that_of_all_namespaces(root: Path) -> None:
    """What lies beside their directories is not the cache's."""
    for name, size in (("a/pages/x", 100), ("b/pages/d/y", 20), ("c/other", 3000), (".d/pages/x", 3000), ("e", 3000)):
        make(root, name)
        (root / name).write_bytes(b"x" * size)
    async with opened(root / "{namespace}" / "pages") as backend:
        assert await backend.size_bytes() == 120


async def test_a_file_that_goes_while_counting_counts_as_nothing(root: Path) -> None:
    """A walk looks at each after it was listed."""
    make(root, *(f"{number}" for number in range(20)))
    listed: list[os.DirEntry[str]] = []
    real = os.scandir

    class Vanishing:
        def __init__(self, directory: int) -> None:
            self.entries = real(directory)

        def __enter__(self) -> Iterator[os.DirEntry[str]]:
            listed.extend(self.entries)
            (root / listed[0].name).unlink()
            return iter(listed)

        def __exit__(self, *_: object) -> None:
            self.entries.close()

    size = sum(len(str(number)) for number in range(20))
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(os, "scandir", Vanishing)
        async with opened(root) as backend:
            assert await backend.size_bytes() == size - len(listed[0].name)


# Threads


class Gate:
    """A function of the system that waits in its thread until it may go on."""

    def __init__(self, real: Callable[..., Any]) -> None:
        self.real = real
        self.reached = threading.Event()
        self.free = threading.Event()

    def __call__(self, path: Any, *args: Any, **more: Any) -> Any:
        if threading.current_thread() is not threading.main_thread():
            self.reached.set()
            assert self.free.wait(PATIENCE)
        return self.real(path, *args, **more)


async def test_a_cancelled_removal_waits_for_nothing_and_is_completed(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The caller goes on at once, though the disk hangs; there is no half of it."""
    make(root, "a", "b", "c")
    gate = Gate(os.unlink)
    monkeypatch.setattr(os, "unlink", gate)
    async with opened(root) as backend:
        task = asyncio.create_task(remove(backend, "a", "b", "c"))
        await eventually(gate.reached.is_set)
        task.cancel()
        await asyncio.wait([task], timeout=PATIENCE)
        assert task.cancelled()
        assert held_in(root) == ["a", "b", "c"]
        gate.free.set()
        await eventually(lambda: held_in(root) == [])


async def test_a_cancelled_walk_is_closed_behind_its_last_batch(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The caller goes on at once, though the disk hangs, and no descriptor is left open."""
    make(root, *(f"a/{number}/x" for number in range(10)))
    before = descriptors()
    gate = Gate(os.scandir)
    async with opened(root) as backend:
        with monkeypatch.context() as patched:
            patched.setattr(os, "scandir", gate)
            task = asyncio.create_task(select(backend, "prefix", "a"))
            await eventually(gate.reached.is_set)
            task.cancel()
            await asyncio.wait([task], timeout=PATIENCE)
            assert task.cancelled()
            assert descriptors() > before
            gate.free.set()
            await eventually(lambda: descriptors() <= before)
        assert len(await select(backend, "prefix", "a")) == 10
    assert descriptors() == before


async def test_a_walk_that_is_left_alone_is_closed(root: Path) -> None:
    """Whoever stops in the midst of finding closes what is open."""
    make(root, *(f"a/{number % 9}/{number}" for number in range(1200)))
    before = descriptors()
    async with opened(root) as backend:
        batches = cast("Any", backend.select(Scope(HERE, "prefix", "a")))
        async with aclosing(batches):
            assert len(await anext(batches)) == 500
            assert descriptors() > before
        assert descriptors() == before


async def test_closing_waits_for_what_is_under_way(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No thread outlives the backend, and the event loop has its turns meanwhile."""
    make(root, "a")
    gate = Gate(os.unlink)
    monkeypatch.setattr(os, "unlink", gate)
    backend = FilesBackend(root)
    await backend.open()
    removing = asyncio.create_task(remove(backend, "a"))
    await eventually(gate.reached.is_set)
    closing = asyncio.create_task(backend.close())
    for _ in range(10):
        await asyncio.sleep(0)
    assert not closing.done()
    gate.free.set()
    await closing
    assert await removing == 1


async def test_many_operations_leave_no_descriptor_open(root: Path) -> None:
    """Every descriptor is closed, after removals, refusals and failures alike."""
    (root / "link").symlink_to("/")
    make(root, "d/e/f")
    before = descriptors()
    async with opened(root) as backend:
        for number in range(30):
            make(root, f"d/e/{number}")
            assert await remove(backend, f"d/e/{number}") == 1
            assert await remove(backend, f"d/x/{number}") == 0
            with pytest.raises(RefusedKey):
                await remove(backend, f"link/{number}")
            await backend.variants(HERE, [f"d/e/{number}", "link/a"])
            await backend.size_bytes()
            assert await select(backend, "prefix", "d") == ["d/e/f"]
    assert descriptors() == before
