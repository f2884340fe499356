"""The host's settings (`kvmhv host set`), kept in Records so that they survive a restart."""

import msgspec

from kvmhv.config import Config, change_settings
from kvmhv.model import HostSettings
from kvmhv.ports import Records

KIND = "settings"
KEY = "migration"


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
