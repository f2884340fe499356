"""Who may do what over the network, and how hosts come to trust each other."""

import asyncio
import contextlib
import datetime
import re
import ssl
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from kvmhv.agent.api import listener
from kvmhv.agent.api.access import Access
from kvmhv.agent.api.routes import ROUTES
from kvmhv.drivers.auth import certificate
from kvmhv.errors import CallerError, PeerUnreachable, Refused


def concrete(path: str) -> str:
    return re.sub(r"\{\w+\}", "x", path)


async def test_every_route_refuses_a_stranger_unless_it_is_open(make_host: Any) -> None:
    host = await make_host("host1")
    async with host.remote() as stranger:
        for route in ROUTES:
            async with stranger.request(route.method, concrete(route.path)) as response:
                refused = response.status in (401, 403) and (await response.json())["exit_status"] == 4
                assert refused == (route.access is not Access.OPEN), route.path
        async with stranger.get("/v1/hosts/host1/vms") as response:
            assert response.status == 401
    async with host.remote(token="kvmhv_wrong") as guesser, guesser.get("/v1/vms") as response:
        assert response.status == 401
        assert response.headers["WWW-Authenticate"] == "Bearer"


async def test_tokens_open_the_api_and_not_the_peer_routes(make_host: Any) -> None:
    host = await make_host("host1")
    async with host.local() as local, local.post("/v1/host/tokens", json={"name": "ci"}) as response:
        token = (await response.json())["token"]
    async with host.remote(token=token) as remote:
        for path, status in (("/v1/vms", 200), ("/metrics", 200), ("/v1/hosts/host1/vms", 200), ("/peer/move", 403)):
            async with remote.get(path) as response:
                assert response.status == status, path
        async with host.local() as local:
            async with local.get("/v1/host/tokens") as response:
                assert token not in await response.text()
            await local.delete("/v1/host/tokens/ci")
        async with remote.get("/v1/vms") as response:
            assert response.status == 401


async def test_metrics_open_to_subnets(make_host: Any) -> None:
    host = await make_host("host1", metrics_subnets=["127.0.0.0/8"])
    async with host.remote() as stranger:
        async with stranger.get("/metrics") as response:
            assert response.status == 200
            assert 'kvmhv_vms{state="running"} 1.0' in await response.text()
        async with stranger.get("/v1/vms") as response:
            assert response.status == 401


async def test_invite_and_join(make_host: Any) -> None:
    one, two = await make_host("host1"), await make_host("host2")
    async with one.local() as local, local.post("/v1/host/trust/invite", json={"address": one.address}) as response:
        code = (await response.json())["code"]
    assert "\n" not in code
    async with two.local() as local:
        body = {"code": code, "address": two.address}
        async with local.post("/v1/host/trust/join", json=body) as response:
            assert await response.json() == {
                "name": "host1",
                "address": one.address,
                "fingerprint": one.trust.fingerprint,
            }
        async with local.get("/v1/hosts/host1/host") as response:
            assert (await response.json())["name"] == "host1"
        async with local.post("/v1/host/trust/join", json=body) as response:
            assert (response.status, (await response.json())["code"]) == (403, "invite-unknown")
    async with one.local() as local, local.get("/v1/hosts/host2/host") as response:
        assert (await response.json())["name"] == "host2"


async def test_an_invitation_ends_after_fifteen_minutes(make_host: Any) -> None:
    one, two = await make_host("host1"), await make_host("host2")
    code = one.services.trusting.invite(one.address)
    one.clock.now_ms += 15 * 60 * 1000
    with pytest.raises(Refused, match="older than 15 minutes"):
        await two.services.trusting.join(code, two.address)
    assert one.trust.list() == two.trust.list() == ()


async def test_join_refuses_names_that_are_taken(make_host: Any, befriend: Any) -> None:
    one, two, double = await make_host("host1"), await make_host("host2"), await make_host("host2")
    await befriend(one, two)
    code = one.services.trusting.invite(one.address)
    with pytest.raises(CallerError) as caught:
        await double.services.trusting.join(code, double.address)
    assert (caught.value.code, caught.value.host) == ("trust-name-taken", "host1")
    namesake = await make_host("host1")
    with pytest.raises(CallerError) as caught:
        await namesake.services.trusting.join(code, namesake.address)
    assert caught.value.code == "trust-name-taken"
    assert double.trust.list() == namesake.trust.list() == ()
    assert [host.fingerprint for host in one.trust.list()] == [two.trust.fingerprint]
    # The refusals did not use the invitation up.
    await (await make_host("host3")).services.trusting.join(code, "127.0.0.1:2")
    assert [host.name for host in one.trust.list()] == ["host2", "host3"]


async def test_join_again_renews_the_address(make_host: Any, befriend: Any) -> None:
    one, two = await make_host("host1"), await make_host("host2")
    await befriend(one, two)
    await two.services.trusting.join(one.services.trusting.invite(one.address), "127.0.0.1:77")
    assert one.trust.find("host2").address == "127.0.0.1:77"


async def test_join_finds_another_host_at_the_address(make_host: Any) -> None:
    one, two, mallory = await make_host("host1"), await make_host("host2"), await make_host("mallory")
    code = one.services.trusting.invite(mallory.address)
    with pytest.raises(Refused) as caught:
        await two.services.trusting.join(code, two.address)
    assert caught.value.code == "peer-fingerprint"
    assert two.trust.list() == ()


async def test_join_with_another_secret_or_a_changed_address_is_refused(make_host: Any) -> None:
    one, two = await make_host("host1"), await make_host("host2")
    code = one.services.trusting.invite(one.address)
    with pytest.raises(Refused, match="no such invitation"):
        await two.services.trusting.join(code[:-4] + ("AAAA" if code[-4:] != "AAAA" else "BBBB"), two.address)
    assert one.trust.list() == two.trust.list() == ()


async def test_join_where_nobody_listens(make_host: Any) -> None:
    one, two = await make_host("host1"), await make_host("host2")
    code = one.services.trusting.invite(one.address)
    await one.listener.close()
    with pytest.raises(PeerUnreachable):
        await two.services.trusting.join(code, two.address)


async def test_removed_trust_ends_at_once_even_on_an_open_connection(make_host: Any, befriend: Any) -> None:
    one, two = await make_host("host1"), await make_host("host2")
    await befriend(one, two)
    async with one.remote(as_host=two) as remote:
        async with remote.get("/v1/vms") as response:
            assert response.status == 200
        one.trust.remove("host2")
        async with remote.get("/v1/vms") as response:
            assert response.status == 401
    async with one.remote(as_host=two) as remote:
        with pytest.raises(aiohttp.ClientError):
            await remote.get("/v1/vms")
    async with one.remote() as anybody, anybody.get("/openapi.json") as response:
        assert response.status == 200


async def test_a_host_does_not_forward_for_another(make_host: Any, befriend: Any) -> None:
    one, two = await make_host("host1"), await make_host("host2")
    await befriend(one, two)
    async with two.local() as local, local.get("/v1/hosts/host1/hosts/host2/vms") as response:
        assert (response.status, (await response.json())["code"]) == (403, "forward-chain")


async def test_forwarding_streams_and_names_who_asked(make_host: Any, befriend: Any) -> None:
    one, two = await make_host("host1"), await make_host("host2")
    await befriend(one, two)
    content = b"k" * 1_000_000
    async with two.local() as local:
        async with local.put("/v1/hosts/host1/images/lin/kernel?append=a%20b%3Dc", data=content) as response:
            assert response.status == 200
        async with local.post("/v1/hosts/host1/vms/w/move", json={"vm": "w", "target": "host2"}) as response:
            assert response.status == 202
        async with local.delete("/v1/hosts/host1/vms/w") as response:
            assert response.status == 204
    assert one.images.stored["lin/kernel"] == content
    assert one.images.options["append"] == "a b=c"
    assert re.fullmatch(r"local uid \d+ \(pid \d+\) via host host2 at 127.0.0.1", one.moves.callers[0])


async def test_forwarding_to_a_host_that_is_down_or_does_not_trust(make_host: Any, befriend: Any) -> None:
    one, two = await make_host("host1"), await make_host("host2")
    await befriend(one, two)
    one.trust.remove("host2")
    async with two.local() as local:
        async with local.get("/v1/hosts/host1/vms") as response:
            body = await response.json()
        assert (response.status, body["code"], body["host"]) == (403, "peer-untrusted", "host1")
        assert two.trust.fingerprint in body["message"]
        assert "trust invite` on host1" in body["todo"] and "trust join CODE` on host2" in body["todo"]
        await one.listener.close()
        async with local.get("/v1/hosts/host1/vms") as response:
            assert (response.status, (await response.json())["code"]) == (502, "peer-unreachable")


async def test_the_refusing_side_counts_and_says_who(make_host: Any, befriend: Any, capsys: Any) -> None:
    one, two = await make_host("host1"), await make_host("host2")
    await befriend(one, two)
    one.trust.remove("host2")
    with pytest.raises(Refused):
        await two.peer.connect("host1", 5)
    async with one.local() as local, local.get("/metrics") as response:
        assert re.search(r'kvmhv_peer_refused_total\{cause="untrusted"\} [1-9]', await response.text())
    logged = capsys.readouterr().out
    assert "not one of a trusted host" in logged and "127.0.0.1" in logged and two.trust.fingerprint in logged


async def test_a_pinned_certificate_cannot_vouch_for_another(make_host: Any, tmp_path: Path) -> None:
    """A trusted host signs a certificate for `host9` with its own key: neither chain nor name gets it in."""
    host = await make_host("host1")
    key = ec.generate_private_key(ec.SECP256R1())
    authority = _issue("evil", key, "evil", key, is_authority=True)
    pem = authority.public_bytes(serialization.Encoding.PEM).decode()
    host.trust.add("evil", "127.0.0.1:1", pem)
    leaf_key = ec.generate_private_key(ec.SECP256R1())
    leaf = _issue("host9", leaf_key, "evil", key, is_authority=False)
    chain = tmp_path / "chain.pem"
    chain.write_bytes(
        leaf.public_bytes(serialization.Encoding.PEM)
        + authority.public_bytes(serialization.Encoding.PEM)
        + _key_pem(leaf_key)
    )
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    context.load_cert_chain(chain)
    connector = aiohttp.TCPConnector(ssl=context)
    async with aiohttp.ClientSession(f"https://{host.address}", connector=connector) as session:
        with pytest.raises(aiohttp.ClientError):
            await session.get("/openapi.json")
    # The authority itself is let in: the test would otherwise prove nothing.
    own = tmp_path / "own.pem"
    own.write_bytes(pem.encode() + _key_pem(key))
    context.load_cert_chain(own)
    connector = aiohttp.TCPConnector(ssl=context)
    session = aiohttp.ClientSession(f"https://{host.address}", connector=connector)
    async with session, session.get("/v1/vms") as response:
        assert response.status == 200


async def test_tls_below_1_3_is_refused(make_host: Any) -> None:
    host = await make_host("host1")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    with pytest.raises((ssl.SSLError, ConnectionError)):
        await asyncio.open_connection("127.0.0.1", host.listener.port, ssl=context)


async def test_strangers_hold_few_connections(make_host: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Connections that never shake hands: those over the bound are closed, and all once the deadline is over."""
    monkeypatch.setattr(listener, "HALF_OPEN_MAX_PER_IP", 3)
    monkeypatch.setattr(listener, "HANDSHAKE_S", 0.2)
    host = await make_host("host1")
    silent = [await asyncio.open_connection("127.0.0.1", host.listener.port) for _ in range(5)]
    async with asyncio.timeout(5):
        assert [await reader.read() for reader, _ in silent] == [b""] * 5
    for _, writer in silent:
        writer.close()
    async with host.remote() as anybody, anybody.get("/openapi.json") as response:
        assert response.status == 200
    async with host.local() as local, local.get("/metrics") as response:
        assert 'kvmhv_peer_refused_total{cause="too-many"} 2.0' in await response.text()


async def test_strangers_leave_room_for_trusted_hosts(make_host: Any, befriend: Any) -> None:
    one, two = await make_host("host1", limits={"connections": 10}), await make_host("host2")
    await befriend(one, two)
    context = one.trust.introduction_context(one.trust.fingerprint)
    silent = [await asyncio.open_connection("127.0.0.1", one.listener.port, ssl=context) for _ in range(6)]
    async with asyncio.timeout(5):
        with contextlib.suppress(ConnectionError):
            assert await silent[-1][0].read() == b""
    async with one.remote(as_host=two) as remote, remote.get("/v1/vms") as response:
        assert response.status == 200
    for _, writer in silent:
        writer.close()


async def test_strangers_do_not_keep_connections(make_host: Any) -> None:
    host = await make_host("host1")
    token = host.services.tokens.create("ci")
    for session, kept in ((host.remote(), False), (host.remote(token=token), True)):
        async with session, session.get("/openapi.json") as response:
            assert (response.headers.get("Connection") != "close") == kept


async def test_a_silent_connection_is_ended(make_host: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listener, "FIRST_REQUEST_S", 0.05)
    host = await make_host("host1")
    context = host.trust.introduction_context(host.trust.fingerprint)
    reader, writer = await asyncio.open_connection("127.0.0.1", host.listener.port, ssl=context)
    async with asyncio.timeout(5):
        assert await reader.read() == b""
    writer.close()


def _issue(
    name: str, key: ec.EllipticCurvePrivateKey, issuer: str, issuer_key: ec.EllipticCurvePrivateKey, is_authority: bool
) -> x509.Certificate:
    return (
        x509.CertificateBuilder()
        .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)]))
        .issuer_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, issuer)]))
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(datetime.datetime(2000, 1, 1, tzinfo=datetime.UTC))
        .not_valid_after(datetime.datetime(2999, 1, 1, tzinfo=datetime.UTC))
        .add_extension(x509.BasicConstraints(ca=is_authority, path_length=None), critical=True)
        .sign(issuer_key, hashes.SHA256())
    )


def _key_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def test_the_identity_is_kept_and_private(tmp_path: Path) -> None:
    first = certificate.load_or_make(tmp_path / "identity", "host1")
    again = certificate.load_or_make(tmp_path / "identity", "host1")
    assert first == again
    assert {file.stat().st_mode & 0o777 for file in (tmp_path / "identity").iterdir()} == {0o600}
