"""A move on paper: its check and plan before it, its report after it."""

from collections.abc import Sequence

from kvmhv.cli import output
from kvmhv.model import (
    DiskCopy,
    DiskSaving,
    Finding,
    Mode,
    MoveReport,
    MoveRequest,
    Outcome,
    PagesFollowed,
    Plan,
    QueuePlace,
)

_VERBS = {
    Outcome.RUNNING: "is moving",
    Outcome.DONE: "moved",
    Outcome.FAILED: "did not move",
    Outcome.CANCELLED: "was not moved (cancelled)",
    Outcome.NEEDS_OPERATOR: "stands still between hosts",
}


def draw_check(request: MoveRequest, findings: Sequence[Finding], plan: Plan | None, *, with_plan: bool) -> None:
    """Print findings, what the target has already, and the whole plan if it is wanted and there is one."""
    if findings:
        output.findings(findings)
    else:
        output.say(f"{request.vm} can move to {request.target}: nothing found")
    if plan is None:
        return
    for copy in plan.disk_copies:
        if copy.base is not None:
            less = output.size_text(copy.base.data_bytes)
            output.say(f"{copy.disk}'s base is on {request.target} already: {less} less to send")
    if with_plan:
        _draw_plan(request, plan)


def _draw_plan(request: MoveRequest, plan: Plan) -> None:
    rule = plan.rule
    rate = output.rate_text(rule.bandwidth_bytes_per_s) if rule.bandwidth_bytes_per_s else "as fast as it goes"
    limit = f"{rule.blackout_limit_ms} ms at most, else {rule.on_overrun}" if rule.blackout_limit_ms else "any"
    output.say(f"\nplan for {request.vm} to {request.target} (nothing was changed)")
    output.pairs(
        [
            ("mode", plan.mode),
            ("way", f"{plan.source_address} to {plan.target_address}, {rate}"),
            *(("way", f"{here} to {there}, at the same time") for here, there in plan.more_networks),
            ("switchover", f"at {output.size_text(rule.threshold_bytes)} or after pass {rule.max_passes}"),
            ("blackout", limit),
            *(
                [("post-copy", f"if too much remains; then {request.vm} is on both hosts for a while")]
                if rule.post_copy
                else ()
            ),
            ("capabilities", ", ".join(plan.capabilities)),
            ("estimate", f"{output.seconds_text(plan.estimate_seconds)}, {output.size_text(plan.estimate_bytes)}"),
        ]
    )
    _draw_disks(plan.disk_copies)


def _draw_disks(copies: Sequence[DiskCopy]) -> None:
    rows = [
        (
            copy.disk,
            output.size_text(copy.size_bytes),
            output.size_text(copy.used_bytes),
            f"{copy.source_layers[0].location}/{copy.source_layers[0].path}",
            f"{copy.target_layers[0].location}/{copy.target_layers[0].path}",
            len(copy.source_layers),
        )
        for copy in copies
    ]
    if rows:
        output.table(("disk", "size", "used", "at the source", "at the target", "layers"), rows)


def ends_of(report: MoveReport) -> tuple[str, str]:
    """Return from where to where: hosts, or for a storage move locations of its host."""
    if report.mode is not Mode.STORAGE:
        return report.source, report.target
    sources = dict.fromkeys(copy.source_layers[0].location for copy in report.disks)
    targets = dict.fromkeys(copy.target_layers[0].location for copy in report.disks)
    return f"{report.source}/{','.join(sources)}", f"{report.target}/{','.join(targets)}"


def total_s(report: MoveReport) -> float:
    """Return how long a move took that has ended: its phases, which no clock that is set in between can change."""
    return sum(one.seconds for one in report.phases)


def queue_text(queue: QueuePlace) -> str:
    """Return where a move waits, for what and how long at most."""
    why = f": {queue.reason}" if queue.reason else ""
    return f"number {queue.place} in the queue until {output.time_text(queue.until)} at most{why}"


def draw_report(report: MoveReport, *, with_reason: bool = True) -> None:
    """Print phases and passes with their times, why it switched over, the blackout.

    `with_reason`: also why it did not end well, where no error says so next.
    """
    mode = f" ({report.mode})" if report.mode else ""
    source, target = ends_of(report)
    verb = "waits for a slot" if report.queue else _VERBS[report.outcome]
    output.say(f"{report.vm} {verb}: {source} to {target}{mode}, move {report.id}")
    if report.phases:
        output.table(("phase", "time"), [(done.phase, output.seconds_text(done.seconds)) for done in report.phases])
    if report.passes:
        rows = [
            (
                done.number,
                output.size_text(done.sent_bytes),
                output.size_text(done.remaining_bytes),
                output.rate_text(done.bytes_per_second),
                output.rate_text(done.dirty_bytes_per_second),
                output.seconds_text(done.seconds),
            )
            for done in report.passes
        ]
        output.table(("pass", "sent", "remaining", "rate", "dirtied", "time"), rows)
    _draw_disks(report.disks)
    _draw_savings(report.savings)
    output.pairs([row for row in _summary(report) if with_reason or row[0] != "reason"])


def _draw_savings(savings: Sequence[DiskSaving]) -> None:
    rows = [
        (
            one.disk,
            output.size_text(one.size_bytes),
            output.size_text(one.sent_bytes),
            output.size_text(one.base_bytes),
            output.size_text(one.unallocated_bytes),
            output.size_text(one.zero_bytes),
        )
        for one in savings
    ]
    if rows:
        output.table(("disk", "size", "sent", "not sent: base", "unallocated", "zeros"), rows)


def pages_text(pages: PagesFollowed) -> str:
    """Return what followed a guest that ran before all its pages were there."""
    size, took = output.size_text(pages.sent_bytes), output.seconds_text(pages.seconds)
    end = f"the last page after {took}" if pages.complete else f"for {took}, not all"
    anew = f", {pages.attempts} broken connection{'' if pages.attempts == 1 else 's'}" if pages.attempts else ""
    return f"{size} came while it ran there, {end}; it waited for {pages.requests} pages{anew}"


def _interruptions(report: MoveReport) -> list[tuple[str, object]]:
    """What the guest and its users may have noticed."""
    rows: list[tuple[str, object]] = []
    if report.blackout_ms is not None:
        sure = report.blackout_uncertainty_ms
        rows.append(("blackout", f"{report.blackout_ms:.1f} ms" + (f" (± {sure:.1f} ms)" if sure is not None else "")))
    if report.blackout_limit_ms:
        seen = report.switchover.predicted_ms if report.switchover else None
        told = "" if seen is None else f", {seen:.0f} ms predicted"
        slowed = f", the guest's CPUs slowed by {report.throttle_percent} %" if report.throttle_percent else ""
        rows.append(("blackout's limit", f"{report.blackout_limit_ms} ms{told}{slowed}"))
    if report.blackout_steps:
        rows.append(("blackout's steps", ", ".join(f"{one.name} {one.at_ms:.0f} ms" for one in report.blackout_steps)))
    if report.network_gap_ms is not None:
        rows.append(("network gap", f"{report.network_gap_ms:.1f} ms"))
    if report.answer_gap_ms is not None:
        rows.append(("first answer", f"after {report.answer_gap_ms:.1f} ms"))
    if report.pages is not None:
        rows.append(("post-copy", pages_text(report.pages)))
    if report.writes_held_ms is not None:
        rows.append(("requests held", f"{report.writes_held_ms:.1f} ms"))
    return rows


def _summary(report: MoveReport) -> list[tuple[str, object]]:
    rows: list[tuple[str, object]] = [("outcome", report.outcome)]
    if report.queue is not None:
        return [("queued", queue_text(report.queue)), *([("asked by", report.asked)] if report.asked else [])]
    if report.reason:
        rows.append(("reason", report.reason))
    if report.switchover:
        rows.append(("switchover", f"{report.switchover.reason}, after pass {report.switchover.pass_number}"))
    rows += _interruptions(report)
    if report.mode is not Mode.STORAGE:
        rows.append(("memory", output.size_text(report.memory_bytes)))
    if report.memory_zero_bytes is not None:
        rows.append(("zero pages", f"{output.size_text(report.memory_zero_bytes)}, of each page a mark was sent"))
    rows.append(("disks", output.size_text(report.disk_bytes)))
    if report.wire_bytes is not None:
        rows.append(("on the wire", output.size_text(report.wire_bytes)))
    if report.ended_at is not None:
        rows.append(("total", output.seconds_text(total_s(report))))
    if report.queued_seconds is not None:
        rows.append(("waited for a slot", output.seconds_text(report.queued_seconds)))
    if report.asked is not None:
        rows.append(("asked by", report.asked))
    rows += [(f"on {one.host}", f"kvmhv {one.kvmhv}, QEMU {one.qemu} ({one.accel})") for one in report.versions]
    rows += [("warning", warning) for warning in report.warnings]
    return rows
