"""`kvmhv host show`: what a host tells about itself, gathered at the moment of the question."""

from collections.abc import Callable

import kvmhv
from kvmhv.agent.settings import Settings
from kvmhv.config import Config
from kvmhv.core import bounds
from kvmhv.drivers.auth.trust import Trust
from kvmhv.errors import HostError
from kvmhv.model import HostReport, MoveReport, QemuInfo
from kvmhv.ports import Disks, Hypervisor, Network

RunningMoves = Callable[[], tuple[MoveReport, ...]]


class HostView:
    """Makes HostReports."""

    def __init__(
        self,
        *,
        config: Config,
        host_id: str,
        settings: Settings,
        trust: Trust,
        hypervisor: Hypervisor,
        disks: Disks,
        network: Network,
        running_moves: RunningMoves,
    ) -> None:
        self._config = config
        self._host_id = host_id
        self._settings = settings
        self._trust = trust
        self._hypervisor = hypervisor
        self._disks = disks
        self._network = network
        self._running_moves = running_moves

    async def report(self) -> HostReport:
        """Return the host's report; a host without a usable QEMU says why in `accel_reason`."""
        qemu: QemuInfo | None = None
        try:
            qemu = await self._hypervisor.probe()
            reason = self._hypervisor.accel_reason()
        except HostError as error:
            reason = error.message
        running = self._running_moves()
        return HostReport(
            name=self._config.name,
            id=self._host_id,
            kvmhv_version=kvmhv.__version__,
            listen=self._config.listen,
            address=self._config.advertise,
            fingerprint=self._trust.fingerprint,
            qemu=qemu,
            accel_reason=reason,
            settings=self._settings.shown(),
            locations=await self._disks.locations(),
            switches=await self._network.switches(),
            trusted=self._trust.list(),
            moves_out=sum(move.direction == "out" for move in running),
            moves_in=sum(move.direction == "in" for move in running),
            move_bound_s=bounds.move_s(self._config.timeouts, self._config.waits.cont_s),
            blackout_bound_s=bounds.blackout_s(self._config.timeouts),
        )
