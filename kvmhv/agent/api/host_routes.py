"""Routes of the host itself: what it is, its settings, whom it trusts, its tokens, what ails it."""

from kvmhv.agent.api.route import Call, Route
from kvmhv.agent.api.services import Services
from kvmhv.drivers.auth.invitations import LIFETIME_MS
from kvmhv.model import HostReport, Problem, Struct, TrustedHost


class SettingChanges(Struct, frozen=True, kw_only=True):
    """`{"migration.enabled": "true", ...}`: applied all or none."""

    changes: dict[str, str]


class InviteRequest(Struct, frozen=True, kw_only=True):
    """`address`: where the other host reaches this one, if not at the configured address."""

    address: str | None = None


class InviteCode(Struct, frozen=True, kw_only=True):
    """One line for `kvmhv host trust join` on the other host; it works once, for `expires_in_s`."""

    code: str
    expires_in_s: float


class JoinRequest(Struct, frozen=True, kw_only=True):
    """`address`: where the inviting host reaches this one, if not at the configured address."""

    code: str
    address: str | None = None


class TokenRequest(Struct, frozen=True, kw_only=True):
    """Name of the token to make."""

    name: str


class NewToken(Struct, frozen=True, kw_only=True):
    """A fresh token: shown this once."""

    name: str
    token: str


class TokenInfo(Struct, frozen=True, kw_only=True):
    """A token as the list shows it."""

    name: str
    created_at: float


class SettingsShown(Struct, frozen=True, kw_only=True):
    """All settings by name."""

    settings: dict[str, object]


async def show(api: Services, call: Call) -> HostReport:
    """Answer GET /v1/host."""
    return await api.host.report()


async def change_settings(api: Services, call: Call) -> SettingsShown:
    """Answer PATCH /v1/host/settings."""
    body: SettingChanges = call.body
    api.settings.change(body.changes)
    return SettingsShown(settings=api.settings.shown())


async def list_trust(api: Services, call: Call) -> tuple[TrustedHost, ...]:
    """Answer GET /v1/host/trust."""
    return api.trusting.trust.list()


async def remove_trust(api: Services, call: Call) -> None:
    """Answer DELETE /v1/host/trust/{name}."""
    api.trusting.trust.remove(call.path("name"))


async def invite(api: Services, call: Call) -> InviteCode:
    """Answer POST /v1/host/trust/invite."""
    body: InviteRequest = call.body
    return InviteCode(code=api.trusting.invite(body.address), expires_in_s=LIFETIME_MS / 1000)


async def join(api: Services, call: Call) -> TrustedHost:
    """Answer POST /v1/host/trust/join."""
    body: JoinRequest = call.body
    return await api.trusting.join(body.code, body.address)


async def list_tokens(api: Services, call: Call) -> tuple[TokenInfo, ...]:
    """Answer GET /v1/host/tokens."""
    return tuple(TokenInfo(name=token.name, created_at=token.created_at) for token in api.tokens.list())


async def create_token(api: Services, call: Call) -> NewToken:
    """Answer POST /v1/host/tokens."""
    body: TokenRequest = call.body
    return NewToken(name=body.name, token=api.tokens.create(body.name))


async def revoke_token(api: Services, call: Call) -> None:
    """Answer DELETE /v1/host/tokens/{name}."""
    api.tokens.revoke(call.path("name"))


async def doctor(api: Services, call: Call) -> tuple[Problem, ...]:
    """Answer GET /v1/doctor."""
    return await api.doctor.problems()


HOST_ROUTES = (
    Route(method="GET", path="/v1/host", doc="The host and its settings.", handler=show, response=HostReport),
    Route(
        method="PATCH",
        path="/v1/host/settings",
        doc="Change settings, all or none.",
        handler=change_settings,
        request=SettingChanges,
        response=SettingsShown,
    ),
    Route(
        method="GET",
        path="/v1/host/trust",
        doc="The hosts that this host trusts.",
        handler=list_trust,
        response=tuple[TrustedHost, ...],
    ),
    Route(
        method="POST",
        path="/v1/host/trust/invite",
        doc="Invite another host: the code is for `join` there, works once and for 15 minutes.",
        handler=invite,
        request=InviteRequest,
        body_optional=True,
        response=InviteCode,
        status=201,
    ),
    Route(
        method="POST",
        path="/v1/host/trust/join",
        doc="Follow another host's invitation: both trust each other afterwards.",
        handler=join,
        request=JoinRequest,
        response=TrustedHost,
    ),
    Route(method="DELETE", path="/v1/host/trust/{name}", doc="Trust a host no longer.", handler=remove_trust),
    Route(
        method="GET",
        path="/v1/host/tokens",
        doc="The bearer tokens, without the secret part.",
        handler=list_tokens,
        response=tuple[TokenInfo, ...],
    ),
    Route(
        method="POST",
        path="/v1/host/tokens",
        doc="Make a bearer token; it is shown this once.",
        handler=create_token,
        request=TokenRequest,
        response=NewToken,
        status=201,
    ),
    Route(method="DELETE", path="/v1/host/tokens/{name}", doc="Revoke a token.", handler=revoke_token),
    Route(
        method="GET",
        path="/v1/doctor",
        doc="What on this host would keep VMs from running or moving.",
        handler=doctor,
        response=tuple[Problem, ...],
    ),
)
