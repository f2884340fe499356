"""The parts of the CLI that only compute: SPEC, rates, WebSocket frames, progress lines, quantities."""

import io

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from kvmhv.agent.api import route
from kvmhv.cli import address, connection, disk_spec, output, websocket
from kvmhv.cli.parameters import parse_rate
from kvmhv.cli.progress import Display, Lines, expectation, news, pass_text
from kvmhv.cli.watch import exit_status
from kvmhv.errors import CallerError, HostError
from kvmhv.model import (
    DiskFormat,
    DiskSpec,
    ErrorBody,
    Estimate,
    MoveReport,
    MoveRequest,
    Outcome,
    Pass,
    Phase,
    PhaseTime,
    Switchover,
    VmSpec,
)
from tests.cli_agent import report

# --- SPEC ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "disk"),
    [
        ("size=4G", DiskSpec(size_bytes=4 * 1024**3)),
        ("size=0", DiskSpec(size_bytes=0)),
        ("file=/srv/a b.img,format=raw", DiskSpec(file="/srv/a b.img", format=DiskFormat.RAW)),
        ("file=/srv/a,,b.img", DiskSpec(file="/srv/a,b.img")),
        ("file=/srv/a,,,location=fast", DiskSpec(file="/srv/a,", location="fast")),
        ("image=debian,location=fast", DiskSpec(image="debian", location="fast")),
        ("size=4G,backing=/b=1.qcow2,format=qcow2", None),
    ],
)
def test_disk_spec(text: str, disk: DiskSpec | None) -> None:
    found = disk_spec.parse(text)
    assert disk is None or found == disk
    assert disk is not None or (found.backing, found.format) == ("/b=1.qcow2", DiskFormat.QCOW2)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "nothing at all"),
        ("size=4G,", "comma"),
        (",size=4G", "comma"),
        ("4G", "no key '4G'"),
        ("size", "no value"),
        ("size=", "no value"),
        ("size=4G,size=4G", "size is there twice"),
        ("size=4G,file=/x", "not size and file"),
        ("format=raw", "none of them"),
        ("size=4 apples", "size: '4 apples'"),
        ("size=-1", "size: '-1'"),
        ("image=a,format=vmdk", "format: 'vmdk'"),
        ("image=a,backing=/b", "backing goes with size"),
        ("Size=4G", "no key 'Size'"),
    ],
)
def test_disk_spec_refuses(text: str, why: str) -> None:
    with pytest.raises(CallerError) as caught:
        disk_spec.parse(text)
    assert caught.value.code == "disk-spec-invalid"
    assert why in caught.value.message


@given(st.text())
def test_any_text_is_a_disk_or_a_documented_error(text: str) -> None:
    try:
        disk_spec.parse(text)
    except CallerError as error:
        assert error.code == "disk-spec-invalid"


@given(st.text(st.characters(exclude_categories=["Cs"]), min_size=1))
def test_every_file_name_can_be_written(name: str) -> None:
    assert disk_spec.parse(f"file={name.replace(',', ',,')},format=raw").file == name


# --- rates, addresses, quantities ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "rate"),
    [("400mbit", 50_000_000), ("1gbit", 125_000_000), ("8bit", 1), ("50M", 50 * 1024**2), ("50M/s", 50 * 1024**2)],
)
def test_rates(text: str, rate: int) -> None:
    assert parse_rate(text) == rate


@pytest.mark.parametrize("text", ["", "fast", "-1", "4mbits", "M"])
def test_no_rates(text: str) -> None:
    with pytest.raises(CallerError):
        parse_rate(text)


@pytest.mark.parametrize("host", ["http://a", "https://", "https://a/b", "https://u:p@a", "https://a:99999", "x://["])
def test_urls_that_are_no_agent(host: str) -> None:
    with pytest.raises(CallerError) as caught:
        address.find(host)
    assert caught.value.code == "host-url-invalid"


def test_a_url_has_token_and_pin(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVMHV_TOKEN", "secret\n")
    monkeypatch.setenv("KVMHV_FINGERPRINT", "SHA256:" + ":".join(["AB"] * 32))
    found = address.find("https://host1.example")
    assert (found.server, found.token, found.fingerprint) == (("host1.example", 6600), "secret", "ab" * 32)
    monkeypatch.setenv("KVMHV_FINGERPRINT", "abc")
    with pytest.raises(CallerError):
        address.find("https://host1.example")
    assert str(address.Address(host="::1", server=("::1", 6600))) == "https://[::1]:6600"


def test_a_host_by_name_is_asked_through_the_local_agent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVMHV_LAB", "nosuchlab")
    assert address.find("host 9/../ä").base == "/v1/hosts/host%209%2F..%2F%C3%A4"


def test_quantities() -> None:
    assert output.size_text(0) == "0 B"
    assert output.size_text(1536) == "1.5 KiB"
    assert output.size_text(256 * 1024**2) == "256 MiB"
    assert output.size_text(None) == "-"
    assert output.seconds_text(0.4211) == "0.42 s"
    assert output.seconds_text(59.96) == "60.0 s"
    assert output.seconds_text(65) == "1 min 05 s"
    assert output.seconds_text(7390) == "2 h 03 min"


def test_control_characters_do_not_reach_the_terminal() -> None:
    assert output.printable("a\x1b[2Jb\r\x9bc\td") == "a\\x1b[2Jb\\x0d\\x9bc\td"


def test_aligned_cuts_nothing() -> None:
    assert output.aligned([["A", "B"], ["longer", "x"], ["", "y"]]) == ["A       B", "longer  x", "        y"]


# --- WebSocket ----------------------------------------------------------------------------------------------------


def test_accept_of_the_standards_example() -> None:
    assert websocket.accept_of("dGhlIHNhbXBsZSBub25jZQ==") == "s3pPLMBiTxaQ9kYGzzhZRbK+xOo="


@pytest.mark.parametrize("size", [0, 1, 125, 126, 65535, 65536])
def test_frames_are_masked_and_whole(size: int) -> None:
    payload = bytes(index % 251 for index in range(size))
    data = websocket.frame(websocket.BINARY, payload)
    assert data[1] & 0x80
    start = {True: 2, False: 4 if size < 65536 else 10}[size < 126]
    mask = data[start : start + 4]
    assert bytes(byte ^ mask[index % 4] for index, byte in enumerate(data[start + 4 :])) == payload


def _server_frame(opcode: int, payload: bytes) -> bytes:
    size = len(payload)
    head = bytes([size]) if size < 126 else b"\x7e" + size.to_bytes(2, "big")
    return bytes([0x80 | opcode]) + head + payload


@given(st.lists(st.binary(max_size=300), max_size=5), st.integers(1, 50))
def test_frames_arrive_however_they_are_cut(payloads: list[bytes], step: int) -> None:
    data = b"".join(_server_frame(websocket.BINARY, payload) for payload in payloads)
    reader = websocket.FrameReader()
    found = [frame for at in range(0, len(data), step) for frame in reader.feed(data[at : at + step])]
    assert found == [(websocket.BINARY, payload) for payload in payloads]


@pytest.mark.parametrize("data", [b"\x82\x81abcde", b"\x82\x7f" + (2**40).to_bytes(8, "big")])
def test_frames_that_no_server_sends(data: bytes) -> None:
    with pytest.raises(HostError) as caught:
        websocket.FrameReader().feed(data)
    assert caught.value.code == "console-broken"


# --- progress -----------------------------------------------------------------------------------------------------


def _pass(number: int) -> Pass:
    return Pass(
        number=number,
        sent_bytes=1024**2,
        remaining_bytes=2048,
        dirty_bytes_per_second=4096.0,
        bytes_per_second=1024.0**2,
        seconds=1.0,
    )


STORY = (
    report(),
    report(phase=Phase.STORAGE, phases=(PhaseTime(phase=Phase.SETUP, seconds=0.1),), storage_total_bytes=1000),
    report(phase=Phase.STORAGE, storage_total_bytes=1000, storage_copied_bytes=250),
    report(phase=Phase.STORAGE, storage_total_bytes=1000, storage_copied_bytes=260),
    report(phase=Phase.MEMORY, passes=(_pass(1),), storage_total_bytes=1000, storage_copied_bytes=1000),
    report(
        phase=Phase.CLEANUP,
        phases=tuple(PhaseTime(phase=phase, seconds=1.0) for phase in list(Phase)[:4]),
        passes=(_pass(1), _pass(2)),
        switchover=Switchover(reason="threshold", pass_number=2),
        storage_total_bytes=1000,
        storage_copied_bytes=1000,
        warnings=("slow disk",),
    ),
)


def test_news_tells_each_thing_once_and_in_order() -> None:
    lines = [line for old, new in zip((None, *STORY), STORY, strict=False) for line in news(old, new)]
    assert lines == [
        "move 3f2a91c0d4: web01 from host1 to host2",
        "phase setup",
        "phase storage",
        "disks: 250 B of 1000 B copied (20 %)",
        "disks: 1000 B of 1000 B copied (100 %)",
        "phase memory",
        "pass 1: sent 1 MiB in 1.00 s, 2 KiB remain, the guest dirties 4 KiB/s",
        "pass 2: sent 1 MiB in 1.00 s, 2 KiB remain, the guest dirties 4 KiB/s",
        "switchover after pass 2: threshold",
        "phase state",
        "phase cleanup",
        "warning: slow disk",
    ]


def test_lines_are_the_news(capsys: pytest.CaptureFixture[str]) -> None:
    view = Lines()
    for it in STORY[:2]:
        view.show(it)
    view.say("by the way")
    assert capsys.readouterr().out.splitlines()[1:] == ["phase setup", "phase storage", "by the way"]


def test_display_draws_the_state_below_the_news() -> None:
    above: list[str] = []
    drawn = io.StringIO()
    console = Console(file=drawn, width=120)
    display = Display(console.print, lambda text, **_options: above.append(text))
    display.show(report(phase=Phase.MEMORY, passes=(_pass(1),), progress=0.25, remaining_bytes=3 * 1024**2))
    assert above == ["move 3f2a91c0d4: web01 from host1 to host2", "phase memory", pass_text(_pass(1))]
    assert "memory, pass 2" in drawn.getvalue()
    assert "25 %" in drawn.getvalue()
    assert "3 MiB remain" in drawn.getvalue()
    display.show(report(outcome=Outcome.DONE, phase=Phase.CLEANUP))
    assert drawn.getvalue().rstrip().endswith("remain  -"), "the line goes when the move has ended"


ESTIMATE = Estimate(
    seconds_low=8, seconds_likely=12.5, seconds_high=75, passes=10, switchover="pass-limit", blackout_ms=2400
)


def test_the_expectation_is_told_after_each_pass_and_the_pass_limit_as_soon_as_it_is_in_sight() -> None:
    done = Pass(number=1, sent_bytes=9, remaining_bytes=8, dirty_bytes_per_second=1, bytes_per_second=2, seconds=3)
    before = report(phase=Phase.MEMORY, estimate=ESTIMATE)
    after = report(phase=Phase.MEMORY, passes=(done,), estimate=ESTIMATE)
    text = (
        "about 12.5 s left (8.00 s to 1 min 15 s); the pass limit will end the passes after pass 10, "
        "with a blackout of about 2.40 s"
    )
    assert news(None, before)[-1] == text
    assert news(before, before) == []
    assert news(before, after) == [pass_text(done), text]
    assert news(after, after) == []
    threshold = msgspec.structs.replace(ESTIMATE, switchover="threshold", passes=3)
    calm = msgspec.structs.replace(before, estimate=threshold)
    assert not any("will end the passes" in line for line in news(None, calm))
    assert news(calm, before) == [text]
    assert "the threshold will end the passes after pass 3" in expectation(threshold)


def _ended(outcome: Outcome, status: int | None) -> MoveReport:
    error = None if status is None else ErrorBody(code="x", message="y", todo="z", exit_status=status)
    return report(outcome=outcome, error=error)


@pytest.mark.parametrize(
    ("outcome", "status_of_error", "status"),
    [
        (Outcome.DONE, None, 0),
        (Outcome.FAILED, None, 1),
        (Outcome.FAILED, 1, 1),
        (Outcome.FAILED, 3, 3),
        (Outcome.FAILED, 4, 4),
        (Outcome.CANCELLED, None, 6),
        (Outcome.CANCELLED, 6, 6),
        (Outcome.NEEDS_OPERATOR, 5, 5),
        (Outcome.NEEDS_OPERATOR, None, 5),
    ],
)
def test_exit_status(outcome: Outcome, status_of_error: int | None, status: int) -> None:
    assert exit_status(_ended(outcome, status_of_error)) == status


@pytest.mark.parametrize(
    ("asked", "sent"),
    [
        (VmSpec(name="web01", memory_bytes=1), {"name", "memory_bytes"}),
        (
            VmSpec(name="web01", memory_bytes=1, disks=(DiskSpec(size_bytes=4096),), free_page_reporting=False),
            {"name", "memory_bytes", "disks", "free_page_reporting"},
        ),
        (MoveRequest(vm="web01", target="host2"), {"vm", "target"}),
        (
            MoveRequest(vm="web01", target="host2", post_copy=True, max_passes=3),
            {"vm", "target", "post_copy", "max_passes"},
        ),
    ],
)
def test_an_older_agent_is_not_asked_for_what_nobody_wanted(asked: VmSpec | MoveRequest, sent: set[str]) -> None:
    """It would refuse a field that it does not know, whatever its value."""
    body = connection.encoded(asked)
    assert set(msgspec.json.decode(body)) == sent
    assert route.decode(body, type(asked)) == asked
