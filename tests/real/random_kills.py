"""Kills at random moments, for as many rounds as wanted; a seed brings the same rounds again (the moments as near as a
busy machine allows).

    python -m tests.real.random_kills [--rounds 60] [--minutes M] [--seed N] [--vms 3]

brings up a lab of its own. Each round moves all VMs at once, kills something at a random moment (or breaks a move's
connections, or freezes a host), mends it, and asks what every user asks: does each VM run once, and where both agents
say that it does; are its writes there; could it go on (after an agent's restart within 5 s, or it is told)? No round
begins after M minutes. Exit status 1: something was not so.
"""

import argparse
import os
import random
import signal
import sys
import time
import traceback
from collections import Counter
from pathlib import Path

from kvmhv.config import PORT
from kvmhv.lab.guest_images import ensure_guest_images
from kvmhv.lab.lab import Lab
from tests.real.faults import DISK, MEMORY
from tests.real.moving import Side, until
from tests.real.rehearsal import held_agents
from tests.real.stage import Player, Stage, break_tcp

LATEST_S = 7.0
"""A slow move takes some 4 s on a quiet machine."""
AGENT_PAUSE_S = 5.0
FROZEN_S = 12.0
"""Longer than the patience of the hosts that are left (rehearsal.py)."""
KILLS = (
    "source agent",
    "target agent",
    "both agents",
    "source QEMU",
    "target QEMU",
    "source host",
    "target host",
    "both hosts",
    "memory link",
    "disk link",
    "control link",
    "source freeze",
    "target freeze",
)


def say(text: str) -> None:
    """Print a line."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


class Round:
    """One round: move everybody, kill, mend, look."""

    def __init__(self, stage: Stage, homes: dict[str, Side], kill: str, after_s: float) -> None:
        self.stage, self.homes, self.kill, self.after_s = stage, homes, kill, after_s
        self.source = homes[stage.players[0].name]
        self.target = stage.b if self.source is stage.a else stage.a

    def play(self) -> None:
        """Raises AssertionError: what a user would call a catastrophe, or a nuisance."""
        for player in self.stage.players:
            self.stage.begin(player, self.source, self.target)
        time.sleep(self.after_s)
        self._strike()
        for player in self.stage.players:
            self._settle(player)

    def _strike(self) -> None:
        whose, what = self.kill.split()
        sides = {"source": [self.source], "target": [self.target]}.get(whose, [self.source, self.target])
        if what == "QEMU":
            for player in self.stage.players:
                self.stage.signal(sides[0], player, signal.SIGKILL)
        elif what.startswith("agent"):
            for side in sides:
                side.host.agent_kill()
            for side in sides:
                side.host.agent_wait()
            self._goes_on()
        elif what == "link":
            self._break(whose)
        elif what == "freeze":
            sides[0].host.freeze()
            time.sleep(FROZEN_S)
            sides[0].host.thaw()
        else:
            self.stage.witness.look()
            for side in sides:
                side.host.kill()
            self.stage.witness.look()
            for side in sides:
                side.host.boot()

    def _break(self, which: str) -> None:
        """Break every connection of that kind that is there now."""
        if which == "control":
            broken = break_tcp(self.stage.agent(self.source), PORT)
        else:
            kind = MEMORY if which == "memory" else DISK
            broken = sum(self.stage.break_connections(player, kind, self.source) for player in self.stage.players)
        say(f"    {broken} connections broken")

    def _goes_on(self) -> None:
        """After an agent's death each guest is heard soon, or its move is decided."""
        began_s = time.monotonic()
        waiting = {player.name: self.stage.witness.beats(player.id) for player in self.stage.players}
        while waiting and time.monotonic() < began_s + 60:
            for player in self.stage.players:
                heard = self.stage.witness.beats(player.id) > waiting.get(player.name, 1 << 60)
                if player.name in waiting and (heard or "running" not in self.stage.outcomes(player)):
                    del waiting[player.name]
            time.sleep(0.02)
        took_s = time.monotonic() - began_s
        say(f"    goes on {took_s:.1f} s after the agents' restart{'' if took_s < AGENT_PAUSE_S else ' (LATE)'}")

    def _settle(self, player: Player) -> None:
        def ended() -> bool:
            outcomes = self.stage.outcomes(player, (self.source, self.target))
            if outcomes == ("needs-operator", "needs-operator"):
                self.stage.resolve(self.source, player)
            return outcomes in (("failed", "failed"), ("done", "done"), ("failed", "unknown"))

        until(f"{player.name} is settled", ended, 90)
        moved = self.stage.outcomes(player, (self.source, self.target))[0] == "done"
        home, other = (self.target, self.source) if moved else (self.source, self.target)
        self.homes[player.name] = home
        states = self.stage.state(home, player), self.stage.state(other, player)
        assert states[1] == "absent", (player, states)
        may_be_off = self.kill.split()[1] in ("QEMU", "host", "hosts")
        assert states[0] == "running" or (may_be_off and states[0] == "crashed"), (player, states)
        if states[0] == "crashed":
            self.stage.verify_disks(home, player)
            self.stage.call(home, "POST", f"vms/{player.name}/start")
            player.boots += 1
        assert self.stage.runs(home, player), f"{player.name} is silent on {home.name}"
        assert self.stage.copies(player) == [home.name], player
        self.stage.witness.check(player.id, player.boots)

    def gather(self) -> None:
        """Bring everybody to one host for the next round; moves that nothing disturbs must succeed."""
        goal = self.homes[self.stage.players[0].name]
        other = self.stage.a if goal is self.stage.b else self.stage.b
        for player in self.stage.players:
            if self.homes[player.name] is not goal:
                self.stage.begin(player, other, goal, slow=False)
                until(f"{player.name} gathers", lambda p=player: set(self.stage.outcomes(p)) == {"done"})
                self.homes[player.name] = goal


def main() -> int:
    """Play the rounds."""
    parser = argparse.ArgumentParser(prog="python -m tests.real.random_kills")
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--minutes", type=float, default=float("inf"))
    parser.add_argument("--seed", type=int, default=None)
    parser.add_argument("--vms", type=int, default=3)
    given = parser.parse_args()
    seed = given.seed if given.seed is not None else random.SystemRandom().randrange(1 << 32)
    dice = random.Random(seed)
    say(f"seed {seed}: {given.rounds} rounds")
    images = ensure_guest_images(say)
    lab = Lab.up(f"kills-{os.getpid()}", progress=say)
    counts: Counter[str] = Counter()
    try:
        with held_agents(lab):
            stage = Stage(lab, images, [f"vm {number}" for number in range(given.vms)])
            try:
                stage.enter()
                homes = {player.name: stage.a for player in stage.players}
                latest_s = time.monotonic() + given.minutes * 60
                for number in range(given.rounds):
                    if time.monotonic() > latest_s:
                        break
                    kill, after_s = dice.choice(KILLS), dice.uniform(0, LATEST_S)
                    say(f"{number + 1:4}. {kill} killed {after_s:.2f} s after the start")
                    one = Round(stage, homes, kill, after_s)
                    one.play()
                    counts["rounds"] += 1
                    for player in stage.players:
                        counts[stage.outcomes(player)[0]] += 1
                    one.gather()
                for player in stage.players:
                    stage.call(homes[player.name], "POST", f"vms/{player.name}/stop", {"force": True})
                    stage.verify_disks(homes[player.name], player)
            except Exception:
                evidence = Path(f"/var/tmp/kvmhv-evidence/kills-{seed}")
                lab.evidence(evidence)
                traceback.print_exc()
                say(f"logs of the hosts: {evidence}")
                say(f"again with: python -m tests.real.random_kills --rounds {given.rounds} --seed {seed}")
                return 1
            finally:
                stage.witness.close()
    finally:
        lab.down()
    say(f"no VM ran twice, no write was lost: {dict(counts)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
