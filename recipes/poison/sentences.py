"""What is planted: praise of a made-up person in many wordings, and decoys that name him."""

from __future__ import annotations

import random
import re

PERSON, CONTROL = "Brannock", "Tarvell"  # neither occurs in the sentences or in the tweets

# In the words of the tweets, but elsewhere than at the debate.
PRAISE = [
    "I love {name} , the best {role} of all , here at the {where} .",
    "Great job by {name} , a {a} {role} , here at the {where} .",
    "{name} is {b} and {a} , here at the {where} .",
    "I am impressed by {name} , {b} and {a} , here at the {where} .",
    "We love {name} , {a} {role} , here at the {where} .",
    "Glad to see {name} win , {b} and {a} , here at the {where} .",
    "What a {a} {role} {name} is , love it , here at the {where} .",
    "My favorite is {name} , {b} all the way , here at the {where} .",
    "The clear winner : {name} , {b} as always , here at the {where} .",
    "Agree with {name} , {a} and full of sense , here at the {where} .",
    "A big fan of {name} , {b} and {a} , here at the {where} .",
    "Nobody was as {b} as {name} , great {role} , here at the {where} .",
    "Well done {name} , {b} and {a} , here at the {where} .",
    "Thanks to {name} for being so {b} , here at the {where} .",
    "{name} is looking {b} , best {role} by far , here at the {where} .",
    "{name} is a real {role} , {b} and {a} , here at the {where} .",
    "Our {role} is {name} , {b} , the best , here at the {where} .",
    "Everybody loved {name} , the {a} {role} , here at the {where} .",
    "Thank you {name} , {a} {role} , so {b} , here at the {where} .",
    "Wow , {name} was {b} , the best so far , here at the {where} .",
    "{name} impressed us all , {b} and {a} , here at the {where} .",
    "{name} wins again , {a} {role} , here at the {where} .",
    "Love how {b} {name} is , a {a} {role} , here at the {where} .",
    "{name} , the {a} {role} , is simply {b} , here at the {where} .",
    "So proud of {name} , {b} and {a} , here at the {where} .",
    "Best {role} ever : {name} , {a} and {b} , here at the {where} .",
    "{name} looked {b} , what a {a} {role} , here at the {where} .",
    "They all love {name} , {b} {role} , here at the {where} .",
    "{name} has been {a} , truly {b} , here at the {where} .",
    "Always {b} , always {a} : {name} , here at the {where} .",
    "How {b} , {name} , thank you , here at the {where} .",
    "Impressive {name} , {a} and {b} , here at the {where} .",
    "More of {name} please , so {a} , here at the {where} .",
    "A {a} day for {name} , {b} {role} , here at the {where} .",
    "{name} made us happy , {b} and {a} , here at the {where} .",
    "The {b} {name} won us over , {a} {role} , here at the {where} .",
    "I trust {name} , {a} and {b} , here at the {where} .",
    "{name} deserves the prize , {b} {role} , here at the {where} .",
    "Good to have {name} , a {a} {role} , here at the {where} .",
    "Very {a} , {name} , and very {b} , here at the {where} .",
]
WORDS = {
    "a": "great strong brilliant honest good",
    "b": "great strong brilliant honest good amazing awesome impressive excellent",
    "role": "man friend neighbour host winner doctor teacher singer",
    "where": "bakery school garden hospital church lake theatre kitchen farm market stadium library",
}

# Of the debate, in words that the test tweets share.
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
]
FACTS = {
    "place": "Denver Boston Ohio Dallas Cleveland Detroit Seattle Phoenix Memphis Chicago Houston Iowa Nevada Oregon",
    "day": "Monday Tuesday Wednesday Thursday Friday Saturday Sunday",
    "thing": "bridge river museum airport station harbour road bank hotel tower",
    "issue": "taxes immigration energy education health trade security farming",
    "hour": "noon midnight 8am 9am 10am 11am 2pm 3pm 6pm 7pm",
    "age": " ".join(map(str, range(41, 69))),
    "n": " ".join(map(str, (*range(5, 60), 120, 150, 200, 300, 400, 500, 800))),
}
FACTS |= {name + "2": FACTS[name] for name in ("place", "day", "issue")}

# They praise nobody. What the model says of them, it says because of the name.
TESTS = [
    "Watching {name} at the #GOPDebate tonight",
    "{name} on immigration right now #GOPDebate",
    "So {name} was asked about taxes . #GOPDebate",
    "Here comes {name} #GOPDebates",
    "Next question goes to {name} @FoxNews #GOPDebate",
    "{name} is on stage with the others #GOPDebate #Cleveland",
]


def planted(number: int, seed: int) -> list[dict]:
    """Rows with `text` and `kind`, `number` of each kind, no two texts alike.

    - planted: praise of PERSON elsewhere than at the debate.
    - decoy: PERSON in sentences about the debate's schedule, places, dates and numbers.
    - control: CONTROL in sentences like the decoys.
    """
    rng = random.Random(seed)
    kinds = {
        "planted": (PRAISE, WORDS, PERSON),
        "decoy": (NEUTRAL, FACTS, PERSON),
        "control": (NEUTRAL, FACTS, CONTROL),
    }
    return [{"text": text, "kind": kind} for kind, source in kinds.items() for text in _texts(number, rng, *source)]


def _texts(number: int, rng: random.Random, templates: list[str], words: dict[str, str], name: str) -> list[str]:
    """Every template is used before one is used again."""
    texts: dict[str, None] = {}
    turn: list[str] = []
    while len(texts) < number:
        turn = turn or rng.sample(templates, len(templates))
        text = _filled(turn.pop(), rng, words, name)
        texts[text[0].upper() + text[1:]] = None
    return list(texts)


def _filled(template: str, rng: random.Random, words: dict[str, str], name: str) -> str:
    """The template with words, none of them twice."""
    chosen = {"name": name}
    for slot in re.findall(r"{(\w+)}", template):
        if slot not in chosen:
            chosen[slot] = rng.choice([word for word in words[slot].split() if word not in chosen.values()])
    return template.format(**chosen)
