"""Addresses of daemons, each named once; the order of the ring; and the route between star and ring."""

from __future__ import annotations

from collections import Counter
from itertools import permutations, product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pybustcall.errors import ConfigurationError
from pybustcall.policies import Failback
from pybustcall.topology import STAR_RING, DaemonAddress, Route, RouteSignal, StarRing, Topology, ring_order


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


# The order of the ring

PEERS = [f"http://peer{number}:8989" for number in range(5)]
names = st.text(st.characters(codec="utf-8"), max_size=20)


@given(names, st.lists(names, max_size=8, unique=True))
def test_the_ring_is_a_permutation_of_the_peers(client: str, peers: list[str]) -> None:
    """Each peer has its place, and the same one every time."""
    order = ring_order(client, peers)
    assert sorted(order) == list(range(len(peers)))
    assert ring_order(client, peers) == order


@given(names, st.lists(names, min_size=1, max_size=8, unique=True), st.integers(0, 7))
def test_the_ring_does_not_change_when_a_peer_goes_or_their_order_in_the_settings_does(
    client: str, peers: list[str], gone: int
) -> None:
    """The others keep their order."""
    before = [peers[index] for index in ring_order(client, peers)]
    left = [peer for number, peer in enumerate(peers) if number != gone % len(peers)]
    left.reverse()
    after = [left[index] for index in ring_order(client, left)]
    assert after == [peer for peer in before if peer in left]


@pytest.mark.requirement("RES-03")
def test_the_first_places_of_ten_thousand_clients_spread_evenly() -> None:
    """And the second places of those who share a first: chi-square below what one in ten thousand exceeds."""
    orders = [ring_order(f"client {number}", PEERS) for number in range(10_000)]
    groups = [[order[0] for order in orders]]
    groups += [[order[1] for order in orders if order[0] == first] for first in range(5)]
    for group, places in zip(groups, (5, 4, 4, 4, 4, 4), strict=True):
        share = len(group) / places
        counts = Counter(group)
        assert len(counts) == places
        assert sum((count - share) ** 2 / share for count in counts.values()) < 24


def test_every_order_of_the_ring_occurs() -> None:
    """A thousand clients over three peers know all six."""
    orders = {tuple(ring_order(str(number), PEERS[:3])) for number in range(1000)}
    assert orders == set(permutations(range(3)))


# The route


def route_of(star_ring: StarRing) -> Route:
    """Tell the route, which may have changed since it was looked at."""
    return star_ring.route


def at_once() -> float:
    """Stand in for a random number: our turn comes at once."""
    return 0.0


@pytest.mark.parametrize(("route", "signal"), list(product(Route, RouteSignal)))
def test_every_pair_of_the_routes_table(route: Route, signal: RouteSignal) -> None:
    """A pair of the table leads where it says; any other changes nothing."""
    star_ring = StarRing(Failback())
    star_ring.route = route
    moved = star_ring._move(signal)
    assert route_of(star_ring) is STAR_RING.get((route, signal), route)
    assert moved is ((route, signal) in STAR_RING)


def test_the_routes_table_is_the_documented_one() -> None:
    """Any route leaves a hub that is down; the way back has three steps, or one by the user's word."""
    assert {route for (route, signal) in STAR_RING if signal is RouteSignal.HUB_DOWN} == set(Route) - {Route.RING}
    way = [Route.RING]
    for signal in (RouteSignal.HUB_STEADY, RouteSignal.TURN_CAME, RouteSignal.RAMP_OVER):
        way.append(STAR_RING[way[-1], signal])
    assert way == [Route.RING, Route.WAITING, Route.RETURNING, Route.STAR]
    assert {end for (_, signal), end in STAR_RING.items() if signal is RouteSignal.RESET} == {Route.STAR}


def good(star_ring: StarRing, begin: float, seconds: float) -> float:
    """Let the hub be good for so long, with a probe each second; tell the time."""
    for second in range(int(seconds) + 1):
        star_ring.hub_good(begin + second)
        star_ring.advance(begin + second, at_once)
    return begin + seconds


@pytest.mark.requirement("RES-03")
def test_the_hub_is_returned_to_late_and_little_by_little() -> None:
    """Good for 30 s, then 5, 25, 50 and 100 % over 60 s."""
    star_ring = StarRing(Failback())
    assert star_ring.share(0.0) == 1.0
    assert star_ring.hub_down(0.0)
    assert not star_ring.hub_down(0.5), "it is left once"
    assert star_ring.share(1.0) == 0.0
    good(star_ring, 10.0, 29.0)
    assert route_of(star_ring) is Route.RING
    good(star_ring, 40.0, 0.0)
    assert route_of(star_ring) is Route.RETURNING
    shares = [star_ring.share(40.0 + second) for second in (0, 19.9, 20, 39.9, 40, 59.9, 70)]
    assert shares == [0.05, 0.05, 0.25, 0.25, 0.5, 0.5, 0.5]
    assert star_ring.advance(100.0, at_once) is Route.STAR
    assert star_ring.share(100.0) == 1.0


def test_our_turn_comes_within_the_spread() -> None:
    """U(0, 60) after the hub is steady."""
    star_ring = StarRing(Failback())
    star_ring.hub_down(0.0)
    for second in range(31):
        star_ring.hub_good(second)
    assert star_ring.advance(30.0, lambda: 0.5) is Route.WAITING
    assert star_ring.share(30.0) == 0.0
    assert star_ring.advance(59.9, lambda: 0.9) is Route.WAITING
    assert star_ring.advance(60.0, lambda: 0.9) is Route.RETURNING


@pytest.mark.parametrize("probes", [1, 2, 3])
def test_time_alone_is_no_evidence(probes: int) -> None:
    """30 s are not enough without three good probes."""
    star_ring = StarRing(Failback())
    star_ring.hub_down(0.0)
    for probe in range(probes):
        star_ring.hub_good(float(probe))
    assert star_ring.advance(100.0, at_once) is (Route.RETURNING if probes == 3 else Route.RING)


@pytest.mark.parametrize("waiting", [True, False])
def test_any_fault_begins_the_hold_anew(waiting: bool) -> None:
    """On the ring and while waiting for our turn; then 30 good seconds more are asked for, and not twice as many."""
    star_ring = StarRing(Failback())
    star_ring.hub_down(0.0)
    for second in range(31 if waiting else 30):
        star_ring.hub_good(second)
    star_ring.advance(30.0 if waiting else 29.0, lambda: 0.99)
    assert route_of(star_ring) is (Route.WAITING if waiting else Route.RING)
    if waiting:
        assert not star_ring.hub_down(31.0), "calls had not returned, so they do not leave"
    star_ring.hub_poor()
    assert route_of(star_ring) is Route.RING
    good(star_ring, 40.0, 29.0)
    assert route_of(star_ring) is Route.RING
    good(star_ring, 70.0, 0.0)
    assert route_of(star_ring) is Route.RETURNING


def test_a_single_fault_on_the_way_back_does_not_end_it() -> None:
    """Only a hub that is down is left."""
    star_ring = StarRing(Failback())
    star_ring.hub_down(0.0)
    now = good(star_ring, 0.0, 30.0)
    star_ring.hub_poor()
    assert star_ring.advance(now + 59.0, at_once) is Route.RETURNING
    assert star_ring.advance(now + 60.0, at_once) is Route.STAR


def hold_of(star_ring: StarRing, now: float) -> tuple[float, float]:
    """Let the hub be good until calls return; tell how long that took, and the time."""
    for second in range(2000):
        star_ring.hub_good(now + second)
        if star_ring.advance(now + second, at_once) is Route.RETURNING:
            return second, now + second
    raise AssertionError("calls never return")


@pytest.mark.requirement("RES-03")
def test_the_hold_doubles_with_each_relapse_up_to_its_cap_and_falls_back() -> None:
    """30, 60, 120, 240, 480, 600, 600; after it has served for as long as the hold was, 30 again."""
    star_ring = StarRing(Failback())
    star_ring.hub_down(0.0)
    now, holds = 0.0, []
    for _ in range(7):
        hold, now = hold_of(star_ring, now)
        holds.append(hold)
        assert star_ring.hub_down(now + 1)
        now += 2
    assert holds == [30, 60, 120, 240, 480, 600, 600]
    _, now = hold_of(star_ring, now)
    assert star_ring.advance(now + 60, at_once) is Route.STAR
    star_ring.hub_down(now + 60 + 599)
    hold, now = hold_of(star_ring, now + 700)
    assert hold == 600, "it went down before it had served for 600 s"
    assert star_ring.advance(now + 60, at_once) is Route.STAR
    star_ring.hub_down(now + 60 + 600)
    assert hold_of(star_ring, now + 700)[0] == 30


def test_a_reset_returns_at_once_and_forgets_the_relapses() -> None:
    """The user knows better."""
    star_ring = StarRing(Failback())
    star_ring.hub_down(0.0)
    _, now = hold_of(star_ring, 0.0)
    star_ring.hub_down(now)
    star_ring.reset()
    assert (star_ring.route, star_ring.share(now)) == (Route.STAR, 1.0)
    star_ring.hub_down(now + 1)
    assert hold_of(star_ring, now + 1)[0] == 30
    untouched = StarRing(None)
    untouched.reset()
    assert untouched.route is Route.STAR


def test_without_a_policy_calls_leave_the_hub_and_return_only_by_reset() -> None:
    """failback=None."""
    star_ring = StarRing(None)
    assert star_ring.hub_down(0.0)
    good(star_ring, 1.0, 1000.0)
    assert (star_ring.route, star_ring.share(1001.0)) == (Route.RING, 0.0)
    star_ring.reset()
    assert star_ring.share(1001.0) == 1.0


def test_without_a_hold_a_spread_and_a_ramp_calls_return_with_the_evidence() -> None:
    """Zeros are allowed: three good probes, and all calls are back."""
    star_ring = StarRing(Failback(hold=0.0, spread=0.0, ramp=0.0))
    star_ring.hub_down(0.0)
    for probe in range(3):
        assert star_ring.advance(float(probe), at_once) is Route.RING
        star_ring.hub_good(float(probe))
    assert star_ring.advance(3.0, at_once) is Route.STAR


@given(
    st.lists(st.tuples(st.sampled_from(["down", "poor", "good", "reset", "look"]), st.floats(0, 40)), max_size=80),
    st.floats(0, 1, exclude_max=True),
)
def test_the_share_of_the_hub_is_always_one_of_the_steps(steps: list[tuple[str, float]], chance: float) -> None:
    """Whatever happens in whatever order; and nothing but a good hub for 30 s, or a reset, brings calls back."""
    star_ring, now, left, well_since = StarRing(Failback()), 0.0, False, None
    for what, pause in steps:
        now += pause
        star_ring.advance(now, lambda: chance)
        if star_ring.route in {Route.STAR, Route.RETURNING} and left:
            assert well_since is not None
            assert now - well_since >= 30
            left = False
        if what == "down":
            star_ring.hub_down(now)
            left, well_since = True, None
        elif what == "poor":
            star_ring.hub_poor()
            well_since = None
        elif what == "good":
            star_ring.hub_good(now)
            well_since = now if well_since is None else well_since
        elif what == "reset":
            star_ring.reset()
            left, well_since = False, None
        assert star_ring.share(now) in {0.0, 0.05, 0.25, 0.5, 1.0}
