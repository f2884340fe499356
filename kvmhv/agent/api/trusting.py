"""How two hosts come to trust each other: `invite` on one, `join CODE` on the other.

operator        host1 (inviting)                     host2 (joining)
invite  ------> opens an invitation, prints the code
join CODE --------------------------------------------> connects, checks host1's fingerprint
                <- name, address, certificate, proof -
                checks the proof, keeps host2, uses the invitation up
                - name, address, certificate --------> checks the fingerprint again, keeps host1
"""

import msgspec
import structlog

from kvmhv.config import split_address
from kvmhv.drivers.auth.certificate import fingerprint_of_pem
from kvmhv.drivers.auth.invitations import Invitations, parse_code, proof
from kvmhv.drivers.auth.trust import HostAddress, Trust
from kvmhv.drivers.peer import JOIN_ROUTE, Peer, TrustAnswer, TrustQuestion
from kvmhv.errors import CallerError, PeerBroke
from kvmhv.model import Name, Struct, TrustedHost

JOIN_S = 15.0

log = structlog.get_logger()


class Introduction(Struct, frozen=True, kw_only=True):
    """What the joining host says of itself."""

    name: Name
    address: HostAddress
    certificate_pem: str
    proof: str


class Welcome(Struct, frozen=True, kw_only=True):
    """What the inviting host answers."""

    name: Name
    address: HostAddress
    certificate_pem: str


class Trusting:
    """Trust between hosts as the API offers it."""

    def __init__(self, trust: Trust, invitations: Invitations, peer: Peer, advertise: str) -> None:
        self.trust = trust
        self._invitations = invitations
        self.peer = peer
        self._advertise = advertise

    def invite(self, address: str | None) -> str:
        """Return the code of a fresh invitation. Raises CallerError `address-invalid`, Refused `invite-limit`."""
        return self._invitations.invite(_checked_address(address or self._advertise)).code()

    async def join(self, code: str, address: str | None) -> TrustedHost:
        """Follow an invitation; both hosts trust each other when it returns.

        Raises CallerError `code-invalid`, `trust-name-taken` and the inviting host's own refusals; nothing was changed
        here then.
        """
        invitation = parse_code(code)
        self.trust.check_new(invitation.name, invitation.fingerprint)
        own_address = _checked_address(address or self._advertise)
        own = self.trust.own_name
        introduction = Introduction(
            name=own,
            address=own_address,
            certificate_pem=self.trust.certificate_pem,
            proof=proof(invitation.secret, invitation.fingerprint, self.trust.fingerprint, own, own_address),
        )
        answer = await self.peer.introduce(
            invitation.address, invitation.fingerprint, JOIN_ROUTE, msgspec.json.encode(introduction), JOIN_S
        )
        try:
            welcome = msgspec.json.decode(answer, type=Welcome)
        except msgspec.MsgspecError as error:
            raise _broke(invitation.name, str(error)) from error
        if welcome.name != invitation.name or fingerprint_of_pem(welcome.certificate_pem) != invitation.fingerprint:
            raise _broke(invitation.name, "it introduced itself as another host than the invitation says")
        # The address that worked is kept, not the one that the host believes in.
        host = self.trust.add(welcome.name, invitation.address, welcome.certificate_pem)
        log.info("host trusted", host=host.name, address=host.address, fingerprint=host.fingerprint)
        return host

    def accept(self, introduction: Introduction, peer_ip: str) -> Welcome:
        """Answer a host that follows an invitation of this one.

        Raises Refused `invite-unknown`, and as Trust.add; the invitation stays open then.
        """
        fingerprint = fingerprint_of_pem(introduction.certificate_pem)
        secret = self._invitations.match(introduction.proof, fingerprint, introduction.name, introduction.address)
        host = self.trust.add(introduction.name, introduction.address, introduction.certificate_pem)
        self._invitations.use_up(secret)
        log.info("host trusted", host=host.name, address=host.address, fingerprint=host.fingerprint, peer_ip=peer_ip)
        return Welcome(name=self.trust.own_name, address=self._advertise, certificate_pem=self.trust.certificate_pem)

    def answer(self, question: TrustQuestion, peer_ip: str) -> TrustAnswer:
        """Tell a host that was refused whether it is trusted here; the log names it."""
        host = self.trust.host_of(question.fingerprint)
        if host is None:
            log.warning(
                "a host that is not trusted tried to connect",
                peer_ip=peer_ip,
                claims_to_be=question.name[:64],
                fingerprint=question.fingerprint[:64],
                todo="if it should be trusted: `kvmhv host trust invite` here, `kvmhv host trust join CODE` there",
            )
        return TrustAnswer(host=self.trust.own_name, trusted=host is not None)


def _checked_address(address: str) -> str:
    try:
        host, port = split_address(address)
        if port == 0:
            raise ValueError(f"{address!r}: no such port")
        if host in ("0.0.0.0", "::"):  # noqa: S104 - compared, not bound
            raise ValueError(f"{address!r} is where an agent listens, not where another host reaches it")
        return msgspec.convert(address, HostAddress)
    except (ValueError, msgspec.ValidationError) as error:
        raise CallerError(
            "address-invalid", str(error), "give the address at which other hosts reach this agent, e.g. 10.0.0.1:6600"
        ) from error


def _broke(host: str, what: str) -> PeerBroke:
    return PeerBroke("peer-protocol", f"the agent of {host}: {what}", "see that both agents run one version", host=host)
