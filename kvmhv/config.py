"""The agent's configuration file (agent.toml), strict: an unknown key or a wrong type is an error that names it.

What an operator changes while the agent runs is a *setting* (`HostSettings`, `kvmhv host set`), kept in the database;
what must be known before it starts is *configuration* and stands in the file.
"""

import ipaddress
import re
import socket
import tomllib
from pathlib import Path
from typing import Annotated

import msgspec
from msgspec import Meta

from kvmhv.errors import CallerError
from kvmhv.model import COUNT_MAX, MIB, HostSettings, Timeouts, Wait

PORT = 6600
"""Hyper-V's port for live migration."""


class Limits(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Bounds of the agent itself."""

    vms: Annotated[int, Meta(ge=1, le=COUNT_MAX)] = 500
    peer_frame_bytes: Annotated[int, Meta(ge=65536, le=COUNT_MAX)] = 4 * MIB
    """Largest message between two agents."""
    request_bytes: Annotated[int, Meta(ge=4096, le=COUNT_MAX)] = 1 * MIB
    """Largest JSON body of the REST API (uploads of images have no such bound but the disk's)."""
    move_facts: Annotated[int, Meta(ge=100, le=COUNT_MAX)] = 10_000
    """Facts of one move that wait to be handled; beyond it the move fails."""
    moves_kept: Annotated[int, Meta(ge=10, le=COUNT_MAX)] = 1000
    """Records of ended moves that are kept."""
    queued_moves: Annotated[int, Meta(ge=1, le=COUNT_MAX)] = 100
    """Moves out of this host that wait for a slot."""
    tokens: Annotated[int, Meta(ge=1, le=COUNT_MAX)] = 100
    peers: Annotated[int, Meta(ge=1, le=COUNT_MAX)] = 200
    connections: Annotated[int, Meta(ge=10, le=COUNT_MAX)] = 500
    qmp_timeout_s: Wait = 20.0
    """A QMP command that QEMU answers at once unless it hangs."""
    switchover_command_s: Wait = 5.0
    """One that it is told while the guest stands still, but the run itself: beyond it the move is taken back."""
    qemu_start_s: Wait = 30.0
    io_stall_s: Wait = 10.0
    """A disk that answers nothing for so long while the guest waits for it is told of."""
    stop_grace_s: Wait = 60.0
    """ACPI power button until force, in `vm stop`."""


class Waits(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How long this host's agent waits for what is outside it, in seconds; then it is an error, or tried otherwise.

    What a move as a whole may take is in `Timeouts`.
    """

    qmp_connect_s: Wait = 5.0
    """QEMU's QMP socket takes a connection and greets; then it is tried again."""
    qemu_state_s: Wait = 5.0
    """QEMU says whether its guest runs."""
    qemu_quit_s: Wait = 3.0
    """QEMU ends when it is told to; then it is killed."""
    qemu_kill_s: Wait = 10.0
    """A killed QEMU is gone; then it is `qemu-unkillable`."""
    kvm_proof_s: Wait = 3.0
    """A tiny guest has run under KVM; then the host takes TCG."""
    memory_stats_s: Wait = 3.0
    """QEMU tells how far the memory is."""
    memory_cancel_s: Wait = 1.0
    """QEMU takes one word that ends the memory's migration; then its connections are cut."""
    yank_s: Wait = 2.0
    """QEMU cuts its connections itself, out of band."""
    pages_connect_s: Wait = 10.0
    """Post-copy: QEMU comes to a new connection of the pages; then it is tried again."""
    pages_end_s: Wait = 5.0
    """Post-copy: the last pages arrive of a source that is gone; then the guest is lost."""
    greeting_s: Wait = 5.0
    """The target's NBD server says its first word, before the source's QEMU is let at it."""
    handshake_s: Wait = 3.0
    """The target's QEMU answers the source's, whose guest stands still until then; then the connection is cut."""
    release_s: Wait = 15.0
    """QEMU takes the new images of a storage move."""
    cont_s: Wait = 30.0
    """A guest is let run before a move that has ended is put away."""
    peer_connect_s: Wait = 10.0
    """Another agent takes a connection; so long again for its first word."""
    peer_ask_s: Wait = 5.0
    """An agent that has refused a connection says whether it trusts this host."""
    source_silent_s: Wait = 5.0
    """A target that has lost its source waits for it; then it asks by itself."""
    slot_kept_s: Wait = 20.0
    """A slot of which a waiting move was told is kept for it."""
    proof_kept_s: Wait = 30.0
    """What was written to a shared location for another host to read is left there for it."""
    image_look_s: Wait = 30.0
    """qemu-img has read or written an image's header."""
    image_map_s: Wait = 600.0
    """qemu-img has listed all that an image has."""
    image_copy_s: Wait = 6 * 3600.0
    """A new disk's content is copied; a move's disks have `timeouts.storage_s`."""
    share_command_s: Wait = 8.0
    """An NFS, iSCSI or SMB server takes a connection; an NFS or iSCSI server answers one command."""
    share_answer_s: Wait = 12.0
    """A location answers a look, which may be several commands; then it is silent."""
    share_lock_s: Wait = 10.0
    """Another host lets an ownership record go, which it changes just now."""
    smb_silence_s: Wait = 15.0
    """An SMB server acknowledges what was sent to it; then a new connection is made."""
    smb_patience_s: Wait = 600.0
    """An SMB share in user space comes back; then requests of its VMs fail."""
    mount_s: Wait = 40.0
    unmount_s: Wait = 10.0
    locations_start_s: Wait = 5.0
    """The locations answer when the agent starts; then it starts without those that do not, and goes on trying."""
    netlink_s: Wait = 10.0
    """The kernel makes, finds or removes a tap or an address."""


class LibvirtSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Guests that libvirt runs. Without libvirt none of this matters."""

    uri: str = "qemu:///system"
    """This host's libvirt."""
    peer_uri: str = "qemu+tls://{host}/system"
    """How this host's libvirt reaches that of a target, `{host}` being its name."""
    encrypt: bool = True
    """Disks and memory travel under TLS where both hosts have certificates for QEMU."""
    certificates: str = "/etc/pki/qemu"
    """Where QEMU's certificates are: `migrate_tls_x509_cert_dir` in libvirt's qemu.conf."""
    image_dirs: tuple[str, ...] = ("/var/lib/libvirt/images",)
    """Where images of arriving disks may be made, beside the directories of libvirt's storage pools."""
    call_s: Wait = 20.0
    """libvirt answers a question."""
    look_s: Wait = 5.0
    """libvirt says where a domain is, at the end of a move; then that side is silent, and asked again."""
    act_s: Wait = 120.0
    """libvirt has started, stopped or changed a domain."""


class Config(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """agent.toml. Every key has a default that suits one host."""

    name: str = ""
    """The host's name, unique among the hosts that trust each other; empty: the machine's hostname."""
    listen: str = f"0.0.0.0:{PORT}"
    advertise: str = ""
    """`host:port` at which other hosts reach this agent; empty: the name and the port of `listen`."""
    state_dir: str = "/var/lib/kvmhv"
    run_dir: str = "/run/kvmhv"
    socket_group: str = "kvmhv"
    """Group that may use the UNIX socket (beside root); if it does not exist only root may."""
    qemu_binary: str = ""
    """Empty: `qemu-system-x86_64` in PATH."""
    accel: str = "auto"
    """`auto`, `kvm` or `tcg`."""
    switches: tuple[str, ...] = ()
    """Bridges that VMs may be attached to; empty: every bridge of the host."""
    locations: dict[str, str] = {}
    """Further places for disks: name -> directory. `default` is `state_dir`/disks unless given."""
    metrics_subnets: tuple[str, ...] = ()
    """Who may read /metrics without a certificate or token."""
    migration_networks: tuple[str, ...] = ()
    """Initial value of the setting migration.networks."""
    migration_ports: tuple[int, int] = (49152, 49215)
    log_format: str = "text"
    """`text` or `json`."""
    log_level: str = "info"
    limits: Limits = Limits()
    timeouts: Timeouts = Timeouts()
    waits: Waits = Waits()
    libvirt: LibvirtSettings = LibvirtSettings()

    @property
    def state_path(self) -> Path:
        """Directory of what must survive a reboot."""
        return Path(self.state_dir)

    @property
    def run_path(self) -> Path:
        """Directory of sockets and of what a reboot ends (on tmpfs)."""
        return Path(self.run_dir)

    @property
    def socket_path(self) -> Path:
        """The local UNIX socket."""
        return self.run_path / "agent.sock"


PROFILES: dict[str, int] = {"hyperv": 10, "hyperv-2012r2": 5}
"""Complete passes after which the guest is stopped (2008 R2 and the brief: 10; since 2012 R2: 5)."""

PERFORMANCE_OPTIONS = ("tcpip", "compression", "smb")

ON_OVERRUN = ("cancel", "throttle", "accept")
"""What can happen to a move whose blackout would be over its limit."""


def load(path: Path | None) -> Config:
    """Read and check the configuration file; None gives the defaults.

    Raises CallerError `config-invalid` naming the file and the key.
    """
    data: dict[str, object] = {}
    if path is not None:
        try:
            data = tomllib.loads(path.read_text())
        except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
            raise CallerError("config-invalid", f"{path}: {error}", "mend the file and start again") from error
    return from_data(data, where=str(path or "defaults"))


def from_data(data: dict[str, object], where: str) -> Config:
    """Check already parsed configuration. Raises CallerError `config-invalid`."""
    try:
        config = msgspec.convert(data, Config)
        if not config.name:
            config = msgspec.structs.replace(config, name=socket.gethostname().split(".")[0])
        host, port = split_address(config.listen)
        ipaddress.ip_address(host)
        if not config.advertise:
            config = msgspec.structs.replace(config, advertise=f"{config.name}:{port}")
        split_address(config.advertise)
        for subnet in config.metrics_subnets:
            ipaddress.ip_network(subnet)
        parse_networks(config.migration_networks)
        first, last = config.migration_ports
        if not 1024 <= first <= last <= 65535:
            raise ValueError("migration_ports: two ports between 1024 and 65535, the lower first")
        if config.accel not in ("auto", "kvm", "tcg"):
            raise ValueError("accel: auto, kvm or tcg")
        if config.log_format not in ("text", "json"):
            raise ValueError("log_format: text or json")
    except (msgspec.ValidationError, ValueError) as error:
        raise CallerError("config-invalid", f"{where}: {error}", "mend the file and start again") from error
    return config


def split_address(text: str) -> tuple[str, int]:
    """Split `host:port` or `[v6]:port`. Raises ValueError."""
    match = re.fullmatch(r"\[(?P<v6>[0-9a-fA-F:.]+)\]:(?P<p6>\d{1,5})|(?P<host>[^:\s]+):(?P<port>\d{1,5})", text)
    if match is None:
        raise ValueError(f"{text!r} is not host:port")
    port = int(match["p6"] or match["port"])
    if not 0 <= port <= 65535:
        raise ValueError(f"{text!r}: no such port")
    return match["v6"] or match["host"], port


def parse_networks(
    networks: tuple[str, ...],
) -> list[tuple[ipaddress.IPv4Network | ipaddress.IPv6Network, int]]:
    """Parse `subnet[@priority]` entries. Raises ValueError naming the entry."""
    result = []
    for entry in networks:
        subnet, _, priority = entry.partition("@")
        try:
            result.append((ipaddress.ip_network(subnet), int(priority or 0)))
        except ValueError as error:
            raise ValueError(f"network {entry!r}: {error}") from None
    return result


def change_settings(settings: HostSettings, changes: dict[str, str]) -> HostSettings:
    """Return the settings with `migration.KEY=VALUE` changes applied, all or none.

    Lists are comma separated; sizes are bytes or have a suffix (64M). Raises CallerError `setting-unknown` or
    `setting-invalid` naming the key.
    """
    values: dict[str, object] = msgspec.to_builtins(settings)
    for key, text in changes.items():
        field = key.removeprefix("migration.")
        if field not in values or not key.startswith("migration."):
            known = ", ".join(f"migration.{name}" for name in values)
            raise CallerError("setting-unknown", f"there is no setting {key!r}", f"the settings are: {known}")
        values[field] = _setting_value(field, values[field], text)
    try:
        changed = msgspec.convert(values, HostSettings, strict=False)
        parse_networks(changed.networks)
        for source in changed.sources:
            ipaddress.ip_network(source)
        if changed.profile not in PROFILES:
            raise ValueError(f"migration.profile: one of {', '.join(PROFILES)}")
        if changed.performance not in PERFORMANCE_OPTIONS:
            raise ValueError(f"migration.performance: one of {', '.join(PERFORMANCE_OPTIONS)}")
        if changed.on_overrun not in ON_OVERRUN:
            raise ValueError(f"migration.on_overrun: one of {', '.join(ON_OVERRUN)}")
    except (msgspec.ValidationError, ValueError) as error:
        text = str(error).replace("$.", "migration.")
        raise CallerError("setting-invalid", text, "docs/manual.md says which values a setting may have") from error
    return changed


def _setting_value(field: str, old: object, text: str) -> object:
    if isinstance(old, bool):
        if text.lower() not in ("true", "false", "yes", "no", "on", "off"):
            raise CallerError("setting-invalid", f"migration.{field}: {text!r} is not true or false")
        return text.lower() in ("true", "yes", "on")
    if isinstance(old, list | tuple):
        return [item.strip() for item in text.split(",") if item.strip()]
    if field.endswith(("_bytes", "_bytes_per_s")):
        return parse_size(text)
    return text


SIZE_UNITS = {"": 1, "B": 1, "K": 1024, "M": 1024**2, "G": 1024**3, "T": 1024**4}


def parse_size(text: str) -> int:
    """Parse `4096`, `64M`, `1.5G`, `10T` (powers of 1024; `MiB` and `MB` mean the same).

    Raises CallerError `size-invalid`.
    """
    match = re.fullmatch(r"(\d{1,18}(?:\.\d{1,6})?)\s*([BKMGT]?)(?:I?B)?", text.strip().upper())
    if match is None:
        raise CallerError(
            "size-invalid", f"{text!r} is not a size", "write bytes or a number with K, M, G or T, e.g. 256M"
        )
    return int(float(match[1]) * SIZE_UNITS[match[2]]) if "." in match[1] else int(match[1]) * SIZE_UNITS[match[2]]
