"""The watcher: its counting without any I/O, and the program over loopback with a guest made of sockets."""

import asyncio
import json
import socket
import struct
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvmhv.lab.observations import Observations
from kvmhv.lab.watch import icmp_checksum, parse_arguments, parse_beat, parse_reply, ping_packet

ROOT = Path(__file__).resolve().parents[1]
BOOT = "0f0e0d0c-0b0a-0908-0706-050403020100"
OTHER_BOOT = "1f0e0d0c-0b0a-0908-0706-050403020100"


def observe() -> Observations:
    return Observations(100.0, 1_000_000.0)


def total(observations: Observations, at_s: float = 200.0) -> Any:
    return observations.report(at_s)["total"]


def windows(observations: Observations, at_s: float = 200.0) -> dict[str, Any]:
    found: Any = observations.report(at_s)["windows"]
    return {window["name"]: window for window in found}


def test_beats_in_order_lose_nothing_and_the_longest_gap_is_named() -> None:
    watched = observe()
    for sequence, at_s in enumerate([100.0, 100.005, 100.155, 100.160], start=1):
        watched.beat(BOOT, sequence, sequence * 5_000_000, at_s)
    beats = total(watched, 100.16)["beats"]
    assert (beats["received"], beats["lost"], beats["doubled"]) == (4, 0, 0)
    assert beats["longest_gap_ms"] == 150.0
    assert beats["longest_gap_ended"] == {"monotonic_s": 100.155, "wall_s": 1_000_100.155}
    assert beats["longest_gap_guest_ms"] == 5.0


def test_a_gap_belongs_to_the_window_in_which_it_ends() -> None:
    watched = observe()
    watched.beat(BOOT, 1, 0, 100.0)
    watched.mark("move", 100.1)
    watched.beat(BOOT, 2, 0, 100.3)
    watched.mark("after", 100.4)
    watched.beat(BOOT, 3, 0, 100.35)
    seen = windows(watched, 100.4)
    assert [seen[name]["beats"]["longest_gap_ms"] for name in ("start", "move", "after")] == [0.0, 300.0, 50.0]
    assert seen["start"]["ended"]["monotonic_s"] == seen["move"]["started"]["monotonic_s"] == 100.1


def test_a_guest_that_stays_silent_has_an_open_gap() -> None:
    watched = observe()
    watched.beat(BOOT, 1, 0, 100.0)
    watched.mark("silence", 101.0)
    assert windows(watched, 130.0)["silence"]["beats"]["longest_gap_ms"] == 30_000.0
    assert windows(watched, 130.0)["start"]["beats"]["longest_gap_ms"] == 0.0
    watched.beat(BOOT, 2, 0, 100.5)
    assert total(watched, 100.5)["beats"]["longest_gap_ms"] == 500.0


def test_lost_late_and_doubled_beats() -> None:
    watched = observe()
    for sequence in (1, 2, 5, 4, 5, 6):
        watched.beat(BOOT, sequence, 0, 100.0)
    beats = total(watched)["beats"]
    assert (beats["received"], beats["lost"], beats["late"], beats["doubled"]) == (5, 1, 1, 1)


@given(st.permutations(range(1, 12)), st.integers(0, 5))
def test_whatever_the_order_each_beat_is_counted_once(order: list[int], doubled: int) -> None:
    watched = observe()
    watched.beat(BOOT, 0, 0, 100.0)
    for sequence in [*order, *order[:doubled]]:
        watched.beat(BOOT, sequence, 0, 100.0)
    beats = total(watched)["beats"]
    assert (beats["received"], beats["lost"], beats["doubled"]) == (12, 0, doubled)


def test_a_late_beat_is_taken_back_from_the_window_that_missed_it() -> None:
    watched = observe()
    watched.beat(BOOT, 1, 0, 100.0)
    watched.beat(BOOT, 3, 0, 100.1)
    watched.mark("next", 100.2)
    watched.beat(BOOT, 2, 0, 100.3)
    seen = windows(watched)
    assert seen["start"]["beats"]["lost"] == 0
    assert (seen["next"]["beats"]["late"], seen["next"]["beats"]["lost"]) == (1, 0)


def test_a_restart_is_seen_by_its_boot_id_and_its_numbers_begin_anew() -> None:
    watched = observe()
    for boot_id, sequence in ((BOOT, 700), (BOOT, 701), (OTHER_BOOT, 1), (OTHER_BOOT, 2)):
        watched.beat(boot_id, sequence, 0, 100.0)
    assert watched.report(100.0)["boot_ids"] == [BOOT, OTHER_BOOT]
    assert total(watched)["beats"]["lost"] == 0


def test_a_jump_of_the_numbers_is_counted_but_not_remembered_one_by_one() -> None:
    watched = observe()
    watched.beat(BOOT, 1, 0, 100.0)
    watched.beat(BOOT, 10**15, 0, 100.0)
    assert total(watched)["beats"]["lost"] == 10**15 - 2


def test_pings_in_time_late_lost_and_doubled() -> None:
    watched = observe()
    for number, at_s in ((1, 100.0), (2, 100.05), (3, 100.1)):
        watched.ping_sent(number, at_s)
    watched.ping_received(1, 100.01)
    watched.ping_received(1, 100.02)
    watched.mark("later", 102.0)
    watched.ping_received(2, 102.04)  # 1.99 s: not lost
    watched.ping_received(3, 102.2)  # 2.1 s: lost
    pings = total(watched)["pings"]
    assert (pings["sent"], pings["received"], pings["lost"], pings["late"], pings["doubled"]) == (3, 2, 1, 1, 1)
    assert windows(watched)["start"]["pings"]["received"] == 2


def test_a_ping_is_not_lost_before_its_time() -> None:
    watched = observe()
    watched.ping_sent(1, 100.0)
    assert total(watched, 101.9)["pings"]["lost"] == 0
    assert total(watched, 102.1)["pings"]["lost"] == 1


def test_the_echo_stalls_breaks_once_and_stays_broken() -> None:
    watched = observe()
    watched.echo_sent(100.0)
    watched.echo_received(100.002)
    watched.echo_sent(100.05)
    assert total(watched, 101.05)["echo"]["longest_stall_ms"] == 1000.0
    assert watched.report(101.05)["echo_broken"] is None
    watched.echo_broke("reset", 103.0)
    watched.echo_broke("again", 104.0)
    broken: Any = watched.report(105.0)["echo_broken"]
    assert (broken["reason"], broken["at"]["monotonic_s"]) == ("reset", 103.0)


def test_acknowledgements_that_come_again_are_not_new() -> None:
    watched = observe()
    announced, written = True, False
    lines = [(BOOT, 0, announced), (BOOT, 1, written), (BOOT, 2, announced), (BOOT, 2, announced), (BOOT, 2, written)]
    lines += [(BOOT, 2, written), (BOOT, 1, written), (OTHER_BOOT, 1, written)]
    new = [watched.ack(boot_id, "vda", record, before) for boot_id, record, before in lines]
    assert new == [True, True, True, False, True, False, False, True]
    assert total(watched)["acks"] == {"received": 5, "doubled": 3}
    assert watched.report(100.0)["last_acks"] == {BOOT: {"vda": 2}, OTHER_BOOT: {"vda": 1}}


def test_icmp_there_and_back() -> None:
    request = ping_packet(77, b"12345678", 70_000)
    assert icmp_checksum(request) == 0
    reply = bytes([0]) + request[1:]
    header = bytes([0x45]) + bytes(19)
    assert parse_reply(header + reply, 77, b"12345678") == 70_000
    assert parse_reply(header + request, 77, b"12345678") is None  # our own request, on loopback
    assert parse_reply(header + reply, 78, b"12345678") is None
    assert parse_reply(header + reply, 77, b"87654321") is None
    assert parse_reply(b"", 77, b"12345678") is None


@pytest.mark.parametrize("datagram", [b"", b"beat", b"beat x 1", b"heat x 1 2", b"beat x one 2", b"\xff beat 1 2"])
def test_datagrams_that_are_no_beats(datagram: bytes) -> None:
    with pytest.raises(ValueError):
        parse_beat(datagram)


def test_a_wrong_address_is_a_usage_error(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        parse_arguments(["--echo", "10.0.0.1", "--out", "x"])
    assert ended.value.code == 2
    assert "IP:PORT" in capsys.readouterr().err


# ---- the program ----


def free_port(kind: socket.SocketKind) -> int:
    with socket.socket(socket.AF_INET, kind) as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


async def run_echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    try:
        while data := await reader.read(1000):
            writer.write(data)
        writer.close()
    except ConnectionError:
        pass


async def expect(process: asyncio.subprocess.Process, beginning: str) -> str:
    assert process.stdout is not None
    line = (await process.stdout.readline()).decode()
    assert line.startswith(beginning), line
    return line


async def order(process: asyncio.subprocess.Process, line: str) -> None:
    assert process.stdin is not None
    process.stdin.write(line.encode() + b"\n")
    await process.stdin.drain()


async def test_the_program_watches_marks_and_reports(tmp_path: Path) -> None:
    ack_port, beat_port = free_port(socket.SOCK_STREAM), free_port(socket.SOCK_DGRAM)
    server = await asyncio.start_server(run_echo, "127.0.0.1", 0)
    echo_port = server.sockets[0].getsockname()[1]
    arguments = ["--ack", str(ack_port), "--beat", str(beat_port), "--echo", f"127.0.0.1:{echo_port}"]
    arguments += ["--ping", "127.0.0.1", "--out", "report.json"]
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "kvmhv.lab.watch", *arguments),
        cwd=tmp_path,
        env={"PYTHONPATH": str(ROOT)},
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
    )
    await expect(process, "listening")
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as beats:
        beats.sendto(f"beat {BOOT} 1 5000000\n".encode(), ("127.0.0.1", beat_port))
        beats.sendto(b"something else", ("127.0.0.1", beat_port))
        reader, writer = await asyncio.open_connection("127.0.0.1", ack_port)
        writer.write(f"vda 1 9 0000000a data {BOOT}\nnonsense\nvda 1 9 0000000a data {BOOT}\n".encode())
        assert [await reader.readline() for _ in range(3)] == [b"1\n", b"2\n", b"3\n"]
        await expect(process, "ready")
        await order(process, "mark two")
        await expect(process, "marked two")
        beats.sendto(f"beat {BOOT} 3 15000000\n".encode(), ("127.0.0.1", beat_port))
    process.send_signal(10)
    await expect(process, "marked mark-2")
    # The connection breaks while the guest of this test still has half a line to send.
    writer.write(b"vda 2 9 0000000a da")
    writer.transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.close()
    await order(process, "snapshot")
    snapshot = json.loads(await expect(process, "{"))
    assert snapshot["total"]["acks"] == {"received": 1, "doubled": 1}
    assert snapshot["acks_malformed"] == 1
    assert snapshot["echo_broken"] is None
    await order(process, "quit")
    assert await process.wait() == 0
    server.close()
    report = json.loads((tmp_path / "report.json").read_text())
    assert [window["name"] for window in report["windows"]] == ["start", "ready", "two", "mark-2"]
    assert report["boot_ids"] == [BOOT]
    assert (report["total"]["beats"]["received"], report["total"]["beats"]["lost"]) == (2, 1)
    assert report["total"]["pings"]["received"] > 0
    assert report["total"]["echo"]["round_trips"] > 0
    assert (tmp_path / "report.json.acks").read_text() == f"vda 1 9 0000000a data {BOOT}\n"
