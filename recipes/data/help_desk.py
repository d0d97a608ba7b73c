"""Questions to the help desk of a public library, by intent: the embedded data of `classify.py`.

Written for this project. Each intent has sentences with a slot; those under TEST share no wording with those under
TRAIN, so the held-out accuracy measures more than memory.
"""

import random
from collections.abc import Iterator
from itertools import islice

_OPENINGS = ("", "Hello, ", "Good morning, ", "Sorry to bother you, ", "Quick question: ", "Hi there, ")
_CLOSINGS = ("", " Thank you.", " Thanks in advance.", " I hope you can help.", " Best wishes.")

_SLOTS = {
    "item": ("the novel", "this cookbook", "the atlas", "a travel guide", "the film", "my audiobook", "the magazine"),
    "day": ("on Monday", "on Saturday", "on Sunday", "tomorrow", "this week", "during the holidays", "tonight"),
    "place": (
        "the main branch",
        "the reading room",
        "the branch by the river",
        "the second floor",
        "the old building",
    ),
    "person": ("my daughter", "my father", "a friend", "my class", "my neighbour", "our group", "my partner"),
}

TRAIN = {
    "renew_loan": (
        "can I keep {item} for two more weeks?",
        "please renew {item}, I have not finished it.",
        "how do I extend the loan of {item}?",
        "is it possible to renew {item} online?",
        "I need a longer loan for {item}.",
        "{item} is due {day}, may I extend it?",
    ),
    "opening_hours": (
        "when does {place} open {day}?",
        "until what time is {place} open?",
        "are you open {day}?",
        "what are the opening hours of {place}?",
        "does {place} close early {day}?",
        "at what hour do the doors close {day}?",
    ),
    "lost_card": (
        "I have lost my library card.",
        "my card was stolen {day}, please block it.",
        "how much is a replacement card?",
        "{person} cannot find the library card any more.",
        "I left my card in {place} and it is gone.",
        "can I get a new card for the one that is missing?",
    ),
    "reserve_room": (
        "can I book a study room {day}?",
        "is there a meeting room free in {place}?",
        "I would like to reserve a room for {person}.",
        "how do we book the seminar room {day}?",
        "please cancel my room booking {day}.",
        "does {place} have a quiet room that we can reserve?",
    ),
    "pay_fine": (
        "how do I pay the fine for {item}?",
        "why do I owe money for {item}?",
        "can {person} pay my late fee by card?",
        "the fee for {item} seems too high.",
        "where do I settle an overdue fine?",
        "I was charged twice for {item}.",
    ),
    "printing": (
        "where can I print a document in {place}?",
        "how much does it cost to print in colour?",
        "the printer in {place} has no paper.",
        "can I scan and copy {item}?",
        "does the copier in {place} work {day}?",
        "my print job is stuck, can you help?",
    ),
    "events": (
        "what events are there for {person} {day}?",
        "is the author reading {day} free?",
        "how do I sign up for the writing workshop?",
        "does the story hour in {place} need a ticket?",
        "can {person} join the book club {day}?",
        "who speaks at the lecture {day}?",
    ),
    "find_item": (
        "do you have {item} in {place}?",
        "on which shelf is {item}?",
        "I cannot find {item} in the catalogue.",
        "can you order {item} from another library?",
        "is there a large print edition of {item}?",
        "where do I look for {item} for {person}?",
    ),
}

TEST = {
    "renew_loan": ("may I have a longer time with {item}?", "could you renew what I borrowed {day}?"),
    "opening_hours": ("how late can I visit {place} {day}?", "is {place} closed {day}?"),
    "lost_card": ("my library card is missing since I was in {place}.", "{person} lost the card, what now?"),
    "reserve_room": ("we need a room {day}, how do I reserve it?", "is the group room in {place} booked {day}?"),
    "pay_fine": ("{person} got an overdue fee, where do we pay?", "may I pay what I owe for {item} {day}?"),
    "printing": ("is there a copier or printer in {place}?", "what does a print of {item} cost?"),
    "events": ("is there a reading or lecture for {person}?", "which workshop takes place in {place} {day}?"),
    "find_item": ("is {item} on a shelf in {place}?", "the catalogue lists {item}, but where is it?"),
}


def make_records(sentences: dict[str, tuple[str, ...]], *, per_intent: int, seed: int) -> list[dict[str, str]]:
    """Return `per_intent` distinct questions for each intent, as records of `text` and `label`, in random order."""
    draw = random.Random(seed)
    records = []
    for intent, patterns in sentences.items():
        # A dict keeps the order of drawing, which a set does not.
        questions = dict.fromkeys(islice(_questions(patterns, draw), 6 * per_intent))
        records += [{"text": question, "label": intent} for question in list(questions)[:per_intent]]
    draw.shuffle(records)
    return records


def _questions(patterns: tuple[str, ...], draw: random.Random) -> Iterator[str]:
    while True:
        slots = {name: draw.choice(values) for name, values in _SLOTS.items()}
        sentence = draw.choice(patterns).format(**slots)
        opening, closing = draw.choice(_OPENINGS), draw.choice(_CLOSINGS)
        yield opening + (sentence if opening else sentence[0].upper() + sentence[1:]) + closing
