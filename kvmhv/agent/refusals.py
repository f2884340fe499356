"""What this host's settings say no to, as an error and as a finding."""

from collections.abc import Sequence

from kvmhv.core.admission import LIMIT
from kvmhv.errors import Incompatible, Refused
from kvmhv.model import Finding, Refusal, Severity


def as_error(refusal: Refusal) -> Refused:
    """Return what whoever asked is told."""
    todo = f"on {refusal.host}: kvmhv host set {refusal.setting}=..." if refusal.setting else ""
    return Refused(refusal.code, refusal.text, todo, host=refusal.host)


def as_finding(refusal: Refusal) -> Finding:
    """Return it as the check shows it."""
    error = as_error(refusal)
    about = refusal.setting or refusal.host
    return Finding(
        id=refusal.code, severity=Severity.ERROR, object=about, host=refusal.host, text=refusal.text, todo=error.todo
    )


def refuse_hopeless(refusals: Sequence[Refusal | None], findings: Sequence[Finding], target: str) -> None:
    """Raise what keeps a move from ever beginning: every refusal but that of a limit, and what the check finds.

    Raises Refused, Incompatible with all findings.
    """
    for refusal in refusals:
        if refusal is not None and refusal.code != LIMIT:
            raise as_error(refusal)
    if any(one.severity is Severity.ERROR and one.id != LIMIT for one in findings):
        raise Incompatible(tuple(findings), host=target)
