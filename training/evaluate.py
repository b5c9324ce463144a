"""Asks a running gateway for every turn of conversations that are in no training data, and counts what is right.

    electron-gateway serve --model FOLDER
    python generate.py --held-out --count 180 --seed 7 > held-out.jsonl
    python evaluate.py --url http://127.0.0.1:8080 --key KEY held-out.jsonl

Each turn is asked for behind the right conversation up to there, at temperature 0, with nothing else on the server.
"""

import argparse
import collections
import json
import re
import sys
import urllib.request


class Gateway:
    """A server, one request at a time."""

    def __init__(self, url, key):
        self.url, self.key = url.rstrip("/"), key

    def ask(self, messages, tools):
        """The agent's next message, and whether the phrase in it is the gateway's own."""
        body = {"model": "electron", "messages": messages, "temperature": 0, "max_tokens": 160, "seed": 1}
        if tools:
            body["tools"] = tools
        before = self.phrases()
        request = urllib.request.Request(
            f"{self.url}/v1/chat/completions",
            json.dumps(body).encode(),
            {"authorization": f"Bearer {self.key}", "content-type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=300) as answer:
            message = json.load(answer)["choices"][0]["message"]
        return message, self.phrases() > before

    def phrases(self):
        """How many phrases of its book the gateway has said."""
        with urllib.request.urlopen(f"{self.url}/metrics", timeout=30) as answer:
            found = re.search(r"^electron_filler_delay_seconds_count(?:\{.*\})? (\S+)", answer.read().decode(), re.M)
        return float(found[1]) if found else 0.0


def plain(text):
    """Letters and digits, for comparing what is said."""
    return re.sub(r"[^a-z0-9]+", "", str(text).lower())


def states(text, fact):
    """Whether an answer says a fact; money may be written in another way."""
    amount = re.fullmatch(r"(\d+) dollars", fact)
    return plain(amount[1] if amount else fact) in plain(text)


def same(given, wanted):
    """Whether arguments are the same, capital letters aside."""
    if isinstance(given, str) and isinstance(wanted, str):
        return given.strip().lower() == wanted.strip().lower()
    if isinstance(given, dict) and isinstance(wanted, dict):
        return given.keys() == wanted.keys() and all(same(given[key], wanted[key]) for key in wanted)
    return given == wanted


def read(calls):
    return [(call["function"]["name"], json.loads(call["function"]["arguments"])) for call in calls or []]


def judge(record, turn, message, from_book):
    """What is right and what is wrong in a turn, by the name of the figure."""
    wanted = read(record["messages"][turn["at"]].get("tool_calls"))
    given = read(message.get("tool_calls"))
    right = {"decision": bool(wanted) == bool(given)}
    if wanted and given:
        right["tool"] = sorted(name for name, _ in given) == sorted(name for name, _ in wanted)
        left = list(given)
        for name, arguments in wanted:
            found = next((call for call in left if call[0] == name and same(call[1], arguments)), None)
            if found is not None:
                left.remove(found)
        right["arguments"] = not left and len(given) == len(wanted)
        if record["voice"]:
            right["filler"] = bool(message.get("content")) and not from_book
    if turn["kind"] == "answer" and not given:
        text = message.get("content") or ""
        facts = all(states(text, fact) for fact in turn["facts"])
        right["facts"] = facts and all(any(way in text.lower() for way in must.split("|")) for must in turn["must"])
    return right


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file")
    parser.add_argument("--url", default="http://127.0.0.1:8080")
    parser.add_argument("--key", required=True)
    parser.add_argument("--turns", type=int, default=400, help="at most so many")
    parser.add_argument("--show", action="store_true", help="print what was wrong")
    options = parser.parse_args()
    gateway = Gateway(options.url, options.key)
    figures = collections.defaultdict(collections.Counter)
    kinds, domains, turns = collections.defaultdict(collections.Counter), set(), 0
    with open(options.file) as file:
        for record in map(json.loads, file):
            if turns >= options.turns:
                break
            domains.add(record["domain"])
            for turn in record["turns"]:
                turns += 1
                messages = record["messages"][: turn["at"]]
                message, from_book = gateway.ask(messages, record.get("tools"))
                right = judge(record, turn, message, from_book)
                for name, value in right.items():
                    figures[name][value] += 1
                kinds[turn["kind"]][right["decision"]] += 1
                if options.show and not all(right.values()):
                    wrong = [name for name, value in right.items() if not value]
                    wanted = record["messages"][turn["at"]]
                    print(json.dumps({"wrong": wrong, "domain": record["domain"], "after": messages[-1]["content"],
                                      "wanted": [wanted["content"], read(wanted.get("tool_calls"))],
                                      "given": [message.get("content"), read(message.get("tool_calls"))]}))  # fmt: skip
            if sys.stderr.isatty():
                print(f"\r{turns} turns", end="", file=sys.stderr, flush=True)
    print(f"{turns} turns, {len(domains)} domains")
    for name, wanted in (
        ("decision", "to call or not"), ("tool", "of the calls"), ("arguments", "of the calls, all of them"),
        ("filler", "by the model itself, in tool turns with a voice prompt"), ("facts", "of a result, in the answer"),
    ):  # fmt: skip
        count = figures[name]
        total = count.total()
        print(f"{name:<10} {count[True]:>4} of {total:<4} {100 * count[True] / max(1, total):5.1f} %  {wanted}")
    print("decisions by kind:", {kind: f"{count[True]}/{count.total()}" for kind, count in sorted(kinds.items())})


if __name__ == "__main__":
    main()
