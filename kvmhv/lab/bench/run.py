"""The turns: every way moves its own guest over the same link, one after the other, round after round."""

import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

from kvmhv.errors import HostError, KvmhvError
from kvmhv.lab.bench import figures, meters
from kvmhv.lab.bench.cases import DOWNTIME_S, GUEST_NUMBERS, KVMHV, RAW, VIRSH, Case, Way
from kvmhv.lab.bench.extras import EXTRAS
from kvmhv.lab.bench.figures import Measured, Rounds
from kvmhv.lab.bench.libvirt import VirshGuest
from kvmhv.lab.bench.machine import furnish, hardware, make_disk, make_tap, shape, unshape
from kvmhv.lab.bench.pace import Pace
from kvmhv.lab.bench.product import KvmhvGuest, kvmhv
from kvmhv.lab.bench.raw import RawGuest
from kvmhv.lab.guest_images import ensure_guest_images
from kvmhv.lab.lab import Lab, LabHost
from kvmhv.lab.libvirt import Libvirt
from kvmhv.lab.plan import LIBVIRT_TREE, rate_bits_per_second
from kvmhv.lab.steps import Progress

RATED = ("migration", "management")
"""The networks that a case may give its rate."""
BEAT_PORTS = {RAW: 7161, VIRSH: 7162, KVMHV: 7163}
SETTLE_S = 0.6
WORKS_S = 90.0
BREAKS = (KvmhvError, subprocess.SubprocessError, OSError, LookupError, ValueError)
"""What may go wrong with a part: the others are measured all the same."""
_NOTHING: dict[str, Any] = {"comparisons": [], "own_comparisons": [], "failures": [], "cases": []}
AnyGuest = RawGuest | VirshGuest | KvmhvGuest


class Bench:
    """One run on one lab."""

    def __init__(self, lab: Lab, progress: Progress, pace: Pace) -> None:
        """Furnish the hosts and start libvirtd."""
        self.lab = lab
        self.progress = progress
        self.pace = pace
        self.hosts = (lab.host("host1"), lab.host("host2"))
        self.client = lab.host("client")
        self.images = ensure_guest_images(progress)
        psk_hex = secrets.token_hex(32)
        for host in self.hosts:
            furnish(host, self.images, psk_hex)
            make_tap(host, f"bench{GUEST_NUMBERS[RAW]}")
        progress("starting libvirtd on both hosts")
        self.libvirt = Libvirt(self.hosts)
        self.rounds: dict[str, Rounds] = {}
        self.failures: list[dict[str, str]] = []

    def versions(self) -> dict[str, str]:
        """Return the versions of what is compared."""
        qemu = self.hosts[0].exec(["qemu-system-x86_64", "--version"]).stdout.splitlines()[0]
        return {"qemu": qemu, "libvirt": self.libvirt.version(), "kernel": os.uname().release}

    def run_case(self, case: Case, rounds: int) -> None:
        """Make all moves of a case; a case that breaks is noted, and what was measured of it kept."""
        self.progress(f"{case.name}: {case.title}, {rounds} rounds, {case.moves(rounds)} moves")
        self.rounds[case.name] = {way.name: [] for way in case.ways}
        self.pace.begin(case.name)
        try:
            self._lay(case)
            with ExitStack() as guests:
                turns = {method: guests.enter_context(Turn(self, case, method)) for method in methods_of(case.ways)}
                self.pace.done(case.start_s() * len(turns))
                for number in range(rounds):
                    for way in case.turns(number):
                        measured = turns[way.method].move(way, number)
                        self.rounds[case.name][way.name].append(measured)
                        self.pace.done(case.move_s())
        except BREAKS as error:
            self.failures.append(_broke(case.name, error, self.progress))
        self.pace.end()

    def _lay(self, case: Case) -> None:
        """Give the networks of a case its rate, and no other a rate; kvmhv may use those, in their order."""
        subnets = [self.lab.plan.network(network).subnet for network in case.networks]
        for host in self.hosts:
            for network in RATED:
                if network in case.networks:
                    shape(host, network, case.rate)
                else:
                    unshape(host, network)
            kvmhv(self.lab, host.name, "host", "set", f"migration.networks={','.join(subnets)}")


class Turn:
    """One method's guest of a case: it stands still except when it is its turn."""

    def __init__(self, bench: Bench, case: Case, method: str) -> None:
        self.bench, self.case, self.method = bench, case, method
        client_ip = bench.client.plan.addresses["lan"]
        port = BEAT_PORTS[method]
        self.guest_ip = f"{client_ip.rsplit('.', 1)[0]}.{GUEST_NUMBERS[method]}"
        self.hardware = hardware(case.guest, method, bench.images.cmdline, port, client_ip)
        self.onlooker = meters.Onlooker(bench.client, port, self.guest_ip)
        self.guest: AnyGuest | None = None
        self.boot_id: str | None = None

    def __enter__(self) -> "Turn":
        """Start the guest, wait until it works, and let it stand."""
        first = self.bench.hosts[0]
        if self.hardware.disk is not None:
            make_disk(first, self.hardware.disk, self.case.guest.disk_mib, full=True)
            if self.method == RAW:
                make_disk(self.bench.hosts[1], self.hardware.disk, self.case.guest.disk_mib, full=False)
        try:
            self.guest = self._start(first)
            self.onlooker.wait_ready()
            self._wait_until_it_works()
            self._stand_still()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        """End the guest."""
        self._signal(signal.SIGCONT)
        if self.guest is not None:
            self.guest.end()
        self.onlooker.end()

    def _start(self, host: LabHost) -> AnyGuest:
        if self.method == RAW:
            return RawGuest(self.hardware, host)
        if self.method == VIRSH:
            return VirshGuest(self.hardware, host)
        return KvmhvGuest(self.hardware, host, (str(self.bench.images.vmlinuz), str(self.bench.images.initrd)))

    def _wait_until_it_works(self) -> None:
        """Wait until all of the working set was written."""
        deadline_s = time.monotonic() + WORKS_S
        while True:
            told = self._health()
            self.boot_id = told["boot_id"]
            if told["working_set_bytes"] and (told["dirty_passes"] or not self.case.guest.dirty_mib_per_s):
                return
            if time.monotonic() > deadline_s:
                raise HostError("bench-step", f"the guest of {self.method} does not work: {told}")
            time.sleep(0.5)

    def _health(self) -> dict[str, Any]:
        return meters.health(self.bench.client, self.guest_ip)

    def _stand_still(self) -> None:
        self.onlooker.look_away()
        self._signal(signal.SIGSTOP)

    def _signal(self, number: signal.Signals) -> None:
        for pid in meters.qemus(self.bench.hosts, self.method):
            os.kill(pid, number)

    def move(self, way: Way, number: int) -> Measured:
        """Let the guest go on, move it, look at it, and let it stand again."""
        assert self.guest is not None
        self._signal(signal.SIGCONT)
        self.onlooker.look_again()
        time.sleep(SETTLE_S)
        first, second = self.bench.hosts
        target = second if self.guest.host.name == first.name else first
        if self.method == RAW and self.hardware.disk is not None:
            make_disk(target, self.hardware.disk, self.case.guest.disk_mib, full=False)
        self.onlooker.mark(f"{way.name}-{number}")
        meter = meters.Meter(self.bench.hosts, self.method, self.case.networks)
        meter.begin()
        measured = self._move(way, target)
        wire_bytes, other_cpu_s, qemu_cpu_s = meter.end()
        time.sleep(SETTLE_S)
        if isinstance(self.guest, KvmhvGuest):
            measured["target_effects"] = self.guest.effects_here(measured["id"])
        seen = self.onlooker.window()
        wrong = meters.damage(self._health(), self.boot_id)
        if wrong is not None:
            raise HostError("bench-step", f"{way.label}: after the move {wrong}")
        self._stand_still()
        measured |= {
            "round": number,
            "blackout_ms": seen["beats"]["longest_gap_ms"],
            "beats_lost": seen["beats"]["lost"],
            "network_gap_ms": seen["pings"]["longest_gap_ms"],
            "wire_bytes": wire_bytes,
            "agent_cpu_s": other_cpu_s,
            "cpu_s": other_cpu_s + measured["command_cpu_s"],
            "qemu_cpu_s": qemu_cpu_s,
            "load": os.getloadavg()[0],
        }
        self.bench.progress(
            f"  {number + 1} {way.label}: {measured['wall_s']:.2f} s, blackout {measured['blackout_ms']:.0f} ms"
        )
        return measured

    def _move(self, way: Way, target: LabHost) -> Measured:
        ip = target.plan.addresses["migration"]
        if isinstance(self.guest, RawGuest):
            by_hand = self.guest.move(target, ip, tls=way.tls, own_rule=way.own_rule)
            return {
                "wall_s": by_hand.wall_s, "qemu_s": by_hand.qemu_s, "target_start_s": by_hand.target_start_s,
                "command_cpu_s": 0.0, "steps": by_hand.steps,
            }  # fmt: skip
        if isinstance(self.guest, VirshGuest):
            virsh = self.guest.move(target, ip, way.options)
            return {"wall_s": virsh.wall_s, "qemu_s": virsh.qemu_s, "command_cpu_s": virsh.cpu_s}
        assert isinstance(self.guest, KvmhvGuest)
        rule: tuple[str, ...] = ()
        if not way.own_rule:
            rule = ("--threshold", str(int(rate_bits_per_second(self.case.rate) / 8 * DOWNTIME_S)))
        ours = self.guest.move(target, (*way.options, *rule))
        times = {one["phase"]: one["seconds"] for one in ours.report["phases"]}
        return {
            "wall_s": ours.wall_s, "qemu_s": ours.qemu_s, "command_cpu_s": ours.cpu_s,
            "setup_s": times.get("setup", 0.0), "cleanup_s": times.get("cleanup", 0.0),
            "reported_blackout_ms": ours.report["blackout_ms"], "phases": times,
            "reported_network_gap_ms": ours.report["network_gap_ms"],
            "channels": ours.report["plan"]["channels"],
            "blackout_steps": ours.report.get("blackout_steps", []),
            "passes": len(ours.report["passes"]), "switchover": ours.report["switchover"],
            "agent_bytes": max(meters.resident_bytes(meters.agent_pid(host)) for host in self.bench.hosts),
            "around_s": ours.wall_s - sum(times.values()), "before_s": ours.before_s, "after_s": ours.after_s,
            "id": ours.report["id"], "effects": ours.report["effects"],
            "passes_s": [one["seconds"] for one in ours.report["passes"]],
        }  # fmt: skip


def methods_of(ways: Sequence[Way]) -> list[str]:
    """Return the methods of these ways, each once."""
    return list(dict.fromkeys(way.method for way in ways))


def cli_start_s(times: int = 7) -> list[float]:
    """Return how long `kvmhv --help` takes."""
    found = []
    for _ in range(times):
        started_s = time.monotonic()
        subprocess.run([sys.executable, "-m", "kvmhv", "--help"], stdout=subprocess.DEVNULL, check=True, timeout=20)
        found.append(time.monotonic() - started_s)
    return found


def expected_s(cases: Sequence[Case], rounds: int, extras: Sequence[str]) -> dict[str, float]:
    """Return about how long each part of a run takes."""
    found = {
        case.name: case.start_s() * len(methods_of(case.ways)) + case.move_s() * case.moves(rounds) for case in cases
    }
    return found | {name: EXTRAS[name].expected_s for name in extras}


def run(
    name: str, cases: Sequence[Case], rounds: int, progress: Progress, pace: Pace, *, extras: Sequence[str] = ()
) -> dict[str, Any]:
    """Run the benchmark on labs of its own; returns everything that was measured.

    `extras`: what else is measured, by its name in EXTRAS. What breaks is noted in `failures`, and the rest goes on.
    """
    started_s = time.time()
    load_before = os.getloadavg()[0]
    found = _compared(name, cases, rounds, progress, pace) if cases else dict(_NOTHING)
    start_s = figures.spread(cli_start_s())["median"]
    start = figures.limit("CLI start (kvmhv --help)", start_s, "s", 0.2)
    limits, details = [*found.pop("limits", ()), start], {}
    failures = [*found.pop("failures")]
    for extra in extras:
        pace.begin(extra)
        try:
            more, details[extra] = EXTRAS[extra].measure(name, progress)
            limits += more
        except BREAKS as error:
            failures.append(_broke(extra, error, progress))
        pace.end()
    return {
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(started_s)),
        "seconds": round(time.time() - started_s),
        "machine": {"cpus": os.cpu_count(), "load_before": load_before},
        "versions": found.pop("versions", {"kernel": os.uname().release}),
        "cli_start_s": start_s,
        "limits": limits,
        "failures": failures,
        "extras": details,
        **found,
    }


def _broke(part: str, error: Exception, progress: Progress) -> dict[str, str]:
    """Say at once that a part broke, and return what the result has of it."""
    progress(f"{part}: BROKE: {error}")
    return {"case": part, "error": str(error)}


def _compared(name: str, cases: Sequence[Case], rounds: int, progress: Progress, pace: Pace) -> dict[str, Any]:
    suites = {"host1": LIBVIRT_TREE, "host2": LIBVIRT_TREE}
    lab = Lab.up(name, rate=cases[0].rate, suites=suites, progress=progress)
    try:
        bench = Bench(lab, progress, pace)
        for case in cases:
            bench.run_case(case, rounds)
        versions = bench.versions()
    finally:
        lab.down()
    compared = [one for case in cases for one in figures.compare(case, bench.rounds[case.name])]
    return {
        "versions": versions,
        "comparisons": [one for one in compared if one["against"] != KVMHV],
        "own_comparisons": [one for one in compared if one["against"] == KVMHV],
        "limits": figures.limits(bench.rounds),
        "failures": bench.failures,
        "cases": [
            {
                "name": case.name,
                "title": case.title,
                "rate": case.rate,
                "ways": {way.name: way.label for way in case.ways},
                "moves": bench.rounds[case.name],
            }
            for case in cases
        ],
    }
