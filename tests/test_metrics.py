"""Metrics: what is counted at a move's end, and what is shown only while it runs."""

import msgspec
import pytest
from prometheus_client.parser import text_string_to_metric_families

from kvmhv.agent.metrics import Metrics, Snapshot
from kvmhv.errors import Refused
from kvmhv.model import (
    HostSettings,
    Mode,
    MoveReport,
    Outcome,
    Pass,
    Phase,
    PhaseTime,
    Switchover,
    VmState,
    VmSummary,
)

RUNNING = MoveReport(
    id="m1",
    vm="web01",
    vm_id="id-1",
    source="host1",
    target="host2",
    direction="out",
    mode=Mode.SHARED_NOTHING,
    outcome=Outcome.RUNNING,
    reason=None,
    error=None,
    phase=Phase.MEMORY,
    phases=(PhaseTime(phase=Phase.SETUP, seconds=0.5), PhaseTime(phase=Phase.MEMORY, seconds=3.0)),
    passes=(
        Pass(
            number=1, sent_bytes=9, remaining_bytes=4096, dirty_bytes_per_second=1.0, bytes_per_second=2.0, seconds=3.0
        ),
    ),
    switchover=None,
    blackout_ms=None,
    blackout_uncertainty_ms=None,
    memory_bytes=9,
    disk_bytes=0,
    findings=(),
    progress=0.5,
    remaining_bytes=4096,
    storage_total_bytes=0,
    storage_copied_bytes=0,
    warnings=(),
    started_at=1.0,
    ended_at=None,
)
DONE = msgspec.structs.replace(
    RUNNING,
    outcome=Outcome.DONE,
    blackout_ms=42.0,
    switchover=Switchover(reason="pass-limit", pass_number=10),
    ended_at=2.0,
)


def samples(metrics: Metrics, *moves: MoveReport, vms: tuple[VmSummary, ...] = ()) -> dict[str, float]:
    text = metrics.render(Snapshot(vms=vms, moves=moves, settings=HostSettings(moves_out=3))).decode()
    return {
        sample.name + "".join(f" {key}={value}" for key, value in sorted(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_a_move_that_ends_well_is_counted_with_its_figures() -> None:
    metrics = Metrics("1.2", "host1")
    metrics.observe_move(DONE)
    seen = samples(metrics)
    assert seen["kvmhv_build_info host=host1 version=1.2"] == 1
    assert seen["kvmhv_migrations_total direction=out mode=shared-nothing outcome=done reason=none"] == 1
    assert seen["kvmhv_migration_phase_seconds_sum mode=shared-nothing phase=memory"] == 3.0
    assert seen["kvmhv_migration_blackout_seconds_sum"] == pytest.approx(0.042)
    assert seen["kvmhv_migration_blackout_seconds_bucket le=0.05"] == 1
    assert seen["kvmhv_migration_blackout_seconds_bucket le=0.02"] == 0
    assert seen["kvmhv_migration_passes_sum"] == 10


def test_a_move_that_fails_has_its_code_and_no_times() -> None:
    metrics = Metrics("1", "host1")
    error = Refused("limit-reached", "no").body()
    metrics.observe_move(msgspec.structs.replace(DONE, outcome=Outcome.FAILED, mode=None, error=error))
    seen = samples(metrics)
    assert seen["kvmhv_migrations_total direction=out mode=none outcome=failed reason=limit-reached"] == 1
    assert seen["kvmhv_migration_blackout_seconds_count"] == 0
    assert not any(name.startswith("kvmhv_migration_phase_seconds") for name in seen)


def test_a_running_move_shows_and_leaves_nothing() -> None:
    metrics = Metrics("1", "host1")
    seen = samples(metrics, RUNNING, msgspec.structs.replace(RUNNING, vm="web02", direction="in"))
    assert seen["kvmhv_migration_phase direction=out phase=memory vm=web01"] == 1
    assert seen["kvmhv_migration_phase direction=out phase=state vm=web01"] == 0
    assert seen["kvmhv_migration_pass direction=out vm=web01"] == 1
    assert seen["kvmhv_migration_remaining_bytes direction=in vm=web02"] == 4096
    assert seen["kvmhv_migration_progress_ratio direction=out vm=web01"] == 0.5
    assert seen["kvmhv_migrations_running direction=out"] == seen["kvmhv_migrations_running direction=in"] == 1
    assert (seen["kvmhv_migrations_limit direction=out"], seen["kvmhv_migrations_limit direction=in"]) == (3, 2)
    after = samples(metrics, DONE)
    assert not any("vm=" in name for name in after)
    assert after["kvmhv_migrations_running direction=out"] == 0


def test_vms_by_state() -> None:
    vm = VmSummary(name="a", id="i", state=VmState.RUNNING, host="h", memory_bytes=1, cpus=1)
    crashed = msgspec.structs.replace(vm, name="b", state=VmState.CRASHED)
    seen = samples(Metrics("1", "h"), vms=(vm, crashed))
    assert (seen["kvmhv_vms state=running"], seen["kvmhv_vms state=crashed"]) == (1, 1)
    assert seen["kvmhv_vms state=stopped"] == 0


def test_refused_connections_by_cause() -> None:
    metrics = Metrics("1", "h")
    metrics.peer_refused("untrusted")
    metrics.peer_refused("untrusted")
    assert samples(metrics)["kvmhv_peer_refused_total cause=untrusted"] == 2


def test_two_agents_in_one_process_do_not_share() -> None:
    one, two = Metrics("1", "a"), Metrics("1", "b")
    one.observe_move(DONE)
    assert samples(two)["kvmhv_migration_blackout_seconds_count"] == 0
