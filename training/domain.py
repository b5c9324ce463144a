"""Phone domains: what callers of some business ask, which tools it has, what they return and how that is said.

A domain is a TOML file; `README.md` has its fields. Run this file to check some: `python domain.py FILE …`.
"""

import datetime
import json
import pathlib
import random
import sys
import tomllib
from dataclasses import dataclass, field

from values import KINDS, draw, places

FOLDER = pathlib.Path(__file__).parent


@dataclass
class Param:
    """An argument. The first of its names is the one that templates use."""

    names: list
    kind: str
    about: list
    optional: bool = False
    ask: list = field(default_factory=list)

    @property
    def name(self):
        return self.names[0]


@dataclass
class Outcome:
    """What a tool may return, and how that is said. `must` are words of which one has to be said, apart by `|`."""

    result: dict
    answer: list
    must: list = field(default_factory=list)


@dataclass
class Tool:
    """A tool. The first of its names is the one that chains use."""

    names: list
    about: list
    users: list
    filler: list
    outcome: list
    partial: list = field(default_factory=list)
    param: list = field(default_factory=list)

    @property
    def name(self):
        return self.names[0]


@dataclass
class Step:
    """A call in a chain. `args` are templates; what is missing there comes from the caller's words."""

    tool: str
    result: dict
    args: dict = field(default_factory=dict)
    filler: list = field(default_factory=list)


@dataclass
class Chain:
    """A request that takes several calls, one after the other."""

    users: list
    steps: list
    answer: list
    must: list = field(default_factory=list)


@dataclass
class Said:
    """A question that no tool answers; `fact` is a sentence of the instructions that does."""

    users: list
    answer: list
    fact: str = ""


@dataclass
class Domain:
    """A business with a phone."""

    name: str
    business: list
    tool: list
    facts: list
    refuse: list
    chain: list = field(default_factory=list)


def read(path) -> Domain:
    """Reads a file.

    Raises `ValueError` with all its faults.
    """
    path = pathlib.Path(path)
    given = tomllib.loads(path.read_text())
    try:
        tools = []
        for tool in given.pop("tool"):
            params = [Param(**param) for param in tool.pop("param", [])]
            outcomes = [Outcome(**outcome) for outcome in tool.pop("outcome")]
            tools.append(Tool(**tool, param=params, outcome=outcomes))
        chains = [
            Chain(**{**chain, "steps": [Step(**step) for step in chain["steps"]]}) for chain in given.pop("chain", [])
        ]
        said = {key: [Said(**said) for said in given.pop(key)] for key in ("facts", "refuse")}
        domain = Domain(path.stem, tool=tools, chain=chains, **said, **given)
    except (KeyError, TypeError) as fault:
        raise ValueError(f"{path.name}: {fault}") from None
    faults = list(check(domain))
    if faults:
        raise ValueError("\n".join(f"{path.name}: {fault}" for fault in faults))
    return domain


def folder(name: str) -> list:
    """All domains of a folder, in the order of their names."""
    return [read(path) for path in sorted((FOLDER / name).glob("*.toml"))]


def strings(value):
    """All texts in a JSON value."""
    if isinstance(value, dict):
        return [text for part in value.values() for text in strings(part)]
    if isinstance(value, list):
        return [text for part in value for text in strings(part)]
    return [value] if isinstance(value, str) else []


def check(domain: Domain):
    """The faults of a domain."""
    if not 3 <= len(domain.tool) <= 6:
        yield "3 to 6 tools are wanted"
    for what, least in (("business", 3), ("facts", 3), ("refuse", 3)):
        if len(getattr(domain, what)) < least:
            yield f"at least {least} {what} are wanted"
    tools = {tool.name: tool for tool in domain.tool}
    for tool in domain.tool:
        for what, least in (("names", 3), ("about", 3), ("users", 6), ("filler", 4), ("outcome", 2)):
            if len(getattr(tool, what)) < least:
                yield f"{tool.name}: at least {least} {what} are wanted"
        if any(len(filler) > 60 for filler in tool.filler):
            yield f"{tool.name}: a filler is short"
        required = {param.name for param in tool.param if not param.optional}
        known = {param.name for param in tool.param}
        if required and len(tool.partial) < 2:
            yield f"{tool.name}: at least 2 partial are wanted"
        for param in tool.param:
            if param.kind.partition(":")[0] not in KINDS:
                yield f"{tool.name}.{param.name}: there is no kind {param.kind}"
            if not param.optional and len(param.ask) < 2:
                yield f"{tool.name}.{param.name}: at least 2 ask are wanted"
        for text in tool.users:
            used = {name for name, _ in places(text)}
            if not required <= used <= known:
                yield f"{tool.name}: {text!r} has to name {required}, and may name {known}"
        for text in tool.partial:
            used = {name for name, _ in places(text)}
            if not used < known or required <= used:
                yield f"{tool.name}: {text!r} has to leave something out"
        for outcome in tool.outcome:
            yield from check_told(tool.name, [outcome.result], outcome.answer, known)
    for chain in domain.chain:
        known = set()
        for text in chain.users:
            known |= {name for name, _ in places(text)}
        for step in chain.steps:
            if step.tool not in tools:
                yield f"there is no tool {step.tool}"
                continue
            required = {param.name for param in tools[step.tool].param if not param.optional}
            if not required <= set(step.args) | known:
                yield f"{step.tool} in a chain lacks {required - set(step.args) - known}"
        yield from check_told("chain", [step.result for step in chain.steps], chain.answer, known)


def check_told(where, results, answers, known):
    """What is said has to be known from the caller or from a result."""
    drawn = {name for result in results for text in strings(result) for name, kind in places(text) if kind}
    if len(answers) < 2:
        yield f"{where}: at least 2 answers are wanted for {results}"
    for result in results:
        for text in strings(result):
            for name, kind in places(text):
                if kind and kind.partition(":")[0] not in KINDS:
                    yield f"{where}: there is no kind {kind} in {text!r}"
                if not kind and name not in known | drawn:
                    yield f"{where}: {name} in {text!r} is nothing that was said"
    for text in answers:
        for name, kind in places(text):
            if kind or name not in known | drawn:
                yield f"{where}: {name} in {text!r} is nothing that is known"


def main(paths):
    faults = 0
    for path in paths:
        try:
            domain = read(path)
            rng, today = random.Random(1), datetime.date(2026, 5, 5)
            for tool in domain.tool:
                for param in tool.param:
                    draw(rng, param.kind, today)
            print(f"{domain.name}: {len(domain.tool)} tools, {len(domain.chain)} chains")
        except ValueError as fault:
            faults += 1
            print(fault)
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
