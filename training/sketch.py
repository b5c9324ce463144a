"""Sketched businesses: what callers say and which tool they need is written by hand, what the tools return is made up.

A file of `sketches/` has many; `README.md` has its fields. Run this file to check some: `python sketch.py FILE …`.
"""

import datetime
import pathlib
import random
import sys
import tomllib

from domain import FOLDER, Chain, Domain, Param, Step, Tool, check
from invented import ASK, ASKED, Made
from values import places

# Longest description and longest filler, in characters.
ABOUT, FILLER = 100, 60
# A text of at most so many words behind its article is a thing, and no description.
THING = 2


def sketches() -> list:
    """All sketches, in the order of their files."""
    return [each for path in sorted((FOLDER / "sketches").glob("*.toml")) for each in read(path)]


def read(path) -> list:
    """Reads the sketches of a file.

    Raises `ValueError` with all their faults.
    """
    path = pathlib.Path(path)
    found, faults = tomllib.loads(path.read_text())["business"], []
    for sketch in found:
        where = f"{path.name}: {sketch.get('called', ['no name'])[0]}"
        try:
            faults += [f"{where}: {fault}" for fault in faults_of(sketch)]
        except (KeyError, ValueError, IndexError) as fault:
            faults.append(f"{where}: {type(fault).__name__} {fault}")
    if faults:
        raise ValueError("\n".join(faults))
    return found


def faults_of(sketch):
    """What is wrong with a sketch."""
    names = [name for tool in sketch["tool"] for name in tool["names"]]
    yield from (f"the tool name {name} is there twice" for name in sorted({n for n in names if names.count(n) > 1}))
    for tool in sketch["tool"]:
        yield from (f"{tool['names'][0]}: too long: {text!r}" for text in tool["about"] if len(text) > ABOUT)
        yield from (f"{tool['names'][0]}: too long: {text!r}" for text in tool["filler"] if len(text) > FILLER)
        if len(tool["users"]) < 5 or len(tool["filler"]) < 2 or len(tool["names"]) < 3:
            yield f"{tool['names'][0]}: at least 5 users, 2 filler and 3 names are wanted"
    known = {tool["names"][0] for tool in sketch["tool"]}
    for chain in sketch.get("chain", []):
        where = f"chain of {chain['first']} and {chain['then']}"
        yield from (f"{where}: there is no tool {name}" for name in {chain["first"], chain["then"]} - known)
        yield from (f"{where}: too long: {text!r}" for text in chain["filler"] if len(text) > FILLER)
        if len(chain["users"]) < 3 or len(chain["filler"]) < 2:
            yield f"{where}: at least 3 users and 2 filler are wanted"
        if not {chain["first"], chain["then"]} <= known:
            return
        yield from (f"{where}: {fault}" for fault in unfit(sketch, chain))
    for fault in check(sketched(random.Random(1), sketch)):
        if " are wanted" not in fault or "partial" in fault:
            yield fault


def parsed(line: str) -> tuple:
    """Names, kind and whether it is optional, out of `name|other name: kind`, with a `?` before it if it is."""
    names, _, kind = line.partition(":")
    kind, _, texts = kind.strip().partition(":")
    if kind == "text":
        texts = "|".join(bare(text) for text in texts.split("|"))
    return names.strip(" ?").split("|"), f"{kind}:{texts}".rstrip(":"), names.startswith("?")


def bare(text: str) -> str:
    """A thing that is said with an article is passed on without: `bookcase=a bookcase`."""
    article, _, rest = text.partition(" ")
    return f"{rest}={text}" if article in ("the", "a", "an") and len(rest.split()) <= THING else text


def parameters(sketch, name) -> dict:
    """Kind and whether it is optional, of each parameter of a tool."""
    tool = next(tool for tool in sketch["tool"] if tool["names"][0] == name)
    return {names[0]: (kind, optional) for names, kind, optional in map(parsed, tool["params"])}


def param(rng, line: str) -> Param:
    """A parameter, and how the agent asks for it."""
    names, kind, optional = parsed(line)
    asked = ASKED.get(kind.partition(":")[0], "kind")
    noun = names[0].replace("_", " ")
    ways = [*(text.format(n=noun) for text in ASK[asked]), f"What's the {noun}?", f"Could you tell me the {noun}?"]
    return Param(names, kind, [noun.capitalize()], optional, rng.sample(ways, min(4, len(ways))))


def unfit(sketch, chain):
    """Which sentences of a chain do not say what its two calls need."""
    first, then = (parameters(sketch, chain[step]) for step in ("first", "then"))
    if chain["passes"] not in then:
        yield f"{chain['then']} has no parameter {chain['passes']}"
    # Where both take it, the caller's is the first's.
    then.pop(chain["passes"], None)
    both = [*first.items(), *then.items()]
    needed, allowed = {name for name, (_, optional) in both if not optional}, {name for name, _ in both}
    for text in chain["users"]:
        used = {name for name, _ in places(text)}
        if not needed <= used <= allowed:
            yield f"{text!r} has to name {needed or 'nothing'}, and may name {allowed or 'nothing'}"


def sketched(rng: random.Random, sketch: dict) -> Domain:
    """The business of a sketch, with results and small talk that are made up anew each time."""
    made = Made(rng)
    tools = [
        Tool(
            names=tool["names"],
            about=tool["about"],
            users=tool["users"],
            filler=tool["filler"],
            outcome=[made.outcome("", "request") for _ in range(3)],
            partial=tool.get("partial", []),
            param=[param(rng, line) for line in tool["params"]],
        )
        for tool in sketch["tool"]
    ]
    facts, refuse = made.small_talk("request")
    chains = [chained(made, sketch, chain) for chain in sketch.get("chain", [])]
    return Domain("sketched", sketch["called"], tools, facts, refuse, chains)


def chained(made: Made, sketch, chain) -> Chain:
    """Two calls, of which the second takes what the first brings."""
    kind, _ = parameters(sketch, chain["then"])[chain["passes"]]
    key = made.rng.choice([chain["passes"], chain["passes"], "number" if "digits" in kind or "code" in kind else "found"])
    return made.two_steps(chain["users"], chain["first"], chain["then"], chain["passes"], key, kind, chain["filler"])


def main(paths):
    faults = 0
    for path in paths:
        try:
            found = read(path)
            print(f"{path}: {len(found)} businesses, {sum(len(sketch['tool']) for sketch in found)} tools")
        except (ValueError, KeyError) as fault:
            faults += 1
            print(fault)
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
