"""The host's settings (`kvmhv host set`), kept in Records so that they survive a restart."""

import msgspec

from kvmhv.config import ON_OVERRUN, PERFORMANCE_OPTIONS, PROFILES, Config, change_settings
from kvmhv.errors import CallerError
from kvmhv.model import HostSettings, MoveRequest, Rule
from kvmhv.ports import Records

KIND = "settings"
KEY = "migration"
PASSES_MAX = 1000


class Settings:
    """The current settings of this host; whoever reads `current` at the moment of a decision has the newest."""

    def __init__(self, records: Records, config: Config) -> None:
        self._records = records
        kept = records.get(KIND, KEY)
        if kept is None:
            self._current = HostSettings(networks=config.migration_networks)
        else:
            # Fields that this version does not know any more are left out, not an error.
            known = {field.name for field in msgspec.structs.fields(HostSettings)}
            values = {key: value for key, value in msgspec.json.decode(kept).items() if key in known}
            self._current = msgspec.convert(values, HostSettings)

    @property
    def current(self) -> HostSettings:
        """Return the settings of this moment."""
        return self._current

    def change(self, changes: dict[str, str]) -> HostSettings:
        """Apply `migration.KEY` -> value changes, all or none; kept on disk when it returns.

        Raises CallerError `setting-unknown` or `setting-invalid`.
        """
        changed = change_settings(self._current, changes)
        self._records.put(KIND, KEY, msgspec.json.encode(changed))
        self._current = changed
        return changed

    def shown(self) -> dict[str, object]:
        """Return the settings by the names that `host set` takes."""
        return {f"migration.{key}": value for key, value in msgspec.to_builtins(self._current).items()}


def with_option(settings: HostSettings, request: MoveRequest) -> MoveRequest:
    """Return the request with its performance option, the host's if it has none. CallerError `performance-unknown`."""
    option = request.performance or settings.performance
    if option not in PERFORMANCE_OPTIONS:
        text = f"there is no performance option {option!r}"
        raise CallerError("performance-unknown", text, f"use one of: {', '.join(PERFORMANCE_OPTIONS)}")
    return msgspec.structs.replace(request, performance=option)


def rule_of(settings: HostSettings, request: MoveRequest) -> Rule:
    """Return the rule of a move: what was asked for, else the host's settings.

    Raises CallerError `passes-invalid`, `overrun-invalid`.
    """
    passes = PROFILES[settings.profile] if request.max_passes is None else request.max_passes
    if not 1 <= passes <= PASSES_MAX:
        raise CallerError("passes-invalid", f"{passes} passes", f"give 1 to {PASSES_MAX}")
    asked = request.bandwidth_bytes_per_s
    limit_ms = settings.blackout_limit_ms if request.blackout_limit_ms is None else request.blackout_limit_ms
    on_overrun = request.on_overrun or settings.on_overrun
    if on_overrun not in ON_OVERRUN or (request.on_overrun and not limit_ms):
        text = f"{on_overrun!r} for a blackout over its limit" + ("" if limit_ms else ", and there is no limit")
        raise CallerError("overrun-invalid", text, f"give a blackout limit, and one of: {', '.join(ON_OVERRUN)}")
    return Rule(
        max_passes=passes,
        threshold_bytes=settings.threshold_bytes if request.threshold_bytes is None else request.threshold_bytes,
        bandwidth_bytes_per_s=settings.bandwidth_bytes_per_s if asked is None else asked,
        performance=request.performance or settings.performance,
        blackout_limit_ms=limit_ms,
        on_overrun=on_overrun,
        post_copy=request.post_copy,
    )
