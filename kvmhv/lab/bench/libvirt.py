"""virsh between two libvirtd of the lab's hosts (lab/libvirt.py).

The control connection of a peer-to-peer migration goes over plain TCP on the management network; `--tls` is about
QEMU's own channels, for which the hosts have certificates.
"""

import subprocess
import time
from dataclasses import dataclass
from xml.sax.saxutils import escape

from kvmhv.errors import HostError
from kvmhv.lab.bench.machine import CPU_FEATURES, DIRECTORY, MACHINE, Hardware, make_disk
from kvmhv.lab.lab import LabHost

NAME = "virsh"
MOVE_S = 240.0


@dataclass(frozen=True)
class VirshMove:
    """What a move by virsh took."""

    wall_s: float
    cpu_s: float
    qemu_s: float


class VirshGuest:
    """A guest that libvirt runs and virsh moves."""

    def __init__(self, hardware: Hardware, host: LabHost) -> None:
        """Start the guest on `host`."""
        self.hardware = hardware
        self.host = host
        host.path(f"{DIRECTORY}/virsh.xml").write_text(domain_xml(hardware))
        host.exec(["virsh", "-q", "create", f"{DIRECTORY}/virsh.xml"])

    def end(self) -> None:
        """End the guest."""
        self.host.exec(["virsh", "-q", "destroy", NAME], check=False)

    def move(self, target: LabHost, ip: str, options: tuple[str, ...]) -> VirshMove:
        """Move the guest to `target` by one virsh command, which must succeed; `ip` is its migration address."""
        arguments = ["migrate", "--live", "--p2p", *options, "--domain", NAME]
        arguments += ["--desturi", f"qemu+tcp://{target.name}/system", "--migrateuri", f"tcp://{ip}"]
        if self.hardware.disk is not None:
            arguments += ["--copy-storage-all", "--disks-uri", f"tcp://{ip}"]
            # libvirt wants the image to be there, where no pool makes it; this is not counted.
            make_disk(target, self.hardware.disk, self._disk_mib(), full=False)
        argv = self.host.argv(["virsh", "-q", *arguments])
        started_s, cpu_s = time.monotonic(), children_cpu_s()
        done = subprocess.run(argv, capture_output=True, text=True, timeout=MOVE_S, check=False)
        wall_s = time.monotonic() - started_s
        cpu_s = children_cpu_s() - cpu_s
        if done.returncode:
            raise HostError("bench-step", f"virsh {' '.join(arguments)}: {done.stderr.strip()}")
        qemu_s = self._qemu_s(target)
        self.host = target
        return VirshMove(wall_s, cpu_s, qemu_s)

    def _disk_mib(self) -> int:
        argv = ["sh", "-c", f"qemu-img info -U --output=json {self.hardware.disk} | grep -m1 virtual-size"]
        return int(self.host.exec(argv).stdout.split(":")[1].strip(" ,\n")) >> 20

    def _qemu_s(self, target: LabHost) -> float:
        """Return what libvirt says the migration took, which includes its own preparations there."""
        listing = target.exec(["virsh", "-q", "domjobinfo", NAME, "--completed"], check=False).stdout
        for line in listing.splitlines():
            if line.startswith("Time elapsed:"):
                return float(line.split()[2]) / 1000
        return 0.0


def children_cpu_s() -> float:
    """Return the CPU seconds of the commands that this process has waited for."""
    import resource  # noqa: PLC0415

    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def domain_xml(hardware: Hardware) -> str:
    """Return libvirt's definition of the guest: the same machine, CPU and devices as the other ways have."""
    names = [name.replace("lahf-lm", "lahf_lm") for name in CPU_FEATURES]
    features = "".join(f'<feature policy="require" name="{name}"/>' for name in names)
    disk = ""
    if hardware.disk is not None:
        disk = (
            f'<disk type="file" device="disk"><driver name="qemu" type="qcow2" cache="none" io="threads"/>'
            f'<source file="{hardware.disk}"/><target dev="vda" bus="virtio"/></disk>'
        )
    return f"""<domain type="qemu">
  <name>{NAME}</name>
  <memory unit="MiB">{hardware.memory_mib}</memory>
  <vcpu>1</vcpu>
  <os>
    <type arch="x86_64" machine="{MACHINE}">hvm</type>
    <kernel>{DIRECTORY}/vmlinuz</kernel>
    <initrd>{DIRECTORY}/initrd</initrd>
    <cmdline>{escape(hardware.append)}</cmdline>
  </os>
  <features><acpi/></features>
  <cpu mode="custom" match="exact" check="none"><model fallback="forbid">qemu64</model>{features}</cpu>
  <on_reboot>restart</on_reboot>
  <devices>
    <emulator>/usr/bin/qemu-system-x86_64</emulator>
    <controller type="usb" model="none"/>
    {disk}
    <interface type="bridge">
      <source bridge="lan"/><mac address="{hardware.mac}"/><model type="virtio"/><driver name="qemu"/>
      <rom enabled="no"/>
    </interface>
    <serial type="file"><source path="{DIRECTORY}/virsh.console"/></serial>
    <memballoon model="virtio" freePageReporting="on"/>
    <rng model="virtio"><backend model="random">/dev/urandom</backend></rng>
  </devices>
</domain>
"""
