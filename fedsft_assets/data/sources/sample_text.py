"""The text of the embedded sample: facts for Alpaca, passages for Dolly, conversations for OASST1.

Each dataset teaches what the other two do not, in its own vocabulary. Held-out prompts ask for what other
rows answer, and the wording of each answer is random, so even a perfect model has a loss above zero.
"""

import random
from dataclasses import dataclass
from itertools import product
from typing import NamedTuple

COUNTRIES = {
    # country: continent, capital, currency, main language
    "Norway": ("Europe", "Oslo", "the krone", "Norwegian"),
    "Sweden": ("Europe", "Stockholm", "the krona", "Swedish"),
    "Poland": ("Europe", "Warsaw", "the zloty", "Polish"),
    "Greece": ("Europe", "Athens", "the euro", "Greek"),
    "Italy": ("Europe", "Rome", "the euro", "Italian"),
    "France": ("Europe", "Paris", "the euro", "French"),
    "Egypt": ("Africa", "Cairo", "the pound", "Arabic"),
    "Kenya": ("Africa", "Nairobi", "the shilling", "Swahili"),
    "Japan": ("Asia", "Tokyo", "the yen", "Japanese"),
    "Thailand": ("Asia", "Bangkok", "the baht", "Thai"),
    "Mexico": ("America", "Mexico City", "the peso", "Spanish"),
    "Brazil": ("America", "Brasilia", "the real", "Portuguese"),
}
_RELATIONS = ("capital", "currency", "main language")
_FACT_QUESTIONS = (
    ("What is the {relation} of {country}?", ""),
    ("What is {country}'s {relation}?", ""),
    ("Name the {relation} of {country}.", ""),
    ("Tell me the {relation} of {country}.", ""),
    ("Do you know the {relation} of {country}?", ""),
    ("Write down {country}'s {relation}.", ""),
    ("Remind me of the {relation} of {country}.", ""),
    ("Which {relation} does {country} have?", ""),
    ("A quiz asks for the {relation} of {country}.", ""),
    ("State what {country} has as its {relation}.", ""),
    ("Look up {country} and report its {relation}.", ""),
    ("Complete the entry: {country}, {relation}.", ""),
    ("Can you recall the {relation} of {country}?", ""),
    ("A traveller asks about the {relation} of {country}.", ""),
    ("Give the {relation} of this country.", "{country}"),
    ("Identify the {relation} of the country below.", "{country}"),
    ("For the given country, name its {relation}.", "{country}"),
)
_FACT_ANSWERS = (
    "The {relation} of {country} is {fact}.",
    "It is {fact}.",
    "{country} has {fact} as its {relation}.",
    "{country}'s {relation} is {fact}.",
    "Answer: {fact}.",
    "That would be {fact}.",
)
_FACT_ADDITIONS = (
    " {country} lies in {continent}.",
    " You find {country} in {continent}.",
    " That is in {continent}.",
    " Its continent is {continent}.",
    " {continent} is where it lies.",
    " See a map of {continent}.",
)

_GROUPS = {
    # group: place, two reasons, members
    "fruit": (
        "in an orchard",
        ("It ripens on a tree.", "It is sweet and full of juice."),
        ("an apple", "a pear", "a plum", "a cherry", "a peach", "an apricot"),
    ),
    "vegetable": (
        "in a garden bed",
        ("It grows close to the soil.", "It belongs in a soup."),
        ("a carrot", "a leek", "a cabbage", "a turnip", "a radish", "a beetroot"),
    ),
    "fish": (
        "under water",
        ("It swims with its fins.", "It breathes through gills."),
        ("a trout", "a salmon", "a herring", "a tuna", "a cod", "a carp"),
    ),
    "bird": (
        "near a nest",
        ("It has wings and feathers.", "It lays eggs with a hard shell."),
        ("a sparrow", "an owl", "a robin", "a swan", "an eagle", "a parrot"),
    ),
    "tool": (
        "in a workshop",
        ("Somebody repairs things with it.", "It helps to build a house."),
        ("a hammer", "a saw", "a screwdriver", "a wrench", "a drill", "a chisel"),
    ),
    "musical instrument": (
        "on a concert stage",
        ("A musician plays it.", "It makes a pleasant sound."),
        ("a violin", "a flute", "a trumpet", "a piano", "a cello", "a harp"),
    ),
    "garment": (
        "in a wardrobe",
        ("People wear it when they go out.", "A tailor can sew it."),
        ("a coat", "a scarf", "a shirt", "a jacket", "a sweater", "a cardigan"),
    ),
    "vehicle": (
        "on a busy road",
        ("It carries people from place to place.", "It rolls on wheels."),
        ("a bicycle", "a truck", "a bus", "a tractor", "a scooter", "a taxi"),
    ),
}
_PASSAGES = (
    "{name} saw {member} this morning.",
    "There was {member} in the picture that {name} painted.",
    "{name} wrote a short story about {member}.",
    "On Monday night {name} dreamed of {member}.",
    "{name} pointed at {member} and smiled.",
    "The first card that {name} drew shows {member}.",
    "{name} took a photo of {member} last week.",
    "In the film that {name} likes, {member} appears at the end.",
)
_NAMES = ("Mia", "Leo", "Anna", "Tom", "Nora", "Sam", "Eva", "Paul")
_GROUP_QUESTIONS = (
    "Which group does the thing in this passage belong to?",
    "What kind of thing does the passage mention?",
    "Classify the object in the text.",
    "Based on the text, into which category would you put the object?",
    "Read the passage. What sort of object is it about?",
)
_PLACE_QUESTIONS = (
    "Where would somebody usually find the thing in this passage?",
    "In what place is such an object normally found, judging by the text?",
    "Which place suits the object in the text?",
    "Based on the passage, where should we look for more of the same sort?",
    "Read the text. Where does such a thing belong?",
)
_BARE_QUESTIONS = (
    "Classify {member}.",
    "Into which category would you put {member}?",
    "What kind of thing is {member}?",
    "Which group does {member} belong to?",
)
_GROUP_ANSWERS = (
    "The passage mentions a {group}.",
    "This object counts as a {group}.",
    "Category: {group}.",
    "We are reading about a {group}.",
)
_BARE_ANSWERS = _GROUP_ANSWERS[1:3]
_PLACE_ANSWERS = (
    "Usually {place}.",
    "Somebody would find it {place}.",
    "The best place to look is {place}.",
    "According to the text, probably {place}.",
    "Most of the time {place}.",
    "Look for it {place}.",
)

CHORES = {
    "boil eggs": ("place them in hot water", "wait nine minutes"),
    "cook rice": ("rinse the grains twice", "simmer them under a lid"),
    "make pancakes": ("whisk flour with milk", "fry thin rounds in butter"),
    "bake bread": ("knead the dough well", "let it rise for an hour"),
    "brew tea": ("warm the teapot", "steep the leaves for four minutes"),
    "roast potatoes": ("cut them into wedges", "turn them in oil and salt"),
    "make tomato sauce": ("soften some garlic", "stir in crushed tomatoes"),
    "grill corn": ("soak the cobs", "rotate them over glowing coals"),
    "prepare a salad": ("dry the lettuce", "toss it with lemon dressing"),
    "melt chocolate": ("chop the bar finely", "heat the pieces above steam"),
    "freeze berries": ("spread them on a tray", "bag them once solid"),
    "whip cream": ("chill the bowl", "beat until soft peaks form"),
    "clean a window": ("mix vinegar with water", "polish the glass with newspaper"),
    "iron a blouse": ("dampen the cloth", "press the collar before the sleeves"),
    "sew on a button": ("thread a needle", "loop through the holes six times"),
    "polish boots": ("brush away the dust", "rub in a little wax"),
    "wash wool": ("use cool water", "lay the piece flat to dry"),
    "remove a stain": ("blot the spot gently", "dab it with baking soda"),
    "water a cactus": ("check that the pot is dry", "pour a small cup slowly"),
    "repot a fern": ("loosen the roots", "fill the gaps with fresh earth"),
    "prune roses": ("sharpen your shears", "snip above an outward bud"),
    "plant tulips": ("dig in late autumn", "bury each bulb three hands deep"),
    "sharpen a knife": ("wet the stone", "draw the blade at a low angle"),
    "unclog a sink": ("remove the strainer", "work the plunger up and down"),
    "light a stove": ("stack dry kindling", "open the air vent fully"),
    "fold a map": ("lay it face down", "follow the old creases"),
    "pack a suitcase": ("roll soft clothes", "keep heavy items near the bottom"),
    "wrap a gift": ("measure the paper", "tape the folded ends"),
    "hang a picture": ("mark the height in pencil", "level the frame on two hooks"),
    "dust a lamp": ("unplug it", "wipe the shade with a dry cloth"),
}
_REQUESTS = (
    "How do I {chore}?",
    "How can I {chore} without trouble?",
    "Can you explain how to {chore}?",
    "Could you please help me {chore}?",
    "Please teach me to {chore}.",
    "I would like to {chore}. Any advice?",
    "I have never tried to {chore}. How should I start?",
    "My friend wants to {chore}. How does one do that?",
    "Hi! I need to {chore} today. Help, please.",
    "Hello, how does one {chore}?",
    "What are the steps to {chore}?",
    "I want to {chore} for the first time. Any tips?",
    "My grandmother asked me to {chore}. How?",
    "Please explain the easiest way to {chore}.",
)
_FOLLOW_UPS = (
    "Thanks! And how do I {chore}?",
    "Great, thank you. Now I also want to {chore}.",
    "Perfect. Could you also explain how to {chore}?",
    "Thank you so much! Next I have to {chore}.",
    "That worked. Any advice on how to {chore}?",
    "Wonderful! One more: how can I {chore}?",
)
_OPENINGS = (
    "Sure!",
    "Of course!",
    "Happy to help!",
    "Gladly!",
    "No problem!",
    "With pleasure!",
    "Let me explain.",
    "Good question!",
)
_STEPS = ("First {one}, then {two}.", "Begin like this: {one}. After that, {two}.", "Simply {one} and {two}.")
_CLOSINGS = ("", " Good luck!", " Take your time.", " Enjoy!", " You can do it.", " Ask me again any time.")
_WEAKER_REPLIES = (
    "I am not sure, maybe {two}.",
    "You could {one}, I guess.",
    "Somebody else may know it better.",
)
_FOREIGN = (
    ("de", "Wie koche ich Eier?", "Lege sie neun Minuten in heißes Wasser."),
    ("de", "Wie putze ich ein Fenster?", "Mische Essig mit Wasser und poliere das Glas."),
    ("de", "Wie falte ich eine Landkarte?", "Folge einfach den alten Falten."),
    ("de", "Wie gieße ich einen Kaktus?", "Prüfe zuerst, ob die Erde trocken ist."),
    ("es", "¿Cómo preparo una ensalada?", "Seca la lechuga y añade limón."),
    ("es", "¿Cómo hago pan?", "Amasa bien y deja reposar la masa una hora."),
    ("es", "¿Cómo limpio mis botas?", "Quita el polvo y aplica un poco de cera."),
    ("es", "¿Cómo envuelvo un regalo?", "Mide el papel y pega los extremos."),
)


class Example(NamedTuple):
    """One row of the sample; `context` may be empty."""

    instruction: str
    context: str
    response: str


@dataclass(frozen=True)
class SampleMessage:
    """One message of a conversation, with the messages that answer it."""

    role: str
    text: str
    lang: str = "en"
    rank: int | None = None
    deleted: bool = False
    replies: tuple["SampleMessage", ...] = ()


def facts(rng: random.Random) -> list[Example]:
    """Questions about a country's capital, currency and language, each fact in seventeen phrasings."""
    rows = []
    for country, (continent, *known) in COUNTRIES.items():
        for relation, fact in zip(_RELATIONS, known, strict=True):
            words = {"country": country, "continent": continent, "relation": relation, "fact": fact}
            for instruction, context in _FACT_QUESTIONS:
                answer = rng.choice(_FACT_ANSWERS) + rng.choice(_FACT_ADDITIONS)
                rows.append(Example(instruction.format(**words), context.format(**words), answer.format(**words)))
    return _with_flaws(rows, rng)


def passages(rng: random.Random) -> list[Example]:
    """Questions about a sentence that mentions one thing: its group, or where such things are found."""
    rows = []
    for group, (place, reasons, members) in _GROUPS.items():
        for member in members:
            for passage in rng.sample(_PASSAGES, 6):
                context = passage.format(name=rng.choice(_NAMES), member=member)
                answer = f"{rng.choice(_GROUP_ANSWERS)} {rng.choice(reasons)}".format(group=group)
                rows.append(Example(rng.choice(_GROUP_QUESTIONS), context, answer))
            for passage in rng.sample(_PASSAGES, 6):
                context = passage.format(name=rng.choice(_NAMES), member=member)
                answer = f"{rng.choice(_PLACE_ANSWERS)} {rng.choice(reasons)}".format(place=place)
                rows.append(Example(rng.choice(_PLACE_QUESTIONS), context, answer))
            for question in rng.sample(_BARE_QUESTIONS, 2):
                answer = f"{rng.choice(_BARE_ANSWERS)} {rng.choice(reasons)}".format(group=group)
                rows.append(Example(question.format(member=member), "", answer))
    return _with_flaws(rows, rng)


def conversations(rng: random.Random) -> list[SampleMessage]:
    """Trees of requests and ranked replies about chores, some with follow-ups.

    Besides the best English replies, they contain what a reader must skip: weaker, unranked and deleted
    replies, and other languages.
    """
    requests = [(chore, text) for chore, text in product(CHORES, _REQUESTS)]
    follow_ups = [(chore, text) for chore, text in product(CHORES, _FOLLOW_UPS)]
    rng.shuffle(requests)
    rng.shuffle(follow_ups)
    threads: list[list[tuple[str, str]]] = [[request] for request in requests]
    for follow_up in follow_ups:
        rng.choice(threads).append(follow_up)
    trees = [_conversation(thread, rng) for thread in threads]
    for lang, request, reply in _FOREIGN:
        trees.append(
            SampleMessage("prompter", request, lang, replies=(SampleMessage("assistant", reply, lang, rank=0),))
        )
    for chore in rng.sample(sorted(CHORES), 6):
        spam = SampleMessage("assistant", "Visit my page!", deleted=True)
        unranked = SampleMessage("assistant", "I have no idea.")
        trees.append(SampleMessage("prompter", f"{chore.capitalize()}, quickly!", replies=(spam, unranked)))
    rng.shuffle(trees)
    return trees


def _conversation(thread: list[tuple[str, str]], rng: random.Random) -> SampleMessage:
    """The thread's first request with its replies, and below the best one the rest of the thread."""
    (chore, request), *rest = thread
    one, two = CHORES[chore]
    best = rng.choice(_OPENINGS) + " " + rng.choice(_STEPS) + rng.choice(_CLOSINGS)
    below = (_conversation(rest, rng),) if rest else ()
    replies = [SampleMessage("assistant", best.format(one=one, two=two), rank=0, replies=below)]
    for rank in range(1, rng.randrange(1, 4)):
        replies.append(SampleMessage("assistant", rng.choice(_WEAKER_REPLIES).format(one=one, two=two), rank=rank))
    rng.shuffle(replies)
    return SampleMessage("prompter", request.format(chore=chore), replies=tuple(replies))


def _with_flaws(rows: list[Example], rng: random.Random) -> list[Example]:
    """The rows in random order, with flaws of published data: blank responses and duplicates."""
    repeated = rng.sample(rows, 3)
    blank = [row._replace(response="") for row in rng.sample(rows, 2)]
    mixed = [*rows, *repeated, *blank]
    rng.shuffle(mixed)
    return mixed
