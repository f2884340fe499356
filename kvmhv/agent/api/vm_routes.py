"""Routes of VMs: their life, and the serial console as a WebSocket."""

import asyncio
import contextlib
from pathlib import Path
from typing import Annotated

import msgspec
from aiohttp import WSMsgType, web
from msgspec import UNSET, Meta, UnsetType

from kvmhv.agent.api.route import Call, Query, Route
from kvmhv.agent.api.services import Services
from kvmhv.errors import HostError, Refused
from kvmhv.model import Struct, VmDetails, VmSpec, VmSummary

CONSOLE_CHUNK_BYTES = 16 * 1024
CONSOLE_HEARTBEAT_S = 20.0
CONSOLE_CONNECT_S = 5.0


class StartRequest(Struct, frozen=True, kw_only=True):
    """`take_over`: also if the disks belong to another host; only for one that is surely dead and stays so."""

    take_over: bool = False


class StopRequest(Struct, frozen=True, kw_only=True):
    """`force`: end it at once; `timeout_s`: ACPI power button until force (default: the agent's configuration)."""

    force: bool = False
    timeout_s: Annotated[float, Meta(ge=0, le=3600)] | None = None


class VmChanges(Struct, frozen=True, kw_only=True):
    """`probe`: what the source asks the guest while it moves: `ping:IP`, `tcp:IP:PORT`, `http://IP/...`; null: none.

    `free_page_reporting`: whether the guest reports what it frees; of a stopped VM. What is not there stays as it is.
    """

    probe: str | UnsetType | None = UNSET
    free_page_reporting: bool | UnsetType = UNSET


async def list_vms(api: Services, call: Call) -> tuple[VmSummary, ...]:
    """Answer GET /v1/vms."""
    return await api.vms.list()


async def create(api: Services, call: Call) -> VmDetails:
    """Answer POST /v1/vms."""
    return await api.vms.create(call.body)


async def show(api: Services, call: Call) -> VmDetails:
    """Answer GET /v1/vms/{name}."""
    details = await api.vms.show(call.path("name"))
    return msgspec.structs.replace(details, io_stalled=api.io_watch.of(details.vm.id))


async def change(api: Services, call: Call) -> VmDetails:
    """Answer PATCH /v1/vms/{name}."""
    body: VmChanges = call.body
    name = call.path("name")
    if body.free_page_reporting is not UNSET:
        await api.vm_settings.set_free_page_reporting(name, body.free_page_reporting)
    if body.probe is not UNSET:
        await api.vm_settings.set_probe(name, body.probe)
    return await api.vms.show(name)


async def remove(api: Services, call: Call) -> None:
    """Answer DELETE /v1/vms/{name}."""
    await api.vms.remove(call.path("name"), keep_disks=call.flag("keep_disks"))


async def start(api: Services, call: Call) -> VmDetails:
    """Answer POST /v1/vms/{name}/start."""
    body: StartRequest = call.body
    return await api.vms.start(call.path("name"), take_over=body.take_over)


async def stop(api: Services, call: Call) -> VmDetails:
    """Answer POST /v1/vms/{name}/stop."""
    body: StopRequest = call.body
    return await api.vms.stop(call.path("name"), force=body.force, timeout_s=body.timeout_s)


async def console(api: Services, call: Call) -> web.WebSocketResponse:
    """Answer GET /v1/vms/{name}/console: bytes both ways until either side ends."""
    name = call.path("name")
    path = await api.vms.console_socket(name)
    if path in api.open_consoles:
        raise Refused("console-busy", f"somebody has the console of {name!r} open", "end that first", http_status=409)
    api.open_consoles.add(path)
    try:
        return await _serve_console(path, call.request)
    finally:
        api.open_consoles.discard(path)


async def _serve_console(path: Path, request: web.Request) -> web.WebSocketResponse:
    reader, writer = await _connect(path)
    try:
        client = web.WebSocketResponse(heartbeat=CONSOLE_HEARTBEAT_S, max_msg_size=64 * 1024, decode_text=False)
        await client.prepare(request)
        outward = asyncio.create_task(_outward(reader, client))
        try:
            await _inward(client, writer)
        finally:
            outward.cancel()
            with contextlib.suppress(asyncio.CancelledError, OSError, RuntimeError):
                await outward
            await client.close()
        return client
    finally:
        writer.close()


async def _connect(path: Path) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    try:
        async with asyncio.timeout(CONSOLE_CONNECT_S):
            return await asyncio.open_unix_connection(path)
    except (OSError, TimeoutError) as error:
        raise HostError(
            "console", f"the console does not answer: {error}", "see `kvmhv vm show`: does the VM run?"
        ) from error


async def _outward(reader: asyncio.StreamReader, client: web.WebSocketResponse) -> None:
    while chunk := await reader.read(CONSOLE_CHUNK_BYTES):
        await client.send_bytes(chunk)
    await client.close()


async def _inward(client: web.WebSocketResponse, writer: asyncio.StreamWriter) -> None:
    async for message in client:
        if message.type not in (WSMsgType.BINARY, WSMsgType.TEXT):
            return
        writer.write(message.data)
        try:
            await writer.drain()
        except OSError:
            return


VM_ROUTES = (
    Route(method="GET", path="/v1/vms", doc="The VMs of this host.", handler=list_vms, response=tuple[VmSummary, ...]),
    Route(
        method="POST",
        path="/v1/vms",
        doc="Define a VM and make its disks.",
        handler=create,
        request=VmSpec,
        response=VmDetails,
        status=201,
    ),
    Route(method="GET", path="/v1/vms/{name}", doc="One VM.", handler=show, response=VmDetails),
    Route(
        method="PATCH",
        path="/v1/vms/{name}",
        doc="Change a VM: what its guest sees, only while it is stopped.",
        handler=change,
        request=VmChanges,
        response=VmDetails,
    ),
    Route(
        method="DELETE",
        path="/v1/vms/{name}",
        doc="Remove a stopped VM, and its disks.",
        handler=remove,
        query=(Query(name="keep_disks", doc="Leave its disks where they are.", type="boolean"),),
    ),
    Route(
        method="POST",
        path="/v1/vms/{name}/start",
        doc="Start a VM.",
        handler=start,
        request=StartRequest,
        body_optional=True,
        response=VmDetails,
    ),
    Route(
        method="POST",
        path="/v1/vms/{name}/stop",
        doc="Stop a VM: ACPI power button, then force.",
        handler=stop,
        request=StopRequest,
        body_optional=True,
        response=VmDetails,
    ),
    Route(
        method="GET",
        path="/v1/vms/{name}/console",
        doc="The serial console as a WebSocket: binary messages both ways.",
        handler=console,
        status=101,
    ),
)
