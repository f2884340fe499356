"""The tree of errors: every class has its exit status, and an error survives the way to another process."""

import pytest

from kvmhv import errors
from kvmhv.errors import (
    CallerError,
    Cancelled,
    HostError,
    Incompatible,
    KvmhvError,
    MoveFailed,
    NeedsOperator,
    PeerBroke,
    PeerUnreachable,
    Refused,
)
from kvmhv.model import Finding, Severity

FINDING = Finding(
    id="switch-missing", severity=Severity.ERROR, object="nic0", host="host2", text="no switch lan", todo="make it"
)


@pytest.mark.parametrize(
    ("kind", "exit_status"),
    [
        (CallerError, 2),
        (Refused, 4),
        (NeedsOperator, 5),
        (Cancelled, 6),
        (MoveFailed, 1),
        (PeerUnreachable, 1),
        (PeerBroke, 1),
        (HostError, 1),
    ],
)
def test_exit_statuses(kind: type[KvmhvError], exit_status: int) -> None:
    body = kind("a-code", "what happened", "what to do", host="host1").body()
    assert (body.exit_status, body.code, body.message, body.todo, body.host) == (
        exit_status,
        "a-code",
        "what happened",
        "what to do",
        "host1",
    )
    back = errors.from_body(body)
    assert back.body() == body
    assert back.exit_status == exit_status


def test_incompatible_keeps_its_findings_and_counts_the_errors() -> None:
    error = Incompatible((FINDING, FINDING), host="host2")
    assert "2 findings" in error.message
    assert "1 finding" in Incompatible((FINDING,)).message
    back = errors.from_body(error.body())
    assert isinstance(back, Incompatible)
    assert back.findings == (FINDING, FINDING)
    assert back.exit_status == 3


def test_a_line_for_the_log_names_code_and_host() -> None:
    assert str(HostError("qemu-start", "it does not start", host="host1")) == "it does not start (qemu-start) [host1]"
    assert str(HostError("qemu-start", "it does not start")) == "it does not start (qemu-start)"


def test_an_http_status_of_its_own() -> None:
    assert CallerError("x", "y", http_status=404).http_status == 404
    assert CallerError("x", "y").http_status == 400
