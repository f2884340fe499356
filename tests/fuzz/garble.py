"""Values as an enemy, a bit flip or another version makes them, for hypothesis."""

import copy
import json
from typing import Any

from hypothesis import strategies as st

TEXTS = (
    "",
    "\0",
    "../../../etc/passwd",
    "a" * 300,
    "a\n",
    "-rf",
    "web01,accel=none",
    "٣",
    "\ud7ff\uffff",
    "running",
    "completed",
    "NaN",
    "1e999",
)
NUMBERS = (0, -1, 1, 65536, 2**31, 2**63, 2**64, -(2**63) - 1, 10**30, 1e308, -1e308, 0.1, 5e-324)

junk = st.one_of(
    st.none(),
    st.booleans(),
    st.sampled_from(NUMBERS),
    st.sampled_from(TEXTS),
    st.text(max_size=20),
    st.integers(),
    st.floats(allow_nan=False, allow_infinity=False),
    st.sampled_from(([], {}, [[]], [{}], {"": {}}, [0] * 100, {"data": []}, [None])),
)
"""A JSON value that hardly anybody expects."""


def _places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    found = [path]
    if isinstance(value, dict):
        for key, item in value.items():
            found += _places(item, (*path, key))
    elif isinstance(value, list):
        for index, item in enumerate(value):
            found += _places(item, (*path, index))
    return found


@st.composite
def garbled(draw: st.DrawFn, value: Any, most: int = 3) -> Any:
    """A JSON value with up to `most` of its parts replaced, missing, doubled or added to."""
    value = copy.deepcopy(value)
    for _ in range(draw(st.integers(0, most))):
        places = _places(value)
        path = places[draw(st.integers(0, len(places) - 1))]
        if not path:
            if draw(st.integers(0, 9)) == 0:
                return copy.deepcopy(draw(junk))
            continue
        holder = value
        for key in path[:-1]:
            holder = holder[key]
        act = draw(st.sampled_from(("replace", "replace", "drop", "add")))
        if act == "replace":
            holder[path[-1]] = copy.deepcopy(draw(junk))
        elif act == "drop":
            del holder[path[-1]]
        elif isinstance(holder, dict):
            holder[draw(st.text(max_size=8))] = copy.deepcopy(draw(junk))
        else:
            holder.append(copy.deepcopy(holder[path[-1]]))
    return value


@st.composite
def spoilt(draw: st.DrawFn, whole: bytes) -> bytes:
    """Bytes that were cut off, had bits flipped or something put in between."""
    act = draw(st.sampled_from(("cut", "flip", "flip", "insert", "empty", "double")))
    at = draw(st.integers(0, max(0, len(whole) - 1)))
    if act == "cut":
        return whole[:at]
    if act == "flip" and whole:
        changed = bytearray(whole)
        for _ in range(draw(st.integers(1, 8))):
            changed[draw(st.integers(0, len(whole) - 1))] ^= 1 << draw(st.integers(0, 7))
        return bytes(changed)
    if act == "insert":
        return whole[:at] + draw(st.binary(max_size=16)) + whole[at:]
    return whole + whole if act == "double" else b""


def frames(value: Any) -> st.SearchStrategy[bytes]:
    """JSON text of a value: garbled, spoilt, or no JSON at all."""
    whole = json.dumps(value).encode()
    return st.one_of(
        garbled(value).map(lambda changed: json.dumps(changed).encode()),
        spoilt(whole),
        st.binary(max_size=64),
        st.sampled_from(
            (b"[" * 100_000, b'{"a":' * 50_000, b"9" * 100_000, b'"' + b"a" * 100_000, b"\xff\xfe", b"null")
        ),
    )
