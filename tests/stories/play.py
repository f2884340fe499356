"""Stories: what a move's two sides are told, line by line, and exactly what they decide.

A story is a text file of paragraphs: a command, `----`, what came of it. The commands:

    begin [disks=N] [passes=N] [used=BYTES]     a source that has not begun, with so much memory to send
    source FACT [key=value ...]        the source learns of a fact (kvmhv/core/facts.py); started, peer-connected, ...
    target FACT [key=value ...]
    source hears MESSAGE [key=value]   a message is said to it, by whoever says it
    deliver                            everything that was said arrives, in its order, also what is said thereby
    lose                               everything that was said is lost
    restart source|target [key=value]  a new agent reads its journal: process=no, status=, migration=, rebooted=yes

KVMHV_STORIES=rewrite in the environment writes what came of it into the files.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec

from kvmhv import messages
from kvmhv.core import effects as ef
from kvmhv.core import facts, recover, source, target
from kvmhv.core.source_state import SourceState
from kvmhv.core.target_state import TargetState
from kvmhv.model import ErrorBody, IncomingAddress, Rule
from tests.sim import examples

ERROR = ErrorBody(code="broken", message="it broke", todo="")
DEFAULTS: dict[str, Any] = {
    "at_ms": 0,
    "error": ERROR,
    "epoch": 1,
    "resumed_ms": 150,
    "told_ms": 100,
    "copied_bytes": 1,
    "total_bytes": 1,
    "sent_bytes": 0,
    "remaining_bytes": 0,
    "dirty_bytes_per_s": 0,
    "address": IncomingAddress(memory_port=49152, disk_port=49153),
    "inventory": examples.inventory("host2", octet=2),
    "caller": "the operator",
    "effect": "",
    "name": "step",
}
Side = SourceState | TargetState


class Story:
    """Both sides and what is under way between them."""

    def __init__(self) -> None:
        self.sides: dict[str, Side] = {}
        self.journals: dict[str, dict[bool, bytes]] = {"source": {}, "target": {}}
        self.said: list[tuple[str, messages.AnyMessage]] = []

    def play(self, command: str) -> str:
        """Do what the command says; return what came of it."""
        word, *rest = command.split()
        words = [one for one in rest if "=" not in one]
        named = dict(one.split("=", 1) for one in rest if "=" in one)
        return "\n".join(getattr(self, f"_{word}")(words, named))

    def _begin(self, words: list[str], named: dict[str, str]) -> Iterator[str]:
        moving = examples.vm(disks=int(named.get("disks", "1")))
        rule = Rule(max_passes=int(named.get("passes", "10")))
        used_bytes = int(named.get("used", "128000000"))
        self.sides["source"] = examples.source_state(moving, rule=rule, used_bytes=used_bytes)
        yield f"source {self._where('source')}"

    def _source(self, words: list[str], named: dict[str, str]) -> Iterator[str]:
        yield from self._told("source", words, named)

    def _target(self, words: list[str], named: dict[str, str]) -> Iterator[str]:
        yield from self._told("target", words, named)

    def _told(self, side: str, words: list[str], named: dict[str, str]) -> Iterator[str]:
        if words[0] == "hears":
            message = _make(getattr(messages, words[1]), named)
            yield from self._step(side, facts.Received(at_ms=0, message=message))
            return
        name = "".join(part.capitalize() for part in words[0].split("-"))
        yield from self._step(side, _make(getattr(facts, name), named))

    def _deliver(self, words: list[str], named: dict[str, str]) -> Iterator[str]:
        if not self.said:
            yield "nothing was said"
        while self.said:
            side, message = self.said.pop(0)
            name = type(message).__name__
            if side == "target" and "target" not in self.sides:
                yield from self._visit(message)
                continue
            yield f"{side} hears {name}"
            for line in self._step(side, facts.Received(at_ms=200, message=message)):
                yield f"  {line}"

    def _visit(self, message: messages.AnyMessage) -> Iterator[str]:
        if isinstance(message, messages.Enquire):
            yield "target answers with its inventory"
            self.said.append(("source", messages.Answer(inventory=DEFAULTS["inventory"])))
        elif isinstance(message, messages.Offer):
            yield "target lets the offer in"
            begun = self.sides["source"]
            assert isinstance(begun, SourceState)
            self.sides["target"] = examples.target_state(begun, message)
            for line in self._step("target", facts.Offered(at_ms=0)):
                yield f"  {line}"

    def _lose(self, words: list[str], named: dict[str, str]) -> Iterator[str]:
        yield "lost: " + ", ".join(type(message).__name__ for _, message in self.said)
        self.said.clear()

    def _restart(self, words: list[str], named: dict[str, str]) -> Iterator[str]:
        side = words[0]
        kept = self.journals[side]
        if named.get("rebooted") == "yes":
            kept.pop(False, None)
        kind: type[Side] = SourceState if side == "source" else TargetState
        state = msgspec.msgpack.decode(kept.get(False, kept[True]), type=kind)
        found = facts.Restarted(
            at_ms=0,
            process=named.get("process", "yes") == "yes",
            status=named.get("status", ""),
            migration=named.get("migration", ""),
            rebooted=named.get("rebooted") == "yes",
        )
        if isinstance(state, SourceState):
            self.sides[side], effects = recover.recover_source(state, found)
        else:
            self.sides[side], effects = recover.recover_target(state, found)
        yield from self._show(side, effects)

    def _step(self, side: str, fact: facts.Fact) -> Iterator[str]:
        state = self.sides[side]
        if isinstance(state, SourceState):
            self.sides[side], effects = source.step(state, fact)
        else:
            self.sides[side], effects = target.step(state, fact)
        yield from self._show(side, effects)

    def _show(self, side: str, effects: list[ef.Effect]) -> Iterator[str]:
        state = self.sides[side]
        kept = self.journals[side]
        words = []
        for effect in effects:
            if isinstance(effect, ef.Journal):
                kept[effect.durable] = msgspec.msgpack.encode(state)
                if effect.durable:
                    kept.pop(False, None)
            elif isinstance(effect, ef.Send):
                other = "target" if side == "source" else "source"
                self.said.append((other, effect.message))
            words.append(_effect(effect))
        yield f"{self._where(side)}: {', '.join(words) or 'nothing'}"

    def _where(self, side: str) -> str:
        state = self.sides[side]
        return f"{state.step}/{state.hold.right}"


def _make(kind: type[Any], named: dict[str, str]) -> Any:
    values = {name: DEFAULTS[name] for name in kind.__struct_fields__ if name in DEFAULTS}
    given = {name: _value(text) for name, text in named.items()}
    if isinstance(given.get("error"), str):
        given["error"] = ErrorBody(code=str(given["error"]), message=str(given["error"]), todo="")
    return kind(**{**values, **given})


def _value(text: str) -> object:
    if re.fullmatch(r"-?\d+", text):
        return int(text)
    return {"yes": True, "no": False}.get(text, text)


def _effect(effect: ef.Effect) -> str:
    match effect:
        case ef.Journal(durable=durable):
            return "journal on disk" if durable else "journal in memory"
        case ef.Send(message=message):
            fields = [name for name in ("sent", "held", "ran") if hasattr(message, name)]
            shown = " ".join(f"{name}={getattr(message, name)}".lower() for name in fields)
            return f"say {type(message).__name__}" + (f"({shown})" if shown else "")
        case ef.SetTimer(name=name, after_s=after_s):
            return f"timer {name} {after_s:g} s"
        case ef.ClearTimer(name=name):
            return f"no timer {name}"
        case ef.NeedOperator(error=error):
            return f"NEEDS THE OPERATOR ({error.code})"
        case ef.Finish(report=report):
            return f"END {report.outcome}" + (f" ({report.error.code})" if report.error else "")
    return type(effect).__name__


def paragraphs(file: Path) -> Iterator[tuple[str, str, str]]:
    """Yield (comment, command, expected) of a story file."""
    for paragraph in re.split(r"\n\n+", file.read_text().strip()):
        comment = "".join(f"{line}\n" for line in paragraph.splitlines() if line.startswith("#"))
        rest = "\n".join(line for line in paragraph.splitlines() if not line.startswith("#"))
        command, _, expected = rest.partition("\n----")
        yield comment, command.strip(), expected.strip("\n")
