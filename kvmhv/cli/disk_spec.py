"""`--disk SPEC` of `vm create`: KEY=VALUE pairs, comma separated; a comma inside a value is written twice."""

import re

from kvmhv.config import parse_size
from kvmhv.errors import CallerError
from kvmhv.model import DiskFormat, DiskSpec

KEYS = ("size", "file", "image", "format", "backing", "location", "lun")
TODO = (
    "write one of size=4G, file=PATH, image=NAME; with format=qcow2|raw, backing=..., location=...; "
    "on an iSCSI location lun=NUMBER, alone or with size or image"
)


def parse(text: str) -> DiskSpec:
    """Return the disk that SPEC describes.

    Raises CallerError `disk-spec-invalid` naming the key that is wrong; what exists on the host is the agent's to say.
    """
    values = _pairs(text)
    kinds = [key for key in ("size", "file", "image") if key in values]
    if len(kinds) != 1 and not ("lun" in values and not kinds):
        said = " and ".join(kinds) if kinds else "none of them"
        raise _wrong(text, f"exactly one of size, file and image is needed, not {said}")
    if "backing" in values and kinds != ["size"]:
        raise _wrong(text, f"backing goes with size, not with {kinds[0]}")
    return DiskSpec(
        size_bytes=_size(text, values["size"]) if "size" in values else None,
        file=values.get("file"),
        image=values.get("image"),
        format=_format(text, values["format"]) if "format" in values else None,
        backing=values.get("backing"),
        location=values.get("location"),
        lun=_lun(text, values["lun"]) if "lun" in values else None,
    )


def _wrong(text: str, why: str) -> CallerError:
    return CallerError("disk-spec-invalid", f"--disk {text!r}: {why}", TODO)


def _pairs(text: str) -> dict[str, str]:
    values: dict[str, str] = {}
    items = re.findall(r"(?:[^,]|,,)+", text)
    if not items or ",".join(items) != text:
        raise _wrong(text, "there is a comma too many, or nothing at all")
    for item in items:
        key, equals, value = item.replace(",,", ",").partition("=")
        if key not in KEYS:
            raise _wrong(text, f"there is no key {key!r}")
        if key in values:
            raise _wrong(text, f"{key} is there twice")
        if not equals or not value:
            raise _wrong(text, f"{key} has no value")
        values[key] = value
    return values


def _size(text: str, value: str) -> int:
    try:
        return parse_size(value)
    except CallerError as error:
        raise _wrong(text, f"size: {error.message}") from None


def _lun(text: str, value: str) -> int:
    if not (value.isascii() and value.isdecimal() and len(value) <= 5 and int(value) <= 16383):
        raise _wrong(text, f"lun: {value!r} is no number of a LUN (0 to 16383)")
    return int(value)


def _format(text: str, value: str) -> DiskFormat:
    try:
        return DiskFormat(value)
    except ValueError:
        known = ", ".join(DiskFormat)
        raise _wrong(text, f"format: {value!r} is none of {known}") from None
