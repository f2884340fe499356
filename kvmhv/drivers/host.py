"""What the Linux host says of itself, and its clock."""

import os
import time
from pathlib import Path

RDMA_DEVICES = Path("/sys/class/infiniband")
"""Linux has all RDMA devices there, InfiniBand's and those of Ethernet cards (RoCE, iWARP)."""


class HostClock:
    """Implements ports.Clock."""

    def monotonic_ms(self) -> float:
        """Milliseconds that never go backward on this host."""
        return time.monotonic_ns() / 1e6

    def wall_s(self) -> float:
        """UNIX time, for people."""
        return time.time()


def boot_id() -> str:
    """Return the kernel's boot id: another one after each reboot."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def memory_available_bytes() -> int:
    """Return MemAvailable."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return 0


def cpu_vendor() -> str:
    """Return the CPU's vendor, e.g. GenuineIntel; empty where /proc/cpuinfo does not say."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("vendor_id"):
            return line.partition(":")[2].strip()
    return ""


def rdma_devices() -> tuple[str, ...]:
    """Return the names of this host's RDMA devices, as `rdma link` lists them; empty without one."""
    try:
        return tuple(sorted(device.name for device in RDMA_DEVICES.iterdir()))
    except OSError:
        return ()


def cpu_count() -> int:
    """Return the number of CPUs that this process may use."""
    return len(os.sched_getaffinity(0))
