"""The engine: what each strategy covers, over both backends, and what failures among the keys mean."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
from typing import TYPE_CHECKING

import pytest

from pybustcall.daemon import (
    Backend,
    BackendFailure,
    Engine,
    FaultHistory,
    FilesBackend,
    Index,
    MemoryBackend,
    RefusedKey,
    UnknownStrategy,
)
from pybustcall.daemon.engine import format_size
from pybustcall.errors import ConfigurationError

if TYPE_CHECKING:
    from pathlib import Path


class Shelf:
    """A backend that fails as told, and remembers in which threads it was called."""

    name = "shelf"
    blocking = True

    def __init__(self, *held: str, broken: tuple[str, ...] = (), linked: tuple[str, ...] = ()) -> None:
        self.held = dict.fromkeys(held)
        self.broken = broken
        self.linked = linked
        self.threads: list[int] = []
        self.measured = 0

    def check(self, key: str) -> None:
        if key.startswith("/"):
            raise RefusedKey("is an absolute path")

    def check_ready(self) -> None:
        self.threads.append(threading.get_ident())

    def variants(self, key: str) -> list[str]:
        if f"variants of {key}" in self.broken:
            raise BackendFailure("the shelf is stuck")
        return [name for name in self.held if name.startswith(key + "?")]

    def remove(self, key: str) -> bool:
        self.threads.append(threading.get_ident())
        if key in self.broken:
            raise BackendFailure("the shelf is stuck")
        if key in self.linked:
            raise RefusedKey("leads through a link")
        return self.held.pop(key, key) is None

    def size_bytes(self) -> int:
        self.measured += 1
        return 1234567


@pytest.fixture
def index() -> Index:
    """Register a page and its variants, made of a fragment, made of product 7; and a key that only looks alike."""
    index = Index()
    index.add("fragment", ["product:7"])
    for key in ("page", "page.gz", "page?v=2"):
        index.add(key, ["fragment"] if key == "page" else [])
    index.add("page.map")
    return index


@pytest.fixture
def engine(index: Index) -> Engine:
    return Engine(MemoryBackend(index), index)


async def test_direct_removes_exactly_the_key(engine: Engine, index: Index) -> None:
    """Variants and dependents stay."""
    removal = await engine.bust("page", "direct")
    assert removal.keys == ("page",)
    assert removal.count == 1
    assert "page.gz" in index


async def test_direct_on_an_abstract_subject_removes_nothing(engine: Engine, index: Index) -> None:
    """Its dependents are not it."""
    assert (await engine.bust("product:7", "direct")).count == 0
    assert "page" in index


@pytest.mark.parametrize("strategy", ["dimensional", "hybrid"])
async def test_everything_along_the_dimensions_goes(engine: Engine, index: Index, strategy: str) -> None:
    """Dependents by way of others go too, and their variants, and nothing else."""
    removal = await engine.bust("product:7", strategy)
    assert removal.keys == ("fragment", "page", "page.gz", "page?v=2")
    assert "page.map" in index
    assert len(index) == 1


async def test_hybrid_removes_the_key_itself_first(engine: Engine) -> None:
    """What was named goes before what hangs on it."""
    assert (await engine.bust("fragment", "hybrid")).keys[0] == "fragment"


async def test_busting_what_is_not_held_is_a_success(engine: Engine) -> None:
    """No cache holds the old value, which is all that was asked."""
    assert (await engine.bust("unheard", "dimensional")).count == 0


async def test_an_unknown_strategy_is_refused_with_those_that_there_are(engine: Engine) -> None:
    """The error names the supported ones, and not what was asked."""
    with pytest.raises(UnknownStrategy, match="supported are direct, dimensional, hybrid") as caught:
        await engine.bust("page", "sideways")
    assert caught.value.supported == ("direct", "dimensional", "hybrid")
    assert "sideways" not in str(caught.value)


async def test_files_go_and_their_registrations_stay(tmp_path: Path) -> None:
    """A page is rendered again at the same path, so a second bust finds it too."""
    index = Index()
    engine = Engine(FilesBackend(tmp_path), index)
    engine.register("page.html", ["product:7"])
    for _ in range(2):
        for name in ("page.html", "page.html.gz", "other.html"):
            (tmp_path / name).touch()
        assert (await engine.bust("product:7", "dimensional")).keys == ("page.html", "page.html.gz")
    assert os.listdir(tmp_path) == ["other.html"]


async def test_a_target_that_the_backend_could_never_hold_is_refused(tmp_path: Path) -> None:
    """Unless something depends on it, it is a mistake, and nothing is touched."""
    engine = Engine(FilesBackend(tmp_path), Index())
    with pytest.raises(RefusedKey, match=r'has a segment "\.\."'):
        await engine.bust("../secret", "dimensional")


@pytest.mark.parametrize(("strategy", "removed"), [("dimensional", ("page.html",)), ("direct", ())])
async def test_an_abstract_subject_need_not_be_a_key(tmp_path: Path, strategy: str, removed: tuple[str, ...]) -> None:
    """A subject with dependents is sound, whatever its name."""
    engine = Engine(FilesBackend(tmp_path), Index())
    engine.register("page.html", ["https://shop.example/product//7/"])
    (tmp_path / "page.html").touch()
    assert (await engine.bust("https://shop.example/product//7/", strategy)).keys == removed


def test_only_possible_keys_are_registered(tmp_path: Path) -> None:
    """An entry must pass the backend's check; what it depends on may be anything."""
    index = Index()
    engine = Engine(FilesBackend(tmp_path), index)
    with pytest.raises(RefusedKey, match="absolute path"):
        engine.register("/etc/passwd", ["product:7"])
    assert len(index) == 0


async def test_a_way_through_a_link_is_refused_at_removal(tmp_path: Path) -> None:
    """What only the file system can tell is a refusal all the same."""
    (tmp_path / "link").symlink_to("/")
    with pytest.raises(RefusedKey, match="leads through a link"):
        await Engine(FilesBackend(tmp_path), Index()).bust("link/etc", "dimensional")


@pytest.mark.parametrize(
    ("shelf", "removed", "failed", "reason"),
    [
        (Shelf("t", "a", "b", "b?1", broken=("a",)), 3, 1, "the shelf is stuck"),
        (Shelf("t", "a", "b", "b?1", broken=("b?1",)), 3, 1, "the shelf is stuck"),
        (Shelf("t", "a", "b", broken=("variants of a", "t")), 2, 2, "the shelf is stuck"),
        (Shelf("t", "a", "b", linked=("t",)), 2, 1, "a key leads through a link"),
    ],
)
async def test_one_failure_does_not_keep_the_others(shelf: Shelf, removed: int, failed: int, reason: str) -> None:
    """All the others are tried, and the error tells how many were and were not removed."""
    index = Index()
    engine = Engine(shelf, index)
    engine.register("a", ["t"])
    engine.register("b", ["t"])
    with pytest.raises(BackendFailure, match=f"^{removed} removed, {failed} not removed: {reason}$") as caught:
        await engine.bust("t", "dimensional")
    assert (caught.value.removed, caught.value.failed) == (removed, failed)


async def test_a_vanished_root_is_a_failure_and_never_a_success(tmp_path: Path) -> None:
    """A bust that could not look is not applied."""
    root = tmp_path / "root"
    root.mkdir()
    engine = Engine(FilesBackend(root), Index())
    await engine.check_ready()
    shutil.rmtree(root)
    with pytest.raises(BackendFailure, match="0 removed, 1 not removed: the root directory cannot be opened"):
        await engine.bust("a", "dimensional")
    with pytest.raises(BackendFailure):
        await engine.check_ready()


async def test_a_blocking_backend_works_in_one_thread_per_bust() -> None:
    """The event loop is never held up, and a bust of many keys is one call."""
    shelf = Shelf("t", "a", "b")
    engine = Engine(shelf, Index())
    engine.register("a", ["t"])
    engine.register("b", ["t"])
    await engine.bust("t", "dimensional")
    assert len(shelf.threads) == 3
    assert len(set(shelf.threads)) == 1
    assert threading.get_ident() not in shelf.threads


async def test_the_size_of_a_blocking_backend_is_not_measured_twice_at_once() -> None:
    """Asking again soon does not walk the cache again."""
    shelf = Shelf()
    engine = Engine(shelf, Index())
    assert await engine.size_text() == "1.2MB"
    assert await engine.size_text() == "1.2MB"
    assert shelf.measured == 1


async def test_the_size_in_memory_is_that_of_the_keys(engine: Engine, index: Index) -> None:
    """It is kept, not measured."""
    assert await engine.size_text() == f"{index.size_bytes}B"


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0B"),
        (512, "512B"),
        (999, "999B"),
        (1000, "1.0KB"),
        (1234, "1.2KB"),
        (999_949, "999.9KB"),
        (999_950, "1.0MB"),
        (1_234_567, "1.2MB"),
        (10**9, "1.0GB"),
        (10**12, "1.0TB"),
        (10**15, "1.0PB"),
    ],
)
def test_a_size_is_written_for_people(size: int, text: str) -> None:
    """Three digits and a unit, and never 1000.0 of one."""
    assert format_size(size) == text


def write(tmp_path: Path, content: object) -> Path:
    path = tmp_path / "entries.json"
    path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    return path


def test_registrations_are_read_from_a_file(tmp_path: Path) -> None:
    """Each entry of the file is registered with what it depends on."""
    index = Index()
    engine = Engine(MemoryBackend(index), index)
    assert engine.load_registrations(write(tmp_path, {"page": ["product:7"], "plain": []})) == 2
    assert index.dependents("product:7") == ["page"]
    assert "plain" in index


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ([], "expected an object of lists, found a list"),
        (7, "found a number"),
        ({"page": "product:7"}, "the key 'page': expected a list of what it depends on, found a string"),
        ({"page": {}}, "found an object"),
        ({"page": ["a", None]}, "the key 'page': number 2: expected a string, found null"),
        ({"page": [True]}, "number 1: expected a string, found a boolean"),
        ({"page": [""]}, r"number 1 \(''\) is empty"),
        ({"": []}, r"the key \(''\) is empty"),
        ({"a\nb": []}, r"has the control character U\+000A at character 1"),
        ({"x" * 9000: []}, r"x\.\.\.'\) has 9000 bytes, which is more than 8192"),
        (b'{"a": [], "a": ["b"]}', "the key 'a' is there twice"),
        (b'{"a": [', r"expected JSON: .* \(line 1, column 8\)"),
        (b'{"\xff": []}', "expected UTF-8, found the byte 0xff at 2"),
        (b"[" * 200_000, "found deeper nesting"),
        ({"/etc/passwd": []}, "the key '/etc/passwd' is an absolute path"),
    ],
)
def test_a_bad_file_of_registrations_is_refused_whole(tmp_path: Path, content: object, reason: str) -> None:
    """The error tells the file, the key, what was expected and what was found; nothing is registered."""
    index = Index()
    engine = Engine(Shelf(), index)
    path = write(tmp_path, content)
    with pytest.raises(ConfigurationError, match=reason) as caught:
        engine.load_registrations(path)
    assert str(path) in str(caught.value)
    assert caught.value.setting == "entries"
    assert len(index) == 0


def test_a_missing_file_of_registrations_is_told(tmp_path: Path) -> None:
    """A file that is not there is named."""
    index = Index()
    with pytest.raises(ConfigurationError, match=r"nothing\.json': the file cannot be read: No such file"):
        Engine(MemoryBackend(index), index).load_registrations(tmp_path / "nothing.json")


def test_the_history_keeps_the_newest_faults_with_their_nanoseconds() -> None:
    """It is bounded, oldest first, and stamped by its clock."""
    instants = iter((1, 1_000_000_002, 1_700_000_000_123_456_789))
    history = FaultHistory(2, clock=lambda: next(instants))
    for stage in (3, 4, 7):
        history.record(stage, f"fault {stage}", binding="go")
    assert [(record.fault_stage, str(record.timestamp)) for record in history.records()] == [
        (4, "1970-01-01T00:00:01.000000002Z"),
        (7, "2023-11-14T22:13:20.123456789Z"),
    ]
    assert len(history) == 2
    assert repr(history) == "FaultHistory(2 faults, 0 denials, at most 2 of each)"


def told(history: FaultHistory) -> list[tuple[str, str]]:
    return [(record.binding, record.message) for record in history.records()]


@pytest.mark.requirement("INT-14")
def test_denials_are_not_washed_out_by_other_faults() -> None:
    """They are kept apart, and told together, in the order in which they happened."""
    history = FaultHistory(2)
    history.record(3, "denied", binding="go", denial=True)
    for number in range(100):
        history.record(4, f"fault {number}")
    history.record(3, "denied too", denial=True)
    assert told(history) == [
        ("go", "denied"), ("unknown", "fault 98"), ("unknown", "fault 99"), ("unknown", "denied too"),
    ]  # fmt: skip


@pytest.mark.requirement("INT-14")
def test_equal_denials_are_one_with_a_count() -> None:
    """Since the first, at the time of the last, also if others lie between; another binding is another one."""
    instants = iter(range(1_000_000_000, 6_000_000_000, 1_000_000_000))
    history = FaultHistory(clock=lambda: next(instants))
    for message, binding in (("a", "go"), ("b", "go"), ("a", "go"), ("a", "lua"), ("a", "go")):
        history.record(3, message, binding=binding, denial=True)
    assert told(history) == [("go", "b"), ("lua", "a"), ("go", "a (3 times since 1970-01-01T00:00:01.000000000Z)")]
    assert [str(record.timestamp)[17:19] for record in history.records()] == ["02", "04", "05"]
    assert len(history) == 3


@pytest.mark.requirement("INT-14")
def test_denials_under_many_bindings_are_counted_all_the_same() -> None:
    """Who invents a binding for each makes the daemon forget bindings, and no denial."""
    instants = iter(range(1_000_000_000, 2**62, 1_000_000_000))
    history = FaultHistory(3, clock=lambda: next(instants))
    history.record(3, "mine", binding="go", denial=True)
    for number in range(40):
        history.record(3, "denied", binding=f"b{number}", denial=True)
    assert told(history) == [
        ("unknown", "mine"),
        ("unknown", "denied (39 times since 1970-01-01T00:00:02.000000000Z)"),
        ("b39", "denied"),
    ]


def test_denials_of_too_many_kinds_go_oldest_first() -> None:
    """There is a bound to them, too."""
    history = FaultHistory(2)
    for number in range(4):
        history.record(3, f"denied {number}", denial=True)
    assert told(history) == [("unknown", "denied 2"), ("unknown", "denied 3")]


def test_the_history_refuses_what_is_no_stage_and_no_limit() -> None:
    """A stage is 0 to 12, and a history of nothing is none."""
    with pytest.raises(ValueError, match="0 to 12"):
        FaultHistory().record(13, "x")
    with pytest.raises(ValueError, match="at least 1"):
        FaultHistory(0)


def test_backends_and_engine_tell_what_they_are(engine: Engine, tmp_path: Path) -> None:
    """Their repr names the backend, and both backends fit the seam."""
    backends: list[Backend] = [MemoryBackend(Index()), FilesBackend(tmp_path)]
    assert [(backend.name, backend.blocking) for backend in backends] == [("memory", False), ("files", True)]
    backends[0].check_ready()
    assert repr(engine).startswith("Engine(MemoryBackend(Index(5 entries")


def test_a_missing_extra_is_told_with_what_to_install() -> None:
    """Without sortedcontainers the import says what to do."""
    code = "import sys; sys.modules['sortedcontainers'] = None; import pybustcall.daemon"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "ImportError: the daemon needs an extra: pip install 'pybustcall[daemon]'" in done.stderr
