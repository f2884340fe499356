"""`kvmhv doctor`."""

import click

from kvmhv.cli import output
from kvmhv.cli.session import Session, json_option
from kvmhv.model import Problem, Severity


@click.command()
@json_option
@click.pass_obj
def doctor(session: Session) -> int:
    """Show what on the host would keep VMs from running or moving.

    Exit status 1 if there is an error among it; warnings are no reason.
    """
    problems = session.agent().call("GET", "doctor", list[Problem])
    session.answer(problems, lambda: _draw(problems))
    return 1 if any(problem.severity is Severity.ERROR for problem in problems) else 0


def _draw(problems: list[Problem]) -> None:
    if not problems:
        output.say("nothing found: VMs can run and move here")
        return
    rows = [(problem.severity, problem.id, problem.text, problem.todo) for problem in problems]
    output.table(("severity", "problem", "what", "what to do"), rows)
