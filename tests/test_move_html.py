"""A move's page: whole, well-formed, without anything from outside, and true to the report."""

import re
from html.parser import HTMLParser
from pathlib import Path

import msgspec
import pytest

from kvmhv.cli import main, move_html
from kvmhv.model import (
    Accel,
    Asked,
    BlackoutStep,
    DiskCopy,
    DiskFormat,
    EffectTime,
    ErrorBody,
    Finding,
    HostVersions,
    Layer,
    Mode,
    MoveRequest,
    Outcome,
    Pass,
    Phase,
    PhaseTime,
    Plan,
    Rule,
    Severity,
    Switchover,
    Timeouts,
    Vm,
)
from tests.cli_agent import report, scripted_agent

MIB = 1024**2
PASSES = tuple(
    Pass(
        number=number,
        sent_bytes=128 * MIB >> number,
        remaining_bytes=64 * MIB >> number,
        dirty_bytes_per_second=20.0 * MIB,
        bytes_per_second=45.0 * MIB,
        seconds=3.0 / number,
    )
    for number in range(1, 4)
)
STEPS = (("stopped", "host1", 3.0), ("state-sent", "host1", 60.0), ("running", "host2", 81.0))
DONE = report(
    outcome=Outcome.DONE,
    mode=Mode.SHARED_NOTHING,
    phase=Phase.CLEANUP,
    phases=tuple(
        PhaseTime(phase=phase, seconds=0.5 + number)
        for number, phase in enumerate(p for p in Phase if p is not Phase.PAGES)
    ),
    passes=PASSES,
    switchover=Switchover(reason="threshold", pass_number=3, remaining_bytes=MIB),
    blackout_ms=81.04,
    blackout_uncertainty_ms=0.5,
    blackout_steps=tuple(BlackoutStep(name=name, host=host, at_ms=at_ms) for name, host, at_ms in STEPS),
    network_gap_ms=97.5,
    memory_bytes=282 * MIB,
    disk_bytes=64 * MIB,
    progress=1.0,
    started_at=1700000000.0,
    ended_at=1700000012.0,
    versions=tuple(
        HostVersions(host=host, kvmhv="0.1.0", qemu=qemu, accel=Accel.KVM)
        for host, qemu in (("host1", "10.0.13"), ("host2", "9.2.4"))
    ),
    asked=Asked(who="ops <b>", authentication="token", address="10.0.0.9"),
    request=MoveRequest(vm="web01", target="host2", include_storage=True),
    plan=Plan(
        mode=Mode.SHARED_NOTHING,
        rule=Rule(max_passes=10, threshold_bytes=MIB),
        source_address="10.77.2.11",
        target_address="10.77.2.12",
        capabilities=("events", "multifd"),
        disk_copies=(),
        target_vm=Vm(id="id-1", name="web01", memory_bytes=256 * MIB, cpus=1),
        estimate_seconds=10.0,
        estimate_bytes=300 * MIB,
        timeouts=Timeouts(),
    ),
)

VOID = frozenset({"meta", "br"})


class Reader(HTMLParser):
    """Checks that every element is closed in order, and collects what is named and shown."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.text += data + " "


def read(page: str) -> Reader:
    reader = Reader()
    reader.feed(page)
    reader.close()
    assert reader.open == []
    return reader


def test_a_storage_move_is_told_as_what_it_is() -> None:
    layers = [(Layer(location=name, path="db01/disk0.qcow2", format=DiskFormat.QCOW2),) for name in ("default", "nfs")]
    copy = DiskCopy(disk="disk0", size_bytes=MIB, used_bytes=MIB, source_layers=layers[0], target_layers=layers[1])
    phases = tuple(one for one in DONE.phases if one.phase is not Phase.MEMORY)
    gone = {"passes": (), "switchover": None, "blackout_ms": None, "blackout_steps": (), "plan": None, "request": None}
    alone = msgspec.structs.replace(
        DONE, mode=Mode.STORAGE, target="host1", disks=(copy,), writes_held_ms=34.0, phases=phases, **gone
    )
    text = read(move_html.page(alone)).text
    for word in ("Storage move", "host1/default → host1/nfs", "Requests held", "34 ms", "nfs/db01/disk0.qcow2"):
        assert word in text, text
    for word in ("Blackout", "Network gap", "Passes", "Memory sent", "brownout", "Live migration"):
        assert word not in text, word


def test_the_page_says_what_a_host_did_and_for_how_long() -> None:
    times = (
        EffectTime(effect="await Ready", at_ms=36.1, took_ms=222.4),
        EffectTime(effect="Prepare", at_ms=12.0, took_ms=113.3),
    )
    text = read(move_html.page(msgspec.structs.replace(DONE, effects=times, direction="in"))).text
    for word in ("What host2 did and waited for", "await Ready", "222.4 ms", "QEMU's start"):
        assert word in text, text
    assert text.index("Prepare") < text.index("await Ready"), "in the order in which they began"
    assert "Effects" not in read(move_html.page(DONE)).text


def test_a_move_that_waited_in_vain_says_how_long() -> None:
    waited = msgspec.structs.replace(DONE, outcome=Outcome.FAILED, queued_seconds=600.0, blackout_ms=None)
    text = read(move_html.page(waited)).text
    assert "Waited for a slot" in text
    assert "10 min 00 s" in text


def test_the_page_has_every_figure_and_nothing_from_outside() -> None:
    page = move_html.page(DONE)
    seen = read(page)
    names = {tag for tag, _ in seen.tags}
    assert not names & {"script", "link", "img", "iframe", "object"}
    assert not any(name in attributes for _, attributes in seen.tags for name in ("src", "href", "onclick", "style"))
    assert "url(" not in page
    assert "@import" not in page
    for text in (
        "81 ms",
        "98 ms",
        "12.5 s",
        "282 MiB",
        "The guest was stopped by the threshold after pass 3, with 1 MiB to send.",
        "10.0.13",
        "9.2.4",
        "token ops <b> at 10.0.0.9",
        "the guest runs at the target",
        "81.0 ms",
        "+21.0 ms",
        "2023-11-14 22:13:20 UTC",
        "events, multifd",
    ):
        assert text in seen.text, text
    assert [attributes["role"] for tag, attributes in seen.tags if tag == "svg"] == ["img"] * 6, (
        "each is drawn for wide and narrow pages"
    )
    assert "prefers-color-scheme:dark" in page
    assert "@media print" in page


def test_what_comes_from_elsewhere_is_text_only() -> None:
    evil = '"><script>alert(1)</script>'
    finding = Finding(id="x", severity=Severity.WARNING, object=evil, host=evil, text=evil, todo=evil)
    error = ErrorBody(code="peer-lost", message=evil, todo=evil)
    page = move_html.page(
        msgspec.structs.replace(
            DONE,
            outcome=Outcome.FAILED,
            reason=evil,
            error=error,
            vm=evil,
            source=evil,
            findings=(finding,),
            warnings=(evil, "\x1b[31mred"),
            blackout_steps=(BlackoutStep(name=evil, host=evil, at_ms=1.0),),
        )
    )
    assert not any(tag == "script" for tag, _ in read(page).tags)
    assert "\x1b" not in page


@pytest.mark.parametrize("outcome", list(Outcome))
def test_a_move_that_did_nothing_has_a_page_too(outcome: Outcome) -> None:
    page = move_html.page(report(outcome=outcome))
    assert move_html.OUTCOMES[outcome] in read(page).text
    assert "svg" not in {tag for tag, _ in read(page).tags}


def test_odd_figures_are_drawn() -> None:
    nothing = msgspec.structs.replace(PASSES[0], sent_bytes=0, remaining_bytes=0, bytes_per_second=0.0, seconds=0.0)
    odd = msgspec.structs.replace(
        DONE,
        passes=(nothing,),
        phases=(PhaseTime(phase=Phase.SETUP, seconds=0.0),),
        blackout_steps=(BlackoutStep(name="stopped", host="h", at_ms=0.0),),
    )
    page = move_html.page(odd)
    read(page)
    assert not re.search(r"nan|inf\b", page)


def test_the_command_writes_the_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("KVMHV_SOCKET", str(tmp_path / "agent.sock"))
    monkeypatch.delenv("KVMHV_HOST", raising=False)
    with scripted_agent(tmp_path / "agent.sock") as running:
        running.on("GET", "/v1/moves", [DONE])
        assert main.main(["move", "report", DONE.id, "--html", str(tmp_path / "move.html")]) == 0
        assert (tmp_path / "move.html").read_text() == move_html.page(DONE)
        assert main.main(["move", "report", DONE.id, "--html", "-"]) == 0
        assert capsys.readouterr().out.endswith(move_html.page(DONE))
        assert main.main(["move", "report", DONE.id, "--html", str(tmp_path / "no" / "such.html")]) == 2
        assert "file-unwritable" in capsys.readouterr().err
