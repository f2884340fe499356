"""virsh between two libvirtd of the lab's hosts, started by hand as a distribution would start them.

libvirtd 11 as Debian has it, without systemd and cgroups. The control connection of a peer-to-peer migration goes over
plain TCP on the management network; `--tls` is about QEMU's own channels, for which the hosts have certificates.
"""

import subprocess
import time
from dataclasses import dataclass
from xml.sax.saxutils import escape

from kvmhv.errors import HostError
from kvmhv.lab.bench.machine import CPU_FEATURES, DIRECTORY, MACHINE, Hardware, make_disk
from kvmhv.lab.lab import LabHost

NAME = "virsh"
START_S = 60.0
MOVE_S = 240.0
LIBVIRTD_CONF = """
listen_tls = 0
listen_tcp = 1
listen_addr = "{address}"
auth_tcp = "none"
auth_unix_rw = "none"
unix_sock_group = "root"
host_uuid = "{uuid}"
"""
QEMU_CONF = """
cgroup_controllers = []
namespaces = []
security_driver = "none"
user = "root"
group = "root"
stdio_handler = "file"
remember_owner = 0
migrate_tls_x509_cert_dir = "/etc/pki/qemu"
migrate_tls_x509_verify = 0
nbd_tls_x509_cert_dir = "/etc/pki/qemu"
"""
CERTIFICATES = """
set -e
mkdir -p {out}; cd {out}
openssl req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=lab -keyout ca-key.pem -out ca-cert.pem \
    -addext basicConstraints=critical,CA:TRUE -addext keyUsage=critical,keyCertSign 2>/dev/null
for host in host1 host2; do
    openssl req -newkey rsa:2048 -nodes -subj /CN=$host -keyout $host-key.pem -out $host.csr 2>/dev/null
    printf 'subjectAltName=DNS:%s,IP:%s\\nextendedKeyUsage=serverAuth,clientAuth\\n' $host \
        $([ $host = host1 ] && echo {first} || echo {second}) > $host.ext
    openssl x509 -req -days 2 -in $host.csr -CA ca-cert.pem -CAkey ca-key.pem -CAcreateserial -extfile $host.ext \
        -out $host-cert.pem 2>/dev/null
done
"""


@dataclass(frozen=True)
class VirshMove:
    """What a move by virsh took."""

    wall_s: float
    cpu_s: float
    qemu_s: float


class Libvirt:
    """libvirtd on both hosts. Made once for a run; everything ends with the lab."""

    def __init__(self, hosts: tuple[LabHost, LabHost]) -> None:
        """Configure and start both; HostError `bench-step` when one does not answer."""
        self._hosts = hosts
        self._certify()
        for number, host in enumerate(hosts, 1):
            address = host.plan.addresses["management"]
            uuid = f"{number}0000000-0000-4000-8000-00000000000{number}"
            host.path("/etc/libvirt/libvirtd.conf").write_text(LIBVIRTD_CONF.format(address=address, uuid=uuid))
            host.path("/etc/libvirt/qemu.conf").write_text(QEMU_CONF)
            host.exec(["libvirtd", "--daemon", "--listen"], timeout_s=START_S)
        for host in hosts:
            self._wait(host)

    def version(self) -> str:
        """Return libvirt's version."""
        return self._hosts[0].exec(["virsh", "--version"]).stdout.strip()

    def _certify(self) -> None:
        """Give both hosts certificates of one authority, for QEMU's TLS."""
        first, second = (host.plan.addresses["migration"] for host in self._hosts)
        out = f"{DIRECTORY}/pki"
        maker = self._hosts[0]
        maker.exec(["sh", "-c", CERTIFICATES.format(out=out, first=first, second=second)], timeout_s=START_S)
        made = maker.path(out)
        for host in self._hosts:
            pki = host.path("/etc/pki/qemu")
            pki.mkdir(parents=True, exist_ok=True)
            (pki / "ca-cert.pem").write_bytes((made / "ca-cert.pem").read_bytes())
            for end in ("server", "client"):
                for part in ("cert", "key"):
                    content = (made / f"{host.name}-{part}.pem").read_bytes()
                    (pki / f"{end}-{part}.pem").write_bytes(content)

    def _wait(self, host: LabHost) -> None:
        deadline_s = time.monotonic() + START_S
        while host.exec(["virsh", "-q", "list"], check=False).returncode:
            if time.monotonic() > deadline_s:
                raise HostError("bench-step", f"libvirtd on {host.name} does not answer")
            time.sleep(0.1)


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
    <memballoon model="virtio"/>
    <rng model="virtio"><backend model="random">/dev/urandom</backend></rng>
  </devices>
</domain>
"""
