"""The source before the blackout: the check, the offer, disks and memory going over while the guest runs."""

from kvmhv.core import (
    blackout,
    checks,
    checks_steered,
    facts,
    plan,
    precopy,
    progress,
    savings,
    source_switchover,
    source_undo,
)
from kvmhv.core.effects import (
    ClearTimer,
    Effect,
    Journal,
    MirrorDisks,
    Send,
    SendFiles,
    SendMemory,
    SetTimer,
    StopGuest,
    ThrottleGuest,
)
from kvmhv.core.source_state import (
    IDLE_TIMER,
    STEP_TIMER,
    Result,
    SourceState,
    SourceStep,
    enter,
    standing_of,
    update,
    with_progress,
)
from kvmhv.messages import Answer, FilesSent, Ready
from kvmhv.model import ErrorBody, HostVersions, Inventory, Outcome, Phase, Severity, Switchover


def started(state: SourceState, fact: facts.Fact) -> Result:
    """Begin: the VM is claimed, nothing is said yet."""
    state = state.begin_phase(Phase.SETUP, fact.at_ms)
    return state, [Journal(), SetTimer(name=STEP_TIMER, after_s=state.timeouts.answer_s)]


def answered(state: SourceState, fact: facts.Fact) -> Result:
    """Check and plan with the target's inventory, then offer; a refusal or a finding ends the move, nothing is made."""
    message = facts.message_of(fact, Answer)
    if message.inventory.refusal is not None:
        refusal = message.inventory.refusal
        error = ErrorBody(
            code=refusal.code,
            message=refusal.text,
            todo=f"on {refusal.host}: kvmhv host set {refusal.setting}=..." if refusal.setting else "",
            host=refusal.host,
            exit_status=4,
        )
        return source_undo.end(state, fact.at_ms, Outcome.FAILED, error)
    check = checks_steered.check if state.vm.runtime else checks.check
    findings = check(state.vm, state.request, state.inventory, message.inventory)
    state = update(state, findings=findings)
    if any(finding.severity is Severity.ERROR for finding in findings):
        error = ErrorBody(
            code="incompatible",
            message=f"the VM cannot move to {state.target}: "
            + "; ".join(finding.text for finding in findings if finding.severity is Severity.ERROR),
            todo="mend each finding and try again",
            host=state.target,
            exit_status=3,
            findings=findings,
        )
        return source_undo.end(state, fact.at_ms, Outcome.FAILED, error)
    made = plan.make(
        state.vm,
        state.request,
        state.rule,
        state.timeouts,
        state.inventory,
        message.inventory,
        state.throughput_bytes_per_s,
        state.link_bytes_per_s,
    )
    state = update(state, plan=made, versions=(_versions(state.inventory), _versions(message.inventory)))
    after, effects = enter(state, SourceStep.OFFERING, state.timeouts.prepare_s)
    return after, [Journal(), *effects, Send(message=after.offer())]


def _versions(inventory: Inventory) -> HostVersions:
    qemu = inventory.qemu
    return HostVersions(host=inventory.host, kvmhv=inventory.kvmhv_version, qemu=qemu.version_text, accel=qemu.accel)


def files_wanted(state: SourceState, fact: facts.Fact) -> Result:
    """The target has let the offer in and lacks the kernel files."""
    return state, [SendFiles()]


def files_uploaded(state: SourceState, fact: facts.Fact) -> Result:
    """The kernel files are there: say so."""
    state = update(state, files_sent=True)
    return state, [Send(message=FilesSent())]


def ready(state: SourceState, fact: facts.Fact) -> Result:
    """The target listens: disks first, if any travel."""
    message = facts.message_of(fact, Ready)
    if message.epoch != state.hold.epoch:
        return state, []
    state = update(state, address=message.address)
    made = state.planned()
    if not made.disk_copies:
        return _begin_memory(state, fact.at_ms)
    state = state.begin_phase(Phase.STORAGE, fact.at_ms)
    after, effects = enter(state, SourceStep.STORAGE, state.timeouts.storage_s)
    return after, [
        Journal(),
        *effects,
        SetTimer(name=IDLE_TIMER, after_s=state.timeouts.storage_idle_s),
        MirrorDisks(plan=made, address=message.address),
    ]


# --- storage and memory


def mirror_progress(state: SourceState, fact: facts.Fact) -> Result:
    """Note what was copied; as long as bytes go over the phase is not idle."""
    assert isinstance(fact, facts.MirrorProgress)
    if fact.copied_bytes <= state.copied_bytes:
        return state, []
    after = update(state, copied_bytes=fact.copied_bytes, disk_total_bytes=fact.total_bytes)
    after = with_progress(after, fact.at_ms)
    return after, [SetTimer(name=IDLE_TIMER, after_s=state.timeouts.storage_idle_s)]


def mirrors_ready(state: SourceState, fact: facts.Fact) -> Result:
    """From here on each write goes to both sides; memory may go."""
    assert isinstance(fact, facts.MirrorsReady)
    return _begin_memory(update(state, copied_bytes=fact.copied_bytes, disks_sent=fact.sent), fact.at_ms)


def _begin_memory(state: SourceState, at_ms: float) -> Result:
    """Start the passes."""
    address = state.address
    assert address is not None
    state = state.begin_phase(Phase.MEMORY, at_ms)
    after, effects = enter(state, SourceStep.MEMORY, state.timeouts.memory_s)
    return after, [
        Journal(),
        *effects,
        SetTimer(name=IDLE_TIMER, after_s=state.timeouts.memory_idle_s),
        SendMemory(plan=state.planned(), address=address),
    ]


def memory_progress(state: SourceState, fact: facts.Fact) -> Result:
    """Note what was sent; as long as pages go over the phase is not idle."""
    assert isinstance(fact, facts.MemoryProgress)
    moved = fact.sent_bytes > state.memory_sent_bytes
    idle: list[Effect] = [SetTimer(name=IDLE_TIMER, after_s=state.timeouts.memory_idle_s)]
    after = update(
        state,
        memory_sent_bytes=max(fact.sent_bytes, state.memory_sent_bytes),
        memory_remaining_bytes=fact.remaining_bytes,
        memory_zero_bytes=savings.of_memory(state.memory_zero_bytes, fact.zero_bytes),
        sampled_dirty_bytes_per_s=fact.sampled_dirty_bytes_per_s or state.sampled_dirty_bytes_per_s,
    )
    if state.step is SourceStep.MEMORY:
        after, effects = _announce_when_near(with_progress(after, fact.at_ms), fact.at_ms)
        return after, [*effects, *idle] if moved else effects
    return after, []


def held_back(state: SourceState, fact: facts.Fact) -> Result:
    """Another move has the network for a moment: this one's passes do not say what the blackout's memory will take."""
    return update(state, held_back=True), []


def pass_started(state: SourceState, fact: facts.Fact) -> Result:
    """Keep the pass that is complete, and pull the lever if the rule says so and the blackout keeps to its limit."""
    assert isinstance(fact, facts.PassStarted)
    passes = state.passes
    if state.pass_begun is not None and fact.number > state.pass_begun.number:
        passes = (*passes, precopy.complete_pass(state.pass_begun, fact))
    state = update(
        state,
        passes=passes,
        pass_begun=fact,
        memory_sent_bytes=max(fact.sent_bytes, state.memory_sent_bytes),
        memory_remaining_bytes=fact.remaining_bytes,
        memory_zero_bytes=savings.of_memory(state.memory_zero_bytes, fact.zero_bytes),
        throttle_percent=max(state.throttle_percent, fact.throttle_percent if state.throttled_ms is not None else 0),
    )
    predicted_ms = _predicted_ms(state, fact.remaining_bytes)
    switchover = precopy.decide(state.rule, fact, passes, predicted_ms)
    if switchover is None:
        return _next_pass(state, fact.at_ms, [])
    over = blackout.exceeds(state.rule, predicted_ms)
    limited = state.rule.blackout_limit_ms and predicted_ms is not None
    follow = state.rule.post_copy and (over if limited else switchover.reason == precopy.PASS_LIMIT)
    if over and not follow and state.rule.on_overrun != blackout.ACCEPT:
        return _would_overrun(state, fact, switchover)
    state, entry = source_switchover.announce(state)
    state = update(state, step=SourceStep.STOPPING, switchover=switchover, guest_runs=False, pages_follow=follow)
    return state, [
        *entry,
        StopGuest(post_copy=follow),
        ClearTimer(name=IDLE_TIMER),
        *source_switchover.blackout_timer(state),
    ]


def _announce_when_near(state: SourceState, at_ms: float) -> Result:
    """The switchover may come soon: announced now, its disk write delays nothing."""
    return source_switchover.announce(state) if progress.is_near(standing_of(state, at_ms)) else (state, [])


def _predicted_ms(state: SourceState, remaining_bytes: int) -> float | None:
    return blackout.predict_ms(
        state.rule,
        state.passes,
        remaining_bytes,
        fixed_ms=state.fixed_blackout_ms,
        shrinks=state.planned().channels.ratio,
        link_bytes_per_s=state.link_bytes_per_s,
        throttle_percent=state.throttle_percent,
        held_back=state.held_back,
    )


def _next_pass(state: SourceState, at_ms: float, effects: list[Effect]) -> Result:
    state, entry = _announce_when_near(with_progress(state, at_ms), at_ms)
    return state, [*entry, SetTimer(name=IDLE_TIMER, after_s=state.timeouts.memory_idle_s), *effects]


def _would_overrun(state: SourceState, fact: facts.PassStarted, switchover: Switchover) -> Result:
    """The blackout would be too long: slow the guest down where that was asked for and helps, or take the move back."""
    rule, since_ms = state.rule, state.throttled_ms
    throttled_s = 0.0 if since_ms is None else (fact.at_ms - since_ms) / 1000
    had_its_chance = blackout.gives_up(rule, len(state.passes), throttled_s, state.timeouts.throttled_s)
    helps = switchover.reason != precopy.THRESHOLD and not had_its_chance
    if rule.on_overrun == blackout.THROTTLE and helps:
        if since_ms is not None:
            return _next_pass(state, fact.at_ms, [])
        slow_down = ThrottleGuest(max_percent=blackout.throttle_max_percent(rule))
        return _next_pass(update(state, throttled_ms=fact.at_ms), fact.at_ms, [slow_down])
    assert switchover.predicted_ms is not None
    error = blackout.over_limit(
        rule,
        state.source,
        switchover.predicted_ms,
        fact.remaining_bytes,
        state.fixed_blackout_ms,
        throttle_percent=state.throttle_percent,
        throttled_s=throttled_s,
    )
    return source_undo.undo(state, fact.at_ms, Outcome.FAILED, error)
