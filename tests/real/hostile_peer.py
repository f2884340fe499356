"""A trusted host that means harm; runs on a host of the lab: says to agents what it is given, and shows what came back.

    python hostile_peer.py NAME DIRECTORY < WISHES      (JSON in, JSON out)

DIRECTORY has the host's identity and its database, made where there is none. WISHES: `join` (invitations to follow, by
`address`), `talks` (each `to` a host: `frames`, texts or how many bytes; then a ping, until it is answered, or until a
message `awaits`, or the connection ends), `uploads` (`to`, `move`, `name`).
"""

import asyncio
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from kvmhv.agent.api.trusting import Trusting
from kvmhv.config import Waits
from kvmhv.drivers.auth import certificate
from kvmhv.drivers.auth.invitations import Invitations
from kvmhv.drivers.auth.trust import Trust
from kvmhv.drivers.database import Database
from kvmhv.drivers.host import HostClock
from kvmhv.drivers.peer import Peer, WebSocketConnection
from kvmhv.errors import KvmhvError

FRAME_BYTES = 16 << 20
PATIENCE_S = 30.0


async def talk(peer: Peer, wish: dict[str, Any]) -> dict[str, Any]:
    """Say it all on one connection; returns the messages that were heard, and whether the agent ended it."""
    connection = await peer.connect(wish["to"], PATIENCE_S)
    heard: list[dict[str, Any]] = []
    try:
        for frame in wish["frames"]:
            await connection.send(bytes(frame) if isinstance(frame, int) else frame.encode())
        await connection.send(json.dumps({"frame": "Ping", "sent_ms": 1.0}).encode())
        async with asyncio.timeout(PATIENCE_S):
            ended = await _listen(connection, heard, wish.get("awaits"))
    except KvmhvError:
        ended = True
    finally:
        await connection.close()
    return {"heard": heard, "ended": ended}


async def _listen(connection: WebSocketConnection, heard: list[dict[str, Any]], awaits: str | None) -> bool:
    """Listen until the answer has come; True: the agent ended the connection before."""
    async for frame in connection.frames():
        received = json.loads(frame)
        if received["frame"] == "Say":
            heard.append(received["message"])
            if received["message"]["type"] == awaits:
                return False
        elif received["frame"] == "Pong" and awaits is None:
            return False
    return True


async def upload(peer: Peer, wish: dict[str, Any]) -> str:
    """Upload a file; returns the code of the refusal, empty if it was taken."""
    with tempfile.NamedTemporaryFile() as file:
        try:
            await peer.send_files(wish["to"], wish["move"], {wish["name"]: Path(file.name)}, PATIENCE_S)
        except KvmhvError as error:
            return error.code
    return ""


async def main(name: str, directory: Path) -> None:
    """Do what is wished for."""
    wishes = json.load(sys.stdin)
    database = Database(directory / "kvmhv.sqlite", directory / "volatile", 10)
    trust = Trust(database, certificate.load_or_make(directory / "identity", name), 100)
    peer = Peer(trust, FRAME_BYTES, Waits())
    invitations = Invitations(name, trust.fingerprint, HostClock())
    for code in wishes.get("join", ()):
        await Trusting(trust, invitations, peer, wishes["address"]).join(code, None)
    talks = [await talk(peer, wish) for wish in wishes.get("talks", ())]
    uploads = [await upload(peer, wish) for wish in wishes.get("uploads", ())]
    sys.stdout.write(json.dumps({"talks": talks, "uploads": uploads}))
    database.close()


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], Path(sys.argv[2])))
