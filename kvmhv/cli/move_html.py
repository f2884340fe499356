"""A move on one page for browsers and paper: everything in one file, without scripts, light and dark."""

import time
from collections.abc import Iterable, Sequence
from html import escape

from kvmhv.cli import move_plots, output
from kvmhv.cli.move_report import ends_of, total_s
from kvmhv.cli.move_style import STYLE
from kvmhv.model import DiskCopy, DiskSaving, Finding, Mode, MoveReport, Outcome, Phase, Plan

OUTCOMES = {
    Outcome.RUNNING: "is running",
    Outcome.DONE: "done",
    Outcome.FAILED: "failed",
    Outcome.CANCELLED: "cancelled",
    Outcome.NEEDS_OPERATOR: "needs the operator",
}
PHASES = {
    Phase.SETUP: "check, plan, target made ready",
    Phase.STORAGE: "disks copied, then mirrored",
    Phase.MEMORY: "memory in passes while the guest runs (brownout)",
    Phase.STATE: "guest stopped, the rest and the device state go over (blackout)",
    Phase.PAGES: "the guest runs at the target, the pages that it lacks follow (post-copy)",
    Phase.CLEANUP: "the source's copy removed",
}
STORAGE_PHASES = {
    Phase.SETUP: "new images made",
    Phase.STORAGE: "disks copied, then mirrored",
    Phase.STATE: "the guest's requests wait while its disks change to the new images",
    Phase.CLEANUP: "the old images removed",
}
SWITCHOVERS = {
    "threshold": "the threshold",
    "pass-limit": "the pass limit",
    "blackout-limit": "the limit to its blackout, which more passes would not have shortened,",
}
STEPS = {
    "stopped": "the guest stands still at the source",
    "memory-sent": "the last pages are sent",
    "mirrors-ended": "the disks are in sync, their mirrors ended",
    "state-sent": "the device state is sent: the grant",
    "loaded": "the target has loaded everything",
    "granted": "the grant has arrived",
    "running": "the guest runs at the target",
    "first-frame": "the switch sees the guest's first frame",
    "first-answer": "the guest answers its probe",
}

EFFECTS = {
    "connect": "the other agent is found, and is the one that it says",
    "await Answer": "the other host says what it has: the check",
    "await Ready": "the target accepts the offer and prepares for it",
    "await Running": "from the grant to the target's word that the guest runs",
    "await Owned": "the target makes the VM its own",
    "SendFiles": "the VM's kernel files go over",
    "Prepare": "taps, images, QEMU's start and its settings",
    "MirrorDisks": "the disks are copied, then mirrored",
    "SendMemory": "from QEMU's settings and connection to the guest's stop",
    "StopGuest": "QEMU is told to stop the guest",
    "FinishMirrors": "the disks' mirrors are ended",
    "ContinueSwitchover": "QEMU is told to send the device state",
    "Unexport": "the target's images are closed to the source",
    "Cont": "QEMU lets the guest run",
    "Adopt": "the VM's record is written",
    "EndCopy": "the source's QEMU is ended",
    "RemoveCopy": "the source's files and record are removed",
    "Journal": "an entry is on disk",
}


def page(report: MoveReport) -> str:
    """Return the whole page."""
    parts = [
        _head(report),
        _figures(report),
        *_phases(report),
        *_passes(report),
        *_blackout(report),
        *_effects(report),
        *_disks(report.disks),
        *_savings(report.savings),
        *_findings(report.findings, report.warnings),
        *_hosts(report),
        *_decided(report),
    ]
    source, target = ends_of(report)
    title = f"Move of {report.vm} from {source} to {target}"
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{_text(title)}</title><style>{STYLE}</style></head><body><main>{''.join(parts)}</main></body></html>\n"
    )


def _text(value: object) -> str:
    return escape(output.printable("-" if value is None else value))


def _head(report: MoveReport) -> str:
    when = _when(report.started_at)
    error = ""
    if report.reason:
        todo = f"<br>What to do: {_text(report.error.todo)}" if report.error and report.error.todo else ""
        code = f" <code>{_text(report.error.code)}</code>" if report.error else ""
        error = f'<p class="reason {report.outcome.value}">{_text(report.reason)}{code}{todo}</p>'
    source, target = ends_of(report)
    kind = "Storage move" if report.mode is Mode.STORAGE else "Live migration"
    mode = f", {_text(report.mode)}" if report.mode not in (None, Mode.STORAGE) else ""
    return (
        f'<header><p class="above">{kind}{mode}</p>'
        f'<h1>{_text(report.vm)} <span class="way">{_text(source)} &rarr; {_text(target)}</span></h1>'
        f'<p class="under"><span class="badge {report.outcome.value}">{_text(OUTCOMES[report.outcome])}</span> '
        f"{_text(when)} <code>{_text(report.id)}</code></p>{error}</header>"
    )


def _when(unix_s: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(unix_s))


def _figures(report: MoveReport) -> str:
    sure = report.blackout_uncertainty_ms
    passes = _text(report.switchover.reason) if report.switchover else ""
    stopped, alone = report.blackout_ms is not None, report.mode is Mode.STORAGE
    figures = [
        (stopped, "Blackout", _ms(report.blackout_ms), "" if sure is None else f"&plusmn; {sure:.1f} ms"),
        (stopped, "Network gap", _ms(report.network_gap_ms), "stop to first frame"),
        (report.answer_gap_ms is not None, "First answer", _ms(report.answer_gap_ms), "of the guest's probe"),
        *_pages(report),
        (report.writes_held_ms is not None, "Requests held", _ms(report.writes_held_ms), "by the change of disks"),
        (True, "Whole move", output.seconds_text(total_s(report) if report.ended_at is not None else None), ""),
        (report.queued_seconds is not None, "Waited for a slot", output.seconds_text(report.queued_seconds), ""),
        (not alone, "Passes", str(len(report.passes)), passes),
        (not alone, "Memory sent", output.size_text(report.memory_bytes), ""),
        (report.memory_zero_bytes is not None, "Zero pages", _zeros(report), "of each a mark was sent"),
        (True, "Disks sent", output.size_text(report.disk_bytes), ""),
        (report.wire_bytes is not None, "On the wire", output.size_text(report.wire_bytes), "with TLS, by TCP"),
    ]
    cells = "".join(
        f"<div><dt>{name}</dt><dd>{_text(value)}</dd>{f'<dd class=note>{note}</dd>' if note else ''}</div>"
        for there, name, value, note in figures
        if there
    )
    return f'<dl class="figures">{cells}</dl>'


def _pages(report: MoveReport) -> Sequence[tuple[bool, str, str, str]]:
    if report.pages is None:
        return ()
    waited = f"{report.pages.requests} pages waited for"
    last = "the last page came" if report.pages.complete else "not all pages came"
    return (
        (True, "Sent after the blackout", output.size_text(report.pages.sent_bytes), waited),
        (True, "Ran without all pages", output.seconds_text(report.pages.seconds), last),
    )


def _zeros(report: MoveReport) -> str:
    return output.size_text(report.memory_zero_bytes)


def _ms(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.0f} ms" if value < 10_000 else output.seconds_text(value / 1000)


def _phases(report: MoveReport) -> Iterable[str]:
    if not report.phases:
        return
    total_s = sum(one.seconds for one in report.phases) or 1.0
    what = STORAGE_PHASES if report.mode is Mode.STORAGE else PHASES
    rows = [
        (
            f'<span class=nowrap><i class="swatch phase-{one.phase}"></i>{_text(one.phase)}</span>',
            _text(output.seconds_text(one.seconds)),
            f"{one.seconds / total_s * 100:.1f} %",
            _text(what[one.phase]),
        )
        for one in report.phases
    ]
    yield _section(
        "Phases", move_plots.phases(report.phases) + _table("Phases", ("Phase", "#Time", "#Share", "What"), rows)
    )


def _passes(report: MoveReport) -> Iterable[str]:
    if not report.passes:
        return
    rows = [
        (
            str(one.number),
            _text(output.size_text(one.sent_bytes)),
            _text(output.size_text(one.remaining_bytes)),
            _text(output.rate_text(one.bytes_per_second)),
            _text(output.rate_text(one.dirty_bytes_per_second)),
            _text(output.seconds_text(one.seconds)),
        )
        for one in report.passes
    ]
    why = ""
    if report.switchover is not None:
        rest = output.size_text(report.switchover.remaining_bytes)
        by = SWITCHOVERS.get(report.switchover.reason, report.switchover.reason)
        why = f"<p>The guest was stopped by {by} after pass {report.switchover.pass_number}, with {rest} to send.</p>"
    head = ("#Pass", "#Sent", "#Remaining", "#Rate", "#Dirtied", "#Time")
    yield _section("Passes", why + move_plots.passes(report.passes) + _table("Passes", head, rows))


def _blackout(report: MoveReport) -> Iterable[str]:
    if not report.blackout_steps:
        return
    rows, before_ms = [], 0.0
    for one in report.blackout_steps:
        name, took_ms = STEPS.get(one.name, one.name), one.at_ms - before_ms
        rows.append((_text(name), _text(one.host), f"{one.at_ms:.1f} ms", f"+{took_ms:.1f} ms"))
        before_ms = one.at_ms
    text = (
        "<p>Counted from the moment the source is told to stop the guest. The target's steps are in the source's clock"
        f"{f' (&plusmn; {report.blackout_uncertainty_ms:.1f} ms)' if report.blackout_uncertainty_ms else ''}.</p>"
    )
    plot = move_plots.blackout(report.blackout_steps, STEPS)
    yield _section("Blackout", text + plot + _table("Steps of the blackout", ("Step", "Host", "#At", "#Took"), rows))


def _effects(report: MoveReport) -> Iterable[str]:
    rows = [
        (
            f"<code>{_text(one.effect)}</code>",
            f"{one.at_ms:.1f} ms",
            f"{one.took_ms:.1f} ms",
            EFFECTS.get(one.effect, ""),
        )
        for one in sorted(report.effects, key=lambda one: one.at_ms)
    ]
    if rows:
        host = report.target if report.direction == "in" else report.source
        text = (
            f"<p>What {_text(host)} did and waited for, from the beginning of the move there. Several may be under way "
            "at once, so the times do not add up to that of the move.</p>"
        )
        yield _section("Effects", text + _table("Effects", ("Effect", "#At", "#Took", "What"), rows))


def _disks(copies: Sequence[DiskCopy]) -> Iterable[str]:
    """The disks of a storage move; what else a move takes along stands in its plan."""
    rows = [
        (
            _text(copy.disk),
            _text(output.size_text(copy.size_bytes)),
            _text(output.size_text(copy.used_bytes)),
            _text(f"{copy.source_layers[0].location}/{copy.source_layers[0].path}"),
            _text(f"{copy.target_layers[0].location}/{copy.target_layers[0].path}"),
        )
        for copy in copies
    ]
    if rows:
        yield _section("Disks", _table("Disks", ("Disk", "#Size", "#Used", "From", "To"), rows))


def _savings(savings: Sequence[DiskSaving]) -> Iterable[str]:
    rows = [
        (
            _text(one.disk),
            *(
                _text(output.size_text(size))
                for size in (one.size_bytes, one.sent_bytes, one.base_bytes, one.unallocated_bytes, one.zero_bytes)
            ),
        )
        for one in savings
    ]
    if rows:
        head = ("Disk", "#Size", "#Sent", "#Base", "#Unallocated", "#Zeros")
        text = (
            "<p>Sent until both sides had all of it, as TCP counts. A base that the target had already, what the "
            "source had never stored, or given back, and written zeros did not have to be.</p>"
        )
        yield _section("What was sent of the disks", text + _table("What was sent of the disks", head, rows))


def _findings(findings: Sequence[Finding], warnings: Sequence[str]) -> Iterable[str]:
    rows = [
        (
            f'<span class="badge {one.severity.value}">{_text(one.severity)}</span>',
            f"<code>{_text(one.id)}</code>",
            _text(one.object),
            _text(one.host),
            f"{_text(one.text)}<br><span class=note>{_text(one.todo)}</span>",
        )
        for one in findings
    ]
    body = _table("Findings", ("Severity", "Finding", "Object", "Host", "What, and what to do"), rows) if rows else ""
    if warnings:
        body += "<ul>" + "".join(f"<li>{_text(one)}</li>" for one in warnings) + "</ul>"
    yield _section("Findings and warnings", body or "<p>None.</p>")


def _hosts(report: MoveReport) -> Iterable[str]:
    if report.versions:
        sides = ("source", "target")
        rows = [
            (side, _text(one.host), _text(one.kvmhv), _text(one.qemu), _text(one.accel))
            for side, one in zip(sides, report.versions, strict=False)
        ]
        yield _section("Hosts", _table("Hosts", ("Side", "Host", "kvmhv", "QEMU", "Accelerator"), rows))


def _decided(report: MoveReport) -> Iterable[str]:
    rows: list[tuple[str, str]] = []
    if report.asked is not None:
        rows.append(("Asked by", _text(report.asked)))
    if report.request is not None:
        asked = report.request
        own = [f"to {asked.target}"]
        own += ["with its disks"] if asked.include_storage else []
        own += [f"disks to {asked.storage}"] if asked.storage else []
        own += [f"at most {asked.max_passes} passes"] if asked.max_passes is not None else []
        own += (
            [f"after {asked.queue_s / 60:.0f} min of waiting for a slot at most"] if asked.queue_s is not None else []
        )
        rows.append(("Asked for", _text(", ".join(own))))
    if report.plan is not None:
        rows += _plan(report.plan)
    if rows:
        yield _section("What was asked and decided", _table("What was asked and decided", ("", ""), rows, kind="pairs"))


def _plan(plan: Plan) -> list[tuple[str, str]]:
    rule = plan.rule
    limit = output.rate_text(rule.bandwidth_bytes_per_s) if rule.bandwidth_bytes_per_s else "none"
    disks = "; ".join(
        f"{copy.disk}: {output.size_text(copy.used_bytes)} of {output.size_text(copy.size_bytes)} used"
        for copy in plan.disk_copies
    )
    estimate = f"{output.seconds_text(plan.estimate_seconds)}, {output.size_text(plan.estimate_bytes)}"
    return [
        ("Rule", _text(f"stop at {output.size_text(rule.threshold_bytes)} or after pass {rule.max_passes}")),
        ("Bandwidth limit", _text(limit)),
        ("Way", f"{_text(plan.source_address)} &rarr; {_text(plan.target_address)}"),
        ("Capabilities", _text(", ".join(plan.capabilities))),
        ("Disks that travel", _text(disks or "none")),
        ("Estimate before", _text(estimate)),
    ]


def _section(title: str, body: str) -> str:
    return f"<section><h2>{title}</h2>{body}</section>"


def _table(name: str, head: Sequence[str], rows: Iterable[Sequence[str]], kind: str = "") -> str:
    """Cells are HTML already; a heading that begins with # is one of figures. On a small screen it can be scrolled."""
    figures = [title.startswith("#") for title in head]

    def cells(tag: str, values: Sequence[str]) -> str:
        return "".join(
            f"<{tag}{' scope=col' if tag == 'th' else ''}{' class=figure' if figure else ''}>{value}</{tag}>"
            for value, figure in zip(values, figures, strict=True)
        )

    titles = [title.removeprefix("#") for title in head]
    top = f"<thead><tr>{cells('th', titles)}</tr></thead>" if any(titles) else ""
    body = "".join(f"<tr>{cells('td', row)}</tr>" for row in rows)
    table = f'<table class="{kind}">{top}<tbody>{body}</tbody></table>'
    return f'<div class="scroll" role="group" tabindex="0" aria-label="{name}">{table}</div>'
