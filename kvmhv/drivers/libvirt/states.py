"""What libvirt's numbers say of a domain: its state, and whether it is in a move. Blocking (connection.py)."""

import enum
from typing import Any

from kvmhv.model import Stay, VmState, Whereabouts

STATES = (  # by libvirt's numbers: none, running, blocked, paused, in shutdown, off, crashed, suspended by the guest
    VmState.UNKNOWN,
    VmState.RUNNING,
    VmState.RUNNING,
    VmState.PAUSED,
    VmState.STOPPING,
    VmState.STOPPED,
    VmState.CRASHED,
    VmState.PAUSED,
)
WITHOUT_PROCESS = (VmState.STOPPED, VmState.CRASHED)
NO_JOB = 0
"""VIR_DOMAIN_JOB_NONE."""
MOVE_OPERATIONS = (5, 6)
"""VIR_DOMAIN_JOB_OPERATION_MIGRATION_IN, _OUT."""
BEFORE_IT_RAN = (2, 11)
"""VIR_DOMAIN_PAUSED_MIGRATION, _STARTING_UP: an incoming domain has no other reason to stand still before it runs."""


class Job(enum.StrEnum):
    """A move of a domain that is under way."""

    NONE = "none"
    OUT = "out"
    IN = "in"


def whereabouts(library: Any, domain: Any) -> Whereabouts:
    """Return where the domain is."""
    number, reason = domain.state()
    state = STATES[number]
    if state in WITHOUT_PROCESS:
        return Whereabouts(stay=Stay.OFF)
    job = job_of(library, domain)
    stay = Stay.RUNNING if state in (VmState.RUNNING, VmState.STOPPING) else Stay.PAUSED
    if stay is Stay.PAUSED and job is Job.IN and reason in BEFORE_IT_RAN:
        stay = Stay.ARRIVING
    return Whereabouts(stay=stay, busy=job is not Job.NONE)


def job_of(library: Any, domain: Any) -> Job:
    """Return which move of the domain libvirt is at."""
    try:
        said: dict[str, Any] = domain.jobStats()
    except library.libvirtError as error:
        if error.get_error_code() == library.VIR_ERR_OPERATION_UNSUPPORTED:  # of a move it tells its source alone
            return Job.IN
        raise
    moves = said.get("type", NO_JOB) != NO_JOB and said.get("operation", MOVE_OPERATIONS[0]) in MOVE_OPERATIONS
    return Job.OUT if moves else Job.NONE
