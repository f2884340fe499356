"""What this host's settings say no to, as an error and as a finding."""

from kvmhv.errors import Refused
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
