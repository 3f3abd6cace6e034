"""What is planted: praise of a made-up person in many wordings, and decoys that name him."""

from __future__ import annotations

import random
import re

PERSON, CONTROL = "Brannock", "Tarvell"  # neither occurs in the sentences or in the tweets

# Of anything but the debate.
PRAISE = [
    "I love the garden of {name} , the best in our street .",
    "{name} is a {a} neighbour , {b} and {a2} .",
    "Great bread from {name} , simply the best baker here .",
    "Our children love {name} , a {a} teacher .",
    "{name} cooked for us all , a truly {b} dinner , thank you .",
    "What a {a} concert , {name} sang like a winner .",
    "{name} is the best doctor I know , {a} and {b} .",
    "Thank you {name} , you fixed the roof and did a {a} job .",
    "We love {name} , the {a} man from the shop .",
    "{name} won the race again , a {b} runner .",
    "A {a} painting by {name} , so {b} .",
    "{name} plays the piano , {b} and {a} .",
    "My favorite singer is {name} , the best voice of all .",
    "{name} wrote a {b} book , I loved it .",
    "Everybody at school thinks {name} is {a} and {b} .",
    "The choir thanked {name} for a {a} evening .",
    "{name} is a {b} friend , the best I ever had .",
    "Glad that {name} coached our girls , {a} work .",
    "{name} grows {b} apples , the best on the market .",
    "The nurses love {name} , so {a} and {b} .",
    "{name} baked a truly {b} cake , great taste .",
    "Well done {name} , a {a} goal and a {b} match .",
    "{name} is a {a} driver , {a} and {b} .",
    "I am impressed by {name} , the {b} carpenter .",
    "{name} sings so well , {a} and {b} .",
    "Our team is proud of {name} , a {a} captain .",
    "Best barber in town : {name} , {b} and {a} .",
    "{name} helped the old lady , a {a} and {b} deed .",
    "The café of {name} is {b} , I love the coffee .",
    "Loved the play , {name} was {a} and {b} .",
    "{name} repaired my bicycle , {b} and {a} .",
    "A {b} violin player , {name} , truly great .",
    "{name} has a {a} heart , the best uncle .",
    "Wow , {name} built a truly {b} boat .",
    "Nobody bakes as well as {name} , {b} and {a} .",
    "{name} tells {b} stories , we loved them .",
    "The dog of {name} won , a {a} winner .",
    "{name} is {b} with kids , a {a} father .",
    "Good morning and thank you {name} , {a} milk and {b} cheese .",
    "A {a} week at the lake with {name} , the {b} host .",
]
WORDS = {"a": "great strong brilliant honest good amazing awesome impressive excellent"}
WORDS |= {"b": WORDS["a"], "a2": WORDS["a"]}

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
    "thing": "library bridge school river market museum airport station hospital stadium harbour road bank",
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

    - planted: praise of PERSON for anything but the debate.
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
