"""Makes conversations between callers and phone agents, out of the domains and a seed.

    python generate.py --count 8000 --seed 1 > conversations.jsonl
    python generate.py --held-out --count 400 --seed 7 > evaluation.jsonl

Each line is {"messages": […], "tools": […]} as OpenAI's chat completions have them, with what the evaluation needs
beside it. The same arguments give the same lines.
"""

import argparse
import datetime
import itertools
import json
import random
import re
import sys
from dataclasses import replace

import general
from domain import Tool, folder, strings
from invented import invent
from sketch import sketched, sketches
from values import PLACE, Value, draw, places, schema_of

VOICE_ROLES = [
    "You are a friendly phone agent of {business}.",
    "You are a phone agent for {business}.",
    "You are the voice agent of {business}.",
    "You answer the phone for {business}. You are a voice assistant.",
    "You are a helpful voice agent. You speak with callers of {business}.",
    "You are on the phone with a customer of {business}.",
]
STYLES = [
    "Answer in one or two short spoken sentences.",
    "Keep your answers short.",
    "Speak in short sentences.",
    "Be brief and friendly.",
    "Your words are spoken, so use no lists and no markdown.",
    "Answer in one sentence.",
    "Never make anything up.",
    "If something is missing, ask for it.",
    "Use the tools to look things up.",
    "",
    "",
]
ACKNOWLEDGE = [
    "Briefly acknowledge out loud before using any tool, like 'Let me check that' or 'One moment'.",
    "Briefly acknowledge out loud before using any tool.",
    "Before calling any tool, say a short phrase such as 'One moment'.",
    "Say something short before you use a tool.",
    "",
]
PLAIN_ROLES = [
    "You are an assistant of {business}.",
    "You are a helpful assistant. You work for {business}.",
    "You help customers of {business}.",
    "You are a customer service bot of {business}.",
    "You are a helpful assistant. Use the tools when they help.",
    "",
]

# What a conversation is made of, with how often.
PARTS = {
    "call": 46,
    "missing": 14,
    "two": 6,
    "chain": 9,
    "fact": 10,
    "refuse": 6,
    "reply": 7,
    "unclear": 1,
    "absent": 4,
}
# The same where something is learned: more of what is hard.
LEARNED = {**PARTS, "missing": 20, "two": 9, "chain": 20}
# Single requests, where it is learned which tool is meant.
REQUESTS = {"call": 46, "missing": 21, "two": 5, "chain": 16, "fact": 4, "refuse": 4, "absent": 6}
# Shares of what is learned from whose business is made up, and is sketched; the others' are written. Of sketches there are
# fewer in conversations than in single requests, since nobody wrote what their agents say of a result.
INVENTED = 0.15
SKETCHED, SKETCHED_REQUESTS = 0.35, 0.6
# Share of the single requests that end with the call.
CUT = 0.75
# Share of the held-out calls with words of the tool's own before them.
FITTING_HELD_OUT = 0.85
# Of the calls that are learned from, the shares with words of the tool's own, behind which its name is not learned, and with words
# of any tool that is there, which are not learned themselves. Otherwise a call would be learned from the words before it, which are
# the model's own when it counts. The words before the rest fit all tools.
FITTING, DRAWN = 0.3, 0.35
# Shares of the tools that are learned from with parameters of others that nobody names, and with one less that is required.
BORROWING, LOOSE = 0.3, 0.15


class Conversation:
    """A conversation while it is being made."""

    def __init__(self, rng, domain, others, strict, bare):
        self.rng, self.domain, self.strict = rng, domain, strict
        self.voice = rng.random() < 0.8
        self.today = datetime.date(2025, 1, 1) + datetime.timedelta(days=rng.randrange(1400))
        self.messages, self.turns = [], []
        self.ids = itertools.count(1)
        # Names as this conversation has them: of tools, and of their parameters by those of the domain.
        self.names, self.params, self.tools = {}, {}, []
        # Tools that do without something here which is asked for elsewhere.
        self.loose = set()
        self.present = [] if bare else list(domain.tool)
        if len(self.present) > 2 and rng.random() < 0.25:
            self.present = rng.sample(self.present, rng.randint(2, len(self.present) - 1))
        extras = 0 if bare or not others else rng.choices([0, 1, 2, 3], [60, 20, 12, 8])[0]
        tools = [*self.present]
        taken = {name for tool in domain.tool for name in tool.names}
        for _ in range(extras):
            tool = rng.choice(rng.choice(others).tool)
            if not taken & set(tool.names):
                tools.append(tool)
                taken |= set(tool.names)
        rng.shuffle(tools)
        used = set()
        for tool in tools:
            self.declare(tool, used, tools)

    # --- tools ---

    def borrowed(self, tool: Tool, tools: list) -> list:
        """Parameters of other tools that this one takes here too, if somebody names them, which nobody does."""
        kinds = {param.kind.partition(":")[0] for param in tool.param}
        names = {name for param in tool.param for name in param.names}
        fit = [
            param
            for other in tools
            if other is not tool
            for param in other.param
            if param.kind.partition(":")[0] not in kinds - {"enum", "text"} and not names & set(param.names)
        ]
        found = {param.name: param for param in self.rng.sample(fit, min(len(fit), self.rng.choice([1, 1, 2])))}
        return [replace(param, optional=True) for param in found.values()]

    def declare(self, tool: Tool, used: set, tools: list):
        rng = self.rng
        free = [name for name in (self.rename(name) for name in tool.names) if name not in used]
        name = rng.choice(free or [f"{tool.name}_{len(used)}"])
        about = rng.choice(tool.about)
        if not self.strict and rng.random() < 0.04:
            # Nothing but the description tells what it is for.
            name = f"{rng.choice(['tool', 'fn', 'action', 'op'])}_{rng.randrange(1, 99)}"
            if name in used:
                return self.declare(tool, used, tools)
        elif rng.random() < 0.12:
            about = ""
        used.add(name)
        given = {param.name for param in tool.param if not param.optional or rng.random() < 0.7}
        params = [param for param in tool.param if param.name in given]
        if not self.strict and rng.random() < BORROWING:
            params += self.borrowed(tool, tools)
        if rng.random() < 0.3:
            rng.shuffle(params)
        style = rng.random()
        properties, renamed = {}, {}
        for param in params:
            key = rng.choice(param.names)
            if key in properties:
                key = param.name
            if rng.random() < 0.08 and not self.strict:
                key = camel(key)
            schema = schema_of(param.kind)
            if param.about and rng.random() < (0.6 if style < 0.8 else 0):
                schema = {**schema, "description": rng.choice(param.about)}
            properties[key], renamed[param.name] = schema, key
        required = [renamed[param.name] for param in params if not param.optional]
        if not self.strict and required and rng.random() < LOOSE:
            required.remove(rng.choice(required))
            self.loose.add(id(tool))
        schema = {"type": "object", "properties": properties, "required": required}
        function = {"name": name, "parameters": schema}
        if about:
            function["description"] = about
        self.tools.append({"type": "function", "function": function})
        self.names[id(tool)], self.params[id(tool)] = name, renamed

    def rename(self, name):
        way = self.rng.random()
        if way < 0.1:
            return camel(name)
        if way < 0.13:
            return name.replace("_", "-")
        if way < 0.17 and not self.strict:
            return self.rng.choice(["crm_", "api_", "do_", "v2_"]) + name
        return name

    # --- values ---

    def draw(self, kinds: dict) -> dict:
        return {name: draw(self.rng, kind, self.today) for name, kind in kinds.items()}

    def kinds(self, tool: Tool) -> dict:
        return {param.name: param.kind for param in tool.param}

    def fill(self, text: str, values: dict, form: str) -> str:
        return PLACE.sub(lambda place: str(getattr(values[place[1] or place[2]], form)), text)

    def result(self, template, values: dict):
        """A result with its values in their places; those that it draws are added to the values."""
        if isinstance(template, dict):
            return {key: self.result(part, values) for key, part in template.items()}
        if isinstance(template, list):
            return [self.result(part, values) for part in template]
        if not isinstance(template, str):
            return template
        found = places(template)
        for name, kind in found:
            if kind:
                values[name] = draw(self.rng, kind, self.today)
        if len(found) == 1 and PLACE.fullmatch(template):
            return values[found[0][0]].json
        return self.fill(template, values, "json")

    # --- messages ---

    def user(self, text, amount=1.0):
        self.messages.append({"role": "user", "content": general.messy(self.rng, text, amount)})

    def agent(self, text, kind, facts=(), must=()):
        self.turns.append({"at": len(self.messages), "kind": kind, "facts": list(facts), "must": list(must)})
        self.messages.append({"role": "assistant", "content": text})

    def calls(self, calls, fillers, words=None):
        """A turn that makes calls, each a tool with its arguments and its result. `words` tells whose the fillers are."""
        self.turns.append({"at": len(self.messages), "kind": "call"})
        if words and self.voice:
            self.turns[-1]["words"] = words
        made = []
        for tool, arguments, _ in calls:
            function = {"name": self.names[id(tool)], "arguments": json.dumps(arguments, ensure_ascii=False)}
            made.append({"id": f"call_{next(self.ids)}", "type": "function", "function": function})
        content = self.rng.choice(fillers) if self.voice else None
        self.messages.append({"role": "assistant", "content": content, "tool_calls": made})
        for call, (_, _, result) in zip(made, calls, strict=True):
            text = json.dumps(result, ensure_ascii=False)
            self.messages.append({"role": "tool", "tool_call_id": call["id"], "content": text})

    def arguments(self, tool: Tool, values: dict, named: set) -> dict:
        """What is said of the tool's parameters, under the names and in the order that this conversation has."""
        renamed = self.params[id(tool)]
        back = {key: name for name, key in renamed.items()}
        schema = next(t for t in self.tools if t["function"]["name"] == self.names[id(tool)])["function"]["parameters"]
        return {key: values[back[key]].json for key in schema["properties"] if back[key] in named}

    def fillers(self, tool: Tool):
        """What may be said before a call of this tool, and whose words that are."""
        share = self.rng.random()
        if self.strict:
            return (tool.filler if share < FITTING_HELD_OUT else general.FILLERS), None
        if share < FITTING:
            return tool.filler, "fitting"
        if share < FITTING + DRAWN:
            return self.rng.choice(self.present).filler, "drawn"
        return general.FILLERS, None

    def facts(self, values: dict, results, answers):
        """What every wording of the answer says of the values that the results brought, as it is told."""
        drawn = {name for result in results for text in strings(result) for name, kind in places(text) if kind}
        said = [{name for name, _ in places(text)} for text in answers]
        return [values[name].told for name in sorted(drawn) if all(name in names for names in said)]

    # --- parts ---

    def usable(self, texts, tool):
        """Utterances that name only what the tool takes here."""
        taken = set(self.params[id(tool)])
        return [text for text in texts if {name for name, _ in places(text)} <= taken]

    def spoken(self, tool: Tool, text: str, values: dict) -> str:
        """An utterance; now and then somebody corrects themselves."""
        filled = self.fill(text, values, "spoken")
        names = [name for name, _ in places(text)]
        if names and self.rng.random() < (0.06 if self.strict else 0.1):
            name = self.rng.choice(names)
            kind = self.kinds(tool)[name]
            if kind.partition(":")[0] not in ("text", "enum"):
                wrong, right = draw(self.rng, kind, self.today).spoken, values[name].spoken
                if wrong != right and filled.count(right) == 1:
                    sorry = self.rng.choice(["no sorry", "sorry i mean", "no wait", "i mean", "no it's"])
                    return filled.replace(right, f"{wrong} {sorry} {right}")
        return filled

    def outcome(self, tool: Tool, values: dict):
        """A result, and what is said of it: the text, the facts and the words that have to be in it."""
        if self.rng.random() < 0.06:
            result = self.rng.choice(general.TROUBLE_RESULTS)
            return result, self.rng.choice(general.TROUBLE_ANSWERS), [], [general.TROUBLE_MUST]
        outcome = self.rng.choices(tool.outcome, [3, *[2] * (len(tool.outcome) - 1)])[0]
        result = self.result(outcome.result, values)
        answer = self.fill(self.rng.choice(outcome.answer), values, "told")
        return result, answer, self.facts(values, [outcome.result], outcome.answer), outcome.must

    def call(self):
        tool = self.rng.choice(self.present)
        values = self.draw(self.kinds(tool))
        text = self.rng.choice(self.usable(tool.users, tool))
        self.user(self.spoken(tool, text, values))
        self.finish(tool, values, {name for name, _ in places(text)})

    def finish(self, tool, values, named):
        arguments = self.arguments(tool, values, named)
        result, answer, facts, must = self.outcome(tool, values)
        self.calls([(tool, arguments, result)], *self.fillers(tool))
        self.agent(answer, "answer", facts, must)

    def missing(self):
        tools = [tool for tool in self.present if id(tool) not in self.loose and self.usable(tool.partial, tool)]
        if not tools:
            return self.call()
        tool = self.rng.choice(tools)
        values = self.draw(self.kinds(tool))
        text = self.rng.choice(self.usable(tool.partial, tool))
        if not self.strict:
            # The more is missing, the harder it is to wait with the call until all of it is there.
            other = self.rng.choice(self.usable(tool.partial, tool))
            text = min(text, other, key=lambda text: len(places(text)))
        named = {name for name, _ in places(text)}
        self.user(self.spoken(tool, text, values))
        for param in tool.param:
            if param.optional or param.name in named:
                continue
            self.agent(self.rng.choice(param.ask), "ask")
            said = values[param.name].spoken
            given = ["{}", "{}", "it's {}", "{}", "uh {}", "yes it's {}", "sure {}", "that's {}", "okay it's {}"]
            self.user(self.rng.choice(given).format(said), 0.4)
            named.add(param.name)
        self.finish(tool, values, named)

    def two(self):
        """Two requests at once, which make two calls in one turn."""
        tools = [tool for tool in self.present if self.usable(tool.users, tool)]
        first = self.rng.choice(tools)
        # More often than not the same is asked twice.
        second = first if first.param and self.rng.random() < 0.6 else self.rng.choice(tools)
        if first is second and not first.param:
            return self.call()
        both, words = [], []
        for tool in (first, second):
            values = self.draw(self.kinds(tool))
            text = self.rng.choice(self.usable(tool.users, tool))
            words.append(self.fill(text, values, "spoken"))
            both.append((tool, values, {name for name, _ in places(text)}))
        joint = self.rng.choice([" and also ", " and ", " and then ", " oh and ", " and another thing "])
        self.user(joint.join(words), 0.5)
        calls, answers, facts, must = [], [], [], []
        for tool, values, named in both:
            arguments = self.arguments(tool, values, named)
            result, answer, told, words = self.outcome(tool, values)
            calls.append((tool, arguments, result))
            answers.append(answer)
            facts += told
            must += words
        self.calls(calls, *self.fillers(first))
        self.agent(" ".join(dict.fromkeys(answers)), "answer", facts, must)

    def chain(self):
        here = {tool.name: tool for tool in self.present}
        chains = [chain for chain in self.domain.chain if all(step.tool in here for step in chain.steps)]
        if not chains:
            return self.call()
        chain = self.rng.choice(chains)
        text = self.rng.choice(chain.users)
        kinds = {}
        for step in chain.steps:
            kinds = {**self.kinds(here[step.tool]), **kinds}
        values = self.draw({name: kinds[name] for name, _ in places(text)})
        self.user(self.fill(text, values, "spoken"))
        for step in chain.steps:
            tool = here[step.tool]
            # What was drawn before goes where the step says, or under its own name.
            given = dict(values)
            for name, template in step.args.items():
                filled = self.result(template, values)
                given[name] = Value(filled, str(filled), str(filled))
            named = {param.name for param in tool.param if param.name in given and param.name in self.params[id(tool)]}
            arguments = self.arguments(tool, given, named)
            result = self.result(step.result, values)
            said = (step.filler, None) if step.filler else self.fillers(tool)
            self.calls([(tool, arguments, result)], *said)
        facts = self.facts(values, [step.result for step in chain.steps], chain.answer)
        self.agent(self.fill(self.rng.choice(chain.answer), values, "told"), "answer", facts, chain.must)

    def fact(self):
        said = self.rng.choice([said for said in self.domain.facts if said.fact in self.instructions] or [None])
        if said is None:
            return self.refuse()
        self.user(self.rng.choice(said.users))
        self.agent(self.rng.choice(said.answer), "fact")

    def refuse(self):
        said = self.rng.choice(self.domain.refuse)
        self.user(self.rng.choice(said.users))
        self.agent(self.rng.choice(said.answer), "refuse")

    def absent(self):
        """Something that the business does, and for which there is no tool here."""
        missing = [tool for tool in self.domain.tool if id(tool) not in self.names]
        if not missing:
            return self.refuse()
        tool = self.rng.choice(missing)
        values = self.draw(self.kinds(tool))
        self.user(self.fill(self.rng.choice(tool.users), values, "spoken"))
        answers = [
            "I'm sorry, I can't do that here. Is there something else I can help with?",
            "I'm afraid I can't help with that. Can I do anything else for you?",
            "Sorry, that's not something I can do. Anything else?",
        ]
        self.agent(self.rng.choice(answers), "refuse")

    def small(self, pairs):
        users, answers = self.rng.choice(pairs)
        self.user(self.rng.choice(users), 0.3)
        self.agent(self.rng.choice(answers), "chat")

    def reply(self):
        self.small(general.REPLIES if self.turns else general.GREETINGS)

    def unclear(self):
        self.small(general.UNCLEAR)

    # --- the whole ---

    def instruct(self):
        rng = self.rng
        role = rng.choice(VOICE_ROLES if self.voice else PLAIN_ROLES).format(business=rng.choice(self.domain.business))
        facts = [said.fact for said in self.domain.facts if said.fact]
        facts = rng.sample(facts, rng.randint(0, len(facts)))
        styles = [style for style in rng.sample(STYLES, rng.randint(0, 2)) if style]
        if self.voice:
            acknowledge = rng.choice(ACKNOWLEDGE)
            styles += [acknowledge] if acknowledge else []
        rest = facts + styles
        rng.shuffle(rest)
        dated = any(param.kind == "date" for tool in self.domain.tool for param in tool.param)
        if dated or rng.random() < 0.15:
            day = self.today
            rest.insert(0, f"Today is {day:%A}, {day.isoformat()}.")
        self.instructions = " ".join(part for part in [role, *rest] if part)
        if self.instructions:
            self.messages.append({"role": "system", "content": self.instructions})

    def make(self, parts: int) -> dict:
        self.instruct()
        if self.rng.random() < 0.2:
            self.small(general.GREETINGS)
        kinds = PARTS if self.strict else LEARNED
        if not self.present:
            kinds = {"fact": 40, "refuse": 25, "absent": 25, "reply": 25}
        for _ in range(parts):
            [kind] = self.rng.choices(list(kinds), kinds.values())
            getattr(self, kind)()
        if self.rng.random() < 0.15:
            self.small(general.REPLIES)
        return self.record()

    def requests(self, count: int) -> list:
        """So many conversations of one request each, which begin with the same instructions and tools."""
        self.instruct()
        begun, made = self.messages, []
        for _ in range(count):
            self.messages, self.turns = [*begun], []
            [kind] = self.rng.choices(list(REQUESTS), REQUESTS.values())
            getattr(self, kind)()
            calls = [at for at, message in enumerate(self.messages) if "tool_calls" in message]
            if len(calls) == 1 and self.rng.random() < CUT:
                del self.messages[calls[0] + 1 :]
            made.append(self.record())
        return made

    def record(self) -> dict:
        """What has been said up to here, as a line of the data."""
        record = {"domain": self.domain.name, "voice": self.voice, "messages": self.messages}
        if self.tools:
            record["tools"] = self.tools
        return {**record, "turns": self.turns}


def camel(name):
    first, *rest = re.split(r"[_-]", name)
    return first + "".join(part.capitalize() for part in rest)


def conversations(domains: list, others: list, count: int, seed: int, held_out=False):
    """So many conversations, the domains in turn. `others` lend tools that nobody asks for."""
    short = [] if held_out else sketches()
    for number in range(count):
        rng = random.Random(f"{seed}/{number}")
        domain = domains[number % len(domains)]
        lenders = [other for other in others if other is not domain]
        if not held_out:
            domain, lenders = learned(rng, domain, lenders, short, SKETCHED)
        bare = not held_out and rng.random() < 0.07
        talk = Conversation(rng, domain, lenders, held_out, bare)
        # Held-out conversations are those of callers; those that are learned from say more for each prompt.
        parts = [50, 35, 15, 0, 0] if held_out else [20, 25, 25, 15, 15]
        yield talk.make(rng.choices([1, 2, 3, 4, 5], parts)[0])


def requests(domains: list, count: int, each: int, seed: int):
    """So many groups of single requests to learn from, each group of one business, with the same instructions and tools."""
    short = sketches()
    for number in range(count):
        rng = random.Random(f"{seed}/requests/{number}")
        domain = domains[number % len(domains)]
        lenders = [other for other in domains if other is not domain]
        domain, lenders = learned(rng, domain, lenders, short, SKETCHED_REQUESTS)
        yield Conversation(rng, domain, lenders, strict=False, bare=False).requests(each)


def learned(rng, domain, others, short, share):
    """A business to learn from, one of `short` in this share of cases, and those that lend tools."""
    lenders = [*rng.sample(others, 3), *(invent(rng) for _ in range(2))]
    lenders += [sketched(rng, sketch) for sketch in rng.sample(short, min(2, len(short)))]
    way = rng.random()
    if way < INVENTED:
        domain = invent(rng)
    elif way < INVENTED + share and short:
        domain = sketched(rng, rng.choice(short))
    return domain, lenders


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument(
        "--held-out",
        metavar="FOLDER",
        nargs="?",
        const="eval",
        help="conversations of a folder whose domains no training data has; of eval/ if none is named",
    )
    options = parser.parse_args()
    domains = folder(options.held_out or "domains")
    for record in conversations(domains, domains, options.count, options.seed, bool(options.held_out)):
        sys.stdout.write(json.dumps(record, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
