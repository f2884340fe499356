"""Every stable code in the source, read from its syntax: `python -m tests.error_codes` lists them.

    errors     the first argument of CallerError, Refused, ... and of their subclasses; ErrorBody(code=), Refusal(code=)
    findings   Finding(id=)
    problems   Problem(id=)

A code is a literal where the error is made, or an argument that is a literal in every call of the function around it
(a helper that builds findings), or the code of another error that is passed on. Anything else is `unresolved`: a code
that nobody can look up in the source is not a stable one.
"""

import ast
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

ROOT = Path(__file__).resolve().parent.parent
BY_KEYWORD = {"ErrorBody": ("errors", "code"), "Refusal": ("errors", "code")} | {
    "Finding": ("findings", "id"),
    "Problem": ("problems", "id"),
}

Function = ast.FunctionDef | ast.AsyncFunctionDef
Node = TypeVar("Node", bound=ast.AST)


@dataclass
class Codes:
    """Code -> the places (file:line) where it is made, by kind; `unresolved` lists places only."""

    errors: dict[str, list[str]] = field(default_factory=dict)
    findings: dict[str, list[str]] = field(default_factory=dict)
    problems: dict[str, list[str]] = field(default_factory=dict)
    unresolved: list[str] = field(default_factory=list)


def collect(package: Path = ROOT / "kvmhv") -> Codes:
    """Return all codes of a package."""
    source = Source({path: ast.parse(path.read_text(), str(path)) for path in sorted(package.rglob("*.py"))})
    codes = Codes()
    for path, module in source.modules.items():
        for node in ast.walk(module):
            if isinstance(node, ast.Call):
                for kind, code in _made(node, source):
                    _note(codes, kind, code, f"{path.relative_to(package.parent)}:{node.lineno}", source)
    return codes


class Source:
    """The syntax of all modules, seen as one."""

    def __init__(self, modules: dict[Path, ast.Module]) -> None:
        self.modules = modules
        self.parents = {
            child: node
            for module in modules.values()
            for node in ast.walk(module)
            for child in ast.iter_child_nodes(node)
        }
        everything = [node for module in modules.values() for node in ast.walk(module)]
        self.calls: dict[str, list[ast.Call]] = {}
        for node in everything:
            if isinstance(node, ast.Call):
                self.calls.setdefault(_name(node.func), []).append(node)
        self.errors, self.own_code = _error_classes([node for node in everything if isinstance(node, ast.ClassDef)])

    def around(self, node: ast.AST, kind: type[Node]) -> Node | None:
        """Return the innermost node of a kind around this one."""
        at: ast.AST = node
        while at in self.parents:
            at = self.parents[at]
            if isinstance(at, kind):
                return at
        return None


def _error_classes(classes: list[ast.ClassDef]) -> tuple[set[str], set[str]]:
    """Return KvmhvError and everything below it, and those of them that bring their code along."""
    bases: dict[str, set[str]] = {}
    own_code = set()
    for node in classes:
        bases.setdefault(node.name, set()).update(_name(base) for base in node.bases)
        for item in node.body:
            if isinstance(item, ast.FunctionDef) and item.name == "__init__":
                taken = [argument.arg for argument in _arguments(item)][1:2]
                own_code |= {node.name} if taken != ["code"] else set()
    found = {"KvmhvError"}
    while more := {name for name, its in bases.items() if its & found} - found:
        found |= more
    return found, own_code & found


def _name(node: ast.expr) -> str:
    return node.id if isinstance(node, ast.Name) else node.attr if isinstance(node, ast.Attribute) else ""


def _made(call: ast.Call, source: Source) -> Iterator[tuple[str, ast.expr]]:
    name = _name(call.func)
    around = source.around(call, ast.ClassDef) if name == "__init__" else None
    if name in BY_KEYWORD:
        kind, keyword = BY_KEYWORD[name]
        yield from ((kind, item.value) for item in call.keywords if item.arg == keyword)
    elif (name in source.errors - source.own_code) or (around is not None and around.name in source.own_code):
        if call.args:
            yield "errors", call.args[0]
        yield from (("errors", item.value) for item in call.keywords if item.arg == "code")


def _note(codes: Codes, kind: str, code: ast.expr, place: str, source: Source) -> None:
    literals = _literals(code, source)
    if literals is None:
        codes.unresolved.append(f"{place}: {ast.unparse(code)}")
    for literal in literals or ():
        getattr(codes, kind).setdefault(literal, []).append(place)


def _literals(node: ast.expr, source: Source) -> set[str] | None:
    """Return what the expression can be; empty for the code of another error; None when that cannot be seen."""
    if isinstance(node, ast.Constant):
        return {node.value} if isinstance(node.value, str) else None
    if isinstance(node, ast.IfExp):
        return _union([_literals(node.body, source), _literals(node.orelse, source)])
    if isinstance(node, ast.Attribute) and node.attr == "code":
        return set()
    function = source.around(node, ast.FunctionDef) or source.around(node, ast.AsyncFunctionDef)
    if not isinstance(node, ast.Name) or function is None:
        return None
    if node.id in {argument.arg for argument in _arguments(function)}:
        return _passed(node.id, function, source)
    values = [
        statement.value
        for statement in ast.walk(function)
        if isinstance(statement, ast.Assign) and node.id in {_name(target) for target in statement.targets}
    ]
    return _union([_literals(value, source) for value in values]) if values else None


def _union(found: list[set[str] | None]) -> set[str] | None:
    literals: set[str] = set()
    for some in found:
        if some is None:
            return None
        literals |= some
    return literals


def _arguments(function: Function) -> list[ast.arg]:
    return [*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs]


def _passed(argument: str, function: Function, source: Source) -> set[str] | None:
    """Return what is passed for an argument in every call of a function, and its default."""
    names = [it.arg for it in _arguments(function) if it.arg not in ("self", "cls")]
    place = names.index(argument)
    found = [_literals(default, source) for name, default in _defaults(function) if name == argument]
    method = isinstance(source.parents[function], ast.ClassDef)
    calls = source.calls.get(function.name, [])
    module = source.around(function, ast.Module)
    near = [
        it for it in calls if source.around(it, ast.Module) is module and method == isinstance(it.func, ast.Attribute)
    ]
    for call in near or calls:
        given = call.args[place : place + 1] + [item.value for item in call.keywords if item.arg == argument]
        found += [_literals(value, source) for value in given]
    return _union(found) if found else None


def _defaults(function: Function) -> Iterator[tuple[str, ast.expr]]:
    its = function.args
    plain = [*its.posonlyargs, *its.args]
    yield from ((it.arg, default) for it, default in zip(plain[::-1], its.defaults[::-1], strict=False))
    yield from ((it.arg, default) for it, default in zip(its.kwonlyargs, its.kw_defaults, strict=True) if default)


def main() -> int:
    """Print each code with the places where it is made; 1 if one cannot be seen."""
    codes = collect()
    for kind in ("errors", "findings", "problems"):
        sys.stdout.write(f"{kind}:\n")
        for code, places in sorted(getattr(codes, kind).items()):
            sys.stdout.write(f"  {code:32} {', '.join(places)}\n")
    for place in codes.unresolved:
        sys.stdout.write(f"unresolved: {place}\n")
    return 1 if codes.unresolved else 0


if __name__ == "__main__":
    sys.exit(main())
