"""`kvmhv host`: a host, its settings, whom it trusts, who may use it with a token."""

import click

from kvmhv.cli import output
from kvmhv.cli.address import segment
from kvmhv.cli.parameters import HOST, NEW, Setting
from kvmhv.cli.session import Session, json_option
from kvmhv.model import HostReport, Struct, TrustedHost


class Invitation(Struct, frozen=True, kw_only=True):
    """What `trust invite` gives."""

    code: str
    expires_in_s: float


class Token(Struct, frozen=True, kw_only=True):
    """A token; its secret is shown once, when it is made."""

    name: str
    token: str


class TokenInfo(Struct, frozen=True, kw_only=True):
    """A token in the list."""

    name: str
    created_at: float


@click.group()
def host() -> None:
    """A host, its settings and whom it trusts."""


@host.command()
@json_option
@click.pass_obj
def show(session: Session) -> None:
    """Show the host: its QEMU, settings, storage, switches and trusted hosts."""
    report = session.agent().call("GET", "host", HostReport)
    session.answer(report, lambda: _draw(report))


def _draw(report: HostReport) -> None:
    qemu = report.qemu
    output.pairs(
        [
            ("host", f"{report.name} ({report.id})"),
            ("kvmhv", report.kvmhv_version),
            ("address", f"{report.address} (listens on {report.listen})"),
            ("fingerprint", report.fingerprint),
            ("qemu", f"{qemu.version_text} at {qemu.binary}" if qemu else "none"),
            ("accelerator", f"{qemu.accel}: {report.accel_reason}" if qemu else report.accel_reason),
            ("switches", ", ".join(report.switches) or None),
            ("moves now", f"{report.moves_out} out, {report.moves_in} in"),
            (
                "bounds",
                f"a move has ended or told the operator after {output.seconds_text(report.move_bound_s)}, "
                f"its blackout after {output.seconds_text(report.blackout_bound_s)}",
            ),
        ]
    )
    output.say("\nsettings (kvmhv host set KEY=VALUE)")
    output.pairs((_setting_key(key), _setting_text(value)) for key, value in report.settings.items())
    output.say("\nlocations")
    rows = [
        (place.name, place.kind, place.path, output.size_text(place.free_bytes), output.size_text(place.total_bytes))
        for place in report.locations
    ]
    output.table(("name", "kind", "path", "free", "total"), rows)
    output.say("\ntrusted hosts")
    _draw_trusted(report.trusted)


def _setting_key(key: str) -> str:
    return key if "." in key else f"migration.{key}"


def _setting_text(value: object) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, list | tuple):
        return ",".join(str(item) for item in value) or "-"
    return str(value)


@host.command("set")
@click.argument("settings", nargs=-1, required=True, type=Setting(), metavar="KEY=VALUE...")
@json_option
@click.pass_obj
def set_settings(session: Session, settings: tuple[tuple[str, str], ...]) -> None:
    """Change settings of the host, all or none; `host show` lists them."""
    changes = dict(settings)
    if len(changes) != len(settings):
        raise click.UsageError("a setting is given twice")
    agent = session.agent()
    agent.call("PATCH", "host/settings", object, body={"changes": changes})
    report = agent.call("GET", "host", HostReport)
    session.answer(report.settings, lambda: _draw_changed(report, changes))


def _draw_changed(report: HostReport, changes: dict[str, str]) -> None:
    values = {_setting_key(key): _setting_text(value) for key, value in report.settings.items()}
    for key, asked in changes.items():
        output.say(f"{report.name}: {key}={values.get(key, asked)}")


# --- trust --------------------------------------------------------------------------------------------------------


@host.group()
def trust() -> None:
    """Hosts that trust each other: `trust invite` on one, `trust join CODE` on the other."""


@trust.command()
@click.option("--address", metavar="HOST:PORT", help="Where the other host reaches this one; default: as configured.")
@json_option
@click.pass_obj
def invite(session: Session, address: str | None) -> None:
    """Print a code with which one other host can join within a few minutes."""
    made = session.agent().call("POST", "host/trust/invite", Invitation, body={"address": address})

    def draw() -> None:
        output.say(f"on the other host, within {output.seconds_text(made.expires_in_s)}:")
        output.say(f"  kvmhv host trust join {made.code}")

    session.answer(made, draw)


@trust.command()
@click.argument("code")
@click.option("--address", metavar="HOST:PORT", help="Where the other host reaches this one; default: as configured.")
@json_option
@click.pass_obj
def join(session: Session, code: str, address: str | None) -> None:
    """Trust the host that gave CODE, and be trusted by it."""
    joined = session.agent().call("POST", "host/trust/join", TrustedHost, body={"code": code, "address": address})
    session.answer(joined, lambda: output.say(f"this host and {joined.name} ({joined.address}) trust each other now"))


@trust.command("list")
@json_option
@click.pass_obj
def list_trusted(session: Session) -> None:
    """List trusted hosts."""
    trusted = session.agent().call("GET", "host/trust", tuple[TrustedHost, ...])
    session.answer(trusted, lambda: _draw_trusted(trusted))


def _draw_trusted(trusted: tuple[TrustedHost, ...]) -> None:
    output.table(("name", "address", "fingerprint"), [(it.name, it.address, it.fingerprint) for it in trusted])


@trust.command("remove")
@click.argument("name", type=HOST)
@json_option
@click.pass_obj
def remove_trusted(session: Session, name: str) -> None:
    """Trust a host no longer."""
    session.agent().call("DELETE", f"host/trust/{segment(name)}", object)
    session.answer({"name": name, "removed": True}, lambda: output.say(f"{name} is trusted no longer"))


# --- tokens -------------------------------------------------------------------------------------------------------


@host.group()
def token() -> None:
    """Tokens for programs that use the agent over the network."""


@token.command()
@click.argument("name", type=NEW)
@json_option
@click.pass_obj
def create(session: Session, name: str) -> None:
    """Make a token and print it: the agent does not show it again."""
    made = session.agent().call("POST", "host/tokens", Token, body={"name": name})
    session.answer(made, lambda: output.say(made.token))


@token.command("list")
@json_option
@click.pass_obj
def list_tokens(session: Session) -> None:
    """List tokens by name, without their secrets."""
    tokens = session.agent().call("GET", "host/tokens", list[TokenInfo])
    rows = [(it.name, output.time_text(it.created_at)) for it in tokens]
    session.answer(tokens, lambda: output.table(("name", "created"), rows))


@token.command()
@click.argument("name", type=NEW)
@json_option
@click.pass_obj
def revoke(session: Session, name: str) -> None:
    """Make a token worthless."""
    session.agent().call("DELETE", f"host/tokens/{segment(name)}", object)
    session.answer({"name": name, "revoked": True}, lambda: output.say(f"token {name} revoked"))
