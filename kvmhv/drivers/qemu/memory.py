"""The memory migration over QMP: capabilities, parameters, start, progress, and the way out without a network.

Rules that were measured: `downtime-limit` 1 ms keeps QEMU from converging by itself; without return-path the source
says `completed` when the bytes are in its socket buffer; pause-before-switchover catches the race in which QEMU wins.
"""

import asyncio
import contextlib
from collections.abc import Callable

import msgspec

from kvmhv.config import Waits
from kvmhv.drivers.qemu.answers import Capability, Migration, YankInstance
from kvmhv.drivers.qemu.keys import TLS_OBJECT
from kvmhv.drivers.qemu.qmp import Command, Qmp, QmpLost, QmpRefused
from kvmhv.errors import HostError
from kvmhv.model import Channels, Plan
from kvmhv.ports import MemoryStats

ALWAYS = ("events", "return-path", "pause-before-switchover")
UNLIMITED_BYTES_PER_S = 1 << 40
DOWNTIME_LIMIT_MS = 1
QEMU_WINDOW_S = 0.1
"""QEMU measures its throughput, and keeps its limit, in windows of so long."""
MEASURING_BYTES_PER_S = 16 * 1024
"""Until QEMU has measured its first window; see `begin`."""
SMALL_BYTES = 64 << 20
"""A guest that has touched less memory than this may be sent within one window."""
MEASURING_SHARE = 8
"""Of a larger one no more than so much goes in the first window: little of what a guest touched is zero again."""
AUTO_CONVERGE = "auto-converge"
THROTTLE_STEP_PERCENT = 20
POLL_S = 0.02
EXIT_ON_ERROR_SINCE = (9, 1, 0)

IDLE = frozenset({"", "none", "completed", "failed", "cancelled"})
"""States of query-migrate in which no migration is on its way."""


def address(ip: str, port: int | str) -> str:
    """Return `ip:port` as QEMU's `tcp:` wants it; an IPv6 address is in brackets."""
    return f"[{ip}]:{port}" if ":" in ip else f"{ip}:{port}"


async def set_capabilities(qmp: Qmp, plan: Plan) -> None:
    """Switch on the plan's capabilities and ALWAYS, and everything else off: an earlier move may have left some on.

    Raises HostError `capability-missing` if this QEMU lacks one of them.
    """
    wanted = {*ALWAYS, *plan.capabilities}
    entries = await qmp.ask(tuple[Capability, ...], "query-migrate-capabilities")
    known = {entry.capability: entry.state for entry in entries}
    missing = sorted(wanted - known.keys())
    if missing:
        raise HostError(
            "capability-missing", f"this host's QEMU lacks {', '.join(missing)}", "use the same QEMU on both hosts"
        )
    changes = [
        {"capability": name, "state": name in wanted} for name, state in known.items() if state != (name in wanted)
    ]
    if changes:
        await qmp.execute("migrate-set-capabilities", {"capabilities": changes})


def channel_parameters(channels: Channels) -> dict[str, object]:
    """Return QEMU's parameters for these channels: the same on both sides."""
    if not channels.count:
        return {}
    found: dict[str, object] = {"multifd-channels": channels.count, "multifd-compression": channels.method}
    if channels.method != "none":
        found[f"multifd-{channels.method}-level"] = channels.level
    return found


async def listen(qmp: Qmp, plan: Plan, ports: tuple[int, int]) -> int:
    """Target: wait for the source under the key; returns the port, one of `ports`. Raises HostError if none is free."""
    parameters = {"tls-creds": TLS_OBJECT, "tls-hostname": "", **channel_parameters(plan.channels)}
    await qmp.execute("migrate-set-parameters", parameters)
    where = f"tcp:{address(plan.target_address, ports[0])},to={ports[1]}{_ways(plan)}"
    arguments: dict[str, object] = {"uri": where}
    if qmp.version >= EXIT_ON_ERROR_SINCE:
        arguments["exit-on-error"] = False
    await qmp.execute("migrate-incoming", arguments)
    answer = await qmp.ask(Migration, "query-migrate")
    for listens in answer.socket_address:
        if listens.type == "inet" and listens.port.isdecimal() and ports[0] <= int(listens.port) <= ports[1]:
            return int(listens.port)
    raise HostError("qemu-error", f"QEMU does not say where it listens: {answer}", "see the VM's qemu.log")


def _ways(plan: Plan) -> str:
    return ",mptcp=on" if plan.more_networks else ""


def measuring_bytes_per_s(touched_bytes: int, ratio: float = 1.0) -> int:
    """Return the limit until QEMU has measured its first window, by the memory that the guest has touched.

    `ratio`: how far it shrinks on its way, for QEMU counts what is on the wire.
    """
    if touched_bytes < SMALL_BYTES:
        return MEASURING_BYTES_PER_S
    return int(touched_bytes / ratio / MEASURING_SHARE / QEMU_WINDOW_S)


async def begin(qmp: Qmp, plan: Plan, port: int, cut: Callable[[], None], touched_bytes: int, waits: Waits) -> None:
    """Source: begin to send memory, of which the guest has touched so much. Raises HostError; then `undo` is due.

    While QEMU shakes hands its main loop and the guest stand still, so this is watched: if the target says nothing for
    `waits.handshake_s`, `cut` cuts the connections and the migration has failed.

    Until QEMU has measured its throughput for the first time, 100 ms after the start, it takes "nothing remains of this
    pass" for "nothing remains" and switches over, whatever the guest has dirtied meanwhile. A small guest on a fast
    network is sent in less, so the first pass is held back until then; a large one is held back only so far that its
    first pass cannot be over by then, which no network of a few Gbit/s feels.
    """
    await set_capabilities(qmp, plan)
    limit = plan.rule.bandwidth_bytes_per_s or UNLIMITED_BYTES_PER_S
    await qmp.execute(
        "migrate-set-parameters",
        {
            "max-bandwidth": min(limit, measuring_bytes_per_s(touched_bytes, plan.channels.ratio)),
            "downtime-limit": DOWNTIME_LIMIT_MS,
            "tls-creds": TLS_OBJECT,
            "tls-hostname": "",
            **channel_parameters(plan.channels),
            **throttle_parameters(plan),
            **({"max-postcopy-bandwidth": plan.rule.bandwidth_bytes_per_s} if plan.rule.post_copy else {}),
        },
    )
    await qmp.execute("migrate", {"uri": f"tcp:{address(plan.target_address, port)}{_ways(plan)}"})
    now_s = asyncio.get_running_loop().time
    deadline_s = now_s() + waits.handshake_s
    while now_s() < deadline_s:
        status = (await stats(qmp, waits.handshake_s)).status
        if status == "lost":
            cut()
            raise HostError("migrate-failed", "the target does not answer the handshake", "see whether its host hangs")
        if status != "setup":
            break
        # It may stay in setup for other reasons (storage that hangs); QMP answers, so the guest runs.
        await asyncio.sleep(POLL_S)
    deadline_s = now_s() + waits.memory_stats_s
    while now_s() < deadline_s:
        now = await stats(qmp, waits.memory_stats_s)
        if now.throughput_bytes_per_s > 0 or now.status not in ("setup", "active"):
            break
        await asyncio.sleep(POLL_S)
    await qmp.execute("migrate-set-parameters", {"max-bandwidth": limit})


def throttle_parameters(plan: Plan) -> dict[str, object]:
    """Return the parameters with which QEMU may slow the guest down, but as good as does not before `throttle`.

    The capability cannot be switched on while a migration runs.
    """
    if AUTO_CONVERGE not in plan.capabilities:
        return {}
    return {
        "throttle-trigger-threshold": 1,
        "cpu-throttle-initial": 1,
        "cpu-throttle-increment": 1,
        "max-cpu-throttle": 1,
    }


async def limit(qmp: Qmp, bytes_per_s: int) -> None:
    """Source: send no faster than this from now on."""
    await qmp.execute("migrate-set-parameters", {"max-bandwidth": bytes_per_s})


async def throttle(qmp: Qmp, max_percent: int) -> None:
    """Source: let QEMU slow the guest's CPUs down, by a step more after every other pass, to so much at most."""
    await qmp.execute(
        "migrate-set-parameters",
        {"cpu-throttle-increment": THROTTLE_STEP_PERCENT, "max-cpu-throttle": max_percent},
    )


async def stop(qmp: Qmp, *, post_copy: bool = False) -> None:
    """Source: lift the bandwidth cap and stop the guest; all commands are on their way at once.

    `post_copy`: QEMU goes to pre-switchover at once, and what remains of the memory follows the switchover.
    """
    follow: tuple[Command, ...] = (("migrate-start-postcopy", {}),) if post_copy else ()
    await qmp.together(
        ("migrate-set-parameters", {"max-bandwidth": UNLIMITED_BYTES_PER_S}),
        ("stop", {}),
        *follow,
    )


async def stats(qmp: Qmp, timeout_s: float) -> MemoryStats:
    """Return query-migrate flat; status `lost` when there is no answer."""
    try:
        answer = await qmp.ask(Migration, "query-migrate", timeout_s=timeout_s)
    except QmpLost as lost:
        return MemoryStats(status="lost", error=lost.message)
    ram = answer.ram
    return MemoryStats(
        status=answer.status,
        transferred_bytes=ram.transferred,
        remaining_bytes=ram.remaining,
        total_bytes=ram.total,
        dirty_bytes_per_s=float(ram.dirty_pages_rate * ram.page_size),
        throughput_bytes_per_s=ram.mbps * 1e6 / 8,
        dirty_sync_count=ram.dirty_sync_count,
        zero_bytes=ram.duplicate * ram.page_size,
        throttle_percent=answer.cpu_throttle_percentage,
        pages_bytes=ram.postcopy_bytes,
        pages_requests=ram.postcopy_requests,
        error=answer.error_desc,
    )


async def cancel(qmp: Qmp, timeout_s: float, cut: Callable[[], None], waits: Waits) -> str:
    """Cancel the migration; if QMP hangs, by out-of-band yank and by `cut`. Returns its final status.

    Raises QmpLost if even that does not end it within the time.
    """
    now_s = asyncio.get_running_loop().time
    deadline_s = now_s() + timeout_s
    status = (await stats(qmp, waits.memory_cancel_s)).status
    while status not in IDLE and not status.startswith("postcopy-"):  # that one QEMU does not cancel
        if now_s() > deadline_s:
            raise QmpLost("qemu-hangs", f"the migration does not end: it is {status}", "end the VM's QEMU by hand")
        try:
            if status == "lost":
                await yank(qmp, waits.yank_s)
                cut()
            elif status != "cancelling":
                await qmp.execute("migrate_cancel", timeout_s=waits.memory_cancel_s)
            await asyncio.sleep(POLL_S)
            status = (await stats(qmp, waits.memory_cancel_s)).status
        except QmpLost:
            status = "lost"
        except QmpRefused:
            # It ended by itself in between.
            status = (await stats(qmp, waits.memory_cancel_s)).status
    return status


async def yank(qmp: Qmp, timeout_s: float, kinds: tuple[str, ...] = ("migration", "block-node")) -> None:
    """Cut connections of migration and disks out of band, which works while QEMU's main loop hangs in one of them.

    No error if there is none, or QEMU does not even answer this: the caller looks at what it wanted to end.
    """
    with contextlib.suppress(QmpRefused, QmpLost):
        instances = await qmp.ask(tuple[YankInstance, ...], "query-yank", timeout_s=timeout_s, oob=True)
        chosen = [msgspec.to_builtins(entry) for entry in instances if entry.type in kinds]
        if chosen:
            await qmp.execute("yank", {"instances": chosen}, timeout_s=timeout_s, oob=True)
