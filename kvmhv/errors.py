"""The one tree of errors that a person can meet.

    KvmhvError
    |-- CallerError      the request is wrong                              exit 2, HTTP 400/404/409
    |-- Incompatible     the check found something; all findings at once   exit 3, HTTP 422
    |-- Refused          this or the other host does not allow it          exit 4, HTTP 403/409/429
    |-- MoveFailed       it was tried and failed; the VM runs at the source   exit 1, HTTP 502/500
    |   |-- PeerUnreachable
    |   `-- PeerBroke    the other agent broke the protocol
    |-- NeedsOperator    nobody can prove enough to go on alone            exit 5, HTTP 409
    |-- Cancelled        on request                                        exit 6, HTTP 409
    `-- HostError        something on this host does not work              exit 1, HTTP 500

Each has a stable `code` (the manual has a paragraph for each), says what happened and on which host, and what to do.
"""

from kvmhv.model import ErrorBody, Finding


class KvmhvError(Exception):
    """Base: `code` never changes, `message` says what happened, `todo` what to do, `host` where."""

    exit_status = 1
    http_status = 500

    def __init__(
        self,
        code: str,
        message: str,
        todo: str = "",
        *,
        host: str | None = None,
        http_status: int | None = None,
    ) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.todo = todo
        self.host = host
        if http_status is not None:
            self.http_status = http_status

    def __str__(self) -> str:
        """One line for logs: code, message, host."""
        where = f" [{self.host}]" if self.host else ""
        return f"{self.message} ({self.code}){where}"

    def body(self) -> ErrorBody:
        """Return the error as the REST API and `--json` show it."""
        return ErrorBody(
            code=self.code, message=self.message, todo=self.todo, host=self.host, exit_status=self.exit_status
        )


class CallerError(KvmhvError):
    """The request is wrong: unknown name, bad value, a thing in the wrong state. Nothing was changed."""

    exit_status = 2
    http_status = 400


class Incompatible(KvmhvError):
    """The VM cannot run at the target as things stand. Nothing was changed; `findings` has every reason at once."""

    exit_status = 3
    http_status = 422

    def __init__(self, findings: tuple[Finding, ...], *, host: str | None = None) -> None:
        errors = [finding for finding in findings if finding.severity == "error"]
        count = f"{len(errors)} finding{'s' if len(errors) != 1 else ''}"
        super().__init__(
            "incompatible", f"the VM cannot move there: {count}", "mend each finding and try again", host=host
        )
        self.findings = findings

    def body(self) -> ErrorBody:
        """Return the error with its findings."""
        return ErrorBody(
            code=self.code,
            message=self.message,
            todo=self.todo,
            host=self.host,
            exit_status=self.exit_status,
            findings=self.findings,
        )


class Refused(KvmhvError):
    """A limit, a setting or a missing trust of `host` says no. Nothing was changed."""

    exit_status = 4
    http_status = 403


class MoveFailed(KvmhvError):
    """A move was tried and did not succeed. The VM runs at the source; nothing is left at the target."""

    exit_status = 1
    http_status = 502


class PeerUnreachable(MoveFailed):
    """The other agent does not answer. Before the grant this changes nothing for the VM."""


class PeerBroke(MoveFailed):
    """The other agent sent something that the protocol does not allow; the connection was ended."""


class NeedsOperator(KvmhvError):
    """Neither side can prove enough to go on alone: both copies stand still until an operator decides."""

    exit_status = 5
    http_status = 409


class Cancelled(KvmhvError):
    """The move was cancelled on request; the VM runs at the source."""

    exit_status = 6
    http_status = 409


class HostError(KvmhvError):
    """Something that this host needs does not work (QEMU, disk, network). The message says what was left how."""


ERROR_CLASSES: dict[int, type[KvmhvError]] = {
    2: CallerError,
    4: Refused,
    5: NeedsOperator,
    6: Cancelled,
    1: MoveFailed,
}


def from_body(body: ErrorBody) -> KvmhvError:
    """Return the error that another process described; the inverse of `body()` up to the class of exit status 1."""
    if body.exit_status == Incompatible.exit_status:
        return Incompatible(body.findings, host=body.host)
    kind = ERROR_CLASSES.get(body.exit_status, MoveFailed)
    return kind(body.code, body.message, body.todo, host=body.host)
