"""Growing tables of numbers that are looked up for many keys at once: an exploration looks up little else."""

from collections.abc import Callable, Iterable

import numpy as np
import numpy.typing as npt

Numbers = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]
NONE: Numbers = np.empty(0, np.int64)


def among(known: Numbers, numbers: Numbers) -> Mask:
    """Return which of the numbers are known; `known` is sorted."""
    if not known.size:
        return np.zeros(numbers.size, np.bool_)
    at = np.searchsorted(known, numbers)
    found: Mask = known[np.minimum(at, known.size - 1)] == numbers
    return found


def merged(known: Numbers, new: Numbers) -> Numbers:
    """Return both, sorted as both are; they have nothing in common."""
    return np.insert(known, np.searchsorted(known, new), new)


def spread(first: Numbers, count: Numbers) -> Numbers:
    """Return first, first + 1, ... of each, so many as its count, one after the other."""
    ends = np.cumsum(count)
    return np.repeat(first - ends + count, count) + np.arange(ends[-1] if ends.size else 0)


class Column:
    """Numbers by row, to which rows are added."""

    def __init__(self) -> None:
        self._array, self._new = NONE, list[int]()

    def __len__(self) -> int:
        return self._array.size + len(self._new)

    def extend(self, numbers: Iterable[int]) -> None:
        """Add rows."""
        self._new.extend(numbers)

    @property
    def array(self) -> Numbers:
        """All rows."""
        if self._new:
            self._array = np.concatenate((self._array, np.array(self._new, np.int64)))
            self._new = []
        return self._array


class Table:
    """A number for each key, worked out when it is first asked for."""

    def __init__(self, work_out: Callable[[int], int]) -> None:
        self._work_out = work_out
        self._keys, self._values = NONE, NONE

    def of(self, keys: Numbers) -> Numbers:
        """Return the numbers of these keys."""
        new = np.unique(keys[~among(self._keys, keys)])
        if new.size:
            values = np.fromiter((self._work_out(key) for key in new.tolist()), np.int64, new.size)
            at = np.searchsorted(self._keys, new)
            self._keys, self._values = np.insert(self._keys, at, new), np.insert(self._values, at, values)
        return self._values[np.searchsorted(self._keys, keys)]
