"""Settings from the environment and from TOML: what is read, and how precisely what is wrong is told."""

from __future__ import annotations

from pathlib import Path

import pytest

from pybustcall import BustcallClient
from pybustcall.config import ENVIRONMENT, Settings, settings_from_env, settings_from_toml
from pybustcall.errors import ConfigurationError
from pybustcall.policies import Pool, Retry

FULL = """
[pybustcall]
url = "https://hub.example"
peers = ["https://peer.example"]
token = "s3cret"
timeout = 3
fault_tolerance = 3
trust_env = false

[pybustcall.retry]
attempts = 2
base = 1

[pybustcall.pool]
per_daemon = 5

[pybustcall.failback]
hold = 5

[pybustcall.requires]
semverx = "^1.0.0"
capabilities = ["cache.bust.tag"]

[pybustcall.outbox]
path = "outbox.db"
rows = 10

[pybustcall.tls]
key_password = "hush"
"""


def test_the_environment_sets_every_setting_it_names() -> None:
    """Each variable reaches the setting that bears its name."""
    settings = settings_from_env(
        {
            "BUSTCALL_URL": "http://a:1",
            "BUSTCALL_PEERS": "http://b:1, http://c:1 http://d:1",
            "BUSTCALL_TOKEN": "t",
            "BUSTCALL_TIMEOUT": "2.5",
            "BUSTCALL_FAULT_TOLERANCE": "3",
            "BUSTCALL_RETRY_ATTEMPTS": "1",
            "BUSTCALL_TLS_CA": "ca.pem",
            "BUSTCALL_TLS_CERT": "cert.pem",
            "BUSTCALL_TLS_KEY": "key.pem",
            "BUSTCALL_TLS_KEY_PASSWORD": "hush",
            "BUSTCALL_MAX_REPLY_BYTES": "2048",
            "BUSTCALL_TRUST_ENV": "yes",
            "BUSTCALL_ALLOW_INSECURE_TOKEN": "1",
            "BUSTCALL_REVEAL_TARGETS": "true",
            "BUSTCALL_DISABLED": "off",
            "BUSTCALL_DELIVERY": "quorum",
            "BUSTCALL_OUTBOX": "outbox.db",
            "BUSTCALL_PROBES": "off",
            "BUSTCALL_CLIENT_ID": "web-1",
            "BUSTCALL_REQUIRES_SEMVERX": ">=0.1",
            "BUSTCALL_REQUIRES_CAPABILITIES": "cache.bust.tag, cache.bust.prefix",
            "PATH": "/bin",
        }
    )
    assert settings.peers == ("http://b:1", "http://c:1", "http://d:1")
    assert settings.token is not None
    assert settings.token.get_secret_value() == "t"
    assert settings.retry == Retry(attempts=1)
    assert (settings.timeout, settings.fault_tolerance, settings.max_reply_bytes) == (2.5, 3, 2048)
    assert settings.tls is not None
    assert (settings.tls.ca, settings.tls.cert, settings.tls.key) == ("ca.pem", "cert.pem", "key.pem")
    assert settings.requires is not None
    assert settings.requires.semverx == ">=0.1"
    assert settings.requires.capabilities == ("cache.bust.tag", "cache.bust.prefix")
    assert settings.trust_env
    assert settings.allow_insecure_token
    assert settings.reveal_targets
    assert not settings.disabled
    assert (settings.delivery, settings.outbox, settings.probes, settings.client_id) == (
        "quorum",
        "outbox.db",
        None,
        "web-1",
    )


def test_every_variable_has_a_setting() -> None:
    """The table names no setting that is not there."""
    for place in ENVIRONMENT.values():
        assert place[0] in Settings.model_fields


def test_an_empty_environment_gives_the_defaults() -> None:
    """Empty variables are unset ones."""
    assert settings_from_env({"BUSTCALL_URL": " ", "BUSTCALL_PEERS": ""}) == Settings()


def test_variables_of_others_are_left_alone() -> None:
    """Kubernetes makes these of a service named bustcall."""
    kubernetes = {"BUSTCALL_PORT": "tcp://10.0.0.1:8989", "BUSTCALL_SERVICE_HOST": "10.0.0.1"}
    assert settings_from_env(kubernetes) == Settings()


@pytest.mark.parametrize(
    ("variable", "value", "why"),
    [
        ("BUSTCALL_TIMEOUT", "soon", "BUSTCALL_TIMEOUT: expected a valid number.*found 'soon'"),
        ("BUSTCALL_TIMOUT", "3", "BUSTCALL_TIMOUT is no setting; did you mean BUSTCALL_TIMEOUT"),
        ("BUSTCALL_FAULT_TOLERANCE", "6.5", "BUSTCALL_FAULT_TOLERANCE: expected a valid integer"),
        ("BUSTCALL_DISABLED", "perhaps", "BUSTCALL_DISABLED: expected a valid boolean"),
        ("BUSTCALL_RETRY_ATTEMPTS", "0", "BUSTCALL_RETRY_ATTEMPTS: retry.attempts must be an integer of at least 1"),
        ("BUSTCALL_REQUIRES_SEMVERX", ">>1", "BUSTCALL_REQUIRES_SEMVERX: range '>>1' "),
    ],
)
def test_a_bad_variable_is_named_with_what_was_expected_and_found(variable: str, value: str, why: str) -> None:
    """Which variable, what was expected, what was found."""
    with pytest.raises(ConfigurationError, match=why):
        settings_from_env({variable: value})


def write(tmp_path: Path, text: str) -> Path:
    """Write a settings file."""
    path = tmp_path / "settings.toml"
    path.write_text(text, encoding="utf-8")
    return path


def test_a_toml_table_sets_everything(tmp_path: Path) -> None:
    """Whole numbers are seconds too, and tables become policies."""
    settings = settings_from_toml(write(tmp_path, FULL))
    assert settings.timeout == 3.0
    assert settings.retry == Retry(attempts=2, base=1.0)
    assert settings.pool == Pool(per_daemon=5)
    assert settings.requires is not None
    assert (settings.requires.semverx, settings.requires.capabilities) == ("^1.0.0", ("cache.bust.tag",))
    assert settings.tls is not None


def test_secrets_do_not_show_in_a_repr(tmp_path: Path) -> None:
    """Neither the token nor the key's password."""
    shown = repr(settings_from_toml(write(tmp_path, FULL)))
    assert "s3cret" not in shown
    assert "hush" not in shown


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("[pybustcall]\ntimeout = '3'", r"settings.toml: pybustcall.timeout: expected a valid number, found '3'"),
        ("[pybustcall]\nfault_tolerance = true", r"pybustcall.fault_tolerance: expected a valid integer, found True"),
        ("[pybustcall]\ntimeot = 3", r"pybustcall.timeot is no setting"),
        ("[pybustcall]\npeers = 'http://b'", r"pybustcall.peers: expected a list, found 'http://b'"),
        ("[pybustcall]\ntoken = 3", r"pybustcall.token: expected a valid string$"),
        ("[pybustcall.retry]\ntimes = 3", r"pybustcall.retry.times is no setting"),
        ("[pybustcall.pool]\nwait = true", r"pybustcall.pool.wait: expected a valid number, found True"),
        ("[pybustcall.pool]\nwait = -1", r"pybustcall.pool: pool.wait must be above 0"),
        ("[other]", r"settings.toml: has no table \[pybustcall\]"),
        ("pybustcall = 3", r"has no table \[pybustcall\]"),
        ("[", r"settings.toml: is not TOML"),
    ],
)
def test_a_bad_file_is_told_by_file_key_expected_and_found(tmp_path: Path, text: str, why: str) -> None:
    """File, key, what was expected, what was found; a secret is never repeated."""
    with pytest.raises(ConfigurationError, match=why):
        settings_from_toml(write(tmp_path, text))


def test_a_missing_file_is_told(tmp_path: Path) -> None:
    """And so is one that is not text."""
    with pytest.raises(ConfigurationError, match=r"missing.toml: cannot be read"):
        settings_from_toml(tmp_path / "missing.toml")
    binary = tmp_path / "binary.toml"
    binary.write_bytes(b"\xff")
    with pytest.raises(ConfigurationError, match="is not TOML"):
        settings_from_toml(binary)


def test_a_client_is_made_of_a_file(tmp_path: Path) -> None:
    """Also of a table inside pyproject.toml."""
    client = BustcallClient.from_toml(write(tmp_path, FULL.replace("pybustcall", "tool.pybustcall")), "tool.pybustcall")
    assert client.daemons == ("https://hub.example", "https://peer.example")
    assert client.fault_tolerance == 3


def test_a_client_is_made_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the process's own, when none is given."""
    monkeypatch.setenv("BUSTCALL_URL", "http://127.0.0.1:7777")
    assert BustcallClient.from_env().daemons == ("http://127.0.0.1:7777",)


async def test_the_environment_can_switch_a_client_off() -> None:
    """BUSTCALL_DISABLED=1 makes a client that does nothing and says so."""
    result = await BustcallClient.from_env({"BUSTCALL_DISABLED": "1"}).bust("a")
    assert result.status == "disabled"
