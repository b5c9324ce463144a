"""What callers name and tools return: order numbers, days, times, names.

A kind is written as `name` or `name:parameter`. Each value has three forms: as it stands in JSON, as a caller says it
and a speech recognizer writes it down, and as an agent says it.
"""

import calendar
import datetime
import random
import re
from dataclasses import dataclass

ONES = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen nineteen"
).split()
TENS = "zero ten twenty thirty forty fifty sixty seventy eighty ninety".split()
ORDINALS = (
    "zeroth first second third fourth fifth sixth seventh eighth ninth tenth eleventh twelfth thirteenth fourteenth "
    "fifteenth sixteenth seventeenth eighteenth nineteenth"
).split()
WEEKDAYS = list(calendar.day_name)
MONTHS = list(calendar.month_name)[1:]

FIRST = (
    "Anna Ben Carla David Elena Frank Grace Henry Ines James Karen Leo Maria Noah Olivia Paul Quinn Rosa Samuel Tina "
    "Victor Wendy Yusuf Zoe Amir Bianca Cheng Dora Emil Fatima Gloria Hugo Isabel Jonas Kofi Lena Marco Nadia Oscar "
    "Priya Rafael Sofia Tom Ursula Vera Walter Ximena Yara Adam Bella Claire Diego Erin Felix Hana Ivan Julia Kenji "
    "Laura Miguel Nina Omar Petra Ravi Sara Theo Alice Bruno Cora Derek"
).split()
LAST = (
    "Smith Johnson Brown Garcia Miller Davis Martinez Lopez Wilson Anderson Taylor Moore Jackson Martin Lee Thompson "
    "White Harris Clark Lewis Young Walker Hall Allen King Wright Scott Green Baker Adams Nelson Carter Mitchell Perez "
    "Roberts Turner Phillips Campbell Parker Evans Edwards Collins Stewart Morris Rogers Reed Cook Morgan Bell Murphy "
    "Bailey Cooper Richardson Cox Howard Ward Peterson Gray Ramirez Watson Brooks Kelly Sanders Price Bennett Wood "
    "Barnes Ross Henderson Coleman Jenkins Perry Powell Long Patterson Hughes Flores Butler Simmons Foster Schmidt "
    "Novak Rossi Tanaka Okafor Haddad Silva Kowalski Larsen Dubois"
).split()
CITIES = (
    "Boston|Chicago|Denver|Seattle|Austin|Portland|Miami|Dallas|Atlanta|Phoenix|San Diego|Houston|Detroit|Nashville|"
    "Orlando|Cleveland|Las Vegas|Baltimore|Memphis|Toronto|London|Paris|Berlin|Madrid|Rome|Dublin|Vienna|Lisbon|Oslo|"
    "Prague|New York|San Francisco|Salt Lake City|Minneapolis|Montreal"
).split("|")
STREETS = (
    "Oak Street|Maple Avenue|Main Street|Park Road|Hill Street|Lake Drive|Church Street|Elm Street|River Road|"
    "Station Road|Cedar Lane|Sunset Boulevard|Mill Lane|King Street|Garden Avenue|Bridge Street|Pine Street"
).split("|")


@dataclass
class Value:
    """A value in its three forms."""

    json: object
    spoken: str
    told: str


def words_of(number):
    """A number below ten thousand in words."""
    if number < 20:
        return ONES[number]
    if number < 100:
        return TENS[number // 10] + (f" {ONES[number % 10]}" if number % 10 else "")
    if number < 1000:
        return f"{ONES[number // 100]} hundred" + (f" {words_of(number % 100)}" if number % 100 else "")
    return f"{words_of(number // 1000)} thousand" + (f" {words_of(number % 1000)}" if number % 1000 else "")


def ordinal_of(day):
    """A day of the month in words: `twenty third`."""
    if day < 20:
        return ORDINALS[day]
    if day % 10 == 0:
        return TENS[day // 10][:-1] + "ieth"
    return f"{TENS[day // 10]} {ORDINALS[day % 10]}"


def short_ordinal(day):
    """A day of the month in figures: `23rd`."""
    ending = "th" if 10 <= day % 100 <= 20 else {1: "st", 2: "nd", 3: "rd"}.get(day % 10, "th")
    return f"{day}{ending}"


def spelled(rng, text):
    """Letters and digits as they are read out."""
    pieces = [ONES[int(c)] if c.isdigit() and rng.random() < 0.5 else c.lower() for c in text]
    return " ".join(pieces)


def spoken_digits(rng, text):
    """Digits as a recognizer writes them: together, in groups, one by one, or as words."""
    way = rng.random()
    if way < 0.5:
        return text
    if way < 0.65 and len(text) >= 4:
        size = 2 if len(text) % 2 == 0 else 3
        return " ".join(text[i : i + size] for i in range(0, len(text), size))
    if way < 0.78:
        return " ".join(text)
    return " ".join(ONES[int(c)] for c in text)


def span(parameter, default):
    """The bounds in `3-9` or `3`."""
    low, _, high = (parameter or default).partition("-")
    return int(low), int(high or low)


def digits(rng, parameter, _today):
    low, high = span(parameter, "4-6")
    text = "".join(rng.choice("0123456789") for _ in range(rng.randint(low, high)))
    text = rng.choice("123456789") + text[1:]
    return Value(text, spoken_digits(rng, text), text)


def code(rng, parameter, _today):
    """`AA999` is two letters and three digits."""
    draw = {"A": "ABCDEFGHJKLMNPQRSTUVWXYZ", "9": "0123456789"}
    text = "".join(rng.choice(draw.get(c, c)) for c in parameter or "AA999")
    spoken = rng.choice([text, text.lower(), spelled(rng, text)])
    return Value(text, spoken, text)


def integer(rng, parameter, _today):
    low, high = span(parameter, "1-9")
    number = rng.randint(low, high)
    return Value(number, rng.choice([str(number), words_of(number)]), str(number))


def money(rng, parameter, _today):
    low, high = span(parameter, "5-500")
    number = rng.randint(low, high)
    if number > 100 and rng.random() < 0.6:
        number -= number % 10
    unit = rng.choice(["dollars", "dollars", "bucks"])
    return Value(number, f"{rng.choice([str(number), words_of(number)])} {unit}", f"{number} dollars")


def name(rng, _parameter, _today):
    text = f"{rng.choice(FIRST)} {rng.choice(LAST)}"
    return Value(text, rng.choice([text, text.lower()]), text)


def first_name(rng, _parameter, _today):
    text = rng.choice(FIRST)
    return Value(text, rng.choice([text, text.lower()]), text)


def last_name(rng, _parameter, _today):
    text = rng.choice(LAST)
    return Value(text, rng.choice([text, text.lower()]), text)


def weekday(rng, _parameter, _today):
    text = rng.choice(WEEKDAYS)
    return Value(text, rng.choice([text, text.lower()]), text)


def date(rng, _parameter, today):
    """A day within the next ten weeks, in JSON as ISO 8601 has it. Needs a prompt that tells today's date."""
    day = today + datetime.timedelta(days=rng.randint(2, 70))
    month = MONTHS[day.month - 1]
    said = rng.choice(
        [
            f"{month} {short_ordinal(day.day)}",
            f"{month} {day.day}",
            f"{month.lower()} {ordinal_of(day.day)}",
            f"the {ordinal_of(day.day)} of {month.lower()}",
            f"the {short_ordinal(day.day)} of {month}",
        ]
    )
    return Value(day.isoformat(), said, f"{month} {short_ordinal(day.day)}")


def time(rng, parameter, _today):
    """A time of day, in JSON as HH:MM of 24 hours. `8-18` bounds the hours."""
    low, high = span(parameter, "8-19")
    hour, minute = rng.randint(low, high), rng.choice([0, 0, 0, 30, 30, 15, 45])
    twelve, half = (hour - 1) % 12 + 1, "AM" if hour < 12 else "PM"
    told = f"{twelve}:{minute:02} {half}" if minute else f"{twelve} {half}"
    part = "in the morning" if hour < 12 else "in the afternoon" if hour < 18 else "in the evening"
    clock = {
        0: [f"{twelve} {half.lower()}", f"{twelve} {half.lower()}", f"{ONES[twelve]} {half.lower()}",
            f"{ONES[twelve]} {part}", f"{twelve} o'clock {part}"],
        15: [f"quarter past {ONES[twelve]} {part}", f"{twelve}:15 {half.lower()}"],
        30: [f"half past {ONES[twelve]} {part}", f"{ONES[twelve]} thirty {half.lower()}", f"{twelve}:30 {half.lower()}"],
        45: [f"quarter to {ONES[twelve % 12 + 1]} {part}" if hour not in (11, 17) else f"{twelve}:45 {half.lower()}",
             f"{twelve}:45 {half.lower()}"],
    }[minute]  # fmt: skip
    return Value(f"{hour:02}:{minute:02}", rng.choice(clock), told)


def phone(rng, _parameter, _today):
    text = f"{rng.randint(201, 989)}555{rng.randint(0, 9999):04}"
    groups = [text[:3], text[3:6], text[6:]]
    spoken = rng.choice([" ".join(groups), "-".join(groups), text, ", ".join(" ".join(g) for g in groups)])
    return Value(text, spoken, " ".join(groups))


def email(rng, _parameter, _today):
    user = f"{rng.choice(FIRST)}.{rng.choice(LAST)}".lower()
    host = rng.choice(["example.com", "mail.example", "example.org"])
    return Value(f"{user}@{host}", f"{user.replace('.', ' dot ')} at {host.replace('.', ' dot ')}", f"{user}@{host}")


def city(rng, _parameter, _today):
    text = rng.choice(CITIES)
    return Value(text, rng.choice([text, text.lower()]), text)


def address(rng, _parameter, _today):
    text = f"{rng.randint(2, 199)} {rng.choice(STREETS)}"
    return Value(text, rng.choice([text, text.lower()]), text)


def enum(rng, parameter, _today):
    """`large|small=small one/little` : a value with other ways to say it. In speech `_` is a space."""
    value, _, ways = rng.choice(parameter.split("|")).partition("=")
    plain = value.replace("_", " ")
    return Value(value, rng.choice([plain, *filter(None, ways.split("/"))]), plain)


def text(rng, parameter, _today):
    """One of several texts, taken as it is said, or as stands before `=`: `bookcase=a bookcase`."""
    value, _, said = rng.choice(parameter.split("|")).partition("=")
    return Value(value, said or value, value)


KINDS = {
    "digits": digits, "code": code, "int": integer, "money": money, "name": name, "first_name": first_name,
    "last_name": last_name, "weekday": weekday, "date": date, "time": time, "phone": phone, "email": email,
    "city": city, "address": address, "enum": enum, "text": text,
}  # fmt: skip


def draw(rng: random.Random, kind: str, today: datetime.date) -> Value:
    """A value of a kind such as `int:1-9`."""
    name, _, parameter = kind.partition(":")
    return KINDS[name](rng, parameter, today)


def schema_of(kind: str) -> dict:
    """The JSON schema of a kind."""
    name, _, parameter = kind.partition(":")
    if name in ("int", "money"):
        return {"type": "integer"}
    if name == "enum":
        return {"type": "string", "enum": [value.partition("=")[0] for value in parameter.split("|")]}
    if name == "date":
        return {"type": "string", "format": "date"}
    return {"type": "string"}


PLACE = re.compile(r"\{(?:(\w+)=)?([\w:|\-/=' ,.]+?)\}")


def places(text: str) -> list:
    """The places in a template: `(name, kind)`, without a kind where a value is used that was drawn before."""
    found = []
    for new, rest in PLACE.findall(text):
        found.append((new, rest) if new else (rest, None))
    return found
