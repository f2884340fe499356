"""The one machine that all three ways give their guest, and the files that it needs on both hosts."""

import shutil
from dataclasses import dataclass

from kvmhv.lab.bench.cases import GUEST_NUMBERS, Guest
from kvmhv.lab.guest_images import GuestImages
from kvmhv.lab.lab import LabHost
from kvmhv.lab.plan import rate_bits_per_second

DIRECTORY = "/var/lib/kvmhv/bench"
MACHINE = "pc-q35-7.2"
CPU_FEATURES = ("cx16", "lahf-lm", "popcnt", "pni", "sse4.1", "sse4.2", "ssse3")
CPU_RAW = ",".join(["qemu64", *(f"+{name}" for name in CPU_FEATURES), "-svm"])


@dataclass(frozen=True)
class Hardware:
    """A guest's machine: what differs between the ways is the address of its network card, and its tap."""

    memory_mib: int
    append: str
    mac: str
    tap: str
    disk: str | None


def hardware(guest: Guest, method: str, cmdline: str, beat_port: int, client_ip: str) -> Hardware:
    """Return the machine of this guest for one of the ways."""
    number = GUEST_NUMBERS[method]
    return Hardware(
        memory_mib=guest.memory_mib,
        append=f"{cmdline} {guest.append(method, beat_port, client_ip)}",
        mac=f"52:54:00:00:00:{number:02x}",
        tap=f"bench{number}",
        disk=f"{DIRECTORY}/{method}.qcow2" if guest.disk_mib else None,
    )


def furnish(host: LabHost, images: GuestImages, psk_hex: str) -> None:
    """Put the kernel, the initrd and the key of the moves by hand on a host."""
    directory = host.path(DIRECTORY)
    (directory / "keys").mkdir(parents=True, exist_ok=True)
    for file in (images.vmlinuz, images.initrd):
        shutil.copy(file, directory / file.name)
    (directory / "keys" / "keys.psk").write_text(f"kvmhv:{psk_hex}\n")
    (directory / "keys" / "keys.psk").chmod(0o600)
    # Without it QEMU makes parameters of its own, 190 ms: who knows QMP knows that too.
    parameters = ["openssl", "genpkey", "-genparam", "-algorithm", "DH", "-pkeyopt", "group:ffdhe2048"]
    (directory / "keys" / "dh-params.pem").write_text(host.exec(parameters).stdout)


def make_tap(host: LabHost, tap: str) -> None:
    """Make a tap on the host's switch `lan`."""
    script = f"ip tuntap add {tap} mode tap && ip link set {tap} master lan up"
    host.exec(["sh", "-c", script])


def make_disk(host: LabHost, path: str, size_mib: int, *, full: bool) -> None:
    """Make an empty qcow2 image, or one whose every byte was written at random."""
    script = f"rm -f {path}; qemu-img create -q -f qcow2 {path} {size_mib}M"
    if full:
        script = (
            f"head -c {size_mib}M /dev/urandom > {path}.part && qemu-img convert -f raw -O qcow2 {path}.part {path}"
            f" && rm {path}.part"
        )
    host.exec(["sh", "-c", script], timeout_s=300)


def unshape(host: LabHost, device: str) -> None:
    """Let a host send to a network as fast as it can."""
    host.exec(["sh", "-c", f"tc qdisc del dev {device} root 2>/dev/null || true"])


def shape(host: LabHost, device: str, rate: str) -> None:
    """Give a host's sending side of a network its rate."""
    burst = max(64 * 1024, rate_bits_per_second(rate) // 8000)
    host.exec(
        ["tc", "qdisc", "replace", "dev", device, "root", "tbf", "rate", rate, "burst", str(burst), "latency", "50ms"]
    )
