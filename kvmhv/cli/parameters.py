"""Types of arguments and options, and what a shell offers for them."""

import re
from collections.abc import Callable, Iterable

import click
from click.shell_completion import CompletionItem

from kvmhv.cli import address, disk_spec
from kvmhv.cli.connection import Agent
from kvmhv.config import parse_size
from kvmhv.errors import CallerError, KvmhvError
from kvmhv.model import DiskSpec, Image, LocationReport, MoveReport, TrustedHost, VmSummary

COMPLETION_TIMEOUT_S = 1.0

Offer = Callable[[Agent], Iterable[str]]


class Name(click.ParamType[str]):
    """A name on an agent. Which names exist or may exist is the agent's to say; here it only has to reach it."""

    name = "name"

    def __init__(self, offer: Offer | None = None) -> None:
        self._offer = offer

    def convert(self, value: str, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """Return the name; a usage error for what cannot be part of a URL's path."""
        try:
            value.encode()
        except UnicodeEncodeError:
            self.fail("the name is not valid Unicode", param, ctx)
        if value in ("", ".", ".."):
            self.fail(f"{value!r} is no name", param, ctx)
        return value

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        """Offer what the agent knows; nothing when it does not answer quickly."""
        if self._offer is None:
            return []
        try:
            agent = Agent(address.find(ctx.find_root().params.get("host")))
            names = sorted(set(self._offer(agent)))
        except KvmhvError:
            return []
        return [CompletionItem(name) for name in names if name.startswith(incomplete)]


def _vms(agent: Agent) -> list[str]:
    return [vm.name for vm in agent.call("GET", "vms", list[VmSummary], timeout_s=COMPLETION_TIMEOUT_S)]


def _images(agent: Agent) -> list[str]:
    return [image.name for image in agent.call("GET", "images", list[Image], timeout_s=COMPLETION_TIMEOUT_S)]


def _moves(agent: Agent) -> list[str]:
    return [move.id for move in agent.call("GET", "moves", list[MoveReport], timeout_s=COMPLETION_TIMEOUT_S)]


def _hosts(agent: Agent) -> list[str]:
    trusted = agent.call("GET", "host/trust", list[TrustedHost], timeout_s=COMPLETION_TIMEOUT_S)
    return [host.name for host in trusted]


def _locations(agent: Agent) -> list[str]:
    found = agent.call("GET", "storage", list[LocationReport], timeout_s=COMPLETION_TIMEOUT_S)
    return [it.spec.name for it in found]


VM = Name(_vms)
LOCATION = Name(_locations)
IMAGE = Name(_images)
MOVE = Name(_moves)
HOST = Name(_hosts)
NEW = Name()


class Size(click.ParamType[int]):
    """Bytes, or a number with K, M, G or T."""

    name = "size"

    def convert(self, value: str | int, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Return bytes. Raises CallerError `size-invalid` that names the option."""
        return value if isinstance(value, int) else _sized(parse_size, value, param)


class Rate(click.ParamType[int]):
    """Bytes per second: a size, or bits as network people write them (`400mbit`)."""

    name = "rate"

    def convert(self, value: str | int, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Return bytes per second. Raises CallerError `size-invalid` that names the option."""
        return value if isinstance(value, int) else _sized(parse_rate, value, param)


def _sized(parse: Callable[[str], int], value: str, param: click.Parameter | None) -> int:
    try:
        return parse(value)
    except CallerError as error:
        option = f"--{param.name}: " if param is not None and param.name else ""
        raise CallerError("size-invalid", f"{option}{error.message}", error.todo) from None


BITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9}


def parse_rate(text: str) -> int:
    """Return bytes per second for `50M`, `50M/s` (powers of 1024) or `400mbit` (powers of 1000).

    Raises CallerError `size-invalid`.
    """
    bits = re.fullmatch(r"(\d{1,15})([kmg]?)bit(?:/s)?", text.strip().lower())
    if bits is not None:
        return int(bits[1]) * BITS[bits[2]] // 8
    return parse_size(text.strip().removesuffix("/s"))


class DiskText(click.ParamType[DiskSpec]):
    """SPEC of --disk."""

    name = "spec"

    def convert(self, value: str | DiskSpec, param: click.Parameter | None, ctx: click.Context | None) -> DiskSpec:
        """Return the disk. Raises CallerError `disk-spec-invalid`."""
        return value if isinstance(value, DiskSpec) else disk_spec.parse(value)


class Setting(click.ParamType[tuple[str, str]]):
    """KEY=VALUE."""

    name = "setting"

    def convert(
        self, value: str | tuple[str, str], param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[str, str]:
        """Return key and value; a usage error when there is no `=`."""
        if isinstance(value, tuple):
            return value
        key, equals, text = value.partition("=")
        if not equals or not key:
            self.fail(f"{value!r} is not KEY=VALUE", param, ctx)
        return key, text
