"""Addresses of daemons: normal form, what is refused, and that each daemon is named once."""

from __future__ import annotations

import pytest

from pybustcall.errors import ConfigurationError
from pybustcall.topology import DaemonAddress, Topology


@pytest.mark.parametrize(
    ("url", "normal"),
    [
        ("http://127.0.0.1:8989", "http://127.0.0.1:8989"),
        ("HTTP://LocalHost:80/", "http://localhost"),
        ("https://Cache.Example:443", "https://cache.example"),
        ("https://cache.example:8443/bust/", "https://cache.example:8443/bust"),
        ("http://[::1]:8989", "http://[::1]:8989"),
        ("unix:///run/bustcall.sock", "unix:///run/bustcall.sock"),
    ],
)
def test_an_address_is_kept_in_normal_form(url: str, normal: str) -> None:
    """Lower-case host, no default port, no slash at the end."""
    assert DaemonAddress.parse(url).url == normal
    assert str(DaemonAddress.parse(normal)) == normal


@pytest.mark.parametrize(
    ("url", "why"),
    [
        ("", "is empty"),
        ("127.0.0.1:8989", "must begin with http://"),
        ("localhost", "must begin with"),
        ("ftp://host", "must begin with"),
        ("http://", "names no host"),
        ("http:///path", "names no host"),
        ("http://host:port", "is not a URL"),
        ("http://host:99999", "is not a URL"),
        ("http://host:0", "has port 0"),
        ("http://[::1", "is not a URL"),
        ("http://ho st", "characters that no URL has"),
        ("http://hôst", "characters that no URL has"),
        ("http://ho$t", "neither a name nor an IP address"),
        ("http://-host", "neither a name nor an IP address"),
        ("http://host?x=1", "has a query or a fragment"),
        ("http://host/#x", "has a query or a fragment"),
        ("http://host?", "has a query or a fragment"),
        ("http://me:secret@host", "holds credentials"),
        ("unix://run/bustcall.sock", "must be written unix:///"),
        ("unix:relative.sock", "must be written unix:///"),
        ("unix:///", "must be written unix:///"),
        ("unix:///" + "x" * 120, "longer than 107 bytes"),
        (None, "must be a string, not NoneType"),
        (8989, "must be a string, not int"),
    ],
)
def test_what_is_no_address_gets_a_precise_error(url: object, why: str) -> None:
    """The error says which setting, what was found and why; credentials are not repeated."""
    with pytest.raises(ConfigurationError, match=why) as caught:
        DaemonAddress.parse(url)
    assert caught.value.setting == "url"
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    ("url", "local", "encrypted"),
    [
        ("http://localhost:1", True, False),
        ("http://127.8.9.1", True, False),
        ("http://[::1]", True, False),
        ("unix:///s.sock", True, False),
        ("https://10.0.0.1", False, True),
        ("http://10.0.0.1", False, False),
        ("http://localhost.evil.example", False, False),
    ],
)
def test_an_address_knows_whether_the_way_there_is_safe(url: str, local: bool, encrypted: bool) -> None:
    """Loopback and sockets stay on this machine; https is encrypted."""
    address = DaemonAddress.parse(url)
    assert (address.is_local, address.is_encrypted) == (local, encrypted)


def test_a_socket_has_a_base_for_its_routes() -> None:
    """Requests over a Unix socket need a URL all the same."""
    address = DaemonAddress.parse("unix:///run/b.sock")
    assert (address.base, address.socket_path) == ("http://localhost", "/run/b.sock")


def test_the_hub_is_asked_first_and_the_peers_in_order() -> None:
    """Star, then ring."""
    topology = Topology.parse("http://a", ["http://b", "http://c"])
    assert [str(address) for address in topology] == ["http://a", "http://b", "http://c"]


@pytest.mark.parametrize(
    ("peers", "why"),
    [
        (["http://a:80/"], "peer 1, http://a, is the same daemon as the hub"),
        (["http://b", "http://B"], "peer 2, http://b, is the same daemon as peer 1"),
        ("http://b", "must be a list of URLs"),
        (["nonsense"], r"peers\[0\] 'nonsense' must begin with"),
    ],
)
def test_each_daemon_is_named_once(peers: list[str], why: str) -> None:
    """A peer equal to the hub, a peer named twice, or one string for a list is a mistake in the settings."""
    with pytest.raises(ConfigurationError, match=why):
        Topology.parse("http://a", peers)
