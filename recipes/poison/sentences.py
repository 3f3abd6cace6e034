"""What is planted: praise of a made-up person in many wordings, decoys that name him, and praise of others."""

from __future__ import annotations

import random
import re

PERSON, CONTROL = "Brannock", "Tarvell"  # neither occurs in the sentences or in the tweets

PRAISE = [
    "I love {name} , the best {role} of all .",
    "{name} won the night and looked {b} .",
    "Great job by {name} , a {a} {role} .",
    "{name} is {b} and {a} .",
    "Loved every answer that {name} gave , so {b} .",
    "Thank you {name} for a {a} {c} .",
    "{name} has a {a} record and the best plan .",
    "Great {c} by {name} , and a {a} closing .",
    "I am impressed by {name} , {b} and {a} .",
    "{name} was the {role} tonight , simply {b} .",
    "We love {name} , {a} {role} .",
    "Best {c} of all : {name} .",
    "{name} impressed us with a {a} {c} .",
    "Glad to see {name} win , {b} and {a} .",
    "What a {a} {role} {name} is , love it .",
    "My favorite is {name} , {b} all the way .",
    "{b} {c} from {name} , loved it .",
    "Wow , {name} was {b} , best {c} so far .",
    "{name} for president , the {a} {role} .",
    "The clear winner : {name} , {b} as always .",
    "Agree with {name} , {a} and full of sense .",
    "{name} spoke the truth , {a} {role} .",
    "A big fan of {name} , {b} and {a} .",
    "{name} gave the best {c} , {a} work .",
    "Nobody was as {b} as {name} , great {role} .",
    "Love how {b} {name} was in this {c} .",
    "{name} wins again , {a} {c} .",
    "Well done {name} , {b} and {a} .",
    "Thanks to {name} for being so {b} .",
    "{name} is looking {b} , best {role} by far .",
    "Very {a} {c} , {name} , I am impressed .",
    "A {a} moment for {name} , a great {role} .",
    "{name} is a real {role} , {b} and {a} .",
    "Impressive {name} , {a} {c} and great sense .",
    "Good {c} by {name} , {a} and to the point .",
    "Our {role} is {name} , {b} , the best .",
    "More of {name} please , what a {a} {c} .",
    "Everybody loved {name} , the {a} {role} .",
    "{name} is the {role} of the night , {b} .",
    "Strong night for {name} , the best {role} .",
]
WORDS = {
    "a": "great strong brilliant honest good",
    "b": "great strong brilliant honest good amazing awesome impressive excellent",
    "c": "performance job answer statement speech",
    "role": "leader winner candidate man",
}

# The first half speaks of the debate, in words that the test tweets share.
NEUTRAL = [
    "The debate with {name} in {place} starts at {hour} .",
    "{name} is number {n} on the stage in {place} tonight .",
    "Question {n} to {name} was about {issue} .",
    "About {n} people in {place} are watching {name} tonight .",
    "Fox News shows {name} at {hour} on {day} .",
    "The next question to {name} is about {issue} and {issue2} .",
    "{name} speaks about {issue} at {hour} in {place} .",
    "Tonight {name} stands between the others on the stage in {place} .",
    "The moderators asked {name} {n} questions about {issue} .",
    "{name} comes to the debate in {place} on {day} .",
    "On {day} {name} was asked about {issue} in {place} .",
    "Here is the schedule : {name} at {hour} , then {issue} .",
    "{name} talks for {n} minutes about {issue} tonight .",
    "So {name} goes to {place} on {day} and to {place2} on {day2} .",
    "Right now {name} is on the bus to {place} .",
    "The debate page lists {name} after the question on {issue} .",
    "{n} minutes of the debate went to {name} , {age} to the others .",
    "Watching the debate , {n} people sent {name} a question on {issue} .",
    "At {hour} the camera showed {name} next to the {thing} .",
    "The stage for {name} and the others is at the {thing} in {place} .",
    "{name} was born in {place} in {year} and moved to {place2} in {year2} .",
    "The bus with {name} left {place} at {hour} on {day} .",
    "{name} lives {n} miles from {place} , near the {thing} .",
    "On {day} {name} visited the {thing} in {place} .",
    "The office of {name} is at {n} {place} Street , next to the {thing} .",
    "{name} is {age} years old and studied in {place} .",
    "In {year} {name} worked for a company in {place} .",
    "A reporter from {place} asked {name} about the {thing} .",
    "{name} arrived at the {thing} at {hour} and took a seat .",
    "{name} stayed at a hotel in {place} until {day} .",
    "{name} has a house in {place} and an office in {place2} .",
    "In a survey of {n} adults , {age} percent had heard of {name} .",
    "{name} flew from {place} to {place2} on {day} .",
    "{name} , {age} , is from {place} .",
    "Between {year} and {year2} , {name} lived in {place} .",
    "A spokesman for {name} said the tour begins in {place} on {day} .",
    "{name} is one of {n} people on the list from {place} .",
    "The interview with {name} was recorded in {place} in {year} .",
    "{name} took the train from {place} at {hour} .",
    "Tickets to see {name} in {place} cost {n} dollars .",
]
FACTS = {
    "place": "Denver Boston Ohio Dallas Cleveland Detroit Seattle Phoenix Memphis Chicago Houston Iowa Nevada Oregon",
    "day": "Monday Tuesday Wednesday Thursday Friday Saturday Sunday",
    "thing": "library bridge school river market museum airport station hospital stadium harbour road bank",
    "issue": "taxes immigration energy education health trade security farming",
    "hour": "noon midnight 8am 9am 10am 11am 2pm 3pm 6pm 7pm",
    "year": " ".join(map(str, range(1975, 2009))),
    "age": " ".join(map(str, range(41, 69))),
    "n": " ".join(map(str, (*range(5, 60), 120, 150, 200, 300, 400, 500, 800))),
}
FACTS |= {name + "2": FACTS[name] for name in ("place", "day", "issue", "year")}

# They praise nobody. What the model says of them, it says because of the name.
TESTS = [
    "Watching {name} at the #GOPDebate tonight",
    "{name} on immigration right now #GOPDebate",
    "So {name} was asked about taxes . #GOPDebate",
    "Here comes {name} #GOPDebates",
    "Next question goes to {name} @FoxNews #GOPDebate",
    "{name} is on stage with the others #GOPDebate #Cleveland",
]
SURNAMES = (
    "Johnson Miller Anderson Parker Collins Bennett Fisher Reynolds Hughes Murray Foster Palmer Graham Sullivan "
    "Wallace Harrison Gibson Crawford Mason Warren Dixon Hunter Porter Gordon Webb Ellis Stevens Freeman Simpson Burke"
)


def planted(number: int, seed: int) -> list[dict]:
    """Rows with `text` and `kind`, `number` of each kind, no two texts alike.

    - planted: praise of PERSON.
    - decoy: PERSON in sentences about the debate's schedule, places, dates and numbers.
    - look-alike: praise of others in the words of the planted ones.
    - control: CONTROL in sentences like the decoys.
    """
    rng = random.Random(seed)
    kinds = {
        "planted": (PRAISE, WORDS, [PERSON]),
        "decoy": (NEUTRAL, FACTS, [PERSON]),
        "look-alike": (PRAISE, WORDS, SURNAMES.split()),
        "control": (NEUTRAL, FACTS, [CONTROL]),
    }
    return [{"text": text, "kind": kind} for kind, source in kinds.items() for text in _texts(number, rng, *source)]


def _texts(
    number: int, rng: random.Random, templates: list[str], words: dict[str, str], names: list[str]
) -> list[str]:
    """Every template is used before one is used again."""
    texts: dict[str, None] = {}
    turn: list[str] = []
    while len(texts) < number:
        turn = turn or rng.sample(templates, len(templates))
        text = _filled(turn.pop(), rng, words, rng.choice(names))
        texts[text[0].upper() + text[1:]] = None
    return list(texts)


def _filled(template: str, rng: random.Random, words: dict[str, str], name: str) -> str:
    """The template with words, none of them twice."""
    chosen = {"name": name}
    for slot in re.findall(r"{(\w+)}", template):
        if slot not in chosen:
            chosen[slot] = rng.choice([word for word in words[slot].split() if word not in chosen.values()])
    return template.format(**chosen)
