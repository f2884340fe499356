"""What is read of the moves that have ended: fast, and never stopped by one that cannot be read."""

import msgspec
import pytest

from kvmhv.agent import past_moves
from kvmhv.model import MoveReport, Pass, Rule
from tests.test_move_html import DONE


def kept(move_id: str, target: str = "host2", rate: int = 50) -> bytes:
    one = Pass(
        number=1,
        sent_bytes=rate,
        remaining_bytes=0,
        dirty_bytes_per_second=0.0,
        bytes_per_second=0.0,
        seconds=1.0,
    )
    report = msgspec.structs.replace(DONE, id=move_id, target=target, passes=(one,), plan=None)
    return msgspec.json.encode(report)


def test_a_move_is_found_by_the_beginning_of_its_id_alone() -> None:
    reports = [kept("ab1"), kept("ab2"), kept("cab")]
    assert [report.id for report in past_moves.find(reports, "ab")] == ["ab1", "ab2"]
    assert list(past_moves.find(reports, 'x"')) == []


def test_a_list_copies_what_can_be_read(monkeypatch: pytest.MonkeyPatch) -> None:
    shelf = past_moves.Shelf()
    reports = [kept("a"), b"no report", kept("b")]

    def ids() -> list[str]:
        text = msgspec.json.encode(shelf.listed(reports))
        return [report.id for report in msgspec.json.decode(text, type=list[MoveReport])]

    assert ids() == ["a", "b"]
    reports = [*reports[1:], kept("c")]
    assert ids() == ["b", "c"]
    decoded: list[bytes] = []

    def look(some: list[bytes]) -> list[MoveReport]:
        decoded.extend(some)
        return []

    monkeypatch.setattr(past_moves, "read", look)
    assert ids() == ["b", "c"]
    assert decoded == [b"no report"]  # it is tried again; the others are known


def test_only_moves_to_the_same_target_tell_of_the_way_there() -> None:
    reports = [kept("a", rate=70), b"{", kept("b", rate=60), kept("c", target="host3", rate=5)]
    told = past_moves.experience(reports, "host2", disks=False, rule=Rule())
    assert (told.throughput_bytes_per_s, told.link_bytes_per_s) == (60.0, 70.0)
    assert past_moves.experience(reports, "host4", disks=False, rule=Rule()) == past_moves.Experience()
