"""The daemon's configuration file: what it may hold, what is said of one that is wrong, and what is made of it."""

from __future__ import annotations

import re
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel

from pybustcall.daemon.backends.redis import RedisBackend
from pybustcall.daemon.configuration import (
    Configuration,
    Document,
    FilesLayer,
    Finding,
    InvalidConfiguration,
    MemoryLayer,
    RedisLayer,
    load,
    read,
)
from pybustcall.daemon.engine import Layer
from pybustcall.daemon.index import Indexes
from pybustcall.daemon.settings import DaemonSettings
from pybustcall.daemon.settings_page import EXAMPLE, settings_page
from pybustcall.errors import ConfigurationError
from pybustcall.models import Requirements

ROOT = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every test has a directory of its own."""
    monkeypatch.chdir(tmp_path)


def written(text: str) -> Configuration:
    """Load a file that says this."""
    Path("bustcall.toml").write_text(text, encoding="utf-8")
    return load("bustcall.toml")


def refused(text: str) -> list[str]:
    """Tell what is wrong with a file that says this, without the name of the file."""
    with pytest.raises(InvalidConfiguration) as caught:
        written(text)
    lines = str(caught.value).splitlines()
    assert lines == [str(finding) for finding in caught.value.findings]
    assert all(line.startswith("bustcall.toml: ") for line in lines)
    return [line.removeprefix("bustcall.toml: ") for line in lines]


def layers_of(configuration: Configuration, **environ: str) -> list[Layer]:
    """Make the layers of a configuration."""
    return configuration.layers(Indexes(), environ)


# What is made of a file


def test_an_empty_file_is_the_daemon_without_options() -> None:
    """Its settings are the defaults, and its only layer is in memory."""
    assert written("").settings({}) == Configuration().settings({}) == DaemonSettings()
    (layer,) = layers_of(written(""))
    assert (layer.name, layer.number, layer.backend.name, layer.settle) == ("memory", 0, "memory", None)


def test_every_key_becomes_the_setting_that_it_is() -> None:
    """Paths begin at the directory of the file, wherever the daemon was started."""
    here = Path("etc")
    (here / "secrets").mkdir(parents=True)
    (here / "secrets/token").write_text("s3cret\n")
    (here / "secrets/operator").write_text("0perator")
    (here / "secrets/shop").write_text("of-shop")
    (here / "bustcall.toml").write_text(EXAMPLE)
    home = here.absolute()
    assert load(here / "bustcall.toml").settings({"BUSTCALL_TOKEN": "another"}) == DaemonSettings(
        host="0.0.0.0",
        allowed_hosts=("bust.internal",),
        token="s3cret",
        operator_token="0perator",
        tenants={"shop": "of-shop"},
        access={"daemon.status": "public", "cache.hotswap": "private"},
        requires=Requirements(semverx=">=0.1", capabilities=("cache.bust",)),
        state=str(home / "state.db"),
        registry=str(home / "registry.db"),
        journal=str(home / "journal.db"),
        namespaces=("default", "shop"),
    )
    assert load(here / "bustcall.toml").register == str(home / "entries.json")


def test_every_limit_becomes_the_setting_that_it_is() -> None:
    """Whole numbers are seconds, too."""
    found = written(
        "[listen]\nsocket = 'b.sock'\n[limits]\nmax_body_bytes = 1\nmax_connections = 2\nmax_entries = 3\n"
        "read_timeout = 4\nanswer_within = 0\ndrain = 5.5\n[journal]\nretention = 6\nmost = 7\n[namespaces]\nmost = 8\n"
        "[events]\nkept = 9\nreaders = 10\nheartbeat = 11\n"
    ).settings({})
    assert found == DaemonSettings(
        socket=str(Path("b.sock").absolute()),
        max_body_bytes=1, max_connections=2, max_entries=3, read_timeout=4.0, answer_within=0.0, drain=5.5,
        journal_retention=6.0, journal_most=7, max_namespaces=8,
        events_most=9, max_readers=10, events_heartbeat=11.0,
    )  # fmt: skip


def test_options_win_over_the_file() -> None:
    """What no option says is the file's."""
    configuration = written("[listen]\nhost = 'localhost'\nport = 1\n[limits]\ndrain = 3\n")
    found = configuration.settings({}, port=2, drain=None)
    assert found == DaemonSettings(host="localhost", port=2, drain=3.0)


def test_an_option_for_an_address_stands_instead_of_the_files_socket() -> None:
    """The daemon listens at one place."""
    found = written("[listen]\nsocket = 'b.sock'\n").settings({}, port=2)
    assert (found.socket, found.host, found.port) == (None, "127.0.0.1", 2)


@pytest.mark.parametrize(
    ("table", "option", "expected"),
    [
        ("", None, "of the environment"),
        ("[access]\ntoken_file = 'token'", None, "of_the_file"),
        ("[access]\ntoken_file = 'token'", "given", "of_the_option"),
        ("[access]\ntoken_file = 'missing'", "given", "of_the_option"),
    ],
)
def test_a_token_comes_from_the_option_the_file_or_the_environment(
    table: str, option: str | None, expected: str
) -> None:
    """In this order; a file that the option stands instead of is not read."""
    Path("token").write_text("of_the_file")
    Path("given").write_text("of_the_option\n")
    environ = {"BUSTCALL_TOKEN": expected.replace(" ", "_")} if not table else {"BUSTCALL_TOKEN": "another"}
    assert written(table).settings(environ, token_file=option).token == expected.replace(" ", "_")


def test_a_token_that_is_given_itself_is_not_looked_for() -> None:
    """So that whoever starts a daemon from Python may have it from anywhere."""
    assert written("[access]\ntoken_file = 'missing'\n").settings({}, token="s3cret").token == "s3cret"


def test_a_tenants_token_that_cannot_be_read_is_told() -> None:
    """By the tenant, in the file, and never by what a token may be."""
    with pytest.raises(InvalidConfiguration) as caught:
        written('[access]\ntenants = { shop = "missing" }\n').settings({})
    assert "access.tenants: shop token file" in str(caught.value)


def test_tiers_may_be_said_with_dots() -> None:
    """TOML takes a dot for a table within a table, which is not what anybody means here."""
    quoted = written('[access]\ntiers = { "cache.bust" = "public", "daemon.status" = "public" }\n')
    dotted = written('[access.tiers]\ncache.bust = "public"\ndaemon.status = "public"\n')
    assert quoted.settings({}) == dotted.settings({})
    assert dotted.settings({}).access == {"cache.bust": "public", "daemon.status": "public"}


def test_layers_are_made_inside_out() -> None:
    """By their numbers, which are their places if none is said."""
    Path("pages").mkdir()
    layers = layers_of(
        written(
            '[[layers]]\nbackend = "files"\nroot = "pages"\nnumber = 7\nsettle = 0\n'
            '[[layers]]\nbackend = "memory"\n'
            '[[layers]]\nbackend = "redis"\nname = "shop"\nurl = "redis://127.0.0.1:1/0"\nnumber = 1\nsettle = 2\n'
        )
    )
    assert [(layer.number, layer.name, layer.backend.name, layer.settle) for layer in layers] == [
        (1, "memory", "memory", None),
        (1, "shop", "redis", 2.0),
        (7, "files", "files", 0.0),
    ]
    assert repr(layers[2].backend) == f"FilesBackend({str(Path('pages').absolute())!r})"


@pytest.mark.parametrize("key", ["url", "url_file", "url_env"])
def test_a_redis_url_is_said_or_named(key: str) -> None:
    """By a file or a variable it may have a password, which no repr shows."""
    Path("redis-url").write_text("redis://:pa55@127.0.0.1:1/0\n")
    said = {"url": "redis://127.0.0.1:1/0", "url_file": "redis-url", "url_env": "REDIS_URL"}[key]
    (layer,) = layers_of(
        written(f'[[layers]]\nbackend = "redis"\n{key} = "{said}"\nforeign = "shop:{{key}}"\n'),
        REDIS_URL="redis://:pa55@127.0.0.1:1/0",
    )
    assert isinstance(layer.backend, RedisBackend)
    assert "127.0.0.1:1" in repr(layer.backend)
    assert "pa55" not in repr(layer.backend)
    assert not layer.backend.traits.soft  # as of a server with foreign keys


CACHES = (
    "[[layers]]\nbackend = 'sqlite'\npath = {!r}\nname = 'a'\n[[layers]]\nbackend = 'sqlite'\npath = {!r}\nname = 'b'\n"
)


@pytest.mark.parametrize(
    ("text", "options", "key", "says"),
    [
        ("", {}, "layers.1.path", "the layer a (layers.0.path) and the layer b (layers.1.path)"),
        (
            "[journal]\npath = 'b.db'\n",
            {},
            "layers.1.path",
            "the journal (journal.path) and the layer b (layers.1.path)",
        ),
        ("[files]\nstate = 'b.db'\n", {}, "layers.1.path", "the state (files.state) and the layer b (layers.1.path)"),
        ("[files]\nregistry = 'b.db'\n", {}, "layers.1.path", "the registry (files.registry) and the layer b"),
        ("", {"journal": "b.db"}, "layers.1.path", "the journal and the layer b (layers.1.path)"),
        ("[journal]\npath = 'b.db.lock'\n", {}, "layers.1.path", "the journal (journal.path) and the layer b"),
    ],
)
def test_a_layer_has_a_file_of_its_own(text: str, options: dict[str, str], key: str, says: str) -> None:
    """By whatever name; both are named, by their keys where the file says them."""
    Path("link.db").symlink_to("b.db")
    layers = CACHES.format("link.db" if not text and not options else "a.db", "b.db")
    with pytest.raises(InvalidConfiguration) as caught:
        written(text + layers).settings({}, **options)
    (finding,) = caught.value.findings
    assert finding.key == key
    assert finding.text.startswith(says)
    assert finding.text.endswith(f" cannot both be kept in '{Path('b.db').absolute()}'; give each a file of its own")


def test_a_layer_may_not_lie_where_the_registry_comes_beside_the_journal() -> None:
    """Though no key says it."""
    with pytest.raises(InvalidConfiguration, match=r"layers.0.path: the registry and the layer a \(layers.0.path\)"):
        written("[journal]\npath = 'a'\n" + CACHES.format("a.registry", "b.db")).settings({})


def test_a_sqlite_layer_names_its_file() -> None:
    """Beside the configuration, unless the path is whole; it is made when it is needed."""
    (layer,) = layers_of(written('[[layers]]\nbackend = "sqlite"\npath = "cache.db"\ntimeout = 2.5\nfences = 100\n'))
    assert repr(layer.backend) == f"SqliteBackend({str(Path('cache.db').absolute())!r})"
    assert layer.backend.traits.fences
    assert not Path("cache.db").exists()
    for said in ("timeout = 61", "path = ''"):
        with pytest.raises(InvalidConfiguration, match=rf"layers\.0\.{said.partition(' ')[0]}: expected"):
            written(f'[[layers]]\nbackend = "sqlite"\n{said}\n')


def test_a_memcached_layer_names_its_server() -> None:
    """Which is not asked until it is needed; a URL that cannot be is told by its key, and not shown."""
    table = '[[layers]]\nbackend = "memcached"\nurl = "memcached://127.0.0.1:1"\nprefix = "shop"\ntimeout = 2.5\n'
    (layer,) = layers_of(written(table))
    assert repr(layer.backend) == "MemcachedBackend(memcached://127.0.0.1:1)"
    assert layer.backend.traits.soft
    for url in ("s3cret", "memcached://user:s3cret@host", "redis://s3cret"):
        with pytest.raises(InvalidConfiguration, match=r"layers\.0\.url: no URL of a memcached server") as caught:
            layers_of(written(f'[[layers]]\nbackend = "memcached"\nurl = "{url}"\n'))
        assert "s3cret" not in str(caught.value)


def test_an_option_makes_a_single_layer() -> None:
    """What is wrong with it is told without the file, which does not say it."""
    configuration = written("").with_layer(FilesLayer(backend="files", root="missing"))
    with pytest.raises(InvalidConfiguration, match=r"^the root '[^']*missing' does not exist"):
        layers_of(configuration)
    (layer,) = layers_of(written("").with_layer(MemoryLayer(backend="memory")))
    assert layer.name == "memory"


def test_an_option_and_layers_in_the_file_exclude_each_other() -> None:
    """Which of them was meant cannot be told."""
    with pytest.raises(InvalidConfiguration, match=r"^bustcall.toml: layers: .* leave --root and --backend out$"):
        written('[[layers]]\nbackend = "memory"\n').with_layer(MemoryLayer(backend="memory"))


# What is said of a file that is wrong


MEMORY = "[[layers]]\nbackend = 'memory'\n"
REDIS = "[[layers]]\nbackend = 'redis'\n"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("[listen]\nport = '8989'", 'listen.port: expected a whole number, found "8989"'),
        ("[listen]\nport = 89.5", "listen.port: expected a whole number, found 89.5"),
        ("[listen]\nport = true", "listen.port: expected a whole number, found true"),
        ("[listen]\nport = 70000", "listen.port: expected 65535 or less, found 70000"),
        ("[listen]\nport = -1", "listen.port: expected 0 or more, found -1"),
        (f"[listen]\nport = 0x{'f' * 9000}", "listen.port: expected 65535 or less, found a larger one"),
        ("[listen]\nhost = 1", "listen.host: expected a string, found 1"),
        ("[listen]\nhost = ''", 'listen.host: expected a string that is not empty, found ""'),
        (
            "[access.tenants]\n'a b' = 'secrets/a'",
            (
                'access.tenants."a b": expected 1 to 64 ASCII letters, digits, dots, dashes and underscores, no mark at'
                ' the beginning, found "a b"'
            ),
        ),
        ("[listen]\nhost = 2020-01-01", "listen.host: expected a string, found the date or time 2020-01-01"),
        ('[listen]\nsocket = "\\u0000"', 'listen.socket: expected a path without the character NUL, found "\\u0000"'),
        ("[listen]\nport = 1\nsocket = 'b'", "listen: expected either socket, or host and port; found both"),
        ("[listen]\nallowed_hosts = 'a'", 'listen.allowed_hosts: expected a list, found "a"'),
        ("[listen]\nallowed_hosts = ['a', 2]", "listen.allowed_hosts.1: expected a string, found 2"),
        ("[listen]\nhots = 'a'", "listen.hots: is no setting; did you mean host?"),
        ("[listen]\nfish = 'a'", "listen.fish: is no setting; there are host, port, socket, allowed_hosts"),
        ("listen = 3", "listen: expected a table, found 3"),
        ("listen = []", "listen: expected a table, found a list"),
        ("[access]\ntiers = { a = 'b' }", "access.tiers.a: expected 'public', 'protected' or 'private', found \"b\""),
        ("[access]\ntiers = 'open'", 'access.tiers: expected a table, found "open"'),
        ("[limits]\ndrain = inf", "limits.drain: expected a number that is finite, found inf"),
        ("[limits]\nread_timeout = 0", "limits.read_timeout: expected a number above 0, found 0"),
        ("[limits]\nread_timeout = 'a'", 'limits.read_timeout: expected a number, found "a"'),
        (f"[limits]\ndrain = '{'a' * 90}'", f'limits.drain: expected a number, found "{"a" * 59}...'),
        ("[limits]\nmax_namespaces = 3", "limits.max_namespaces: is no setting here; did you mean namespaces.most?"),
        ("port = 1", "port: is no setting here; did you mean listen.port?"),
        ("layrs = 1", "layrs: is no setting; did you mean layers?"),
        ("[files]\nregister = 1", "files.register: expected a string, found 1"),
        ("[files]\njournal = 'a'", "files.journal: is no setting here; did you mean journal.path?"),
        ("[layers]\na = 1", "layers: expected a list of tables, each [[layers]]; found one table, [layers]"),
        ("layers = ['memory']", 'layers.0: expected a table, found "memory"'),
        (f"{MEMORY}numbr = 1", "layers.0.numbr: is no setting; did you mean number?"),
        (f"{MEMORY}settle = 4000", "layers.0.settle: expected 3600 or less, found 4000"),
        (
            "[[layers]]\nbackend = 'varnish'",
            "layers.0.backend: expected 'memory', 'files', 'redis', 'sqlite', 'memcached', found \"varnish\"",
        ),
        ("[[layers]]\nbackend = 'files'\nroot = 7", "layers.0.root: expected a string, found 7"),
        ("[[layers]]\nbackend = 'files'", "layers.0.root: is missing"),
        (REDIS, "layers.0: expected one of url, url_file and url_env; found none"),
        (
            f"{REDIS}url = 'redis://a'\nurl_env = 'A'",
            "layers.0: expected one of url, url_file and url_env; found url and url_env",
        ),
        (
            f"{MEMORY}root = 'a'",
            "layers.0.root: is no setting of this kind of layer, but of files; there are name, number, settle, backend",
        ),
        (f"{MEMORY}fish = 'a'", "layers.0.fish: is no setting; there are name, number, settle, backend"),
        (
            f"{MEMORY}name = 'A'",
            'layers.0.name: expected 1 to 64 of a to z, 0 to 9, dot, dash and underscore, found "A"',
        ),
        (
            "[[layers]]\nname = 'a'",
            (
                "layers.0.backend: is missing; it says which kind of cache this is: memory, files, redis, sqlite or"
                " memcached"
            ),
        ),
        ("a = \n", "line 1, column 5: Invalid value"),
        ("[a]\nb = 1\nb = 2\n", "line 3, column 6: Cannot overwrite a value"),
        ("a = 'x", 'end of document: Expected "\'"'),
    ],
)
def test_what_is_wrong_is_told_with_its_place(text: str, says: str) -> None:
    """The file, the key or the line, what was expected, and what was found."""
    assert refused(text) == [says]


def test_a_namespace_that_cannot_be_one_is_told() -> None:
    """By its place in the list."""
    (told,) = refused("[namespaces]\nallowed = ['a', '-a']")
    assert told.startswith("namespaces.allowed.1: expected 1 to 64 ASCII letters, digits, dots, dashes and underscores")
    assert told.endswith(', found "-a"')


def test_all_that_is_wrong_is_told_at_once() -> None:
    """Whoever mends a file need not run the daemon once for each mistake."""
    assert refused("[listen]\nport = 'a'\n[limits]\ndrain = -1\n[[layers]]\nbackend = 'files'\n") == [
        'listen.port: expected a whole number, found "a"',
        "limits.drain: expected 0 or more, found -1",
        "layers.0.root: is missing",
    ]


def test_each_layer_has_a_name_of_its_own() -> None:
    """By which answers tell them apart."""
    two = '[[layers]]\nbackend = "memory"\n[[layers]]\nbackend = "memory"\n'
    assert refused(two) == [
        'layers.0.name: is needed, since another layer would be called "memory", too',
        'layers.1.name: is needed, since another layer would be called "memory", too',
    ]
    assert refused(two.replace('"memory"', '"memory"\nname = "a"')) == [
        'layers.1.name: expected another name, found "a" a second time'
    ]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("token = 's3cret'", "access.token_file, or set BUSTCALL_TOKEN"),
        ("[access]\ntoken = 's3cret'", "access.token_file, or set BUSTCALL_TOKEN"),
        ("[listen]\noperator_token = ['s3cret']", "access.operator_token_file, or set BUSTCALL_OPERATOR_TOKEN"),
        ("[[layers]]\nbackend = 'redis'\nurl = 'redis://:s3cret@a'", "url_file or url_env"),
        ("[[layers]]\nbackend = 'redis'\nurl = 'redis://a?password=s3cret'", "url_file or url_env"),
        ("[[layers]]\nbackend = 'redis'\nurl = 's3cret'", "a URL that begins with redis://"),
        ("[[layers]]\nbackend = 'redis'\nurl = 'redis://[s3cret'", "a URL such as redis://"),
        ("[[layers]]\nbackend = 'redis'\nurl = ['s3cret']", "expected a string"),
        ("[[layers]]\nbackend = 'redis'\nurl_file = 'redis://:s3cret@a'", "the path of a file"),
        ("[[layers]]\nbackend = 'redis'\nurl_env = 'redis://:s3cret@a'", "the name of a variable"),
        ("[[layers]]\nbackend = 'redis'\nurl_file = 5", "layers.0.url_file: expected a string"),
        ("[[layers]]\nbackend = 'redis'\nurl_env = 'A'\npassword = 's3cret'", "url_file or url_env"),
    ],
)
def test_a_secret_in_the_file_is_refused_and_not_repeated(text: str, says: str) -> None:
    """The error says where to keep it instead."""
    (told,) = refused(text)
    assert says in told
    assert "s3cret" not in told


def test_a_file_that_cannot_be_read_is_told() -> None:
    """One that is missing, one that is a directory, one that is no UTF-8, one that is no TOML of a bearable kind."""
    with pytest.raises(InvalidConfiguration, match=r"^missing.toml: cannot be read \(No such file or directory\)$"):
        load("missing.toml")
    with pytest.raises(InvalidConfiguration, match=r"^\.: cannot be read \(Is a directory\)$"):
        load(".")
    for content, says in [
        (b"a = '\xff'", "expected UTF-8, found the byte 0xff at 5"),
        (b"a = " + b"[" * 100_000, "is nested too deeply"),
        (b"a = " + b"1" * 9000, "is no TOML: Exceeds the limit"),
    ]:
        Path("bustcall.toml").write_bytes(content)
        with pytest.raises(InvalidConfiguration, match=rf"^bustcall.toml: {re.escape(says)}"):
            load("bustcall.toml")


def test_a_finding_does_not_steer_the_terminal() -> None:
    """A key may be made of any characters."""
    assert refused('"\\u001b[31m" = 1')[0].startswith('"\\u001b[31m": is no setting; there are listen,')
    assert refused('"\\u009b31m" = 1')[0].startswith('"?31m": is no setting; there are listen,')


@given(
    st.recursive(
        st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.datetimes(),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
        max_leaves=6,
    ),
    st.sampled_from([*Document.model_fields, "listen.port", "access.tiers", "requires.capabilities", "layers.0.root"]),
)
def test_whatever_the_file_says_there_is_an_answer(value: Any, place: str) -> None:
    """Either it can be used, or what is wrong is told, key by key."""
    document: Any = value
    for name in reversed(place.split(".")):
        document = [{"backend": "files", **document}] if name == "0" else {name: document}

    def parsed(_text: str) -> Any:
        return document

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tomllib, "loads", parsed)
        Path("bustcall.toml").touch()
        found = read("bustcall.toml")
    table = place.partition(".")[0]
    assert all(finding.key.startswith(table) for finding in found.findings)
    assert all(key.startswith(table) for key in found.left_out)
    assert bool(found.findings) == bool(found.left_out)


def test_what_is_wrong_is_left_out_and_the_rest_can_be_used_to_check() -> None:
    """But not to serve."""
    Path("bustcall.toml").write_text(
        "[limits]\ndrain = -1\nmax_entries = 3\n"
        "[[layers]]\nbackend = 'files'\n[[layers]]\nbackend = 'memory'\nname = 'm'\nnumber = 'x'\n"
    )
    found = read("bustcall.toml")
    assert found.left_out == {"limits.drain", "layers.0", "layers.1.number"}
    assert found.draft({})[0] == DaemonSettings(max_entries=3)
    assert [(key, layer.number) for key, layer in found.draft_layers(Indexes(), {})[0].items()] == [("layers.1", 1)]
    with pytest.raises(InvalidConfiguration, match=r"limits\.drain"):
        found.settings({})
    with pytest.raises(InvalidConfiguration, match=r"layers\.0\.root"):
        found.layers(Indexes(), {})
    with pytest.raises(InvalidConfiguration, match="leave --root and --backend out"):
        found.with_layer(MemoryLayer(backend="memory"))


# What the settings are when taken together


def test_all_that_is_wrong_with_the_settings_is_told_at_their_keys() -> None:
    """Each once, though the daemon's own check ends at the first."""
    configuration = written(
        "[listen]\nhost = '0.0.0.0'\nallowed_hosts = ['a b']\n[access]\ntiers = { tea = 'public' }\n"
        "[requires]\nsemverx = 'new'\n[files]\nstate = 'a'\nregistry = 'b/../a'\n"
    )
    with pytest.raises(InvalidConfiguration) as caught:
        configuration.settings({"BUSTCALL_TOKEN": "two words"})
    assert [finding.key for finding in caught.value.findings] == [
        "access.token_file", "access.tiers", "requires", "listen.allowed_hosts", "files.registry"
    ]  # fmt: skip
    assert "two words" not in str(caught.value)


def test_what_an_option_said_is_told_without_the_file() -> None:
    """Since the file is not where it can be mended."""
    with pytest.raises(InvalidConfiguration) as caught:
        written("").settings({}, max_connections=0, token_file="missing")
    assert [(finding.file, finding.key) for finding in caught.value.findings] == [("", ""), ("", "")]
    assert str(caught.value).startswith("token file missing: cannot be read (No such file or directory)\nthe most conn")


def test_a_token_that_cannot_be_read_is_all_that_is_wrong() -> None:
    """And not that there is none."""
    with pytest.raises(InvalidConfiguration) as caught:
        written("[listen]\nhost = '0.0.0.0'\n[access]\ntoken_file = 'token'\noperator_token_file = 'o'\n").settings({})
    assert [finding.key for finding in caught.value.findings] == ["access.token_file", "access.operator_token_file"]
    assert caught.value.setting == "access.token_file"


@pytest.mark.parametrize(("content", "says"), [(b" \n", "is empty"), (b"\xff", "holds more than visible ASCII")])
def test_a_token_file_without_a_token_is_told(content: bytes, says: str) -> None:
    """Without its content."""
    Path("token").write_bytes(content)
    with pytest.raises(InvalidConfiguration, match=rf"^bustcall.toml: access.token_file: token file .*token: {says}$"):
        written("[access]\ntoken_file = 'token'\n").settings({})


def test_a_setting_that_is_refused_by_another_name_ends_the_check(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is not a setting cannot be set back; it is told, and nothing loops."""

    def refuse(_settings: DaemonSettings) -> None:
        raise ConfigurationError("no", setting="weather")

    monkeypatch.setattr("pybustcall.daemon.configuration.check_settings", refuse)
    with pytest.raises(InvalidConfiguration, match=r"^bustcall.toml: weather: no$"):
        written("").settings({})


def test_all_that_is_wrong_with_the_layers_is_told() -> None:
    """At the key that says it."""
    Path("redis-url").write_text("http://:pa55@127.0.0.1:1/0")
    configuration = written(
        '[[layers]]\nname = "a"\nbackend = "files"\nroot = "missing"\n'
        '[[layers]]\nname = "b"\nbackend = "redis"\nurl_env = "REDIS_URL"\n'
        '[[layers]]\nname = "c"\nbackend = "redis"\nurl_file = "redis-url"\n'
        '[[layers]]\nname = "d"\nbackend = "redis"\nurl = "redis://127.0.0.1:1/0"\nprefix = "{"\n'
        '[[layers]]\nname = "e"\nbackend = "redis"\nurl_file = "missing"\n'
    )
    with pytest.raises(InvalidConfiguration) as caught:
        layers_of(configuration)
    assert [(finding.file, finding.key) for finding in caught.value.findings] == [
        ("bustcall.toml", key)
        for key in ("layers.0.root", "layers.1.url_env", "layers.2.url_file", "layers.3.prefix", "layers.4.url_file")
    ]
    assert caught.value.findings[1].text == "the variable REDIS_URL is not set"
    assert "pa55" not in str(caught.value)


def test_without_the_extra_a_redis_layer_is_told_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """And layers of other kinds do without."""
    for name in [name for name in sys.modules if name.partition(".")[0] == "redis"]:
        monkeypatch.setitem(sys.modules, name, None)
    for name in ("pybustcall.daemon.backends.redis", "pybustcall.redis_connection"):
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(InvalidConfiguration) as caught:
        layers_of(written('[[layers]]\nbackend = "redis"\nurl = "redis://127.0.0.1/0"\n'))
    assert str(caught.value).startswith("bustcall.toml: layers.0.backend: ")
    assert str(caught.value).endswith("pip install 'pybustcall[redis]'")
    assert layers_of(written('[[layers]]\nbackend = "memory"\n'))


def test_a_finding_leaves_out_what_it_has_not() -> None:
    """No file, no key."""
    assert str(Finding("", "", "text")) == "text"
    assert str(Finding("a.toml", "", "text")) == "a.toml: text"


# The page


def keys_of(model: type[BaseModel]) -> Iterator[str]:
    """List the keys of a table."""
    return (field.alias or name for name, field in model.model_fields.items())


def test_the_page_is_that_of_the_model() -> None:
    """`make settings` writes it anew."""
    assert (ROOT / "docs/reference/daemon-settings.md").read_text(encoding="utf-8") == settings_page()


def test_every_key_has_a_description() -> None:
    """So that the page says what each is for."""
    models: list[type[BaseModel]] = [MemoryLayer, FilesLayer, RedisLayer]
    models += [type(getattr(Document(), name)) for name in Document.model_fields if name != "layers"]
    for model in models:
        assert all(field.description for field in model.model_fields.values()), model


def test_the_example_on_the_page_is_a_sound_configuration() -> None:
    """As it stands there."""
    page = (ROOT / "docs/reference/daemon-settings.md").read_text(encoding="utf-8")
    (example,) = re.findall(r"```toml\n(.*?)```", page, re.DOTALL)
    Path("secrets").mkdir()
    Path("pages").mkdir()
    Path("secrets/token").write_text("s3cret")
    Path("secrets/operator").write_text("another")
    Path("secrets/shop").write_text("a-third")
    configuration = written(example)
    configuration.settings({})
    layers = layers_of(configuration, REDIS_URL="redis://:pa55@127.0.0.1:1/0")
    assert [layer.name for layer in layers] == ["redis", "pages"]


def test_the_example_has_every_key() -> None:
    """Those that exclude one another in comments."""
    shown = re.sub(r"^# (?=[a-z_]+ = )", "", EXAMPLE, flags=re.MULTILINE)
    parsed = tomllib.loads(shown)
    for name in Document.model_fields:
        if name != "layers":
            assert set(parsed[name]) == set(keys_of(type(getattr(Document(), name)))), name
    redis, files = parsed["layers"]
    assert set(redis) | {"settle"} == set(keys_of(RedisLayer))
    assert set(files) == set(keys_of(FilesLayer))
