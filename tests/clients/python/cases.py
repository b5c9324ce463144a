"""Conversations, tools and prompts that several tests use."""

MODEL = "electron"

HELLO = [{"role": "user", "content": "Say hello."}]

VOICE_PROMPT = (
    "You are a friendly phone agent. Briefly acknowledge out loud before using any tool, like 'Let me check that' or "
    "'One moment'."
)


def tool(name, properties, **schema):
    parameters = {"type": "object", "properties": properties, "required": list(properties), **schema}
    function = {"name": name, "description": f"Does {name}.", "parameters": parameters}
    return {"type": "function", "function": function}


WEATHER = tool(
    "get_weather",
    {"city": {"type": "string", "enum": ["Oslo", "Paris", "Lima"]}, "days": {"type": "integer", "enum": [1, 3, 7]}},
    additionalProperties=False,
)
CLOCK = tool("get_time", {"zone": {"type": "string", "enum": ["UTC", "CET"]}}, additionalProperties=False)
TOOLS = [WEATHER, CLOCK]


def flat(tool):
    """The form that tools have in the Responses and Realtime APIs."""
    return {"type": "function", **tool["function"]}


FLAT_TOOLS = [flat(tool) for tool in TOOLS]


def said(text, system=None):
    messages = [{"role": "user", "content": text}]
    return messages if system is None else [{"role": "system", "content": system}, *messages]


def schema_of(name, tools=TOOLS):
    return next(t["function"]["parameters"] for t in tools if t["function"]["name"] == name)
