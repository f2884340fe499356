"""What an operator gets when something breaks in a move: the table of docs/promises.md, as the tests read it."""

from pathlib import Path

PAGE = Path(__file__).resolve().parents[2] / "docs" / "promises.md"
FATES = ("stays", "moves", "off-source", "off-target", "operator", "-")
HEAD = "| | setup |"


def promises() -> tuple[tuple[str, ...], dict[str, dict[str, str]]]:
    """Return the phases, and the fate of a VM by fault and phase."""
    lines = PAGE.read_text().splitlines()
    begin = next(number for number, line in enumerate(lines) if line.startswith(HEAD))
    phases = tuple(_cells(lines[begin])[1:])
    found: dict[str, dict[str, str]] = {}
    for line in lines[begin + 2 :]:
        if not line:
            break
        fault, *fates = _cells(line)
        assert set(fates) <= set(FATES), line
        found[fault] = dict(zip(phases, fates, strict=True))
    return phases, found


def _cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip().strip("|").split("|")]
