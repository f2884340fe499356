"""How true the figures of a move are: what kvmhv reports beside what others see, for as many moves as wanted.

    python -m tests.real.accuracy [--moves 20] [--guest boot|linux]

brings up a lab of its own. `boot`: the small guest prints a heartbeat every 2 ms, and a process that nothing delays
looks at both hosts' consoles; its silence is compared with the blackout. `linux`: a guest sends a frame every 2 ms, and
the switch between the hosts says when it came back; that is compared with the network gap. Prints a line a move, then
the median and the worst difference.
"""

import argparse
import contextlib
import os
import statistics
import struct
import subprocess
import sys
import tempfile
from pathlib import Path

from kvmhv.lab.guest_images import GuestImages, ensure_guest_images
from kvmhv.lab.lab import Lab
from tests.real.moving import Pair, Report, Side, until
from tests.real.observers import Sniffer

BEAT_MS = 2
BEAT_AT = 0x194
"""Where the boot guest's image has the time between two heartbeats (vm-images/README.md)."""
WATCH = r"""
import os, sys, time

files, sizes = sys.argv[1:], {}
try:
    os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(50))
except PermissionError:
    pass
print("looking", flush=True)
while True:
    now_ms = time.monotonic() * 1000
    for file in files:
        try:
            size = os.stat(file).st_size
        except FileNotFoundError:
            size = 0
        if size > sizes.get(file, 0):
            print(f"{now_ms:.3f} {files.index(file)}", flush=True)
        sizes[file] = size
    time.sleep(0.0003)
"""


class Consoles:
    """When a guest last said something on one host, and first on the other, in the clock that all hosts share."""

    def __init__(self, sides: tuple[Side, Side], vm_id: str, file: Path) -> None:
        logs = [str(side.file(f"/run/kvmhv/vm/{vm_id}/console.log")) for side in sides]
        self._file = file
        with file.open("wb") as seen:
            self._process = subprocess.Popen([sys.executable, "-c", WATCH, *logs], stdout=seen)
        until("somebody looks at the consoles", lambda: file.read_text().startswith("looking"))

    def end(self) -> tuple[float, float]:
        """End it; returns the last time of the first host and the first of the second."""
        self._process.terminate()
        self._process.wait()
        lines = [line.split() for line in self._file.read_text().split("\n")[1:-1]]
        times = [(float(at), which) for at, which in lines]
        return max(at for at, which in times if which == "0"), min(at for at, which in times if which == "1")


def say(text: str) -> None:
    """Print a line."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def told_and_resumed(pair: Pair, target: Side, report: Report) -> tuple[float, float]:
    """Return when the source was told to stop the guest and when the target ran it, as the report has it."""
    resumed_ms = target.qmp_event_ms(f"vm/{pair.vm_id}", "RESUME")
    return resumed_ms - report["blackout_ms"], resumed_ms


def beats_on_the_console(pair: Pair, moves: int, directory: Path) -> list[float]:
    """Move the boot guest; returns how far the reported blackouts are from its silence."""
    pair.boot(rate_bytes_per_s=4 << 20)
    pair.a.kvmhv("vm", "stop", "web01", "--force")
    image = pair.a.file(pair.a.show()["vm"]["disks"][0]["layers"][0]["path"].join(("/var/lib/kvmhv/disks/", "")))
    with image.open("r+b") as disk:
        disk.seek(BEAT_AT)
        disk.write(struct.pack("<I", BEAT_MS))
    pair.a.kvmhv("vm", "start", "web01")
    until("the guest beats", lambda: pair.a.console().count("beat") > 100)
    found = []
    for number in range(moves):
        source, target = pair.sides if number % 2 == 0 else pair.sides[::-1]
        consoles = Consoles((source, target), pair.vm_id, directory / "consoles")
        try:
            answer = source.move(target)
        finally:
            report = answer.json
            last_ms, first_ms = consoles.end()
        told_ms, resumed_ms = told_and_resumed(pair, target, report)
        steps = {step["name"]: step["at_ms"] for step in report["blackout_steps"]}
        silence_ms = first_ms - last_ms
        found.append(silence_ms - report["blackout_ms"])
        say(
            f"{number + 1:3} blackout {report['blackout_ms']:7.1f} silence {silence_ms:7.1f} "
            f"difference {found[-1]:+6.1f}"
            f" | stop: told, last word {last_ms - told_ms:+.1f}, `stopped` {steps['stopped']:.1f}"
            f" | run: first word {first_ms - resumed_ms:+.1f} after RESUME"
            f" (clocks ± {report['blackout_uncertainty_ms']:.1f}; load {os.getloadavg()[0]:.0f})"
        )
    return found


def frames_on_the_switch(pair: Pair, moves: int, directory: Path) -> list[float]:
    """Move the Linux guest; returns how far the reported network gaps are from what the switch saw."""
    client = pair.lab.host("client").plan.addresses["lan"]
    own = f"{client.rsplit('.', 1)[0]}.50"
    pair.a.sh("mkdir -p /srv")
    for file in (pair.images.vmlinuz, pair.images.initrd):
        pair.a.file(f"/srv/{file.name}").write_bytes(file.read_bytes())
    append = f"{pair.images.cmdline} kvmhv.ip={own}/24 kvmhv.beat={client}:7001@{BEAT_MS}ms"
    files = ("--kernel", "/srv/vmlinuz", "--initrd", "/srv/initrd", "--append", append)
    pair.a.kvmhv("image", "import", "linux", *files)
    pair.create("--image", "linux", "--switch", "lan", memory="128M")
    sniffer = Sniffer(pair.lab, pair.a.show()["vm"]["nics"][0]["mac"], directory / "frames")
    found = []
    try:
        until("the guest beats", lambda: (directory / "frames").read_text().count("\n") > 100)
        for number in range(moves):
            source, target = pair.sides if number % 2 == 0 else pair.sides[::-1]
            move_id = source.move(target).json["id"]
            until("the guest has said something", lambda: target.report(move_id)["network_gap_ms"] is not None)  # noqa: B023
            report = {**source.report(move_id), "network_gap_ms": target.report(move_id)["network_gap_ms"]}
            told_ms, resumed_ms = told_and_resumed(pair, target, report)
            last_ms, first_ms = sniffer.silence(told_ms, resumed_ms)
            found.append(first_ms - told_ms - report["network_gap_ms"])
            say(
                f"{number + 1:3} gap {report['network_gap_ms']:7.1f} switch {first_ms - told_ms:7.1f} difference "
                f"{found[-1]:+6.1f} | blackout {report['blackout_ms']:.1f}, silence {first_ms - last_ms:.1f}"
                f" | stop: told, last frame {last_ms - told_ms:+.1f}"
                f" | first frame {first_ms - resumed_ms:+.1f} after RESUME"
                f" (clocks ± {report['blackout_uncertainty_ms']:.1f}; load {os.getloadavg()[0]:.0f})"
            )
    finally:
        sniffer.end()
    return found


def main() -> int:
    """Run it; returns 0."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--moves", type=int, default=20)
    parser.add_argument("--guest", choices=("boot", "linux"), default="boot")
    wanted = parser.parse_args()
    images: GuestImages = ensure_guest_images(say)
    lab = Lab.up(f"accuracy-{os.getpid()}"[:20], progress=say)
    with contextlib.ExitStack() as ends:
        ends.callback(lab.down)
        directory = Path(ends.enter_context(tempfile.TemporaryDirectory()))
        run = beats_on_the_console if wanted.guest == "boot" else frames_on_the_switch
        found = run(Pair(lab, images), wanted.moves, directory)
        worst = max(found, key=abs)
        say(
            f"{len(found)} moves: difference {statistics.median(found):+.1f} ms in the median, {worst:+.1f} ms at worst"
        )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
