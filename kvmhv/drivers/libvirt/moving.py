"""The source's side of libvirt's own move. Blocking: each runs in a thread (connection.py)."""

import contextlib
from pathlib import Path
from typing import Any

from kvmhv.drivers.libvirt.definition import domain_of
from kvmhv.drivers.libvirt.states import NO_JOB, Job, job_of
from kvmhv.model import MIB, Plan
from kvmhv.ports import MemoryStats, MirrorStats

DOWNTIME_MS = 1
"""libvirt's QEMU would switch over by itself as soon as it can in 300 ms; kvmhv's rule decides when, not that."""
MOST_MIB_PER_S = 1 << 20
CERTIFICATES = ("ca-cert.pem", "server-cert.pem", "server-key.pem", "client-cert.pem", "client-key.pem")
ENCRYPT = "tls"
"""Word of Plan.capabilities."""


def has_certificates(directory: Path) -> bool:
    """Whether QEMU has all that TLS needs, for both directions."""
    return all((directory / name).exists() for name in CERTIFICATES)


def move(library: Any, domain: Any, plan: Plan, peer_uri: str) -> None:
    """Move the domain peer to peer; returns or raises at the end, which proves nothing."""
    vm = plan.target_vm
    flags = (
        library.VIR_MIGRATE_LIVE
        | library.VIR_MIGRATE_PEER2PEER
        | library.VIR_MIGRATE_ABORT_ON_ERROR
        | library.VIR_MIGRATE_CHANGE_PROTECTION
    )
    host = _bracketed(plan.target_address)
    parameters: dict[str, Any] = {library.VIR_MIGRATE_PARAM_URI: f"tcp://{host}"}
    if domain_of(vm).persistent:
        flags |= library.VIR_MIGRATE_PERSIST_DEST | library.VIR_MIGRATE_UNDEFINE_SOURCE
    copied = [copy.disk for copy in plan.disk_copies]
    if copied:
        flags |= library.VIR_MIGRATE_NON_SHARED_DISK
        parameters[library.VIR_MIGRATE_PARAM_DISKS_URI] = f"tcp://{host}"
        parameters[library.VIR_MIGRATE_PARAM_MIGRATE_DISKS] = copied
    if len(copied) < len(vm.disks):
        # libvirt takes a directory of another kind than NFS for local; that both hosts see it is proven.
        flags |= library.VIR_MIGRATE_UNSAFE
    if ENCRYPT in plan.capabilities:
        flags |= library.VIR_MIGRATE_TLS
        parameters[library.VIR_MIGRATE_PARAM_TLS_DESTINATION] = plan.target_host
    if plan.rule.bandwidth_bytes_per_s:
        parameters[library.VIR_MIGRATE_PARAM_BANDWIDTH] = max(1, plan.rule.bandwidth_bytes_per_s // MIB)
    before_ms = domain.migrateGetMaxDowntime()
    domain.migrateSetMaxDowntime(DOWNTIME_MS)
    try:
        domain.migrateToURI3(peer_uri.format(host=plan.target_host), parameters, flags)
    except library.libvirtError:
        with contextlib.suppress(library.libvirtError):
            domain.migrateSetMaxDowntime(before_ms)
        raise


def progress(domain: Any) -> tuple[MemoryStats, MirrorStats]:
    """Return how far the move is: memory, and all disks together."""
    said: dict[str, Any] = domain.jobStats()
    memory = MemoryStats(
        status="active" if said.get("type", NO_JOB) != NO_JOB else "",
        transferred_bytes=said.get("memory_processed", 0),
        remaining_bytes=said.get("memory_remaining", 0),
        total_bytes=said.get("memory_total", 0),
        dirty_bytes_per_s=float(said.get("memory_dirty_rate", 0) * said.get("memory_page_size", 4096)),
        throughput_bytes_per_s=float(said.get("memory_bps", 0)),
        dirty_sync_count=said.get("memory_iteration", 0),
    )
    copied, total = said.get("disk_processed", 0), said.get("disk_total", 0)
    return memory, MirrorStats(disk="disks", copied_bytes=copied, total_bytes=total, ready=0 < total <= copied)


def stop(domain: Any) -> None:
    """Lift the cap and suspend the guest: libvirt lets it go on at the target by itself."""
    domain.migrateSetMaxSpeed(MOST_MIB_PER_S)
    domain.suspend()


def abort(library: Any, domain: Any) -> None:
    """End the move, if one is under way."""
    if job_of(library, domain) is Job.NONE:
        return
    try:
        domain.abortJob()
    except library.libvirtError as error:
        if error.get_error_code() != library.VIR_ERR_OPERATION_INVALID:
            raise  # it ended meanwhile, or is too far: whoever asks where the domain is learns which


def used_bytes(domain: Any) -> int:
    """Return how much memory the domain's process has touched, at most all of the guest's."""
    total_kib: int = domain.maxMemory()
    resident_kib: int = domain.memoryStats().get("rss", total_kib)
    return min(total_kib, resident_kib) * 1024


def _bracketed(address: str) -> str:
    return f"[{address}]" if ":" in address else address
