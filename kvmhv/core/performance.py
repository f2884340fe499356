"""How the memory travels: over how many channels, compressed by what, by what was measured of guest, CPU, link.

Hyper-V calls this the performance option. `tcpip` is one plain connection. `compression` sends over several, each with
a thread of its own that compresses, where that is faster than to send what there is; on a fast link, or with memory
that does not shrink, it is not, and then the memory travels as with `tcpip`. `smb` is one plain connection over all
migration networks of both hosts at once, by MPTCP. All are under TLS; that leaves RDMA out, which QEMU cannot encrypt.
"""

from collections.abc import Iterable

from kvmhv.core import addresses
from kvmhv.model import Channels, Finding, Inventory, PageSample, Severity

COMPRESSION = "compression"
SMB = "smb"

CHANNELS_MIN = 2
CHANNELS_MAX = 4
"""More than the threads that a host can spare for a move bring nothing."""
WORTH_IT = 1.1
"""So much faster it must be expected to be: the measurement is a sample."""
SHRINKS = 1.2
"""Where nobody knows the link, memory that becomes so much smaller is compressed, with the least CPU time."""
CAPABILITY = "multifd"
NETWORKS_MAX = 7
"""Beside the first: Linux makes no more than 8 ways of one connection."""


def capabilities(channels: Channels) -> tuple[str, ...]:
    """Return the QEMU capabilities that these channels need."""
    return (CAPABILITY,) if channels.count else ()


def methods(source: Inventory, target: Inventory) -> tuple[str, ...]:
    """Return the ways to compress that both QEMUs know."""
    if any(CAPABILITY not in host.qemu.capabilities for host in (source, target)):
        return ()
    return tuple(method for method in source.qemu.compressions if method in target.qemu.compressions)


def findings(option: str | None, source: Inventory, target: Inventory) -> Iterable[Finding]:
    """Return a warning where the option asks for what one of the hosts lacks."""
    if option == SMB:
        yield from _smb_findings(source, target)
    if option != COMPRESSION or methods(source, target):
        return
    lacking = source if not source.qemu.compressions else target
    yield Finding(
        id="compression-missing",
        severity=Severity.WARNING,
        object=COMPRESSION,
        host=lacking.host,
        text=f"QEMU {lacking.qemu.version_text} on {lacking.host} cannot compress memory as {source.host} and "
        f"{target.host} both could: it travels uncompressed",
        todo=f"install a QEMU with zstd on {lacking.host}",
    )


def _smb_findings(source: Inventory, target: Inventory) -> Iterable[Finding]:
    for host in (source, target):
        if not host.mptcp:
            yield Finding(
                id="mptcp-missing",
                severity=Severity.WARNING,
                object=SMB,
                host=host.host,
                text=f"the kernel of {host.host} has no MPTCP, or it is off: the move takes one network alone",
                todo=f"on {host.host}: sysctl net.mptcp.enabled=1, with a kernel that has it",
            )
    if not addresses.further(source.migration_addresses, target.migration_addresses):
        yield Finding(
            id="one-network",
            severity=Severity.WARNING,
            object=SMB,
            host=target.host,
            text=f"{source.host} and {target.host} have only one migration network in common: the move takes it alone",
            todo="name a second one in migration.networks on both hosts",
        )
    yield _no_rdma(source, target)


def _no_rdma(source: Inventory, target: Inventory) -> Finding:
    """Return why a move does not take RDMA, Hyper-V's SMB Direct: a host lacks it, or QEMU has no TLS over it."""
    lacking = [host.host for host in (source, target) if not host.rdma]
    if lacking:
        why = f"{' and '.join(lacking)} {'has' if len(lacking) == 1 else 'have'} no RDMA device"
    else:
        devices = ", ".join(f"{'+'.join(host.rdma)} on {host.host}" for host in (source, target))
        why = f"both hosts could ({devices}), but QEMU cannot encrypt what it sends that way"
    return Finding(
        id="rdma-not-used",
        severity=Severity.WARNING,
        object=SMB,
        host=lacking[0] if lacking else source.host,
        text=f"RDMA is not used: {why}; the move goes by TCP, under TLS",
        todo="nothing: by TCP the move takes each network that migration.networks lists, those of RDMA devices too",
    )


def more_networks(option: str, source: Inventory, target: Inventory) -> tuple[tuple[str, str], ...]:
    """Return (source's, target's) addresses in the further networks that a move takes as well."""
    if option != SMB or not (source.mptcp and target.mptcp):
        return ()
    pairs = addresses.further(source.migration_addresses, target.migration_addresses)
    return tuple((here.ip, there.ip) for here, there in pairs[:NETWORKS_MAX])


def choose(option: str, source: Inventory, target: Inventory, link_bytes_per_s: float | None) -> Channels:
    """Return the channels of a move; `link` is the most that earlier moves there sent in a second, None: unknown."""
    facts = source.facts_of_vm
    known = methods(source, target)
    samples = [sample for sample in facts.compression if sample.method in known] if facts else []
    if option != COMPRESSION or not samples:
        return Channels()
    cores = min(source.cpus, target.cpus)
    count = max(CHANNELS_MIN, min(CHANNELS_MAX, cores))
    threads = max(1, min(count, cores))

    def reached(sample: PageSample) -> float:
        """Memory in a second: what the threads compress, or what the link takes of it."""
        assert link_bytes_per_s is not None
        return min(sample.bytes_per_s * threads, link_bytes_per_s * sample.ratio)

    if link_bytes_per_s is None:
        small = [sample for sample in samples if sample.ratio >= SHRINKS]
        best = max(small, key=lambda sample: sample.bytes_per_s, default=None)
    else:
        best = max(samples, key=reached)
        if reached(best) < WORTH_IT * link_bytes_per_s:
            best = None
    if best is None:
        return Channels()
    return Channels(count=count, method=best.method, level=best.level, ratio=best.ratio)
