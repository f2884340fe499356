"""What a move did not have to send: told by its report, counted on the wire."""

import asyncio
import os
import socket

import msgspec
import pytest

from kvmhv.cli import move_html
from kvmhv.cli.move_report import draw_report
from kvmhv.core import plan, savings
from kvmhv.drivers.qemu.disk_wire import DiskWire
from kvmhv.drivers.qemu.process import Process
from kvmhv.model import GIB, MIB, DiskSaving, DiskSent, MoveRequest, Plan, Rule, Timeouts
from tests.cli_agent import report
from tests.sim import examples


def planned(used_bytes: int) -> Plan:
    """Return the plan for a disk of 4 GiB of which so much is stored."""
    moving = examples.vm()
    source = examples.inventory("host1", running=moving)
    assert source.facts_of_vm is not None
    used = {disk.name: used_bytes for disk in moving.disks}
    facts = msgspec.structs.replace(source.facts_of_vm, disk_used_bytes=used)
    source = msgspec.structs.replace(source, facts_of_vm=facts)
    request = MoveRequest(vm=moving.name, target="host2", include_storage=True)
    target = examples.inventory("host2", octet=2)
    return plan.make(moving, request, Rule(), Timeouts(), source, target)


def saving(used_bytes: int, sent_bytes: int | None) -> DiskSaving:
    """Return the saving of the plan's one disk."""
    (found,) = savings.of_disks(planned(used_bytes), (DiskSent(disk="disk0", sent_bytes=sent_bytes),))
    return found


def test_what_is_not_stored_and_what_is_zero_is_told_apart() -> None:
    found = saving(100 * MIB, 30 * MIB)
    assert (found.size_bytes, found.unallocated_bytes, found.zero_bytes) == (4 * GIB, 4 * GIB - 100 * MIB, 70 * MIB)


def test_a_guest_that_writes_meanwhile_makes_no_saving_negative() -> None:
    found = saving(5 * GIB, 6 * GIB)
    assert (found.unallocated_bytes, found.zero_bytes) == (0, 0)


def test_what_cannot_be_counted_is_not_told() -> None:
    found = saving(100 * MIB, None)
    assert (found.sent_bytes, found.zero_bytes, found.unallocated_bytes) == (None, None, 4 * GIB - 100 * MIB)


def test_before_the_disks_are_copied_there_is_no_saving() -> None:
    assert savings.of_disks(planned(MIB), ()) == ()
    assert savings.of_disks(None, (DiskSent(disk="disk0", sent_bytes=1),)) == ()


async def test_each_connection_belongs_to_the_disk_that_opened_it() -> None:
    sent = {7: 1000}
    wire = DiskWire(lambda: dict(sent))

    async def copy(disk: str, port: int) -> None:
        async with wire.opens(disk):
            await asyncio.sleep(0)
            sent[port] = 10 * port

    await asyncio.gather(copy("disk0", 100), copy("disk1", 200), copy("disk0", 300))
    wire.note()
    assert (wire.sent_bytes("disk0"), wire.sent_bytes("disk1")) == (4000, 2000)
    del sent[100]  # it has ended
    sent[300] = 5000
    wire.note()
    assert (wire.sent_bytes("disk0"), wire.sent_bytes("disk2")) == (6000, None)


async def test_without_a_look_nothing_is_known() -> None:
    wire = DiskWire(None)
    async with wire.opens("disk0"):
        pass
    wire.note()
    assert wire.sent_bytes("disk0") is None


async def test_a_process_tells_what_its_connections_have_sent() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname()) as client:
        port = server.getsockname()[1]
        with server.accept()[0] as other:
            client.sendall(bytes(12_345))
            other.recv(12_345, socket.MSG_WAITALL)
            process = Process(os.getpid(), os.pidfd_open(os.getpid()))
            try:
                assert process.sent_bytes("127.0.0.1", (port,)) == {client.getsockname()[1]: 12_345}
                assert process.sent_bytes("127.0.0.2", (port,)) == {}
            finally:
                process.release()


def test_the_count_of_zero_pages_only_grows_and_a_qemu_that_is_gone_tells_none() -> None:
    assert savings.of_memory(None, None) is None
    assert savings.of_memory(None, 0) == 0
    assert savings.of_memory(8, None) == 8
    assert savings.of_memory(8, 4) == 8
    assert savings.of_memory(8, 12) == 12


def test_page_and_terminal_show_zero_pages_where_they_are_known(capsys: pytest.CaptureFixture[str]) -> None:
    told = report(memory_zero_bytes=166 * MIB)
    assert "Zero pages" in move_html.page(told)
    assert "Zero pages" not in move_html.page(report())
    draw_report(told)
    assert "166 MiB, of each page a mark was sent" in capsys.readouterr().out
    draw_report(report())
    assert "zero pages" not in capsys.readouterr().out


def test_page_and_terminal_show_it() -> None:
    told = report(
        savings=(
            DiskSaving(
                disk="disk0", size_bytes=GIB, sent_bytes=None, base_bytes=0, unallocated_bytes=3, zero_bytes=None
            ),
        )
    )
    page = move_html.page(told)
    assert "What was sent of the disks" in page
    assert "What was sent of the disks" not in move_html.page(report())
