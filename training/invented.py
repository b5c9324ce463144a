"""Domains that are made up: any number of businesses whose tools, words and results are put together from parts.

Written domains sound like callers, but there are few of them, and a model can learn by heart which words go with which
tool. Here every conversation has tools of its own, so that only reading their names and descriptions helps, and every
result has fields of its own, so that only saying what is in it helps.

`invented.txt` has the businesses, and what they deal in.
"""

import datetime
import random

from domain import FOLDER, Chain, Domain, Outcome, Param, Said, Step, Tool
from values import draw

LINES = [
    [part.strip() for part in line.split(";")]
    for line in (FOLDER / "invented.txt").read_text().splitlines()
    if not line.startswith("#")
]
NAMES = (
    "Blue Harbor|Cedar|Silver Birch|Old Town|Northside|Green Hill|Redwood|Lakeview|Summit|Corner|Bright|Riverside|Maple|"
    "Three Oaks|Golden Gate|Sunrise|Bell|Anchor|Crown|Falcon|Willow|Copper|Stone Bridge|Harvest|Meadow"
).split("|")
# What any business deals in.
COMMON = [
    "appointment", "visit", "order", "membership", "invoice", "gift card", "delivery", "subscription", "complaint",
    "reservation", "credit note", "voucher", "account", "request", "waiting list spot", "advice session", "inquiry",
]  # fmt: skip

# --- what a tool asks for ---

KEYS = {
    "id": ["{n}_id", "{n}_number", "number", "code", "reference", "{n}_code", "{n}_ref", "id", "{n}", "case_number"],
    "day": ["day", "date", "on_day", "wanted_day", "{n}_date", "when", "new_date", "for_date", "{n}_day", "start_day"],
    "time": ["time", "at_time", "start_time", "{n}_time", "hour", "from_hour", "begins_at"],
    "name": ["name", "customer_name", "customer", "client_name", "full_name", "booked_by", "guest", "holder", "person"],
    "phone": ["phone", "phone_number", "callback_number", "contact_phone", "mobile"],
    "email": ["email", "email_address", "mail", "contact_email"],
    "count": ["count", "quantity", "how_many", "number_of_{n}s", "amount_of_{n}s", "people", "party_size", "pieces"],
    "days": ["days", "extra_days", "duration", "number_of_days", "nights", "for_days"],
    "amount": ["amount", "sum", "budget", "max_price", "deposit", "price_limit"],
    "city": ["city", "town", "location", "place", "branch_city", "near"],
    "address": ["address", "street", "delivery_address", "where", "site"],
    "kind": ["kind", "type", "{n}_type", "{n}_kind", "category", "option", "variant", "style"],
    "problem": ["problem", "issue", "what_happened", "reason", "description", "fault"],
    "language": ["language", "spoken_language", "lang"],
    "priority": ["priority", "urgency", "level"],
    "channel": ["channel", "notify_by", "contact_by", "send_by"],
    "color": ["color", "finish_color", "shade_name"],
    "size": ["size", "{n}_size", "dimension"],
}
ABOUT = {
    "id": ["The {n}'s number", "Number or code", "Reference that the caller has", "Identifies the {n}"],
    "day": ["Day", "Wanted day", "When it should be", "ISO date"],
    "time": ["Time, HH:MM", "When it starts", "Time of day, 24 hours"],
    "name": ["Who it is for", "Name of the caller", "First and last name"],
    "phone": ["Phone number", "Where to call back"],
    "email": ["Email address", "Where to write to"],
    "count": ["How many", "Number of {n}s", "How many are wanted"],
    "days": ["How many days", "Number of days"],
    "amount": ["In dollars", "Amount in dollars", "How much money"],
    "city": ["City", "Where", "Town of the branch"],
    "address": ["Street and number", "Where to go"],
    "kind": ["What kind", "Kind of {n}", "Which sort"],
    "problem": ["What is wrong", "The caller's problem", "In the caller's words"],
    "language": ["Language", "Language that the caller wants"],
    "priority": ["How urgent", "Urgency"],
    "channel": ["How to tell the caller", "Way of contact"],
    "color": ["Color", "Which color"],
    "size": ["Size", "Which size"],
}
ASK = {
    "id": ["What's the {n} number?", "Could you give me the number of the {n}?", "Which {n} is it? I need the number.",
           "May I have the code, please?", "What's your reference?"],
    "day": ["For which day?", "What day would you like?", "Which day suits you?", "When should it be?"],
    "time": ["At what time?", "What time would you like?", "And what time?", "When exactly?"],
    "name": ["What name shall I put down?", "May I have your name?", "Who is it for?", "And your full name?"],
    "phone": ["What's your phone number?", "Which number can we call?", "Under which number do we reach you?"],
    "email": ["What's your email address?", "Where shall I send it?", "Which email, please?"],
    "count": ["How many?", "How many would you like?", "For how many?", "What number shall I put down?"],
    "days": ["For how many days?", "How many days?", "How long, in days?"],
    "amount": ["What amount?", "How much would that be?", "How much in dollars?"],
    "city": ["In which city?", "Which town?", "Where would that be?"],
    "address": ["What's the address?", "Which address is it?", "Where shall we come to?"],
    "kind": ["What kind would you like?", "Which kind of {n}?", "What type?"],
    "problem": ["What's the problem?", "What is wrong with it?", "What happened?"],
}  # fmt: skip
# How a caller says it, behind what is asked for.
SAID = {
    "id": ["number {%}", "{%}", "it's {%}", "the number is {%}", "my code is {%}", "under {%}", "with the code {%}"],
    "day": ["on {%}", "for {%}", "on {%}", "{%}", "it should be {%}"],
    "time": ["at {%}", "around {%}", "at {%}", "{%}"],
    "name": ["for {%}", "the name is {%}", "i'm {%}", "my name is {%}", "this is {%}", "under the name {%}"],
    "phone": ["my number is {%}", "call me at {%}", "my phone is {%}", "on {%}"],
    "email": ["my email is {%}", "send it to {%}", "at {%}"],
    "days": ["for {%} days", "{%} days", "by {%} days"],
    "amount": ["for {%}", "up to {%}", "{%}", "at most {%}"],
    "city": ["in {%}", "near {%}", "around {%}", "in {%}"],
    "address": ["at {%}", "to {%}", "the address is {%}", "my address is {%}"],
    "problem": ["{%}", "because {%}", "the problem is {%}", "{%}"],
    "language": ["in {%}", "i speak {%}", "with someone who speaks {%}"],
    "priority": ["it's {%}", "mark it {%}", "that's {%}"],
    "channel": ["tell me by {%}", "send news by {%}", "by {%} please"],
    "color": ["in {%}", "the {%} one", "make it {%}"],
    "size": ["in {%}", "size {%}", "the {%} size"],
}
# What is asked for where a parameter is of such a kind.
ASKED = {
    "digits": "id", "code": "id", "weekday": "day", "date": "day", "time": "time", "name": "name", "first_name": "name",
    "last_name": "name", "phone": "phone", "email": "email", "int": "count", "money": "amount", "city": "city",
    "address": "address", "enum": "kind", "text": "kind",
}  # fmt: skip
KIND = {
    "time": "time:8-19", "name": "name", "phone": "phone", "email": "email", "city": "city", "address": "address",
    "days": "int:2-14", "amount": "money:20-900",
    "language": "enum:english|german|french|italian|polish|arabic",
    "priority": "enum:low=not urgent|normal|urgent=very urgent|today=needed today",
    "channel": "enum:sms=text message|email|phone=phone call|letter",
    "color": "enum:red|blue|green|gray=grey|yellow|brown|orange|purple",
    "size": "enum:xs=extra small|s=small|m=medium|l=large|xl=extra large",
    "problem": "text:it makes a loud noise|it is broken|it leaks|it does not start|it arrived damaged|a part is missing|"
               "it smells burnt|the door is stuck|the screen is black|it is too small|it was dirty|nobody came|"
               "it stopped yesterday|the handle came off|it keeps beeping|the wrong one was sent|it is too loud|"
               "the label is wrong|it has a crack|the light blinks|it is scratched|it cannot be opened",
}  # fmt: skip
IDS = ["digits:4-6", "digits:3-5", "code:AA999", "code:A9999", "code:AAA99", "code:A99", "code:9999AA", "code:AA-99"]

# --- what tools do ---

# What is done: the verbs of names, what it is about, what callers say with the thing's name, what the agent says, and
# what it needs and may be given. `{n}` is the thing, `{a}` the thing with its article.
DONE = [
    ("status", ["check", "track", "get_status_of", "look_up", "where_is", "progress_of"],
     ["Tells how far {a} is", "Status of {a}", "Looks up the state of {a} by its number", "Where {a} is now"],
     ["where is my {n}", "what's the status of my {n}", "any news about my {n}", "is my {n} done", "how far is my {n}",
      "i'm still waiting for my {n}", "has anything happened with my {n}", "can you check on my {n}"],
     ["I'll check on your {n}.", "Let me see how far it is.", "Let me look at the status.", "I'm looking that up."],
     ["id"], []),
    ("book", ["book", "reserve", "schedule", "make", "arrange", "set_up"],
     ["Books {a}", "Reserves {a} for a customer", "Makes a booking of {a}", "Puts {a} into the calendar"],
     ["i'd like to book {a}", "can i get {a}", "i need {a}", "please reserve {a}", "could you set up {a}",
      "we want to have {a}", "i was hoping to get {a}", "put me down for {a}"],
     ["I'll book that for you.", "Let me reserve the {n}.", "Let me put that in.", "I'm setting that up."],
     ["day"], ["time", "name", "kind", "count", "language", "phone"]),
    ("cancel", ["cancel", "call_off", "remove", "drop", "delete", "void"],
     ["Cancels {a}", "Calls off {a}", "Removes {a}", "Takes {a} out of the calendar"],
     ["i have to cancel my {n}", "please call off my {n}", "i don't need the {n} anymore", "drop my {n}",
      "can you cancel the {n}", "i can't make it to my {n}", "take my {n} out please", "i no longer want my {n}"],
     ["I'll cancel that for you.", "Let me take it out.", "I'm calling it off.", "Let me cancel the {n}."],
     ["id"], ["problem", "channel"]),
    ("move", ["move", "reschedule", "change_date_of", "shift", "postpone", "rebook"],
     ["Moves {a} to another day", "Changes the day of {a}", "Puts {a} on a new date", "Postpones {a}"],
     ["i need to move my {n}", "can we postpone the {n}", "please change the day of my {n}", "reschedule my {n}",
      "could my {n} be on another day", "shift my {n}", "something came up can you move my {n}"],
     ["I'll move it for you.", "Let me change the day.", "Let me find that {n}.", "I'm moving your {n}."],
     ["id", "day"], ["time", "problem"]),
    ("price", ["price_of", "quote", "cost_of", "estimate", "calculate", "rate_for"],
     ["Tells what {a} costs", "Price of {a}", "Works out the cost of {a}", "Gives an estimate for {a}"],
     ["how much is {a}", "what does {a} cost", "what would i pay for {a}", "give me a price for {a}",
      "what's the rate for {a}", "is {a} expensive how much is it", "can you quote me {a}"],
     ["Let me look up the price.", "I'll work that out.", "Let me see what it costs.", "I'm checking the price."],
     ["kind"], ["count", "size", "days", "city"]),
    ("free", ["find_free", "check_availability_of", "open", "available", "search", "any_free"],
     ["Finds out whether {a} is free on a day", "Availability of {a}", "Free days of {a}", "Tells if there is {a} left"],
     ["is there {a} free", "do you have {a} left", "is {a} available", "any {n} open", "could i still get {a}",
      "what about {a} is it free", "do you have room for {a}"],
     ["Let me see what's free.", "I'll check what is left.", "Let me look at the calendar.", "I'm checking the {n}s."],
     ["day"], ["kind", "count", "time", "city"]),
    ("report", ["report_problem_with", "open_ticket_for", "complain_about", "log_fault_of", "file_issue_for"],
     ["Reports a problem with {a}", "Opens a ticket because of {a}", "Takes down what is wrong with {a}"],
     ["there's something wrong with my {n}", "i have a problem with the {n}", "i want to complain about my {n}",
      "i need to report my {n}", "my {n} has a fault"],
     ["I'll write that down.", "Let me open a ticket.", "I'm sorry, I'll report it.", "Let me report that for you."],
     ["problem"], ["id", "priority", "phone", "channel"]),
    ("buy", ["order", "buy", "purchase", "send", "deliver", "request"],
     ["Orders {n}s", "Takes an order of {n}s", "Sells {n}s", "Sends {n}s to a customer"],
     ["i'd like to order a few {n}s", "can i buy some {n}s", "i want {n}s", "please send me {n}s",
      "we're out of {n}s can you send more", "let me have some {n}s"],
     ["I'll place the order.", "Let me order that.", "I'm putting your order in.", "Let me send that."],
     ["count"], ["kind", "address", "color", "size", "day", "name"]),
    ("find", ["find", "locate", "nearest", "search_nearby", "list"],
     ["Finds where to get {a} in a city", "Places that have {a}", "The nearest branch with {a}"],
     ["where can i get {a}", "i'm looking for {a}", "is there a place for {a}", "find me {a}", "who has {a}"],
     ["Let me search for that.", "I'll find one for you.", "Let me look around there.", "I'm searching."],
     ["city"], ["kind", "size", "day"]),
    ("join", ["sign_up_for", "register_for", "enroll_in", "add_to", "join"],
     ["Signs somebody up for {a}", "Registers a person for {a}", "Puts a name on the list of {a}"],
     ["i want to sign up for {a}", "please register me for {a}", "can i join {a}", "enroll me in {a}",
      "put my name on the list for {a}"],
     ["I'll sign you up.", "Let me register you.", "Let me put you on the list.", "I'm adding your name."],
     ["name"], ["phone", "email", "day", "language", "kind"]),
    ("call", ["request_callback_about", "call_me_about", "have_expert_call_for", "phone_back_about"],
     ["Has somebody call back about {a}", "Asks for a call from an expert on {a}", "Callback about {a}"],
     ["can somebody call me back about {a}", "i want a call about my {n}", "have an expert phone me about the {n}",
      "please get someone to ring me about {a}"],
     ["I'll arrange the call.", "Let me find someone to call you.", "I'm noting the callback.", "Let me arrange that."],
     ["phone"], ["time", "day", "name", "language"]),
    ("extend", ["extend", "prolong", "renew", "lengthen", "keep_longer"],
     ["Makes {a} last longer", "Extends {a} by some days", "Renews {a}"],
     ["i need my {n} for longer", "can you extend my {n}", "please prolong the {n}", "i want to keep my {n} a bit more",
      "renew my {n}"],
     ["I'll extend it for you.", "Let me make it longer.", "I'm extending your {n}.", "Let me add the days."],
     ["id", "days"], ["channel"]),
    ("pay", ["pay_for", "charge", "pay_deposit_for", "settle", "pay_off"],
     ["Takes a payment for {a}", "Pays {a}", "Books a payment to {a}"],
     ["i want to pay for my {n}", "let me settle my {n}", "can i pay something for the {n}", "take a payment for my {n}"],
     ["I'll take the payment.", "Let me book that payment.", "I'm charging that now.", "Let me put the payment in."],
     ["id", "amount"], ["channel", "email"]),
    ("now", ["current", "live", "todays", "latest", "state_of"],
     ["How it is with {n}s today", "Tells about {n}s right now", "Today's news of {n}s", "Takes nothing, tells about {n}s"],
     ["how are the {n}s today", "anything new about the {n}s", "how busy are the {n}s right now",
      "what's going on with the {n}s today", "is there a wait for the {n}s at the moment", "tell me about today's {n}s"],
     ["Let me see how it is today.", "I'll look at that right now.", "Let me check the latest.", "I'm looking."],
     [], []),
    ("send", ["send_details_of", "mail", "resend", "email_copy_of", "forward"],
     ["Sends the papers of {a} by email", "Emails {a} again", "Sends a copy of {a}"],
     ["send me the papers of my {n}", "can you email me the {n}", "i never got anything about my {n} send it again",
      "i need a copy of my {n}"],
     ["I'll send that over.", "Let me email it to you.", "I'm sending it now.", "Let me get that out to you."],
     ["email"], ["id", "name", "language"]),
    ("note", ["update_contact_of", "change_address_of", "set_address_for", "new_address_for"],
     ["Changes the address of {a}", "Writes down a new address for {a}", "Where {a} goes to from now on"],
     ["i moved so change the address of my {n}", "my {n} should go somewhere else", "please update the address for the {n}"],
     ["I'll change the address.", "Let me update that.", "I'm writing down the new one.", "Let me note that."],
     ["address"], ["id", "day", "name"]),
]  # fmt: skip

# --- what tools return, and how that is said ---

# Keys, kind, and clauses that say the value.
FIELDS = [
    (["price", "cost", "total", "fee", "amount_due", "charge"], "money:5-900",
     ["it's {%}", "the price is {%}", "that's {%}", "you pay {%}", "it comes to {%}"]),
    (["reference", "code", "confirmation", "booking_code", "ref", "case"], "code:AA999",
     ["the code is {%}", "your reference is {%}", "it's under {%}", "you have number {%}"]),
    (["number", "ticket", "file_number", "receipt"], "digits:4-6",
     ["the number is {%}", "your number is {%}", "it has number {%}"]),
    (["time", "starts_at", "at", "from", "ready_at", "arrival_time"], "time:8-19",
     ["it's at {%}", "the time is {%}", "that will be at {%}", "please be there at {%}"]),
    (["day", "next_day", "expected_day", "weekday", "ready_on"], "weekday",
     ["it's on {%}", "that will be {%}", "you can count on {%}", "the day is {%}"]),
    (["date", "expected", "due", "valid_until", "scheduled_for"], "date",
     ["it's on {%}", "the date is {%}", "that will be {%}"]),
    (["staff", "agent", "with", "handled_by", "contact", "expert", "driver"], "first_name",
     ["{%} takes care of it", "{%} will help you", "it's with {%}", "you'll meet {%}"]),
    (["person", "manager", "assigned_to", "host"], "name", ["{%} is responsible", "it's with {%}", "{%} will do it"]),
    (["room", "desk", "counter", "gate", "floor"], "int:1-30", ["it's at {key} {%}", "please go to {key} {%}", "{key} {%}"]),
    (["minutes", "wait_minutes", "delay_minutes", "minutes_left"], "int:3-90",
     ["it takes {%} minutes", "that's {%} minutes", "you wait {%} minutes"]),
    (["left", "remaining", "in_stock", "free_places", "available_count"], "int:2-60",
     ["there are {%} left", "{%} are left", "we have {%}"]),
    (["city", "branch", "depot", "location"], "city", ["it's in {%}", "you'll find it in {%}", "that's in {%}"]),
    (["address", "place", "pickup_point"], "address", ["it's at {%}", "the address is {%}", "please come to {%}"]),
    (["points", "credits", "days_left", "people_ahead"], "int:2-99",
     ["you have {%} {key}", "the {key} are {%}", "that's {%} {key}"]),
]  # fmt: skip
# Things that a result may name, whatever they are.
ODD = (
    "locker shelf bay tank tray cabin tower lane wagon table section box line team group zone hangar track pier booth "
    "camera lamp key badge helmet bench stage unit dock route slot panel tag crate rack cart valve meter"
).split()
STATES = (
    "on its way|waiting for approval|in repair|packed|ready for pickup|delayed|in progress|being checked|almost done|paid|"
    "not started yet|on hold|shipped|active|expired|out for delivery|in the workshop|with the inspector|half finished|"
    "waiting for a part|confirmed|at customs|signed|in the archive|being cleaned|sorted out"
).split("|")
REASONS = (
    "fully booked|sold out|too late to change|not found|already closed|out of stock|no staff that day|not paid yet|"
    "already used|too many requests|bad weather|under maintenance|limit reached|not allowed for guests|expired|"
    "over the limit|wrong season|closed for a holiday|waiting for a signature|already done|too far away|no seats left|"
    "blocked by the bank|missing papers|not in this region|only for members"
).split("|")
DONE_WELL = {
    "book": ["booked", "reserved"], "cancel": ["cancelled", "called off"], "move": ["moved", "rescheduled"],
    "report": ["reported", "ticket opened"], "buy": ["ordered", "order placed"], "join": ["registered", "signed up"],
    "call": ["callback arranged", "callback planned"], "extend": ["extended", "renewed"], "pay": ["paid", "payment received"],
    "send": ["sent", "on its way"], "note": ["changed", "updated"],
}  # fmt: skip
OPENINGS = {
    "booked": "It's booked", "reserved": "It's reserved", "cancelled": "It's cancelled", "called off": "It's called off",
    "moved": "It's moved", "rescheduled": "It's rescheduled", "reported": "It's reported",
    "ticket opened": "The ticket is opened", "ordered": "It's ordered", "order placed": "The order is placed",
    "registered": "You're registered", "signed up": "You're signed up", "callback arranged": "The callback is arranged",
    "callback planned": "The callback is planned", "extended": "It's extended", "renewed": "It's renewed",
    "paid": "It's paid", "payment received": "The payment is received", "sent": "It's sent",
    "on its way": "It's on its way", "changed": "It's changed", "updated": "It's updated",
}  # fmt: skip

FACTS = [
    ("We are closed on {a}.", ["are you open on {a}", "can i come by on {a}"],
     ["We're closed on {a}, I'm afraid.", "No, we are closed on {a}."], "weekday"),
    ("Our office is at {a}.", ["where are you", "what's your address", "where do i find you"],
     ["Our office is at {a}.", "You'll find us at {a}."], "address"),
    ("We open at {a}.", ["when do you open", "from what time are you there"], ["We open at {a}.", "From {a} on."], "time:6-10"),
    ("We close at {a}.", ["how late are you open", "when do you close"], ["We close at {a}.", "Until {a}."], "time:16-21"),
    ("Parking is in front of the building.", ["where can i park", "is there parking"],
     ["You can park in front of the building.", "Parking is in front of the building."], None),
    ("We take cards only, no cash.", ["do you take cash", "is cash okay"], ["We take cards only, no cash.", "Cards only, no cash."], None),
    ("Dogs are welcome.", ["is my dog allowed in", "are dogs welcome"], ["Yes, dogs are welcome.", "Dogs are welcome."], None),
    ("Students get {a} percent off.", ["is there a student discount", "do students pay less"],
     ["Students get {a} percent off.", "Yes, {a} percent off for students."], "int:5-30"),
    ("Refunds take {a} days.", ["how long does a refund take", "when do i get my money back"],
     ["Refunds take {a} days.", "You have your money back within {a} days."], "int:3-14"),
    ("Nobody has to bring anything.", ["what should i bring", "do i need to bring something"],
     ["You don't have to bring anything.", "Nothing, nobody has to bring anything."], None),
    ("Children need an adult with them.", ["can my son come alone", "can kids come on their own"],
     ["Children need an adult with them.", "Only with an adult, children can't come alone."], None),
    ("Everything can be cancelled until the day before.", ["how late can i cancel", "until when is cancelling okay"],
     ["You can cancel until the day before.", "Until the day before."], None),
]  # fmt: skip
REFUSE = [
    ["tell me a joke", "write me a poem about the sea", "sing me a song"],
    ["who will win the election", "what do you think about politics"],
    ["can you book me a flight to the moon", "book me a table at a restaurant"],
    ["what's the capital of peru", "help my daughter with her maths"],
    ["i need medicine for my headache", "what should i take against a cold"],
    ["can you fix my laptop", "my phone is broken can you repair it"],
    ["which shares should i buy", "how do i get rich"],
    ["give me the number of your boss at home", "where does your colleague live"],
    ["translate this letter for me", "write an essay for my school"],
    ["call my mother for me", "wake me up tomorrow morning"],
]
REFUSED = [
    "I'm sorry, that's not something I can do. Can I help you with {a}?",
    "I'm afraid I can't help with that. Is it about {a}?",
    "That's outside of what I can do here, sorry.",
    "Sorry, I can only help with what we do here.",
]


def snake(text):
    return text.replace(" ", "_")


def article(noun):
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


class Made:
    """A business while it is being made up."""

    def __init__(self, rng: random.Random):
        self.rng = rng
        self.business, things, kinds = rng.choice(LINES)
        self.things = things.split(", ")
        self.things += rng.sample(COMMON, rng.randint(1, 3))
        self.kinds = kinds
        self.taken, self.fresh = set(), 0

    def some(self, options, count):
        return self.rng.sample(options, min(count, len(options)))

    def value(self) -> str:
        """A name for a value of a result."""
        self.fresh += 1
        return f"x{self.fresh}"

    # --- arguments ---

    def param(self, what, thing, optional) -> Param:
        keys = [key.format(n=snake(thing)) for key in KEYS[what]]
        free = [key for key in keys if key not in self.taken] or [f"{snake(thing)}_{what}_{len(self.taken)}"]
        first = self.rng.choice(free)
        self.taken.add(first)
        others = [key for key in keys if key not in self.taken]
        about = [text.format(n=thing) for text in ABOUT[what]]
        ask = [text.format(n=thing) for text in ASK.get(what, ASK["kind"])]
        return Param([first, *self.some(others, 3)], self.kind(what), about, optional, self.some(ask, 4))

    def kind(self, what):
        if what == "id":
            return self.rng.choice(IDS)
        if what == "day":
            return self.rng.choice(["weekday", "date"])
        if what == "count":
            return self.rng.choice(["int:2-9", "int:2-20", "int:2-60"])
        if what == "kind":
            return f"enum:{self.kinds}"
        return KIND[what]

    def said(self, what, name, thing):
        """A few words with a value."""
        if what == "kind":
            ways = ["{%}", "the {%} one", "the {%} kind", "{%} please", f"{{%}} as the type of {thing}"]
        elif what == "count":
            ways = ["{%} of them", "for {%}", "{%} in all", "{%} please", f"{{%}} {thing}s"]
        else:
            ways = SAID[what]
        return self.rng.choice(ways).replace("%", name)

    def utterance(self, core, named, thing):
        """A request with what the caller says of it, in any order; `named` are the parameters by what they are."""
        pieces = [self.said(what, name, thing) for what, name in named]
        self.rng.shuffle(pieces)
        way = self.rng.random()
        if pieces and way < 0.15:
            return f"{pieces[0]} {core} {' '.join(pieces[1:])}".strip()
        if len(pieces) > 1 and way < 0.4:
            return f"{core} {' '.join(pieces[:-1])} and {pieces[-1]}"
        return f"{core} {' '.join(pieces)}".strip()

    # --- tools ---

    def tool(self, action, thing) -> tuple:
        """A tool, and its parameters as `(what, name, optional)`."""
        _, verbs, about, cores, filler, needs, may = action
        noun = snake(thing)
        needed = list(needs)
        for what in may:
            if what != "phone" and self.rng.random() < 0.2:
                needed.append(what)
        extra = [what for what in may if what not in needed and what in SAID]
        extra = self.some(extra, self.rng.choice([0, 0, 1, 1, 2]))
        params = [self.param(what, thing, False) for what in needed] + [self.param(what, thing, True) for what in extra]
        listed = [(what, param.name, param.optional) for what, param in zip([*needed, *extra], params, strict=True)]
        places = {"n": thing, "a": article(thing)}
        cores = [core.format(**places) for core in cores]
        required = [(what, name) for what, name, optional in listed if not optional]
        optional = [(what, name) for what, name, optional in listed if optional]
        users, partial = [], []
        for core in self.some(cores, 6):
            users.append(self.utterance(core, required, thing))
        for _ in range(2 if optional else 0):
            named = required + self.some(optional, self.rng.randint(1, len(optional)))
            users.append(self.utterance(self.rng.choice(cores), named, thing))
        if required:
            for core in self.some(cores, 4):
                kept = self.some(required, self.rng.randrange(len(required)))
                partial.append(self.utterance(core, kept, thing))
        names = [self.name(verb, noun) for verb in self.some(verbs, 4)]
        made = Tool(
            names=list(dict.fromkeys(names)),
            about=[text.format(**places) for text in about],
            users=users,
            filler=[text.format(**places) for text in filler],
            outcome=[self.outcome(action[0], thing) for _ in range(3)],
            partial=partial,
            param=params,
        )
        return made, listed

    def name(self, verb, noun):
        way = self.rng.random()
        if way < 0.15:
            return f"{noun}_{verb}"
        if way < 0.3:
            first, *rest = f"{verb}_{noun}".split("_")
            return first + "".join(word.capitalize() for word in rest)
        return f"{verb}_{noun}"

    # --- results ---

    def clauses(self, count, taken=()):
        """Fields of a result, none named as one that is taken, and for each the ways to say it."""
        fields, said = {}, []
        for keys, kind, ways in self.some(FIELDS, count):
            key, name = self.rng.choice(keys), self.value()
            if self.rng.random() < 0.25:
                key = self.rng.choice(ODD)
                kind = self.rng.choice(["code:A9", "code:A99", "int:1-40", "digits:2-4", "code:AA9"])
                ways = ["the {key} is {%}", "it's {key} {%}", "you have {key} {%}", "{key} {%}"]
            if key in fields or key in taken:
                continue
            fields[key] = f"{{{name}={kind}}}"
            said.append([way.replace("{key}", key.replace("_", " ")).replace("%", name) for way in ways])
        return fields, said

    def joined(self, clauses):
        """Clauses as one or two sentences."""
        way = self.rng.random()
        if len(clauses) == 1:
            text = clauses[0]
        elif len(clauses) == 2:
            text = f"{clauses[0]}{' and ' if way < 0.6 else ', and ' if way < 0.8 else '. '}{clauses[1]}"
        else:
            text = f"{', '.join(clauses[:-1])}{' and ' if way < 0.3 else ', and ' if way < 0.7 else '. '}{clauses[-1]}"
        return ". ".join(capital(part) for part in text.split(". ")) + "."

    def outcome(self, action, thing) -> Outcome:
        rng = self.rng
        way = rng.random()
        if way < 0.2:
            return self.refusal(thing)
        if action in ("status", "now") and way < 0.55:
            state = rng.choice(STATES)
            fields, said = self.clauses(rng.randint(0, 2))
            key = rng.choice(["status", "state", "stage", "progress"])
            key = "status" if key in fields else key
            heads = [f"your {thing} is {state}", f"it's {state}", f"the {thing} is {state}"]
            answers = [self.joined([rng.choice(heads), *(rng.choice(ways) for ways in said)]) for _ in range(3)]
            return Outcome(self.mixed({key: state}, fields), answers, [state])
        fields, said = self.clauses(rng.choice([1, 2, 2, 3]))
        head, opening = {}, None
        if action in DONE_WELL and rng.random() < 0.7:
            state = rng.choice(DONE_WELL[action])
            opening = OPENINGS[state]
            head = rng.choice([{"status": state}, {"result": state}, {"ok": True}, {"success": True}])
        answers = []
        for _ in range(3):
            clauses = [rng.choice(ways) for ways in said]
            if rng.random() < 0.5:
                rng.shuffle(clauses)
            answers.append(self.joined([opening, *clauses] if opening and rng.random() < 0.7 else clauses))
        return Outcome(self.mixed(head, fields), answers)

    def refusal(self, thing) -> Outcome:
        """What could not be done, and why; now and then with what could be done instead."""
        rng = self.rng
        reason = rng.choice(REASONS)
        head = rng.choice([{"error": reason}, {"status": "failed", "reason": reason}, {"ok": False, "reason": reason},
                           {"success": False, "message": reason}, {"available": False, "note": reason}])  # fmt: skip
        answers = [f"I'm sorry, that didn't work: {reason}", f"That can't be done, I'm afraid, it says {reason}",
                   f"I couldn't do that because of this: {reason}", f"I'm sorry about the {thing}, it says {reason}"]  # fmt: skip
        if rng.random() < 0.4:
            name = self.value()
            key = rng.choice(["next", "next_free", "alternative", "instead", "other_option"])
            kind = rng.choice(["weekday", "date", "time:8-19", "city"])
            head = {**head, key: f"{{{name}={kind}}}"}
            offers = [f"The next one would be {{{name}}}.", f"There is {{{name}}} instead.", f"What about {{{name}}}?"]
            answers = [f"{answer}. {rng.choice(offers)}" for answer in answers]
        else:
            answers = [f"{answer}." for answer in answers]
        return Outcome(head, self.some(answers, 3), [reason])

    def mixed(self, head, fields):
        """A result with its fields in some order, flat or one in another."""
        items = [*head.items(), *fields.items()]
        if self.rng.random() < 0.3:
            self.rng.shuffle(items)
        if fields and self.rng.random() < 0.12:
            return {**head, self.rng.choice(["details", "data", "info"]): fields}
        return dict(items)

    # --- chains ---

    def chain(self, tools) -> list:
        """Requests of two steps: the second takes a number that the first brings."""
        rng, made = self.rng, []
        for second, second_listed, thing, second_cores, _ in tools:
            if ("id", False) not in {(what, optional) for what, _, optional in second_listed}:
                continue
            for first, first_listed, first_thing, first_cores, _ in tools:
                if first is second or rng.random() < 0.4:
                    continue
                needs = [(what, name) for what, name, optional in second_listed if not optional and what != "id"]
                given = [(what, name) for what, name, optional in first_listed if not optional]
                users = []
                for _ in range(3):
                    joint = rng.choice([" and then ", " and after that ", " then ", " and once you have it "])
                    head = self.utterance(rng.choice(first_cores), given, first_thing)
                    users.append(head + joint + self.utterance(rng.choice(second_cores), needs, thing))
                ident = next(name for what, name, o in second_listed if what == "id" and not o)
                kind = next(param.kind for param in second.param if param.name == ident)
                key = rng.choice([ident, "reference", "number", "id", "code"])
                filler = ["Now I'll do the second part.", "That's done, now the next step.", "Got it, now the rest.",
                          "I have it, let me go on.", *(f"Now {text[0].lower()}{text[1:]}" for text in second.filler
                                                        if text.startswith("Let me"))]  # fmt: skip
                made.append(self.two_steps(users, first.name, second.name, ident, key, kind, filler))
                if len(made) == 2:
                    return made
        return made

    def two_steps(self, users, first, second, ident, key, kind, filler) -> Chain:
        """A chain whose first call brings `key`, which the second takes as `ident`, with the filler said between them."""
        rng, ref = self.rng, self.value()
        more, said = self.clauses(rng.randint(0, 1), [key])
        last, said_last = self.clauses(rng.randint(1, 2))
        of_first = [f"it's {{{ref}}}", f"I found {{{ref}}}", f"that's {{{ref}}}"]
        if kind.partition(":")[0] in ("digits", "code"):
            of_first = [f"the number is {{{ref}}}", f"you have number {{{ref}}}", f"it's under {{{ref}}}"]
        answers = [
            self.joined([rng.choice(of_first), *(rng.choice(ways) for ways in [*said, *said_last])]) for _ in range(3)
        ]
        result = self.mixed({key: f"{{{ref}={kind}}}"}, more)
        steps = [Step(first, result), Step(second, self.mixed({}, last), {ident: f"{{{ref}}}"}, filler)]
        return Chain(users, steps, answers)

    def small_talk(self, thing):
        """What is asked that no tool answers: facts of the instructions, and what is refused."""
        facts = []
        for fact, users, answers, kind in self.some(FACTS, 4):
            a = draw(self.rng, kind, datetime.date(2026, 1, 1)).told if kind else ""
            facts.append(Said([u.format(a=a.lower()) for u in users], [t.format(a=a) for t in answers], fact.format(a=a)))
        about = [text.format(a=article(thing)) for text in REFUSED]
        return facts, [Said(users, self.some(about, 3)) for users in self.some(REFUSE, 4)]

    # --- the whole ---

    def make(self) -> Domain:
        rng = self.rng
        count = rng.randint(3, 6)
        made, seen = [], set()
        while len(made) < count:
            # Tools that differ in one of the two only: what is done, or with what.
            action, thing = rng.choice(DONE), rng.choice(self.things)
            if made and rng.random() < 0.35:
                thing = rng.choice(made)[2]
            elif made and rng.random() < 0.25:
                like = rng.choice(made)[4]
                action = next(done for done in DONE if done[0] == like)
            if (action[0], thing) in seen:
                continue
            seen.add((action[0], thing))
            tool, listed = self.tool(action, thing)
            cores = [core.format(n=thing, a=article(thing)) for core in action[3]]
            made.append((tool, listed, thing, cores, action[0]))
        facts, refuse = self.small_talk(self.things[0])
        label = f"{rng.choice(NAMES)} {' '.join(word.capitalize() for word in self.business.split())}"
        return Domain(
            name="invented",
            business=[label, f"{article(self.business)} called {rng.choice(NAMES)}", article(self.business)],
            tool=[tool for tool, *_ in made],
            facts=facts,
            refuse=refuse,
            chain=self.chain(made),
        )


def capital(text):
    """A sentence with its first letter as a capital, unless a place comes first."""
    return text[:1].upper() + text[1:]


def invent(rng: random.Random) -> Domain:
    """A domain that nobody wrote."""
    return Made(rng).make()
