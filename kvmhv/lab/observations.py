"""What the watcher saw of a guest, sorted into windows of time. Pure: every fact comes with its time.

Times are seconds of the monotonic clock. A report gives each as `{"monotonic_s", "wall_s"}`. A window begins with
`mark(name)`; what happens belongs to the window in which it is noticed, an answer to a ping to that of its sending.
"""

from dataclasses import dataclass, field

PING_LOST_AFTER_S = 2.0
MISSING_MAX = 100_000
PENDING_PINGS_MAX = 10_000
LOST_PINGS_MAX = 100_000
BOOT_IDS_MAX = 1_000


@dataclass
class Gap:
    """The longest time without something, and when it ended."""

    longest_s: float = 0.0
    ended_s: float | None = None
    guest_s: float | None = None

    def see(self, gap_s: float, ended_s: float, guest_s: float | None = None) -> None:
        """Keep this gap if it is the longest; `guest_s` is how long it was by the guest's own clock."""
        if gap_s > self.longest_s:
            self.longest_s, self.ended_s, self.guest_s = gap_s, ended_s, guest_s


@dataclass
class Window:
    """The counts of one stretch of time."""

    name: str
    started_s: float
    ended_s: float | None = None
    beats: int = 0
    beats_lost: int = 0
    beats_doubled: int = 0
    beats_late: int = 0
    beat_gap: Gap = field(default_factory=Gap)
    pings_sent: int = 0
    pings_received: int = 0
    pings_lost: int = 0
    pings_late: int = 0
    pings_doubled: int = 0
    ping_gap: Gap = field(default_factory=Gap)
    echo_round_trips: int = 0
    echo_stall: Gap = field(default_factory=Gap)
    acks: int = 0
    acks_doubled: int = 0


class Observations:
    """Takes what happened, in the order of time, and gives the report at any moment."""

    def __init__(self, started_s: float, wall_offset_s: float, window: str = "start") -> None:
        self.wall_offset_s = wall_offset_s
        self.started_s = started_s
        self.windows = [Window(window, started_s)]
        self.total = Window("total", started_s)
        self.boot_ids: list[str] = []
        self.echo_broken: tuple[float, str] | None = None
        self.acks_malformed = 0
        self._last_beat: tuple[str, int, int, float] | None = None
        self._missing_beats: dict[tuple[str, int], Window] = {}
        self._pending_pings: dict[int, tuple[float, Window]] = {}
        self._lost_pings: dict[int, Window] = {}
        self._last_reply_s: float | None = None
        self._echo_sent_s: float | None = None
        self._last_acks: dict[str, dict[str, tuple[int, bool]]] = {}

    @property
    def window(self) -> Window:
        """The window that is open."""
        return self.windows[-1]

    def mark(self, name: str, at_s: float) -> None:
        """Close the open window and begin the next."""
        self.window.ended_s = at_s
        self.windows.append(Window(name, at_s))

    # ---- heartbeats ----

    def beat(self, boot_id: str, sequence: int, guest_ns: int, at_s: float) -> None:
        """A heartbeat arrived: the guest's `sequence`th of this boot, sent at `guest_ns` of the guest's clock."""
        last = self._last_beat
        if last is None or boot_id != last[0]:
            # Datagrams of two boots cannot come interleaved: the first of another boot ends the one before.
            if len(self.boot_ids) < BOOT_IDS_MAX:
                self.boot_ids.append(boot_id)
            if last is not None:
                self._beat_gap(at_s - last[3], at_s, None)
            for window in (self.window, self.total):
                window.beats += 1
            self._last_beat = (boot_id, sequence, guest_ns, at_s)
            return
        _, last_sequence, last_guest_ns, last_at_s = last
        if sequence <= last_sequence:
            self._beat_out_of_order(boot_id, sequence)
            return
        for window in (self.window, self.total):
            window.beats += 1
            window.beats_lost += sequence - last_sequence - 1
        for number in range(last_sequence + 1, min(sequence, last_sequence + 1 + MISSING_MAX)):
            if len(self._missing_beats) < MISSING_MAX:
                self._missing_beats[boot_id, number] = self.window
        self._beat_gap(at_s - last_at_s, at_s, (guest_ns - last_guest_ns) / 1e9)
        self._last_beat = (boot_id, sequence, guest_ns, at_s)

    def _beat_out_of_order(self, boot_id: str, sequence: int) -> None:
        missed_in = self._missing_beats.pop((boot_id, sequence), None)
        for window in (self.window, self.total):
            if missed_in is None:
                window.beats_doubled += 1
            else:
                window.beats += 1
                window.beats_late += 1
        if missed_in is not None:
            missed_in.beats_lost -= 1
            self.total.beats_lost -= 1

    def _beat_gap(self, gap_s: float, at_s: float, guest_s: float | None) -> None:
        for window in (self.window, self.total):
            window.beat_gap.see(gap_s, at_s, guest_s)

    # ---- pings ----

    def ping_sent(self, number: int, at_s: float) -> None:
        """The ping `number` was sent."""
        self.expire_pings(at_s)
        for window in (self.window, self.total):
            window.pings_sent += 1
        if len(self._pending_pings) < PENDING_PINGS_MAX:
            self._pending_pings[number] = (at_s, self.window)

    def ping_received(self, number: int, at_s: float) -> None:
        """An answer to the ping `number` arrived. After PING_LOST_AFTER_S it is late, and the ping stays lost."""
        self.expire_pings(at_s)
        pending = self._pending_pings.pop(number, None)
        if pending is None:
            lost_in = self._lost_pings.pop(number, None)
            for window in (lost_in or self.window, self.total):
                if lost_in is None:
                    window.pings_doubled += 1
                else:
                    window.pings_late += 1
            return
        for window in (pending[1], self.total):
            window.pings_received += 1
        if self._last_reply_s is not None:
            for window in (self.window, self.total):
                window.ping_gap.see(at_s - self._last_reply_s, at_s)
        self._last_reply_s = at_s

    def expire_pings(self, at_s: float) -> None:
        """Count as lost what has had no answer for PING_LOST_AFTER_S."""
        lost = [number for number, (sent_s, _) in self._pending_pings.items() if at_s - sent_s > PING_LOST_AFTER_S]
        for number in lost:
            sent_in = self._pending_pings.pop(number)[1]
            if len(self._lost_pings) < LOST_PINGS_MAX:
                self._lost_pings[number] = sent_in
            for window in (sent_in, self.total):
                window.pings_lost += 1

    # ---- the one TCP connection ----

    def echo_sent(self, at_s: float) -> None:
        """A line went out on the connection; the next one waits for its echo."""
        self._echo_sent_s = at_s

    def echo_received(self, at_s: float) -> None:
        """The whole line came back."""
        for window in (self.window, self.total):
            window.echo_round_trips += 1
            if self._echo_sent_s is not None:
                window.echo_stall.see(at_s - self._echo_sent_s, at_s)
        self._echo_sent_s = None

    def echo_broke(self, reason: str, at_s: float) -> None:
        """The connection ended; there is no other."""
        if self.echo_broken is None:
            self.echo_broken = (at_s, reason)

    # ---- acknowledgements ----

    def ack(self, boot_id: str, disk: str, record: int, announced: bool) -> bool:
        """A line about a record arrived. False: it came before (sent again after a broken connection)."""
        last = self._last_acks.setdefault(boot_id, {})
        new = disk not in last or (record, not announced) > last[disk]
        if new:
            last[disk] = (record, not announced)
        for window in (self.window, self.total):
            if new:
                window.acks += 1
            else:
                window.acks_doubled += 1
        return new

    # ---- the report ----

    def report(self, at_s: float) -> dict[str, object]:
        """Return everything so far as JSON; gaps that are still open count up to now."""
        self.expire_pings(at_s)
        broken = None
        if self.echo_broken is not None:
            broken = {"at": self._time(self.echo_broken[0]), "reason": self.echo_broken[1]}
        return {
            "started": self._time(self.started_s),
            "ended": self._time(at_s),
            "boot_ids": list(self.boot_ids),
            "echo_broken": broken,
            "acks_malformed": self.acks_malformed,
            "last_acks": {boot: {disk: at[0] for disk, at in disks.items()} for boot, disks in self._last_acks.items()},
            "total": self._window(self.total, at_s, still_open=True),
            "windows": [self._window(window, at_s, still_open=window is self.window) for window in self.windows],
        }

    def _window(self, window: Window, at_s: float, *, still_open: bool) -> dict[str, object]:
        beat_gap, ping_gap, stall = (
            Gap(gap.longest_s, gap.ended_s, gap.guest_s)
            for gap in (window.beat_gap, window.ping_gap, window.echo_stall)
        )
        if still_open:
            if self._last_beat is not None:
                beat_gap.see(at_s - self._last_beat[3], at_s)
            if self._last_reply_s is not None and window.pings_sent:
                ping_gap.see(at_s - self._last_reply_s, at_s)
            if self._echo_sent_s is not None and self.echo_broken is None:
                stall.see(at_s - self._echo_sent_s, at_s)
        return {
            "name": window.name,
            "started": self._time(window.started_s),
            "ended": self._time(at_s if window.ended_s is None else window.ended_s),
            "beats": {
                "received": window.beats,
                "lost": window.beats_lost,
                "doubled": window.beats_doubled,
                "late": window.beats_late,
                **self._gap("longest_gap", beat_gap),
                "longest_gap_guest_ms": None if beat_gap.guest_s is None else round(beat_gap.guest_s * 1000, 1),
            },
            "pings": {
                "sent": window.pings_sent,
                "received": window.pings_received,
                "lost": window.pings_lost,
                "late": window.pings_late,
                "doubled": window.pings_doubled,
                **self._gap("longest_gap", ping_gap),
            },
            "echo": {"round_trips": window.echo_round_trips, **self._gap("longest_stall", stall)},
            "acks": {"received": window.acks, "doubled": window.acks_doubled},
        }

    def _gap(self, name: str, gap: Gap) -> dict[str, object]:
        return {
            f"{name}_ms": round(gap.longest_s * 1000, 1),
            f"{name}_ended": None if gap.ended_s is None else self._time(gap.ended_s),
        }

    def _time(self, at_s: float) -> dict[str, float]:
        return {"monotonic_s": round(at_s, 4), "wall_s": round(at_s + self.wall_offset_s, 4)}
