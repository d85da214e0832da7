"""The package itself: what it is built of, what an import costs, what a wheel holds, which floors stand on which."""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import os
import pkgutil
import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import pybustcall
from pybustcall.capabilities import advertisement, semverx_of
from tests.conftest import StartDaemon

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
LONG = 240.0
"""Seconds for what may have to ask a package index."""


def run(*command: str, cwd: Path = ROOT, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """Run a command to its end; tell what it printed if it fails."""
    return subprocess.run(
        command, cwd=cwd, env={**os.environ, **(env or {})}, capture_output=True, text=True, timeout=LONG, check=False
    )


@pytest.mark.requirement("RES-01")
@pytest.mark.requirement("IMP-08")
def test_the_floors_hold() -> None:
    """Imports go downward; no module of the client imports the daemon; the vocabulary is pure."""
    done = run(str(Path(sys.executable).parent / "lint-imports"), "--no-cache")
    assert done.returncode == 0, done.stdout
    assert re.search(r"Contracts: 4 kept, 0 broken", done.stdout)


@pytest.mark.requirement("RES-01")
def test_the_delegate_pattern_is_specified() -> None:
    """The page states it, and names the contract that holds it."""
    page = (ROOT / "docs/explanation/delegation.md").read_text(encoding="utf-8")
    contracts = [contract["name"] for contract in PROJECT["tool"]["importlinter"]["contracts"]]
    assert "Delegate pattern: the client holds no cache logic" in contracts
    assert "lint-imports" in page
    assert "holds no cache logic" in page


def test_an_import_loads_nothing_that_was_not_asked_for() -> None:
    """No web framework, no daemon, no command line, no test library, no client of Redis."""
    unwanted = ["aiohttp.web", "click", "redis", "sortedcontainers"]
    unwanted += ["pybustcall.daemon", "pybustcall.cli", "pybustcall.testing"]
    code = f"import sys, pybustcall; print([name for name in {unwanted!r} if name in sys.modules])"
    assert run(sys.executable, "-c", code).stdout.strip() == "[]"


def test_the_core_depends_on_four_packages() -> None:
    """aiohttp, pydantic, backoff, packaging, and nothing else."""
    names = [Requirement(text).name for text in PROJECT["project"]["dependencies"]]
    assert names == ["aiohttp", "pydantic", "backoff", "packaging"]
    assert set(PROJECT["project"]["optional-dependencies"]) == {"cli", "daemon", "redis"}


def test_every_module_says_what_it_offers() -> None:
    """__all__ everywhere, of names that exist; a docstring that tells what the module decides."""
    for info in pkgutil.walk_packages(pybustcall.__path__, "pybustcall."):
        module = importlib.import_module(info.name)
        assert module.__doc__, info.name
        missing = [name for name in module.__all__ if not hasattr(module, name)]
        assert missing == [], info.name


def test_the_version_is_the_same_everywhere() -> None:
    """pyproject.toml, the package, capabilities.json, CHANGELOG.md."""
    version = PROJECT["project"]["version"]
    assert pybustcall.__version__ == version == importlib.metadata.version("pybustcall") == "0.1.0a1"
    document = advertisement()
    assert document.version == version
    assert document.semverx == semverx_of(version) == pybustcall.SEMVERX
    assert re.search(
        rf"^## \[{re.escape(version)}\]", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE
    )


@pytest.mark.parametrize(
    ("version", "semverx"),
    [
        ("1.2.3", "1.stable.2.stable.3.stable"),
        ("2.0rc1", "2.experimental.0.experimental.0.experimental"),
        ("1.2.dev3", "1.experimental.2.experimental.0.experimental"),
    ],
)
def test_versions_are_written_as_semverx(version: str, semverx: str) -> None:
    """A pre-release is experimental in all its parts."""
    assert semverx_of(version) == semverx


def test_the_advertisement_is_the_file_at_the_root() -> None:
    """One source, read from a checkout as it is."""
    assert json.loads((ROOT / "capabilities.json").read_text(encoding="utf-8"))["binding"] == advertisement().binding


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built of an sdist as an index would have it."""
    out = tmp_path_factory.mktemp("dist")
    hatch = str(Path(sys.executable).parent / "hatchling")
    done = run(hatch, "build", "-t", "sdist", "-d", str(out))
    assert done.returncode == 0, done.stderr
    sdist = next(out.glob("*.tar.gz"))
    done = run("tar", "xzf", str(sdist), "-C", str(out))
    assert done.returncode == 0, done.stderr
    done = run(hatch, "build", "-t", "wheel", "-d", str(out), cwd=out / sdist.name.removesuffix(".tar.gz"))
    assert done.returncode == 0, done.stderr
    return next(out.glob("*.whl"))


def test_the_wheel_holds_what_it_should(wheel: Path) -> None:
    """py.typed, the licence, the same capabilities.json; neither tests nor examples."""
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        assert archive.read("pybustcall/capabilities.json") == (ROOT / "capabilities.json").read_bytes()
    assert "pybustcall/py.typed" in names
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert {name.split("/")[0] for name in names} == {"pybustcall", "pybustcall-0.1.0a1.dist-info"}


@pytest.mark.requirement("REL-01")
def test_the_wheel_installs_into_an_empty_environment_and_busts(
    wheel: Path, tmp_path: Path, start_daemon: StartDaemon
) -> None:
    """Pip install with nothing else there: the quickstart runs, and the command line tells what it lacks."""
    python = tmp_path / "venv/bin/python"
    assert run(sys.executable, "-m", "venv", str(tmp_path / "venv")).returncode == 0
    constraints = tmp_path / "constraints.txt"
    lock = (ROOT / ".ci/requirements-dev.txt").read_text(encoding="utf-8")
    constraints.write_text("\n".join(re.findall(r"^[a-z0-9._-]+==[^ \\;]+", lock, re.MULTILINE)))
    done = run(
        str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--only-binary", ":all:",
        "--constraint", str(constraints), str(wheel),
    )  # fmt: skip
    if done.returncode and "CI" not in os.environ:
        pytest.skip(f"the package index cannot be asked: {done.stderr.strip()[-200:]}")
    assert done.returncode == 0, done.stderr
    daemon = start_daemon()
    (daemon.root / "page.html").write_text("old")
    clean = {"PYTHONPATH": "", "BUSTCALL_URL": daemon.url}
    done = run(str(python), str(ROOT / "examples/quickstart.py"), "page.html", cwd=tmp_path, env=clean)
    assert done.returncode == 0, done.stderr
    assert not (daemon.root / "page.html").exists()
    done = run(str(tmp_path / "venv/bin/pybustcall"), "status", cwd=tmp_path, env=clean)
    assert done.returncode == 1
    assert "pip install 'pybustcall[cli]'" in done.stderr
    code = "from pybustcall import advertisement; print(advertisement().version)"
    assert run(str(python), "-c", code, cwd=tmp_path, env=clean).stdout.strip() == "0.1.0a1"


@pytest.mark.requirement("RES-11")
@pytest.mark.requirement("IMP-05")
def test_the_test_command_measures_branches_and_fails_below_95_percent() -> None:
    """The gate stands in the settings, and the README's test command uses it and prints the figure."""
    coverage = PROJECT["tool"]["coverage"]
    assert coverage["run"]["branch"] is True
    assert coverage["report"]["fail_under"] >= 95
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert "pytest --cov --cov-report=term" in makefile
    assert re.search(r"^test: .*pytest$", makefile, re.MULTILINE)


def test_every_requirement_mark_names_a_statement_that_exists() -> None:
    """And every one that this version claims to show has a mark."""
    marks = [
        mark
        for path in (ROOT / "tests").glob("test_*.py")
        for mark in re.findall(r'mark\.requirement\("([^"]*)"\)', path.read_text(encoding="utf-8"))
    ]
    assert marks
    statements = {"RES": 12, "IMP": 14, "INT": 15, "REL": 6}
    known = {f"{gate}-{number:02}" for gate, most in statements.items() for number in range(1, most + 1)}
    assert set(marks) <= known
    shown = {"RES-01", "RES-02", "RES-05", "RES-08", "RES-10", "RES-11", "RES-12"}
    shown |= {"IMP-01", "IMP-02", "IMP-05", "IMP-08", "REL-01"}
    shown |= {"RES-03", "IMP-03", "IMP-04", "IMP-06", "IMP-09", "IMP-11", "INT-03", "INT-06"}
    shown |= {"RES-04", "RES-09", "IMP-07", "IMP-10", "IMP-12", "IMP-13", "INT-01", "INT-02", "INT-04", "INT-14"}
    assert shown <= set(marks)


def test_users_code_type_checks(tmp_path: Path) -> None:
    """tests/typing/api.py is what users write; mypy strict takes it."""
    done = run(sys.executable, "-m", "mypy", "--strict", "--cache-dir", str(tmp_path), "tests/typing/api.py")
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("module", ["pybustcall", "pybustcall.testing", "pybustcall.errors"])
def test_every_public_name_is_in_the_reference(module: str) -> None:
    """docs/reference/api.md tells of each."""
    page = (ROOT / "docs/reference/api.md").read_text(encoding="utf-8")
    names = set(importlib.import_module(module).__all__) - {"Applied"}
    assert {name for name in names if not re.search(rf"\b{re.escape(name)}\b", page)} == set()
