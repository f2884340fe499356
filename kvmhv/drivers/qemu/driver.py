"""`Qemu`: ports.Hypervisor over real QEMU processes."""

import asyncio
from collections.abc import Callable
from pathlib import Path

import msgspec

from kvmhv.config import Config
from kvmhv.drivers.qemu import argv, blocks, direct, exports, keys, memory, post_copy, probe, process, rundir, vm_facts
from kvmhv.drivers.qemu.argv import KernelPaths, Launch
from kvmhv.drivers.qemu.graph import layer_node
from kvmhv.drivers.qemu.instance import POST_COPY, Instance, marks
from kvmhv.drivers.qemu.nodes import check_inactive
from kvmhv.drivers.qemu.qmp import QmpLost
from kvmhv.drivers.qemu.rundir import VmDir
from kvmhv.drivers.qemu.send_queues import UNSENT_MAX_BYTES, SendQueues
from kvmhv.drivers.qemu.starts import Starts
from kvmhv.drivers.qemu.storage_moves import StorageMoves
from kvmhv.errors import HostError
from kvmhv.model import MIB, IncomingAddress, Plan, QemuInfo, Vm, VmFacts
from kvmhv.places import DiskPlace
from kvmhv.ports import Clock, EventSink, MemoryStats, MirrorStats, QemuEvent, RunState

GONE = "gone"
IDLE_MEMORY_BYTES = 32 * MIB
"""Of a QEMU that only copies disks."""


class Qemu(StorageMoves, post_copy.PostCopy):
    """QEMU processes of this host. One agent uses a run_dir at a time; QEMU outlives it and is found again."""

    def __init__(self, config: Config, clock: Clock, on_answer: Callable[[float], None] = lambda seconds: None) -> None:
        """Remember where things are; nothing is started. Raises HostError `run-dir-long`.

        `on_answer` hears how long each QMP command took.
        """
        rundir.check_run_path(config.run_path)
        self._config = config
        self._clock = clock
        self._on_answer = on_answer
        self._instances: dict[str, Instance] = {}
        self._sinks: list[EventSink] = []
        self._given_up: set[str] = set()
        self._adopting: asyncio.Task[None] | None = None
        self._probed: tuple[tuple[str, int], QemuInfo] | None = None
        self._accel_reason = "QEMU was not probed yet"
        self._probing = asyncio.Lock()
        self._starts = Starts()

    async def close(self) -> None:
        """Let go of every process and connection; all VMs run on."""
        for instance in self._instances.values():
            await instance.close()
        self._instances.clear()

    # --- the host

    async def probe(self) -> QemuInfo:
        """Ask the binary what it can do; asked again only when the binary changes."""
        async with self._probing:
            binary = probe.find_binary(self._config)
            key = (str(binary), binary.stat().st_mtime_ns)
            if self._probed is None or self._probed[0] != key:
                accel, self._accel_reason = await probe.accelerator(self._config, binary)
                self._probed = (key, await probe.ask(self._config, self._clock, binary, accel))
            return self._probed[1]

    def accel_reason(self) -> str:
        """Why KVM or TCG was chosen by the probe, in words."""
        return self._accel_reason

    # --- a VM's life

    async def start(
        self,
        vm: Vm,
        disk_paths: dict[str, tuple[DiskPlace, ...]],
        taps: dict[str, str],
        kernel_paths: KernelPaths | None = None,
    ) -> None:
        """Start the VM running; QMP answers when this returns."""
        await self._launch(await self._plan_launch(vm, disk_paths, taps, kernel_paths))

    async def start_idle(self, vm: Vm, disk_paths: dict[str, tuple[DiskPlace, ...]]) -> None:
        """Start a QEMU that has the VM's disks and never runs its guest; no error if it is there."""
        if vm.id not in await self.known():
            bare = msgspec.structs.replace(vm, memory_bytes=IDLE_MEMORY_BYTES, cpus=1, nics=(), kernel=None)
            launch = await self._plan_launch(bare, disk_paths, {}, None)
            await self._launch(msgspec.structs.replace(launch, paused=True))

    async def power_button(self, vm_id: str) -> None:
        """Press the ACPI power button."""
        await (await self._instance(vm_id)).qmp.execute("system_powerdown")

    async def kill(self, vm_id: str) -> None:
        """End the process and remove its directory; its logs stay under run_dir/ended."""
        await self._adopt()
        instance = self._instances.get(vm_id)
        if instance is None:
            self._directory(vm_id).remove()
            return
        await instance.kill()
        self._instances.pop(vm_id, None)

    async def wait_gone(self, vm_id: str, timeout_s: float) -> bool:
        """Wait for the process to end by itself; False when it has not in time."""
        await self._adopt()
        instance = self._instances.get(vm_id)
        return instance is None or await instance.process.wait_gone(timeout_s)

    async def state(self, vm_id: str) -> RunState:
        """Return what the process says now; never raises for a process that hangs or is gone."""
        await self._adopt()
        instance = self._instances.get(vm_id)
        return RunState(process=False) if instance is None else await instance.state()

    async def known(self) -> tuple[str, ...]:
        """Ids of the VMs that have a live process on this host, also ones that an earlier agent started."""
        await self._adopt()
        return tuple(sorted(vm_id for vm_id, instance in self._instances.items() if not instance.process.gone))

    async def cont(self, vm_id: str) -> float:
        """Let the guest run; returns the monotonic ms at which QEMU's RESUME arrived."""
        return await (await self._instance(vm_id)).cont()

    def on_event(self, sink: EventSink) -> None:
        """Every event of every VM's QEMU goes to `sink`, in order, from the event loop; it must return at once."""
        self._sinks.append(sink)

    def console_socket(self, vm_id: str) -> Path:
        """UNIX socket of the VM's serial console; one reader at a time."""
        return self._directory(vm_id).console_socket

    async def facts(self, vm: Vm, *, dirty_rate: bool, pages: bool) -> VmFacts:
        """Read what the check of a move needs from the running QEMU; a dirty rate takes the time to sample it."""
        methods = (await self.probe()).compressions if pages else None
        return await vm_facts.read(await self._instance(vm.id), vm, dirty_rate=dirty_rate, methods=methods)

    def has_open(self, vm_id: str, file: Path) -> bool:
        """Whether the VM's process has this very file open."""
        instance = self._instances.get(vm_id)
        return instance is not None and process.has_open(instance.process.pid, file)

    # --- target of a move

    async def start_incoming(
        self,
        vm: Vm,
        disk_paths: dict[str, tuple[DiskPlace, ...]],
        taps: dict[str, str],
        plan: Plan,
        psk_hex: str,
        export_disks: tuple[str, ...],
        kernel_paths: KernelPaths | None = None,
    ) -> IncomingAddress:
        """Start QEMU waiting for the move, listening under the key; after a failure no process is left."""
        arriving = {copy.disk: blocks.layers_arriving(copy) for copy in plan.disk_copies if copy.disk in export_disks}
        launch = await self._plan_launch(vm, disk_paths, taps, kernel_paths, incoming=True, arriving=arriving)
        instance = await self._launch(launch)
        try:
            return await self._listen(instance, launch, plan, psk_hex)
        except BaseException:
            await asyncio.shield(self._give_up(vm.id))
            raise

    async def unexport(self, vm_id: str) -> None:
        """End the NBD exports and their server."""
        instance = await self._instance(vm_id)
        async with instance.bounded("end the exports", self._config.limits.switchover_command_s):
            await exports.unexport(instance.qmp)

    # --- source of a move

    async def mirror(self, vm: Vm, plan: Plan, address: IncomingAddress, psk_hex: str) -> None:
        """Begin to copy every disk of the plan; returns when the first jobs run."""
        instance = await self._instance(vm.id)
        if address.disk_port is None:
            raise HostError("mirror-failed", f"{vm.name}: the target exports no disk", "try the move again")
        await keys.add(instance.qmp, instance.directory, "client", psk_hex)
        await instance.mirrors.close()
        instance.remember_peer(plan.target_address, address)
        to = plan, address.disk_port
        instance.mirrors = await blocks.begin(instance.qmp, instance.process, *to, self._config.waits)

    async def mirror_stats(self, vm_id: str) -> tuple[MirrorStats, ...]:
        """Progress of each disk over all its layers."""
        instance = await self._instance(vm_id)
        return await blocks.stats(instance.qmp, instance.mirrors)

    async def finish_mirrors(self, vm_id: str) -> None:
        """End ready mirrors in sync, without pivot. The guest is stopped."""
        instance = await self._instance(vm_id)
        async with instance.bounded("end the mirrors", self._config.limits.switchover_command_s):
            await blocks.finish(instance.qmp, tuple(instance.mirrors.disks))

    async def migrate(self, vm: Vm, plan: Plan, address: IncomingAddress, psk_hex: str) -> None:
        """Begin the memory migration."""
        instance = await self._instance(vm.id)
        if not instance.mirrors.disks:
            await keys.add(instance.qmp, instance.directory, "client", psk_hex)
        instance.remember_peer(plan.target_address, address)
        touched = await asyncio.to_thread(process.guest_memory_bytes, instance.process.pid, vm.memory_bytes)
        await memory.begin(instance.qmp, plan, address.memory_port, instance.cut, touched, self._config.waits)
        instance.may_send_bytes_per_s = plan.rule.bandwidth_bytes_per_s or memory.UNLIMITED_BYTES_PER_S
        if plan.rule.post_copy:  # it may be stopped while much remains: what is in the queue goes before its state
            instance.process.limit_unsent(plan.target_address, (address.memory_port,), UNSENT_MAX_BYTES)
            return
        instance.queues = SendQueues(
            instance.process,
            plan.target_address,
            (address.memory_port,),
            touched_bytes=touched,
            ratio=plan.channels.ratio,
        )

    async def memory_stats(self, vm_id: str) -> MemoryStats:
        """Return query-migrate; status `lost` when QMP does not answer in time."""
        instance = await self._instance(vm_id)
        stats = await memory.stats(instance.qmp, self._config.waits.memory_stats_s)
        if instance.queues is not None:
            sent = [one for one in self._instances.values() if one.queues is not None]
            instance.queues.fit(stats, alone=len(sent) == 1)
        sampled = await instance.dirty_sample.read(instance.qmp)
        return msgspec.structs.replace(stats, sampled_dirty_bytes_per_s=sampled)

    async def hold(self, vm_id: str, bytes_per_s: int | None) -> bool:
        """Send memory no faster than this, or as the plan says again; False where no running guest is sent."""
        return await (await self._instance(vm_id)).hold(bytes_per_s)

    async def throttle(self, vm_id: str, max_percent: int) -> None:
        """Let QEMU slow the guest's CPUs down, so far at most, more with each pass, until the migration ends."""
        await memory.throttle((await self._instance(vm_id)).qmp, max_percent)

    async def stop_guest(self, vm_id: str, *, post_copy: bool = False) -> None:
        """Lift the bandwidth cap, then `stop`; `post_copy`: and let the pages follow."""
        instance = await self._instance(vm_id)
        instance.guest_stops()
        async with instance.bounded("stop the guest", self._config.limits.switchover_command_s):
            await memory.stop(instance.qmp, post_copy=post_copy)

    async def continue_switchover(self, vm_id: str) -> None:
        """`migrate-continue` out of pre-switchover."""
        instance = await self._instance(vm_id)
        async with instance.bounded("switch over", self._config.limits.switchover_command_s):
            await instance.qmp.execute("migrate-continue", {"state": "pre-switchover"})

    async def undo_source(self, vm_id: str, timeout_s: float) -> str:
        """Cancel memory and mirrors, remove what the move added; does not `cont`. Also when QMP hangs.

        Returns `gone` if there is no process any more, and so nothing to undo.
        """
        await self._adopt()
        instance = self._instances.get(vm_id)
        if instance is None:
            return GONE
        try:
            if not (status := await self._undo(instance, timeout_s)).startswith(POST_COPY):
                return status
            await self.kill(vm_id)
            return GONE
        except QmpLost:
            if instance.process.gone:
                return GONE
            raise

    async def _undo(self, instance: Instance, timeout_s: float) -> str:
        qmp = instance.qmp
        await instance.mirrors.close()
        # The copies are of no use any more, and a target that hangs would hold them, and the guest's writes with them.
        await memory.yank(qmp, self._config.waits.yank_s, ("block-node",))
        status = await memory.cancel(qmp, timeout_s / 2, instance.cut, self._config.waits)
        await blocks.undo(qmp, timeout_s / 2)
        instance.mirrors = blocks.Mirrors()
        await keys.remove_object(qmp)
        instance.directory.remove_keys()
        instance.forget_peer()
        return status

    def _directory(self, vm_id: str) -> VmDir:
        return VmDir(self._config.run_path, vm_id)

    def _emit(self, event: QemuEvent) -> None:
        if event.name == "GONE":
            self._instances.pop(event.vm_id, None)
            if event.vm_id in self._given_up:
                return
        for sink in self._sinks:
            sink(event)

    async def _adopt(self) -> None:
        """Once: find the processes that an earlier agent left running."""
        if self._adopting is None:
            self._adopting = asyncio.create_task(self._adopt_now())
        await asyncio.shield(self._adopting)

    async def _adopt_now(self) -> None:
        for vm_id in rundir.vm_ids(self._config.run_path):
            directory = self._directory(vm_id)
            found = process.find(marks(directory))
            if found is not None:
                self._take(directory, found, process.arguments(found.pid))

    def _take(self, directory: VmDir, found: process.Process, arguments: list[str]) -> Instance:
        instance = Instance(
            directory,
            found,
            arguments,
            now_ms=self._clock.monotonic_ms,
            emit=self._emit,
            timeout_s=self._config.limits.qmp_timeout_s,
            waits=self._config.waits,
            on_answer=self._on_answer,
        )
        self._instances[directory.vm_id] = instance
        return instance

    async def _instance(self, vm_id: str) -> Instance:
        await self._adopt()
        instance = self._instances.get(vm_id)
        if instance is None:
            tail = self._directory(vm_id).log_tail()
            words = f"; QEMU's last words: {tail}" if tail else ""
            raise HostError("qemu-gone", f"VM {vm_id} has no running QEMU on this host{words}", "start the VM")
        return instance

    async def _plan_launch(
        self,
        vm: Vm,
        disk_paths: dict[str, tuple[DiskPlace, ...]],
        taps: dict[str, str],
        kernel_paths: KernelPaths | None,
        *,
        incoming: bool = False,
        arriving: dict[str, int] | None = None,
    ) -> Launch:
        info = await self.probe()
        return Launch(
            vm=vm,
            binary=info.binary,
            accel=info.accel,
            directory=self._directory(vm.id),
            disk_paths=disk_paths,
            taps=taps,
            kernel_paths=kernel_paths,
            incoming=incoming,
            arriving=arriving or {},
            buffered=await direct.buffered(disk_paths, self._config.waits.share_answer_s),
        )

    async def _launch(self, launch: Launch) -> Instance:
        """Start the process and wait for its QMP; after a failure it is gone."""
        await self._adopt()
        vm = launch.vm
        command = argv.build(launch)
        async with self._starts.turn():
            if vm.id in self._instances:
                raise HostError("qemu-runs", f"{vm.name} has a QEMU on this host already", "stop it first")
            launch.directory.make(incoming=launch.incoming)
            self._given_up.discard(vm.id)
            instance = self._take(launch.directory, process.start(command, launch.directory.qemu_log), command)
            if await instance.qmp.wait_connected(self._config.limits.qemu_start_s):
                return instance
        status, tail = instance.process.exit_status, launch.directory.log_tail()
        await asyncio.shield(self._give_up(vm.id))
        why = "does not answer; do its disks' servers?" if status is None else f"ended with status {status}: {tail}"
        raise HostError("qemu-start", f"{vm.name}: QEMU {why}", "mend what QEMU says and start it again")

    async def _give_up(self, vm_id: str) -> None:
        """End a QEMU that is of no use, without GONE: the caller is told why by an error, which says more."""
        self._given_up.add(vm_id)
        await self.kill(vm_id)

    async def _listen(self, instance: Instance, launch: Launch, plan: Plan, psk_hex: str) -> IncomingAddress:
        qmp, directory = instance.qmp, instance.directory
        ports = self._config.migration_ports
        await keys.add(qmp, directory, "server", psk_hex)
        await memory.set_capabilities(qmp, plan)
        await check_inactive(
            qmp, {layer_node(disk.name, 0) for disk in launch.vm.disks if not launch.arriving.get(disk.name)}
        )
        nodes, sealed = argv.arriving_nodes(launch)
        exports.remember_sealing(directory, sealed)
        disk_port = await exports.export(qmp, plan, ports, nodes) if nodes else None
        return IncomingAddress(memory_port=await memory.listen(qmp, plan, ports), disk_port=disk_port)
