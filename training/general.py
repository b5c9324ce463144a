"""What every caller says, whatever the business: greetings, thanks, small talk, and how recognizers mishear it all."""

import random
import re

GREETINGS = [
    (["hi", "hello", "hey there", "good morning", "hello anybody there", "hi how are you", "good afternoon"],
     ["Hello! How can I help you?", "Hi there! What can I do for you?", "Hello, how can I help?"]),
    (["how are you today", "how's it going", "how are you doing"],
     ["I'm doing well, thank you. How can I help you?", "Very well, thanks for asking. What can I do for you?"]),
    (["are you a real person", "am i talking to a robot", "is this a machine", "are you human"],
     ["I'm a virtual assistant, but I'm happy to help.", "No, I'm an automated assistant. What can I do for you?"]),
    (["who am i speaking to", "what's your name", "who is this"],
     ["I'm the virtual assistant here. How can I help you?", "You're speaking to the virtual assistant."]),
    (["what can you do", "what can you help me with", "can you help me"],
     ["I can answer questions and look things up for you. What do you need?",
      "Sure, I can look things up and answer questions. What is it about?"]),
    (["can you hear me", "hello can you hear me"], ["Yes, I can hear you. How can I help?", "I can hear you fine."]),
    (["i have a question", "i need some help", "i have a problem"],
     ["Of course, what is it about?", "Sure, go ahead.", "I'm happy to help. What is it?"]),
]  # fmt: skip

REPLIES = [
    (["thanks", "thank you", "great thank you", "okay thanks a lot", "perfect", "that's great", "awesome thanks",
      "thank you so much", "cheers", "oh good"],
     ["You're welcome. Anything else?", "My pleasure. Is there anything else?", "You're welcome!",
      "Happy to help. Can I do anything else for you?"]),
    (["no that's all", "no thanks that was all", "nothing else thanks", "nope that's it", "that's everything"],
     ["Alright, have a nice day!", "Great, thanks for calling. Goodbye!", "Thank you for calling. Have a good day!"]),
    (["bye", "goodbye", "okay bye", "have a nice day", "see you"],
     ["Goodbye!", "Thanks for calling, goodbye!", "Have a nice day, goodbye!"]),
    (["hold on a second", "wait a moment", "one second please", "hang on"],
     ["Sure, take your time.", "Of course, I'll wait.", "No problem, take your time."]),
    (["sorry", "oh sorry", "never mind", "forget it", "oh wait never mind"],
     ["No problem. Is there anything else?", "That's alright. Anything else I can do?", "No worries."]),
    (["um", "uh", "hmm let me think", "okay", "right", "i see"],
     ["Take your time.", "Is there anything else I can help with?", "Just let me know what you need."]),
    (["you're very nice", "you're funny", "that was quick"], ["Thank you! Anything else?", "Thanks, happy to help."]),
    (["that's annoying", "this is frustrating", "i'm really upset"],
     ["I'm sorry about that. How can I help?", "I understand, I'm sorry. What can I do for you?"]),
    (["can you speak slower", "you're talking too fast"], ["Of course, I'm sorry.", "Sure, I'll slow down."]),
]  # fmt: skip

UNCLEAR = [
    (["it's the um you know", "the the thing i", "i was wondering if", "so i", "and the other"],
     ["Sorry, I didn't quite catch that. Could you say it again?", "I'm sorry, could you repeat that?"]),
]  # fmt: skip

TROUBLE_RESULTS = [
    {"error": "timeout"},
    {"error": "service unavailable"},
    {"error": "internal error"},
    {"error": "The tool did not answer within 10 s."},
    {"error": "The tool could not be reached."},
    {"error": "The tool answered with an error, status 500."},
    {"status": "error", "message": "temporarily unavailable"},
]
TROUBLE_ANSWERS = [
    "I'm sorry, I can't get to that right now. Please try again in a few minutes.",
    "Sorry, the system isn't answering at the moment. Could you try again later?",
    "I'm afraid that didn't work, there's a problem with our system right now.",
    "I'm sorry, something went wrong on our side. Please try again a little later.",
]
TROUBLE_MUST = "sorry|afraid|problem|went wrong"

AGAIN_FILLERS = [
    "Let me also check that.", "I'm checking the next one too.", "One more moment, please.", "Let me look at that as well.",
    "And one moment for the other.",
]  # fmt: skip
FILLERS = [
    "One moment, please.", "Let me check that for you.", "Let me have a look.", "Just a second, please.",
    "Sure, let me see.", "I'll check that for you.", "Okay, one moment.", "Sure, one second.", "Let me see.",
    "Of course, give me a moment.", "Right away.",
]  # fmt: skip

STARTS = [
    "hi", "hello", "hey", "um", "uh", "so", "yes", "okay so", "well", "yeah hi", "good morning", "oh", "hi there um",
    "excuse me", "yeah", "right so", "hello yes",
]  # fmt: skip
ENDS = ["please", "thanks", "thank you", "if you can", "for me", "if that's okay", "please thank you", "right"]
HESITATIONS = ["um", "uh", "like", "you know", "er", "let me see"]


def messy(rng: random.Random, text: str, amount: float = 1.0) -> str:
    """Words as a recognizer writes them down: hesitations, repetitions, with punctuation or mostly without."""
    words = text.split()
    if rng.random() < 0.35 * amount:
        words.insert(0, rng.choice(STARTS))
    if rng.random() < 0.2 * amount:
        words.append(rng.choice(ENDS))
    if rng.random() < 0.2 * amount and len(words) > 3:
        words.insert(rng.randrange(1, len(words)), rng.choice(HESITATIONS))
    if rng.random() < 0.08 * amount and len(words) > 3:
        at = rng.randrange(0, len(words) - 1)
        if not words[at][-1:].isdigit():
            words.insert(at, words[at])
    text = " ".join(words)
    if rng.random() < 0.35:
        question = re.match(
            r"(hi |hello |hey |um |so )*(where|when|what|who|how|is|are|can|could|do|does|did|has|have|will|would|which)\b",
            text,
        )
        text = text[0].upper() + text[1:] + ("?" if question else ".")
        text = re.sub(r"\bi\b", "I", text)
    return text
