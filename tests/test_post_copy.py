"""Post-copy where the exploration does not go: what is checked before it, what people see of it, whose word counts."""

import msgspec
import pytest

from kvmhv.agent import events
from kvmhv.cli.move_html import page
from kvmhv.cli.move_report import pages_text
from kvmhv.cli.progress import news
from kvmhv.core import checks_post_copy, facts, recover
from kvmhv.core import effects as ef
from kvmhv.core.source_state import SourceStep, report
from kvmhv.core.target_state import Pages, TargetState, TargetStep
from kvmhv.messages import AnyMessage, PagesDone, PagesEnd, PagesFrom, PagesHalted
from kvmhv.model import (
    MIB,
    ErrorBody,
    Finding,
    IncomingAddress,
    MoveRequest,
    Outcome,
    PagesFollowed,
    Phase,
    QemuInfo,
    Severity,
)
from tests import test_target
from tests.sim import examples
from tests.test_events import REPORT
from tests.test_move_html import DONE
from tests.test_source import Driven, at

ASKED = MoveRequest(vm="web01", target="host2", post_copy=True)
FOLLOWED = PagesFollowed(sent_bytes=32 * MIB, requests=71, seconds=1.5, attempts=1, complete=True)
ABLE = msgspec.structs.replace(examples.QEMU, post_copy=True)


def found(request: MoveRequest, here: QemuInfo, there: QemuInfo) -> list[Finding]:
    moving = examples.vm()
    source = msgspec.structs.replace(examples.inventory("host1", running=moving), qemu=here)
    target = msgspec.structs.replace(examples.inventory("host2", octet=2), qemu=there)
    return list(checks_post_copy.findings(moving, request, source, target))


def test_nothing_is_said_of_what_was_not_asked_for() -> None:
    assert found(MoveRequest(vm="web01", target="host2"), examples.QEMU, examples.QEMU) == []


def test_the_risk_is_named_before_anything_moves() -> None:
    (risk,) = found(ASKED, ABLE, ABLE)
    assert (risk.id, risk.severity) == ("post-copy-risk", Severity.WARNING)
    assert "what it had in memory is lost" in risk.text


@pytest.mark.parametrize(("here", "there", "host"), [(False, True, "host1"), (True, False, "host2")])
def test_a_host_that_does_not_know_it_refuses(here: bool, there: bool, host: str) -> None:
    """An older kvmhv says nothing of it, which is a no."""
    encoded = {True: ABLE, False: msgspec.convert(msgspec.to_builtins(examples.QEMU), QemuInfo)}
    errors = [one for one in found(ASKED, encoded[here], encoded[there]) if one.severity is Severity.ERROR]
    assert [(one.id, one.host) for one in errors] == [("post-copy-impossible", host)]


def test_it_goes_over_one_plain_connection() -> None:
    several = msgspec.structs.replace(ASKED, performance="compression")
    assert "post-copy-impossible" in [one.id for one in found(several, ABLE, ABLE)]


# --- whose word counts


def serving() -> Driven:
    """A source whose guest runs at the target and lacks pages."""
    driven = at(SourceStep.SERVING)
    assert ef.ServePages in driven.kinds()
    return driven


ADDRESS = IncomingAddress(memory_port=49154, disk_port=None)


def test_what_qemu_said_of_the_old_connection_does_not_break_the_new_one() -> None:
    driven = serving().told(facts.PagesStopped(at_ms=50))
    assert driven.said() == [PagesHalted(epoch=1, attempt=1)]
    assert driven.hears(PagesFrom(epoch=1, attempt=1, address=ADDRESS)).kinds() == [ef.ResumePages]
    driven.told(facts.PagesResumed(at_ms=70))
    assert driven.told(facts.PagesStopped(at_ms=69)).effects == []
    assert driven.told(facts.PagesStopped(at_ms=71)).said() == [PagesHalted(epoch=1, attempt=2)]


def test_an_answer_to_another_attempt_is_none() -> None:
    driven = serving().told(facts.PagesStopped(at_ms=50))
    assert driven.hears(PagesFrom(epoch=1, attempt=7, address=ADDRESS)).effects == []


def test_a_connection_is_made_one_at_a_time() -> None:
    """Each one that waited in a QEMU that hung broke what the one before had made."""
    again = PagesFrom(epoch=1, attempt=1, address=ADDRESS)
    driven = serving().told(facts.PagesStopped(at_ms=50)).hears(again)
    assert driven.hears(again).effects == []
    driven.told(facts.TimerFired(at_ms=60, name="idle"))
    assert driven.state.attempt == 1
    driven.told(facts.Failed(at_ms=70, effect="ResumePages", error=ErrorBody(code="broken", message="", todo="")))
    driven.told(facts.TimerFired(at_ms=80, name="idle"))
    assert driven.said() == [PagesHalted(epoch=1, attempt=2)]


def progress(sent_bytes: int, pages_bytes: int, requests: int) -> facts.MemoryProgress:
    return facts.MemoryProgress(
        at_ms=60,
        sent_bytes=sent_bytes,
        remaining_bytes=0,
        total_bytes=MIB,
        dirty_bytes_per_s=0.0,
        pages_bytes=pages_bytes,
        pages_requests=requests,
    )


def test_the_report_says_what_came_after_the_guest_ran() -> None:
    driven = serving().told(progress(5000, 1000, 3))
    running = report(driven.state, 1045.0).pages
    assert running == PagesFollowed(sent_bytes=1000, requests=3, seconds=1.0, attempts=0, complete=False)
    driven.hears(PagesDone(epoch=1))
    driven.told(progress(9000, 4000, 5))
    ended = report(driven.state, 99000.0).pages
    assert ended is not None
    assert (ended.sent_bytes, ended.requests, ended.complete) == (4000, 5, True)


def test_a_lost_guest_is_an_end_with_its_error() -> None:
    lost = ErrorBody(code="post-copy-lost", message="what web01 had in memory is lost", todo="", exit_status=5)
    driven = serving().hears(PagesDone(epoch=1, error=lost))
    shown = report(driven.state, 99.0)
    assert shown.error == lost
    assert shown.pages is not None
    assert not shown.pages.complete


def test_a_move_without_it_has_no_such_figures() -> None:
    driven = at(SourceStep.CLEANUP).told(progress(1 << 40, 1000, 3))
    shown = report(driven.state, 99.0)
    assert shown.pages is None
    assert shown.memory_bytes < 1 << 40


@pytest.mark.parametrize("step", [TargetStep.WAITING, TargetStep.STARTING])
def test_a_new_agent_of_the_target_sees_that_all_came(step: TargetStep) -> None:
    """Only the agent that is gone heard QEMU say so."""
    before = target_lacks_pages(step)
    there = facts.Restarted(at_ms=0, process=True, status="paused", migration="completed", rebooted=False)
    after, _ = recover.recover_target(before, there)
    assert after.pages is Pages.THERE


def target_lacks_pages(step: TargetStep) -> TargetState:
    source = at(SourceStep.SERVING).state
    state = examples.target_state(source, source.offer(), volatile_id="host2-0")
    hold = state.hold
    if step is TargetStep.STARTING:
        hold, _ = recover.handover.run_at_target(hold, state.vm.id, granted_epoch=1, loaded=True, newest=True)
    return msgspec.structs.replace(state, hold=hold, step=step, transferred=True, pages=Pages.MISSING)


# --- the target, whose guest lacks pages


def lacking(*, pages: Pages = Pages.MISSING) -> test_target.Driven:
    """A target whose guest runs."""
    driven = test_target.settling()
    lost = ErrorBody(code="post-copy-lost", message="lost", todo="") if pages is Pages.LOST else None
    driven.state = msgspec.structs.replace(driven.state, pages=pages, lost=lost)
    return driven


def alone() -> test_target.Driven:
    """One that has told the operator that it cannot reach the source."""
    driven = lacking().told(facts.Adopted(at_ms=1), facts.PeerLost(at_ms=2, error=test_target.ERROR))
    assert driven.told(facts.TimerFired(at_ms=3, name="step")).kinds() == [ef.SetTimer, ef.NeedOperator]
    assert driven.state.outcome is Outcome.NEEDS_OPERATOR
    return driven


def test_the_operator_is_told_once() -> None:
    driven = alone()
    assert driven.told(facts.TimerFired(at_ms=5, name="step")).kinds() == [ef.SetTimer]


def test_the_last_page_ends_what_the_operator_was_told() -> None:
    driven = alone().told(facts.MemorySent(at_ms=5))
    assert (driven.state.pages, driven.state.outcome, driven.state.failure) == (Pages.THERE, Outcome.RUNNING, None)
    assert driven.said() == [PagesDone(epoch=1)]
    assert driven.told(facts.MemorySent(at_ms=6)).effects == []


def test_a_guest_that_is_lost_is_told_as_that() -> None:
    driven = alone().told(facts.QemuGone(at_ms=5, error=test_target.ERROR))
    assert (driven.state.pages, driven.state.outcome, driven.state.failure) == (Pages.LOST, Outcome.RUNNING, None)
    assert driven.state.lost is not None
    assert driven.said() == [PagesDone(epoch=1, error=driven.state.lost)]


@pytest.mark.parametrize("asked", [PagesHalted(epoch=1, attempt=1), PagesEnd(epoch=1)])
def test_who_asks_for_pages_that_are_settled_hears_how(asked: AnyMessage) -> None:
    assert lacking(pages=Pages.THERE).hears(asked).said() == [PagesDone(epoch=1)]
    lost = lacking(pages=Pages.LOST).hears(asked)
    assert lost.said() == [PagesDone(epoch=1, error=lost.state.lost)]
    assert lacking().hears(asked).said() == []


def test_a_connection_that_is_being_made_is_watched_on() -> None:
    driven = serving().told(facts.PagesStopped(at_ms=50)).hears(PagesFrom(epoch=1, attempt=1, address=ADDRESS))
    told = driven.told(facts.TimerFired(at_ms=60, name="idle")).effects
    assert [one.name for one in told if isinstance(one, ef.SetTimer)] == ["idle"]


# --- what people see


def test_in_words() -> None:
    text = "32 MiB came while it ran there, the last page after 1.50 s; it waited for 71 pages, 1 broken connection"
    assert pages_text(FOLLOWED) == text


def test_the_page_has_its_figures() -> None:
    html = page(msgspec.structs.replace(DONE, pages=FOLLOWED))
    assert "Ran without all pages" in html
    assert "71 pages waited for" in html
    assert "Ran without all pages" not in page(DONE)


def test_the_lines_of_a_running_move() -> None:
    before = msgspec.structs.replace(DONE, outcome=Outcome.RUNNING, phase=Phase.STATE)
    lacks = msgspec.structs.replace(before, phase=Phase.PAGES, pages=msgspec.structs.replace(FOLLOWED, complete=False))
    assert "the guest runs on host2, and lacks pages that are still on host1" in news(before, lacks)
    ended = msgspec.structs.replace(lacks, phase=Phase.CLEANUP, pages=FOLLOWED)
    assert "the last page is on host2, 1.50 s later" in news(lacks, ended)


def test_its_events() -> None:
    kinds = [event.kind for event in events.move_ended(msgspec.structs.replace(REPORT, pages=FOLLOWED))]
    assert kinds == ["brownout", "blackout", "finished", "pages", "move-done"]
    lost = ErrorBody(code="post-copy-lost", message="lost", todo="")
    assert [event.kind for event in events.move_ended(msgspec.structs.replace(REPORT, error=lost))] == ["guest-lost"]
