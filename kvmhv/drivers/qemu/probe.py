"""What this host's QEMU can do, and whether KVM really works here.

A `/dev/kvm` that opens proves nothing: on a machine without vmx/svm (or with a broken nesting) guests hang on it. The
proof is a guest of three instructions that must end QEMU with its own exit status in time.
"""

import asyncio
import contextlib
import ctypes
import os
import shutil
import signal
import tempfile
from pathlib import Path
from typing import Any

from kvmhv.config import Config
from kvmhv.drivers.qemu import answers, process
from kvmhv.drivers.qemu.argv import X86_64_V2_FEATURES
from kvmhv.drivers.qemu.qmp import Qmp, QmpLog, QmpRefused
from kvmhv.drivers.qemu.rundir import read_tail
from kvmhv.errors import HostError
from kvmhv.model import DEFAULT_CPU, Accel, QemuInfo
from kvmhv.ports import Clock

DEFAULT_BINARY = "qemu-system-x86_64"
KVM_DEVICE = Path("/dev/kvm")
COMPRESSIONS = ("zstd", "zlib")
"""QEMU's ways to compress memory, the best first."""
POST_COPY = "postcopy-ram"
BALLOON = "virtio-balloon-pci"
FREE_PAGE_REPORTING = "free-page-reporting"
USERFAULTFD = 323
"""The number of the system call."""
DIES_S = 3.0
PROOF_ROM_BYTES = 64 * 1024
PROOF_PORT = 0xF4
PROOF_VALUE = 0x2A
PROOF_EXIT_STATUS = PROOF_VALUE << 1 | 1
"""isa-debug-exit: `exit((value << 1) | 1)`."""
RESET_VECTOR = 0xFFF0
"""Where an x86 CPU begins, 16 bytes below the end of the ROM."""


def proof_rom() -> bytes:
    """Return a firmware whose only act is to write PROOF_VALUE to PROOF_PORT: mov al, v; out p, al; hlt; jmp to hlt."""
    code = bytes((0xB0, PROOF_VALUE, 0xE6, PROOF_PORT, 0xF4, 0xEB, 0xFD))
    rom = bytearray(b"\xf4" * PROOF_ROM_BYTES)
    rom[RESET_VECTOR : RESET_VECTOR + len(code)] = code
    return bytes(rom)


def find_binary(config: Config) -> Path:
    """Return the QEMU binary. Raises HostError `qemu-missing`."""
    wanted = config.qemu_binary or DEFAULT_BINARY
    found = shutil.which(wanted)
    if found is None:
        raise HostError(
            "qemu-missing", f"there is no {wanted} on this host", "install qemu-system-x86 or set qemu_binary"
        )
    return Path(found)


async def accelerator(config: Config, binary: Path) -> tuple[Accel, str]:
    """Choose KVM where it really works, TCG elsewhere; returns why, in words.

    Raises HostError `kvm-missing` when the configuration insists on KVM and it does not work.
    """
    if config.accel == "tcg":
        return Accel.TCG, "TCG, because agent.toml says accel = tcg"
    why_not = await _why_not_kvm(binary, config.waits.kvm_proof_s)
    if not why_not:
        return Accel.KVM, "KVM: a tiny guest ran under it"
    if config.accel == "kvm":
        raise HostError("kvm-missing", f"agent.toml says accel = kvm, but {why_not}", "mend KVM or set accel = auto")
    return Accel.TCG, f"TCG, because {why_not}"


async def runs_a_guest(binary: Path, accel: Accel, timeout_s: float) -> str:
    """Run the proof guest under an accelerator; returns what is wrong, empty if it ran."""
    with tempfile.TemporaryDirectory(prefix="kvmhv-proof-") as directory:
        rom, log = Path(directory) / "rom", Path(directory) / "log"
        rom.write_bytes(proof_rom())
        argv = [str(binary), "-no-user-config", "-nodefaults", "-display", "none", "-machine", f"pc,accel={accel}"]
        argv += ["-m", "16M", "-bios", str(rom), "-no-reboot"]
        argv += ["-device", f"isa-debug-exit,iobase={PROOF_PORT:#x},iosize=1"]
        guest = process.start(argv, log)
        if await guest.wait_gone(timeout_s):
            if guest.exit_status == PROOF_EXIT_STATUS:
                return ""
            return f"QEMU ended with status {guest.exit_status}: {read_tail(log, 400).strip()}"
        await _kill(guest)
        return f"a tiny guest hung for {timeout_s:g} s"


async def ask(config: Config, clock: Clock, binary: Path, accel: Accel) -> QemuInfo:
    """Ask a QEMU without a guest what it knows. Raises HostError `qemu-start` or as QMP fails."""
    with tempfile.TemporaryDirectory(prefix="kvmhv-probe-") as directory:
        socket, log = Path(directory) / "qmp", Path(directory) / "log"
        argv = [str(binary), "-no-user-config", "-nodefaults", "-display", "none", "-machine", f"none,accel={accel}"]
        argv += [
            "-S",
            "-chardev",
            f"socket,id=qmp,path={socket},server=on,wait=off",
            "-mon",
            "chardev=qmp,mode=control",
        ]
        child = process.start(argv, log)
        qmp = Qmp(
            "the probe",
            child,
            socket,
            QmpLog(Path(directory) / "qmp.log", clock.monotonic_ms),
            now_ms=clock.monotonic_ms,
            deliver=lambda _event, _at_ms: None,
            tail=lambda: read_tail(log, 2048).strip(),
            timeout_s=config.limits.qmp_timeout_s,
            connect_s=config.waits.qmp_connect_s,
        )
        try:
            if not await qmp.wait_connected(config.limits.qemu_start_s):
                raise HostError("qemu-start", f"{binary} does not start: {read_tail(log, 2048)}", "try it by hand")
            return await _questions(qmp, binary, accel)
        finally:
            await qmp.close()
            await _kill(child)


async def _questions(qmp: Qmp, binary: Path, accel: Accel) -> QemuInfo:
    machines, cpus, capabilities, parameters, most, balloon = await qmp.together(
        ("query-machines", {}),
        ("query-cpu-definitions", {}),
        ("query-migrate-capabilities", {}),
        ("query-migrate-parameters", {}),
        ("query-cpu-model-expansion", {"type": "full", "model": {"name": "max"}}),
        ("device-list-properties", {"typename": BALLOON}),
    )
    types = qmp.read(tuple[answers.MachineType, ...], machines, "query-machines")
    known = qmp.read(tuple[answers.CpuDefinition, ...], cpus, "query-cpu-definitions")
    models = {cpu.name: cpu.unavailable_features for cpu in known if not cpu.deprecated}
    largest = qmp.read(answers.Expansion, most, "query-cpu-model-expansion")
    models[DEFAULT_CPU] = missing_features(largest.model.props)
    able = qmp.read(tuple[answers.Capability, ...], capabilities, "query-migrate-capabilities")
    of_balloon = qmp.read(tuple[answers.ObjectProperty, ...], balloon, "device-list-properties")
    compressions = [method for method in COMPRESSIONS if await _takes(qmp, method)]
    return QemuInfo(
        binary=str(binary),
        version=qmp.version,
        accel=accel,
        machines=tuple(sorted({name for machine in types for name in (machine.name, machine.alias) if name})),
        cpu_models=models,
        capabilities=tuple(sorted(entry.capability for entry in able)),
        parameters=tuple(sorted(qmp.read(dict[str, object], parameters, "query-migrate-parameters"))),
        compressions=tuple(compressions),
        post_copy=any(entry.capability == POST_COPY for entry in able) and _faults_for_users(),
        free_page_reporting=any(one.name == FREE_PAGE_REPORTING for one in of_balloon),
    )


def _faults_for_users() -> bool:
    """Whether the kernel lets a process fetch its missing pages itself: post-copy at the target needs it."""
    libc = ctypes.CDLL(None, use_errno=True)
    file = libc.syscall(USERFAULTFD, os.O_CLOEXEC)
    if file >= 0:
        os.close(file)
    return bool(file >= 0)


async def _takes(qmp: Qmp, method: str) -> bool:
    """Whether QEMU was built with a method: it refuses the word otherwise."""
    try:
        await qmp.execute("migrate-set-parameters", {"multifd-compression": method})
    except QmpRefused:
        return False
    return True


def missing_features(properties: dict[str, Any]) -> tuple[str, ...]:
    """Return the features of x86-64-v2 that the largest CPU of this host lacks."""
    return tuple(feature for feature in X86_64_V2_FEATURES if not properties.get(feature, False))


async def _why_not_kvm(binary: Path, proof_s: float) -> str:
    try:
        os.close(os.open(KVM_DEVICE, os.O_RDWR | os.O_CLOEXEC))
    except OSError as error:
        return f"{KVM_DEVICE} does not open: {error.strerror}"
    if not _cpu_virtualizes():
        # seen: a tiny guest runs there all the same, and Linux hangs
        return f"{KVM_DEVICE} opens, but the CPU has neither vmx nor svm (is nesting switched off?)"
    found = await runs_a_guest(binary, Accel.KVM, proof_s)
    return f"{KVM_DEVICE} opens, but {found}" if found else ""


def _cpu_virtualizes() -> bool:
    cpuinfo = Path("/proc/cpuinfo").read_text()
    flags = next((line for line in cpuinfo.splitlines() if line.startswith("flags")), "").split()
    return "vmx" in flags or "svm" in flags


async def _kill(child: process.Process) -> None:
    child.send(signal.SIGKILL)
    with contextlib.suppress(asyncio.CancelledError):
        await child.wait_gone(DIES_S)
    child.release()
