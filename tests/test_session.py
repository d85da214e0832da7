"""The session manager: slots first come first served, loops, forks, closing, certificates."""

from __future__ import annotations

import asyncio
import gc
import os
import ssl
import threading
import weakref
from pathlib import Path

import aiohttp
import pytest
import trustme

from pybustcall import TLS, BustcallClient, ClientClosed, ConfigurationError, Pool, SlotTimeout
from pybustcall.session import SessionManager
from pybustcall.testing import Answer, FakeDaemon
from pybustcall.topology import DaemonAddress
from tests.conftest import PATIENCE, StartDaemon, eventually

A = DaemonAddress.parse("http://127.0.0.1:1")
B = DaemonAddress.parse("http://127.0.0.1:2")


def manager(**pool: float) -> SessionManager:
    """Make a session manager with these limits."""
    return SessionManager(pool=Pool(**pool))  # type: ignore[arg-type]


async def test_slots_are_given_first_come_first_served() -> None:
    """Twenty waiters at one slot are served in the order in which they came."""
    sessions, served = manager(per_daemon=1, wait=10.0), []

    async def work(number: int) -> None:
        async with sessions.lease(A):
            served.append(number)
            await asyncio.sleep(0)

    async with asyncio.TaskGroup() as group:
        for number in range(20):
            group.create_task(work(number))
    assert served == list(range(20))
    await sessions.aclose()


async def test_a_saturated_daemon_delays_nobody_elses_calls() -> None:
    """With room in all, a waiter of another daemon passes those of the full one."""
    sessions = manager(per_daemon=1, total=2, wait=10.0)
    async with sessions.lease(A):
        waiting = asyncio.create_task(sessions.lease(A).__aenter__())
        await eventually(lambda: sessions.statistics().waiting == 1)
        async with sessions.lease(B):
            assert sessions.statistics().in_use == 2
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
    assert sessions.statistics().in_use == 0
    await sessions.aclose()


async def test_a_slot_freed_in_all_goes_to_who_waits_longest_over_daemons() -> None:
    """The total limit has one queue over all daemons."""
    sessions, served = manager(per_daemon=5, total=1, wait=10.0), []

    async def work(address: DaemonAddress, name: str) -> None:
        async with sessions.lease(address):
            served.append(name)

    async with sessions.lease(A):
        tasks = []
        for number, (address, name) in enumerate([(B, "b1"), (A, "a1"), (B, "b2")], start=1):
            tasks.append(asyncio.create_task(work(address, name)))
            await eventually(lambda number=number: sessions.statistics().waiting == number)  # type: ignore[misc]
    await asyncio.gather(*tasks)
    assert served == ["b1", "a1", "b2"]
    await sessions.aclose()


async def test_waiting_for_a_slot_has_its_own_time_and_error() -> None:
    """SlotTimeout tells whose slots they are, how many are in use, and that nothing was sent."""
    sessions = manager(per_daemon=1, wait=0.01)
    async with sessions.lease(A):
        with pytest.raises(SlotTimeout, match=r"1 of 1 are in use there, 1 of 100 in all. Nothing was sent") as caught:
            async with sessions.lease(A):
                raise AssertionError
    assert caught.value.daemon == A.url
    assert caught.value.applied == "no"
    statistics = sessions.statistics()
    assert (statistics.timed_out, statistics.granted, statistics.in_use, statistics.waiting) == (1, 1, 0, 0)
    await sessions.aclose()


async def test_a_waiter_cancelled_in_the_moment_of_its_turn_passes_the_slot_on() -> None:
    """No slot is lost when cancellation and slot arrive together."""
    sessions = manager(per_daemon=1, wait=10.0)
    first = sessions.lease(A)
    await first.__aenter__()
    loser = asyncio.create_task(sessions.lease(A).__aenter__())
    await eventually(lambda: sessions.statistics().waiting == 1)
    await first.__aexit__(None, None, None)  # hands the slot to the loser, who has not run yet
    loser.cancel()
    with pytest.raises(asyncio.CancelledError):
        await loser
    assert sessions.statistics().in_use == 0
    async with sessions.lease(A):
        assert sessions.statistics().daemons[A.url].in_use == 1
    await sessions.aclose()


async def test_a_hundred_slots_serve_five_hundred_workers_evenly() -> None:
    """None of 512 busy workers is starved: after 512 rounds each had its turn."""
    sessions, rounds = manager(per_daemon=100, wait=PATIENCE), [0] * 512

    async def work(number: int) -> None:
        while min(rounds) < 2:
            async with sessions.lease(A):
                rounds[number] += 1
                await asyncio.sleep(0)

    async with asyncio.TaskGroup() as group:
        for number in range(512):
            group.create_task(work(number))
    assert max(rounds) - min(rounds) <= 2
    await sessions.aclose()


@pytest.mark.requirement("IMP-02")
async def test_connections_are_reused() -> None:
    """Ten busts in a row make one connection."""
    async with FakeDaemon() as fake, BustcallClient(fake.url) as client:
        for _ in range(10):
            await client.bust("a")
        assert fake.connections == 1
        assert client.statistics().pool.sessions == 1


async def test_warming_up_opens_connections_before_the_first_bust() -> None:
    """The bust then uses one of them; a daemon that is down is told and not raised."""
    async with FakeDaemon() as fake, BustcallClient(fake.url, peers=["http://127.0.0.1:1"]) as client:
        faults = await client.warm_up(connections=3)
        assert faults[fake.url] is None
        down = faults["http://127.0.0.1:1"]
        assert down is not None
        assert "no connection could be made" in down.message
        await client.bust("a")
        assert fake.connections == 3


async def test_no_cookie_is_kept() -> None:
    """A daemon's cookie is not sent back."""
    async with (
        FakeDaemon([Answer(headers={"Set-Cookie": "session=1; Path=/"})]) as fake,
        BustcallClient(fake.url) as client,
    ):
        await client.bust("a")
        await client.bust("a")
    assert all("Cookie" not in headers for headers in fake.headers)


async def test_no_proxy_of_the_environment_is_used_unless_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """With HTTP_PROXY set to a dead port, a bust still arrives; with trust_env it goes to the proxy."""
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    monkeypatch.delenv("no_proxy", raising=False)
    async with FakeDaemon() as fake:
        async with BustcallClient(fake.url) as client:
            assert (await client.bust("a")).ok
        async with BustcallClient(fake.url, trust_env=True, fault_tolerance=12, retry=None) as client:
            result = await client.bust("a")
            assert not result.ok
            assert result.causes[0].applied == "no"


async def test_a_unix_socket_is_reached(tmp_path: Path) -> None:
    """unix:///path/of.sock is a daemon like any other."""
    async with FakeDaemon(socket=tmp_path / "b.sock") as fake, BustcallClient(fake.url) as client:
        result = await client.bust("a")
    assert result.daemon == f"unix://{tmp_path}/b.sock"


async def test_a_certificate_of_our_authority_is_trusted(server_tls: ssl.SSLContext, ca_file: Path) -> None:
    """HTTPS with a custom CA."""
    async with FakeDaemon(tls=server_tls) as fake, BustcallClient(fake.url, tls=TLS(ca=ca_file)) as client:
        assert (await client.bust("a")).daemon == fake.url


async def test_a_client_certificate_is_shown(
    authority: trustme.CA, server_tls: ssl.SSLContext, ca_file: Path, tmp_path: Path
) -> None:
    """A daemon that demands one is served with it, and refuses a client without."""
    server_tls.verify_mode = ssl.CERT_REQUIRED
    authority.configure_trust(server_tls)
    own = authority.issue_cert("client.example")
    cert, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    own.cert_chain_pems[0].write_to_path(str(cert))
    own.private_key_pem.write_to_path(str(key))
    async with FakeDaemon(tls=server_tls) as fake:
        async with BustcallClient(fake.url, tls=TLS(ca=ca_file, cert=cert, key=key)) as client:
            assert (await client.bust("a")).ok
        async with BustcallClient(fake.url, tls=TLS(ca=ca_file), fault_tolerance=12, retry=None) as client:
            result = await client.bust("a")
            assert not result.ok
            assert "if it asks for a client certificate" in result.causes[0].message
        assert len(fake.requests) == 1


@pytest.mark.parametrize(
    ("tls", "why"),
    [
        (TLS(ca="missing.pem"), "tls.ca: there is no file 'missing.pem'"),
        (TLS(key="key.pem"), "tls.key is given without tls.cert"),
        (TLS(ca=__file__), "holds no usable certificates"),
        (TLS(cert=__file__), "and its key cannot be used"),
    ],
)
def test_files_that_are_no_certificates_are_told_at_once(tls: TLS, why: str) -> None:
    """When the client is made, not at the first bust."""
    with pytest.raises(ConfigurationError, match=why):
        BustcallClient("https://127.0.0.1", tls=tls)


def test_a_keys_password_is_used_and_not_shown(authority: trustme.CA, tmp_path: Path) -> None:
    """A wrong one is an error, not a question on the terminal."""
    from cryptography.hazmat.primitives import serialization

    issued = authority.issue_cert("client.example")
    private = serialization.load_pem_private_key(issued.private_key_pem.bytes(), None)
    locked = private.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.BestAvailableEncryption(b"hush"),
    )
    bundle = tmp_path / "bundle.pem"
    bundle.write_bytes(locked + issued.cert_chain_pems[0].bytes())
    right = TLS(cert=bundle, key_password="hush")
    right.make_context()
    assert "hush" not in repr(right)
    with pytest.raises(ConfigurationError, match="cannot be used"):
        TLS(cert=bundle).make_context()


async def test_a_session_passed_in_is_used_and_never_closed() -> None:
    """It is the caller's to close."""
    async with FakeDaemon() as fake, aiohttp.ClientSession(headers={"X-Mine": "yes"}) as session:
        async with BustcallClient(fake.url, session=session) as client:
            assert (await client.bust("a")).ok
        assert not session.closed
        assert fake.headers[0]["X-Mine"] == "yes"


async def test_a_bust_on_a_session_passed_in_that_is_cut_off_may_have_been_applied() -> None:
    """Such a session notes nothing, so nothing can be ruled out once the client is closed."""
    async with FakeDaemon([Answer(hang=True)]) as fake, aiohttp.ClientSession() as session:
        client = BustcallClient(fake.url, session=session, pool=Pool(drain=0.01))
        call = asyncio.create_task(client.bust("a"))
        await eventually(lambda: fake.requests)
        await client.aclose()
        fake.drop_connections()
        with pytest.raises(ClientClosed) as caught:
            await call
    assert caught.value.applied == "maybe"


async def test_a_closed_session_passed_in_is_a_mistake() -> None:
    """And so is one that cannot reach the daemon, or settings that belong to it."""
    async with aiohttp.ClientSession() as session:
        client = BustcallClient(session=session)
        with pytest.raises(ConfigurationError, match="cannot reach unix:///s"):
            BustcallClient("unix:///s", session=session)
        with pytest.raises(ConfigurationError, match="belong to the session"):
            BustcallClient(session=session, trust_env=True)
    with pytest.raises(ConfigurationError, match="passed in is closed"):
        await client.bust("a")


async def test_a_session_passed_in_stays_in_its_loop() -> None:
    """In another loop it is refused before anything is sent."""
    async with FakeDaemon() as fake, aiohttp.ClientSession() as session:
        client = BustcallClient(fake.url, session=session)
        await client.bust("a")

        def elsewhere() -> None:
            with pytest.raises(ConfigurationError, match="belongs to another event loop"):
                asyncio.run(client.bust("a"))

        await asyncio.to_thread(elsewhere)
        await client.aclose()


async def test_after_aclose_nothing_is_sent() -> None:
    """ClientClosed, and closing again is harmless."""
    async with FakeDaemon() as fake:
        client = BustcallClient(fake.url)
        await client.bust("a")
        await client.aclose()
        await client.aclose()
        with pytest.raises(ClientClosed, match="nothing was sent"):
            await client.bust("a")
        with pytest.raises(ClientClosed):
            await client.bust_many(["a"])
        assert len(fake.requests) == 1
        assert client.statistics().pool.sessions == 0


async def test_aclose_waits_for_what_is_under_way() -> None:
    """A bust that began before aclose still gets its answer."""
    async with FakeDaemon([Answer(delay=0.1)]) as fake:
        client = BustcallClient(fake.url)
        call = asyncio.create_task(client.bust("a"))
        await eventually(lambda: fake.requests)
        await client.aclose()
        assert call.done()
        assert (await call).ok


async def test_the_drain_has_an_end() -> None:
    """A call that outlasts it is told that the client was closed."""
    async with FakeDaemon([Answer(hang=True)]) as fake:
        client = BustcallClient(fake.url, pool=Pool(drain=0.01))
        call = asyncio.create_task(client.bust("a"))
        await eventually(lambda: fake.requests)
        await client.aclose()
        with pytest.raises(ClientClosed, match="while the call was under way") as caught:
            await call
        assert caught.value.applied == "maybe"


async def test_a_question_cut_off_by_the_drain_blames_no_daemon() -> None:
    """The client was closed; the daemon did nothing wrong."""

    async def never(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        asked.set()
        await reader.read()
        writer.close()
        await writer.wait_closed()
        gone.set()

    asked, gone = asyncio.Event(), asyncio.Event()
    async with await asyncio.start_server(never, "127.0.0.1", 0) as server:
        client = BustcallClient(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}", pool=Pool(drain=0.01))
        call = asyncio.create_task(client.status())
        await asyncio.wait_for(asked.wait(), PATIENCE)
        await client.aclose()
        with pytest.raises(ClientClosed):
            await call
        await asyncio.wait_for(gone.wait(), PATIENCE)


async def test_cancelling_aclose_cuts_the_drain_and_still_closes() -> None:
    """The cancellation arrives, and the sessions are closed all the same."""
    async with FakeDaemon([Answer(hang=True)]) as fake:
        client = BustcallClient(fake.url)
        call = asyncio.create_task(client.bust("a"))
        await eventually(lambda: fake.requests)
        closing = asyncio.create_task(client.aclose())
        await asyncio.sleep(0)
        closing.cancel()
        with pytest.raises(asyncio.CancelledError):
            await closing
        assert client.statistics().pool.sessions == 0
        with pytest.raises(ClientClosed):
            await call


def test_one_client_serves_many_loops_in_a_row(start_daemon: StartDaemon) -> None:
    """asyncio.run a hundred times: each loop closes its own connections, and nothing is left open."""
    client = BustcallClient(start_daemon().url)
    loops: list[weakref.ref[asyncio.AbstractEventLoop]] = []

    async def bust() -> int:
        loops.append(weakref.ref(asyncio.get_running_loop()))
        return (await client.bust("a")).stage

    before = len(os.listdir("/proc/self/fd"))
    for _ in range(100):
        assert asyncio.run(bust()) == 12
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) <= before
    pool = client.statistics().pool
    assert (pool.sessions, pool.granted) == (0, 100)
    assert sum(loop() is not None for loop in loops) <= 1  # asyncio itself may hold the last one


async def test_threads_with_their_own_loops_share_a_client() -> None:
    """Each loop has its own connections; closing in one closes them all."""
    async with FakeDaemon() as fake:
        client = BustcallClient(fake.url)
        await client.bust("here")
        done, leave = threading.Event(), threading.Event()

        def elsewhere() -> None:
            async def work() -> None:
                await client.bust("there")
                done.set()
                while not leave.is_set():
                    await asyncio.sleep(0.001)

            asyncio.run(work())

        thread = threading.Thread(target=elsewhere)
        thread.start()
        await asyncio.to_thread(done.wait, PATIENCE)
        assert client.statistics().pool.sessions == 2
        await client.aclose()
        assert client.statistics().pool.sessions == 0
        leave.set()
        await asyncio.to_thread(thread.join, PATIENCE)


def test_a_forked_child_has_connections_of_its_own() -> None:
    """The child busts with the same client object; the parent's connections live on untouched."""

    async def serve_and_fork() -> tuple[int, int]:
        async with FakeDaemon() as fake:
            client = BustcallClient(fake.url)
            await client.bust("parent")
            child = os.fork()
            if child == 0:
                code = 1
                try:
                    code = _in_child(client)
                finally:
                    os._exit(code)
            _, status = await asyncio.to_thread(os.waitpid, child, 0)
            await client.bust("parent again")
            connections = fake.connections
            await client.aclose()
            return os.waitstatus_to_exitcode(status), connections

    code, connections = asyncio.run(serve_and_fork())
    assert code == 0
    assert connections == 2  # the parent's one, used twice, and the child's


def test_a_child_that_drops_the_client_does_the_parent_no_harm() -> None:
    """Its garbage collector must not close what it inherited: the epoll descriptor is the parent's, too."""

    async def serve_and_fork() -> tuple[int, int]:
        async with FakeDaemon() as fake:
            client = BustcallClient(fake.url)
            await client.bust("parent")
            holder = [client]
            child = os.fork()
            if child == 0:
                del client
                holder.clear()
                gc.collect()
                os._exit(0)
            await asyncio.to_thread(os.waitpid, child, 0)
            result = await client.bust("parent again")
            await client.aclose()
            return result.stage, fake.connections

    assert asyncio.run(serve_and_fork()) == (12, 1)


def _in_child(client: BustcallClient) -> int:
    asyncio._set_running_loop(None)
    asyncio.set_event_loop_policy(None)

    async def bust() -> bool:
        return (await client.bust("child")).ok and client.statistics().pool.sessions == 1

    thread_result: list[bool] = []
    thread = threading.Thread(target=lambda: thread_result.append(asyncio.run(bust())))
    thread.start()
    thread.join(PATIENCE)
    return 0 if thread_result == [True] else 1


async def test_aclose_is_not_cancelled_by_another_loop_that_ends() -> None:
    """The other thread's loop goes away while we wait for it: that is its end, not ours."""
    async with FakeDaemon([Answer(), Answer(hang=True)]) as fake:
        client = BustcallClient(fake.url, pool=Pool(drain=PATIENCE))
        await client.bust("here")
        ready, leave = threading.Event(), threading.Event()

        def elsewhere() -> None:
            async def work() -> None:
                hanging = asyncio.ensure_future(client.bust("there"))
                while len(fake.requests) < 2:
                    await asyncio.sleep(0.001)
                ready.set()
                await asyncio.to_thread(leave.wait, PATIENCE)
                hanging.cancel()

            asyncio.run(work())

        thread = threading.Thread(target=elsewhere)
        thread.start()
        await asyncio.to_thread(ready.wait, PATIENCE)
        closing = asyncio.create_task(client.aclose())
        await eventually(lambda: client.statistics().pool.sessions == 1)
        leave.set()
        await closing
        await asyncio.to_thread(thread.join, PATIENCE)
        assert client.statistics().pool.sessions == 0


async def test_a_client_dropped_open_warns() -> None:
    """ResourceWarning names it, and the connections are closed with the loop."""
    async with FakeDaemon() as fake:
        client = BustcallClient(fake.url)
        await client.bust("a")
        with pytest.warns(ResourceWarning, match="was dropped open; use `async with`"):
            client.__del__()
        await client.aclose()


def test_a_client_never_used_is_dropped_in_silence() -> None:
    """Nothing was opened."""
    client = BustcallClient()
    assert repr(client) == "BustcallClient(http://127.0.0.1:8989; unopened)"
    del client
    gc.collect()


async def test_a_restarted_daemons_stale_connections_are_replaced_uncounted() -> None:
    """Used connections that turn out closed are no fault of the daemon: the bust goes out on a fresh one."""
    async with FakeDaemon() as fake, BustcallClient(fake.url) as client:
        await asyncio.gather(*(client.bust("a") for _ in range(5)))
        opened = fake.connections
        fake.plan.append(Answer(reset=True))
        result = await client.bust("a")
        assert (result.stage, len(result.attempts)) == (12, 1)
        assert fake.connections > opened
        assert client.statistics().pool.refreshed == 1


async def test_a_fresh_connection_that_is_cut_is_a_fault() -> None:
    """Without a used connection there is nothing stale about it."""
    async with FakeDaemon([Answer(reset=True)]) as fake, BustcallClient(fake.url) as client:
        result = await client.bust("a")
    assert (result.stage, len(result.attempts)) == (9, 2)
    assert result.causes[0].applied == "maybe"


async def test_uvloop_serves_as_well() -> None:
    """The same client under another event loop implementation."""
    uvloop = pytest.importorskip("uvloop")

    async def work() -> bool:
        async with FakeDaemon() as fake, BustcallClient(fake.url) as client:
            return (await client.bust("a")).ok

    def run() -> bool:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            return runner.run(work())

    assert await asyncio.to_thread(run)


async def test_slots_pass_by_waiters_that_were_cancelled_together() -> None:
    """A whole group is cancelled: its slots come free while its waiters have not noticed yet; none is lost."""
    sessions = manager(per_daemon=2, wait=10.0)

    async def work() -> None:
        async with sessions.lease(A):
            await asyncio.Event().wait()

    tasks = [asyncio.create_task(work()) for _ in range(10)]
    await eventually(lambda: sessions.statistics().waiting == 8)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    assert all(task.cancelled() for task in tasks)
    statistics = sessions.statistics()
    assert (statistics.in_use, statistics.waiting) == (0, 0)
    await sessions.aclose()
