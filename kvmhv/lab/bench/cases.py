"""What is compared: guests, links, ways to move, and which ratio has which target. Pure."""

from dataclasses import dataclass

from kvmhv.lab.plan import rate_bits_per_second

KVMHV, RAW, VIRSH = "kvmhv", "raw", "virsh"
GUEST_NUMBERS = {RAW: 61, VIRSH: 62, KVMHV: 63}
"""Each way has a guest of its own: last byte of its address in the network `lan`."""

DOWNTIME_S = 0.3
"""QEMU's and virsh's default rule: switch over when what remains can be sent in so long."""


@dataclass(frozen=True)
class Guest:
    """The Linux guest of `vm-images/` with its work; sizes in MiB."""

    memory_mib: int
    dirty_mib_per_s: int
    dirty_set_mib: int
    kind: str = "random"
    disk_mib: int = 0

    def append(self, method: str, beat_port: int, client_ip: str) -> str:
        """Return the guest's parameters on its kernel command line."""
        ip = f"{client_ip.rsplit('.', 1)[0]}.{GUEST_NUMBERS[method]}"
        words = [
            f"kvmhv.ip={ip}/24",
            f"kvmhv.dirty={self.dirty_mib_per_s}M" if self.dirty_mib_per_s else "kvmhv.dirty=0",
            f"kvmhv.dirty_set={self.dirty_set_mib}M",
            f"kvmhv.dirty_kind={self.kind}",
            f"kvmhv.beat={client_ip}:{beat_port}@2ms",
        ]
        if self.disk_mib:
            words += ["kvmhv.disk=/dev/vda", "kvmhv.disk_rate=50"]
        return " ".join(words)


@dataclass(frozen=True)
class Way:
    """One way to move a guest: a method with its options."""

    name: str
    method: str
    label: str
    tls: bool = True
    own_rule: bool = True
    """kvmhv's and raw's rule: stop at 1 MiB remaining or after ten passes. False: QEMU's 300 ms."""
    options: tuple[str, ...] = ()


@dataclass(frozen=True)
class Comparison:
    """A ratio that is looked at: the median over the rounds of `way`'s figure by `other`'s."""

    way: str
    other: str
    metric: str
    target: float | None = None
    """At most; None: shown without a target."""
    at_least: bool = False
    note: str = ""


@dataclass(frozen=True)
class Case:
    """One guest on one link, moved by several ways in turn."""

    name: str
    title: str
    guest: Guest
    rate: str
    ways: tuple[Way, ...]
    comparisons: tuple[Comparison, ...]
    in_quick: bool = True
    in_full: bool = True
    networks: tuple[str, ...] = ("migration",)
    """What memory may travel over, the first one alone where a way takes one; all of them have the rate."""

    def turns(self, number: int) -> tuple[Way, ...]:
        """Return the ways of a round, each round in another order: none is always first after a pause.

        What no target depends on is moved in every other round only.
        """
        wanted = {name for one in self.comparisons if one.target is not None for name in (one.way, one.other)}
        start = number % len(self.ways)
        ordered = (*self.ways[start:], *self.ways[:start])
        return tuple(way for way in ordered if way.name in wanted or number % 2 == 0)

    def moves(self, rounds: int) -> int:
        """Return how many moves so many rounds have."""
        return sum(len(self.turns(number)) for number in range(rounds))

    def start_s(self) -> float:
        """Return about how long it takes until one method's guest works."""
        return 12.0 + (self.guest.dirty_set_mib + self.guest.disk_mib) / 30

    def move_s(self) -> float:
        """Return about how long one move takes with all around it: by this it is told how much time is left."""
        memory_mib = min(self.guest.memory_mib, self.guest.dirty_set_mib + 80)
        mib_per_s = rate_bits_per_second(self.rate) / 8 / 2**20
        return 2.6 + (memory_mib + self.guest.disk_mib) / mib_per_s + 0.1 * self.guest.dirty_mib_per_s


OURS = Way("kvmhv", KVMHV, "kvmhv, defaults (TLS)")
OURS_300 = Way("kvmhv-300ms", KVMHV, "kvmhv (TLS), virsh's rule: what can be sent in 300 ms", own_rule=False)
BY_HAND = Way("raw", RAW, "QMP by hand, TLS, kvmhv's rule")
OURS_COMPRESSED = Way(
    "kvmhv-compression", KVMHV, "kvmhv --performance compression (TLS)", options=("--performance", "compression")
)
VIRSH_TLS = Way("virsh-tls", VIRSH, "virsh --live --p2p --tls", own_rule=False, options=("--tls",))
VIRSH_PLAIN = Way("virsh", VIRSH, "virsh --live --p2p, defaults (no TLS)", tls=False, own_rule=False)
VIRSH_PARALLEL = Way(
    "virsh-parallel", VIRSH, "virsh --tls --parallel (2)", own_rule=False,
    options=("--tls", "--parallel", "--parallel-connections", "2"),
)  # fmt: skip
VIRSH_ZSTD = Way(
    "virsh-zstd", VIRSH, "virsh --tls --parallel (2) --comp-methods zstd", own_rule=False,
    options=("--tls", "--parallel", "--parallel-connections", "2", "--compressed", "--comp-methods", "zstd"),
)  # fmt: skip
OURS_COMPRESSED_300 = Way(
    "kvmhv-compression-300ms", KVMHV, "kvmhv --performance compression (TLS), virsh's rule", own_rule=False,
    options=("--performance", "compression"),
)  # fmt: skip
OURS_SMB = Way("kvmhv-smb", KVMHV, "kvmhv --performance smb (TLS, two networks)", options=("--performance", "smb"))
VIRSH_TIMEOUT = Way(
    "virsh-timeout", VIRSH, "virsh --tls --timeout 10 (then suspended)", own_rule=False,
    options=("--tls", "--timeout", "10", "--timeout-suspend"),
)  # fmt: skip

SAME = "same TLS, one channel, same rule"
SAME_COPY = "same TLS, same rule, same copy mode"
BOTH_ZSTD = "same TLS and rule, both zstd over several channels"
DEFAULTS = "defaults against defaults: kvmhv encrypts, virsh does not"
OTHER_RULE = "each with its own rule; kvmhv sees that nothing shrinks and does not compress, virsh does"
TWO_CHANNELS = "same TLS and rule; virsh has two channels"
LIKE_WITH_LIKE = (
    Comparison("kvmhv", "raw", "wall_s", 1.05, note=SAME),
    Comparison("kvmhv", "raw", "blackout_ms", 1.10, note=SAME),
    Comparison("kvmhv", "raw", "network_gap_ms", note=SAME),
    Comparison("kvmhv-300ms", "virsh-tls", "wall_s", 0.80, note=SAME),
    Comparison("kvmhv-300ms", "virsh-tls", "blackout_ms", 0.75, note=SAME),
    Comparison("kvmhv-300ms", "virsh-tls", "network_gap_ms", note=SAME),
    Comparison("kvmhv", "virsh", "wall_s", note=DEFAULTS),
    Comparison("kvmhv", "virsh", "blackout_ms", note=DEFAULTS),
)
FIVE_WAYS = (BY_HAND, VIRSH_TLS, OURS_300, VIRSH_PLAIN, OURS)

IDLE = Case("idle-256", "256 MiB, idle, 1 Gbit/s", Guest(256, 0, 64), "1gbit", FIVE_WAYS, LIKE_WITH_LIKE)
BUSY = Case(
    "busy-256", "256 MiB, 20 MiB/s dirtied, 1 Gbit/s", Guest(256, 20, 64), "1gbit", FIVE_WAYS, LIKE_WITH_LIKE,
    in_full=False,
)  # fmt: skip
BUSY_SLOW = Case(
    "busy-256-slow", "256 MiB, 20 MiB/s dirtied, 400 Mbit/s", Guest(256, 20, 64), "400mbit",
    (*FIVE_WAYS, VIRSH_PARALLEL),
    (
        *LIKE_WITH_LIKE,
        Comparison("kvmhv-300ms", "virsh-parallel", "wall_s", note=TWO_CHANNELS),
        Comparison("kvmhv-300ms", "virsh-parallel", "blackout_ms", note=TWO_CHANNELS),
    ),
    in_quick=False,
)  # fmt: skip
LARGE = Case(
    "large-1g", "1 GiB, 20 MiB/s dirtied, 1 Gbit/s", Guest(1024, 20, 512), "1gbit",
    FIVE_WAYS, LIKE_WITH_LIKE, in_quick=False,
)  # fmt: skip
FIERCE = Case(
    "fierce-1g", "1 GiB, 100 MiB/s dirtied, 1 Gbit/s", Guest(1024, 100, 256), "1gbit",
    (BY_HAND, VIRSH_TIMEOUT, OURS),
    (
        Comparison("kvmhv", "raw", "wall_s", 1.05, note=SAME),
        Comparison("kvmhv", "raw", "blackout_ms", 1.10, note=SAME),
        Comparison("kvmhv", "virsh-timeout", "wall_s", note="different rules: ten passes against 10 s, then suspended"),
        Comparison("kvmhv", "virsh-timeout", "blackout_ms", note="different rules: ten passes against 10 s"),
    ),
    in_quick=False,
)  # fmt: skip
DISK = Case(
    "disk-1g", "256 MiB and a full 1 GiB disk that is written to, 1 Gbit/s", Guest(256, 0, 32, disk_mib=1024), "1gbit",
    (BY_HAND, VIRSH_TLS, OURS_300, OURS),
    (
        Comparison("kvmhv", "raw", "wall_s", 1.05, note=SAME_COPY),
        Comparison("kvmhv", "raw", "blackout_ms", 1.10, note=SAME_COPY),
        Comparison("kvmhv-300ms", "virsh-tls", "wall_s", 0.90, note="same TLS, same rule; virsh: --copy-storage-all"),
        Comparison("kvmhv-300ms", "virsh-tls", "blackout_ms", 0.75, note="same TLS, same rule"),
        Comparison("kvmhv-300ms", "virsh-tls", "qemu_s", note="disk and memory alone, without what is around them"),
    ),
    in_quick=False,
)  # fmt: skip
AGAINST_ZSTD = (
    Comparison("kvmhv-compression-300ms", "virsh-zstd", "wall_s", note=BOTH_ZSTD),
    Comparison("kvmhv-compression-300ms", "virsh-zstd", "blackout_ms", note=BOTH_ZSTD),
    Comparison("kvmhv-compression-300ms", "virsh-zstd", "wire_bytes", note=BOTH_ZSTD),
)
COMPRESSIBLE = Case(
    "compressible", "256 MiB of compressible memory, 5 MiB/s dirtied, 400 Mbit/s", Guest(256, 5, 128, "compressible"),
    "400mbit", (OURS, OURS_COMPRESSED, VIRSH_ZSTD, OURS_COMPRESSED_300),
    (
        Comparison("kvmhv", "kvmhv-compression", "wall_s", 2.0, at_least=True, note="so many times faster"),
        Comparison("kvmhv", "kvmhv-compression", "wire_bytes", note="so many times less on the wire"),
        Comparison("kvmhv-compression", "kvmhv", "blackout_ms", note="the blackout of a compressed move"),
        *AGAINST_ZSTD,
    ),
)  # fmt: skip
INCOMPRESSIBLE = Case(
    "incompressible", "256 MiB of random memory, 5 MiB/s dirtied, 400 Mbit/s", Guest(256, 5, 128), "400mbit",
    (OURS, OURS_COMPRESSED, VIRSH_ZSTD),
    (
        Comparison("kvmhv-compression", "kvmhv", "wall_s", 1.05, note="where nothing shrinks, nothing may be lost"),
        Comparison("kvmhv-compression", "virsh-zstd", "wall_s", note=OTHER_RULE),
        Comparison("kvmhv-compression", "virsh-zstd", "blackout_ms", note=OTHER_RULE),
    ),
    in_quick=False,
)  # fmt: skip
TWO_LINKS = Case(
    "two-links", "1 GiB, 640 MiB of it in use, two networks of 300 Mbit/s", Guest(1024, 0, 560), "300mbit",
    (OURS, OURS_SMB),
    (
        Comparison("kvmhv", "kvmhv-smb", "wall_s", 1.8, at_least=True, note="so many times faster than over one link"),
        Comparison("kvmhv", "kvmhv-smb", "qemu_s", note="the memory alone"),
    ),
    in_quick=False, networks=("migration", "management"),
)  # fmt: skip
CASES = (IDLE, BUSY, BUSY_SLOW, LARGE, FIERCE, DISK, COMPRESSIBLE, INCOMPRESSIBLE, TWO_LINKS)
