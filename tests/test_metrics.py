"""Metrics: what is counted at a move's end, and what is shown only while it runs."""

import msgspec
import pytest
from prometheus_client.parser import text_string_to_metric_families

from kvmhv.agent.metrics import Metrics, Snapshot
from kvmhv.errors import Refused
from kvmhv.model import (
    DiskSaving,
    Estimate,
    Finding,
    HostSettings,
    IoStall,
    Mode,
    MoveReport,
    Outcome,
    Pass,
    Phase,
    PhaseTime,
    Severity,
    Switchover,
    Vm,
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
    assert seen["kvmhv_migration_pass direction=out vm=web01"] == 2
    assert seen["kvmhv_migration_remaining_bytes direction=in vm=web02"] == 4096
    assert seen["kvmhv_migration_progress_ratio direction=out vm=web01"] == 0.5
    assert seen["kvmhv_migration_slots_in_use direction=out"] == seen["kvmhv_migration_slots_in_use direction=in"] == 1
    assert (seen["kvmhv_migration_slots_free direction=out"], seen["kvmhv_migration_slots_free direction=in"]) == (2, 1)
    after = samples(metrics)
    assert not any("vm=" in name for name in after)
    assert after["kvmhv_migration_slots_in_use direction=out"] == 0


def test_a_running_move_s_rates_and_estimate() -> None:
    estimate = Estimate(
        seconds_low=1, seconds_likely=2, seconds_high=4, passes=10, switchover="pass-limit", blackout_ms=1500
    )
    move = msgspec.structs.replace(
        RUNNING, estimate=estimate, throughput_bytes_per_s=5e7, dirty_bytes=4000, dirty_bytes_per_s=2e7
    )
    seen = samples(Metrics("1", "host1"), move)
    bounds = [
        seen[f"kvmhv_migration_estimated_seconds_left bound={bound} direction=out vm=web01"]
        for bound in ("low", "likely", "high")
    ]
    assert bounds == [1, 2, 4]
    assert seen["kvmhv_migration_expected_blackout_seconds direction=out vm=web01"] == 1.5
    assert seen["kvmhv_migration_throughput_bytes_per_second direction=out vm=web01"] == 5e7
    assert seen["kvmhv_migration_dirty_bytes_per_second direction=out vm=web01"] == 2e7
    assert seen["kvmhv_migration_dirty_bytes direction=out vm=web01"] == 4000
    assert "kvmhv_migration_expected_blackout_seconds direction=out vm=web01" not in samples(
        Metrics("1", "host1"), RUNNING
    )


def test_a_move_that_needs_the_operator_keeps_its_slot_and_says_so() -> None:
    seen = samples(Metrics("1", "host1"), msgspec.structs.replace(RUNNING, outcome=Outcome.NEEDS_OPERATOR))
    assert seen["kvmhv_migration_needs_operator direction=out vm=web01"] == 1
    assert seen["kvmhv_migration_slots_in_use direction=out"] == 1


def test_figures_are_counted_by_the_source_and_the_gap_by_the_target() -> None:
    finding = Finding(id="switch-missing", severity=Severity.WARNING, object="nic0", host="h", text="t", todo="d")
    saving = DiskSaving(disk="disk0", size_bytes=9, sent_bytes=1, base_bytes=2, unallocated_bytes=5, zero_bytes=3)
    report = msgspec.structs.replace(
        DONE, disk_bytes=7, findings=(finding,), network_gap_ms=250.0, savings=(saving, saving), memory_zero_bytes=11
    )
    source, target = Metrics("1", "host1"), Metrics("1", "host2")
    source.observe_move(report)
    target.observe_move(msgspec.structs.replace(report, direction="in"))
    out, into = samples(source), samples(target)
    assert out["kvmhv_migration_bytes_total kind=memory"] == 9
    assert out["kvmhv_migration_bytes_total kind=disk"] == 7
    assert out["kvmhv_migration_saved_bytes_total reason=unallocated"] == 10
    assert out["kvmhv_migration_saved_bytes_total reason=base"] == 4
    assert out["kvmhv_migration_saved_bytes_total reason=zeros"] == 6
    assert out["kvmhv_migration_saved_bytes_total reason=zero-pages"] == 11
    assert into["kvmhv_migration_saved_bytes_total reason=zeros"] == 0
    assert into["kvmhv_migration_saved_bytes_total reason=zero-pages"] == 0
    assert out["kvmhv_migration_switchovers_total reason=pass-limit"] == 1
    assert out["kvmhv_migration_findings_total id=switch-missing"] == 1
    assert out["kvmhv_migration_network_gap_seconds_count"] == 0
    assert into["kvmhv_migration_network_gap_seconds_sum"] == 0.25
    assert into["kvmhv_migration_bytes_total kind=memory"] == 0
    assert into["kvmhv_migrations_total direction=in mode=shared-nothing outcome=done reason=none"] == 1
    assert into["kvmhv_migration_blackout_seconds_count"] == 0


def test_the_agent_s_own_health() -> None:
    metrics = Metrics("1", "h")
    metrics.qmp_answered(0.002)
    metrics.journal_written(True, 0.003)
    metrics.journal_written(False, 0.00005)
    seen = samples(metrics)
    assert seen["kvmhv_qmp_command_seconds_bucket le=0.0025"] == 1
    assert seen["kvmhv_journal_write_seconds_sum durable=true"] == 0.003
    assert seen["kvmhv_journal_write_seconds_bucket durable=false le=0.0001"] == 1


def test_a_scrape_of_200_vms_has_one_series_for_each() -> None:
    vms = tuple(
        VmSummary(name=f"vm{number}", id=str(number), state=VmState.RUNNING, host="h", memory_bytes=1, cpus=1)
        for number in range(200)
    )
    moves = tuple(msgspec.structs.replace(RUNNING, vm=f"vm{number}") for number in range(20))
    metrics = Metrics("1", "h")
    metrics.observe_move(DONE)
    since = {vm.id: 1.7e9 for vm in vms}
    snapshot = Snapshot(vms=vms, moves=moves, settings=HostSettings(moves_out=100), running_since=since)
    text = metrics.render(snapshot).decode()
    still = metrics.render(Snapshot(vms=vms, moves=(), settings=HostSettings(), running_since=since)).decode()
    assert len([line for line in text.splitlines() if not line.startswith("#")]) < 800
    assert still.count('vm="vm17"') == 1


def test_a_guest_that_runs_says_since_when() -> None:
    vm = VmSummary(name="a", id="i", state=VmState.RUNNING, host="h", memory_bytes=1, cpus=1)
    still = msgspec.structs.replace(vm, name="b", id="j", state=VmState.PAUSED)
    text = Metrics("1", "h").render(
        Snapshot(vms=(vm, still), moves=(), settings=HostSettings(), running_since={"i": 1.7e9, "gone": 1.0})
    )
    found = [line for line in text.decode().splitlines() if line.startswith("kvmhv_vm_running")]
    assert found == ['kvmhv_vm_running_since_timestamp_seconds{vm="a",vm_id="i"} 1.7e+09']


def test_vms_by_state() -> None:
    vm = VmSummary(name="a", id="i", state=VmState.RUNNING, host="h", memory_bytes=1, cpus=1)
    crashed = msgspec.structs.replace(vm, name="b", state=VmState.CRASHED)
    seen = samples(Metrics("1", "h"), vms=(vm, crashed))
    assert (seen["kvmhv_vms state=running"], seen["kvmhv_vms state=crashed"]) == (1, 1)
    assert seen["kvmhv_vms state=stopped"] == 0


def test_a_disk_that_stands_still_has_a_series_while_it_does() -> None:
    metrics = Metrics("1", "h")
    vm = Vm(id="i", name="web01", memory_bytes=1, cpus=1)
    stall = IoStall(disk="disk0", place="smb/web01/disk0.raw", since=1.0, seconds=34.5)
    snapshot = Snapshot(vms=(), moves=(), settings=HostSettings(), stalls=((vm, stall),))
    assert 'kvmhv_vm_io_stalled_seconds{disk="disk0",vm="web01"} 34.5' in metrics.render(snapshot).decode()
    assert "kvmhv_vm_io_stalled_seconds{" not in metrics.render(msgspec.structs.replace(snapshot, stalls=())).decode()


def test_refused_connections_by_cause() -> None:
    metrics = Metrics("1", "h")
    metrics.peer_refused("untrusted")
    metrics.peer_refused("untrusted")
    assert samples(metrics)["kvmhv_peer_refused_total cause=untrusted"] == 2


def test_two_agents_in_one_process_do_not_share() -> None:
    one, two = Metrics("1", "a"), Metrics("1", "b")
    one.observe_move(DONE)
    assert samples(two)["kvmhv_migration_blackout_seconds_count"] == 0
