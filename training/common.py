"""Prints what the data that is learned from has in common with the held-out domains, which should be nothing.

    python common.py

Compared are the names of tools, however they are written, and the sentences of callers, whatever stands in their places.
"""

import re
import sys

from domain import folder
from sketch import sketches
from values import PLACE


def name(text):
    """A tool's name in snake case."""
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", text).lower().replace("-", "_")


def sentence(text):
    """The words of a sentence, with one for all places."""
    return " ".join(re.findall(r"[\w']+", PLACE.sub(" 0 ", text).lower()))


def of_domains(domains):
    """Names and sentences of domains."""
    tools = [tool for domain in domains for tool in domain.tool]
    names = [text for tool in tools for text in tool.names]
    said = [text for tool in tools for text in [*tool.users, *tool.partial]]
    for domain in domains:
        said += [text for each in [*domain.chain, *domain.facts, *domain.refuse] for text in each.users]
    return names, said


def of_sketches():
    """Names and sentences of sketches."""
    tools = [tool for sketch in sketches() for tool in sketch["tool"]]
    said = [text for tool in tools for text in [*tool["users"], *tool.get("partial", [])]]
    said += [text for sketch in sketches() for chain in sketch.get("chain", []) for text in chain["users"]]
    return [text for tool in tools for text in tool["names"]], said


def main():
    held_names, held_said = of_domains([*folder("eval"), *folder("unseen")])
    names, said = ([*a, *b] for a, b in zip(of_domains(folder("domains")), of_sketches(), strict=True))
    found = 0
    for kind, plain, held, learned in (("name", name, held_names, names), ("sentence", sentence, held_said, said)):
        taken = {plain(text) for text in held}
        common = sorted({text for text in learned if plain(text) in taken})
        print(f"{len(held)} {kind}s held out, {len(learned)} learned from, {len(common)} in common")
        for text in common:
            print(f"  {text}")
        found += len(common)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
