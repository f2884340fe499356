"""drivers/peer between two agents over real TLS: frames, files, and each way it can fail."""

import asyncio
from pathlib import Path
from typing import Any

import pytest

from kvmhv.errors import CallerError, HostError, PeerBroke, PeerUnreachable, Refused


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """The doubles do not read what comes, so that no close is answered: do not wait long for it."""
    monkeypatch.setattr("kvmhv.drivers.peer.CLOSE_S", 0.1)


@pytest.fixture
async def pair(make_host: Any, befriend: Any) -> tuple[Any, Any]:
    limits = {"peer_frame_bytes": 65536}
    source, target = await make_host("host1", limits=limits), await make_host("host2", limits=limits)
    await befriend(target, source)
    return source, target


async def frame(connection: Any) -> bytes:
    async with asyncio.timeout(5):
        return await anext(connection.frames())


async def test_frames_go_both_ways_in_order(pair: tuple[Any, Any]) -> None:
    source, target = pair
    outgoing = await source.peer.connect("host2", 5)
    incoming = await target.moves.served.get()
    assert (outgoing.peer_name, outgoing.peer_ip) == ("host2", "127.0.0.1")
    assert (incoming.peer_name, incoming.peer_ip) == ("host1", "127.0.0.1")
    for number in range(50):
        await outgoing.send(b"%d" % number)
    frames = incoming.frames()
    assert [await anext(frames) for _ in range(50)] == [b"%d" % number for number in range(50)]
    await incoming.send(b"x" * 65000)
    assert await frame(outgoing) == b"x" * 65000
    await outgoing.close()
    async with asyncio.timeout(5):
        assert [item async for item in frames] == []
    with pytest.raises(PeerUnreachable):
        await incoming.send(b"too late")
        await incoming.send(b"surely too late")
    await outgoing.close()


async def test_the_answering_side_ends_it(pair: tuple[Any, Any]) -> None:
    source, target = pair
    outgoing = await source.peer.connect("host2", 5)
    await target.moves.served.get()
    target.moves.serving_ends.set()
    async with asyncio.timeout(5):
        assert [item async for item in outgoing.frames()] == []
    await outgoing.close()


@pytest.mark.parametrize("direction", ["out", "in"])
async def test_a_frame_over_the_bound_breaks_the_connection(pair: tuple[Any, Any], direction: str) -> None:
    source, target = pair
    outgoing = await source.peer.connect("host2", 5)
    incoming = await target.moves.served.get()
    sender, receiver = (outgoing, incoming) if direction == "out" else (incoming, outgoing)
    await sender.send(b"x" * 65537)
    with pytest.raises(PeerBroke) as caught:
        await frame(receiver)
    assert caught.value.host == receiver.peer_name
    async with asyncio.timeout(5):
        assert [item async for item in sender.frames()] == []
    await outgoing.close()


async def test_text_is_no_frame(pair: tuple[Any, Any]) -> None:
    source, target = pair
    outgoing = await source.peer.connect("host2", 5)
    incoming = await target.moves.served.get()
    await outgoing._socket.send_str("hello")
    with pytest.raises(PeerBroke):
        await frame(incoming)
    await outgoing.close()


async def test_a_name_or_an_address_of_a_trusted_host(pair: tuple[Any, Any]) -> None:
    source, target = pair
    connection = await source.peer.connect(target.address, 5)
    assert connection.peer_name == "host2"
    await connection.close()
    for unknown in ("host9", "127.0.0.1:9", ""):
        with pytest.raises(CallerError) as caught:
            await source.peer.connect(unknown, 5)
        assert caught.value.code == "host-unknown"


async def test_nobody_listens(pair: tuple[Any, Any]) -> None:
    source, target = pair
    await target.listener.close()
    with pytest.raises(PeerUnreachable) as caught:
        await source.peer.connect("host2", 5)
    assert caught.value.host == "host2"


async def test_an_agent_that_accepts_and_says_nothing(pair: tuple[Any, Any]) -> None:
    source, target = pair

    async def silence(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()
        writer.close()

    server = await asyncio.start_server(silence, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    source.trust.add("host2", f"127.0.0.1:{port}", target.trust.certificate_pem)
    with pytest.raises(PeerUnreachable, match="no answer in time"):
        await source.peer.connect("host2", 0.2)
    server.close()


async def test_refused_by_a_host_that_does_not_trust_this_one(pair: tuple[Any, Any]) -> None:
    source, target = pair
    target.trust.remove("host1")
    with pytest.raises(Refused) as caught:
        await source.peer.connect("host2", 5)
    assert (caught.value.code, caught.value.host) == ("peer-untrusted", "host2")
    assert source.trust.fingerprint in caught.value.message
    assert caught.value.todo.count("kvmhv host trust") == 2


async def test_refuses_another_host_at_the_address(pair: tuple[Any, Any], make_host: Any, befriend: Any) -> None:
    source, target = pair
    other = await make_host("host3")
    source.trust.add("host2", other.address, target.trust.certificate_pem)
    with pytest.raises(Refused) as caught:
        await source.peer.connect("host2", 5)
    assert (caught.value.code, caught.value.host) == ("peer-untrusted", "host1")
    assert other.moves.served.empty()


async def test_send_file(pair: tuple[Any, Any], tmp_path: Path) -> None:
    source, target = pair
    kernel = tmp_path / "kernel"
    kernel.write_bytes(b"vmlinuz" * 100_000)
    await source.peer.send_files("host2", "m1", {"kernel": kernel}, 10)
    assert target.moves.files == {("host1", "m1", "kernel"): kernel.read_bytes()}
    with pytest.raises(HostError) as caught:
        await source.peer.send_files("host2", "m1", {"initrd": tmp_path / "none"}, 10)
    assert caught.value.code == "file-unreadable"
    target.trust.remove("host1")
    with pytest.raises(Refused):
        await source.peer.send_files("host2", "m1", {"kernel": kernel}, 10)


async def test_a_file_that_the_target_has_is_not_sent(pair: tuple[Any, Any], tmp_path: Path) -> None:
    source, target = pair
    target.moves.has.add("kernel")
    files = {name: tmp_path / name for name in ("kernel", "initrd")}
    for file in files.values():
        file.write_bytes(b"some bytes")
    await source.peer.send_files("host2", "m1", files, 10)
    assert target.moves.files == {("host1", "m1", "initrd"): b"some bytes"}


async def test_an_agent_that_does_not_know_the_question_is_sent_everything(
    pair: tuple[Any, Any], tmp_path: Path
) -> None:
    source, target = pair

    async def refuse(peer_name: str, move_id: str, name: str) -> bool:
        raise CallerError("method", "POST is not for this path", "try PUT", http_status=405)

    target.moves.take_file = refuse
    (tmp_path / "kernel").write_bytes(b"vmlinuz")
    await source.peer.send_files("host2", "m1", {"kernel": tmp_path / "kernel"}, 10)
    assert target.moves.files == {("host1", "m1", "kernel"): b"vmlinuz"}


async def test_the_other_agents_error_comes_through(pair: tuple[Any, Any], tmp_path: Path) -> None:
    source, target = pair

    async def refuse(peer_name: str, move_id: str, name: str, chunks: Any) -> None:
        raise CallerError("move-unknown", "no such move", http_status=404)

    target.moves.receive_file = refuse
    kernel = tmp_path / "kernel"
    kernel.write_bytes(b"k")
    with pytest.raises(CallerError) as caught:
        await source.peer.send_files("host2", "m1", {"kernel": kernel}, 10)
    assert caught.value.code == "move-unknown"


async def test_a_dead_link_is_noticed(pair: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    source, target = pair
    monkeypatch.setattr("kvmhv.drivers.peer.HEARTBEAT_S", 0.1)
    outgoing = await source.peer.connect("host2", 5)
    incoming = await target.moves.served.get()
    # The target's side hears and answers nothing any more, as behind a cut cable.
    incoming._socket._req.transport.pause_reading()
    async with asyncio.timeout(3):
        assert [item async for item in outgoing.frames()] == []
    with pytest.raises(PeerUnreachable):
        await outgoing.send(b"anybody?")
    await outgoing.close()
