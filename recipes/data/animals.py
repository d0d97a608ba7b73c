"""Forty animals, as plain sentences and as questions with answers: the embedded data of `sft.py` and `dpo.py`.

Written for this project. The plain sentences are what the demo's base model is pretrained on. Fine-tuning then teaches
it to answer questions, on some of the animals; it is measured on the others, which it has only read about.
"""

import random

_COLUMNS = ("name", "kind", "home", "food", "cover", "time", "young")
_TABLE = """
badger    | mammal    | in woods         | worms   | fur      | by night | cub
bat       | mammal    | in caves         | insects | fur      | by night | pup
beaver    | mammal    | near rivers      | bark    | fur      | by night | kit
bison     | mammal    | on grassland     | grass   | fur      | by day   | calf
carp      | fish      | in lakes         | plants  | scales   | by day   | fry
cobra     | reptile   | in forests       | rodents | scales   | by day   | snakelet
cod       | fish      | in the sea       | fish    | scales   | by day   | fry
crow      | bird      | in towns         | seeds   | feathers | by day   | chick
deer      | mammal    | in forests       | leaves  | fur      | by day   | fawn
dolphin   | mammal    | in the sea       | fish    | bare skin| by day   | calf
duck      | bird      | near lakes       | plants  | feathers | by day   | duckling
eagle     | bird      | in the mountains | rodents | feathers | by day   | eaglet
fox       | mammal    | in woods         | rodents | fur      | by night | cub
frog      | amphibian | in ponds         | insects | bare skin| by night | tadpole
giraffe   | mammal    | on grassland     | leaves  | fur      | by day   | calf
goat      | mammal    | in the mountains | grass   | fur      | by day   | kid
goose     | bird      | near lakes       | grass   | feathers | by day   | gosling
hare      | mammal    | on grassland     | grass   | fur      | by night | leveret
hedgehog  | mammal    | in gardens       | worms   | spines   | by night | hoglet
heron     | bird      | near rivers      | fish    | feathers | by day   | chick
lion      | mammal    | on grassland     | meat    | fur      | by night | cub
lizard    | reptile   | in deserts       | insects | scales   | by day   | hatchling
mole      | mammal    | in gardens       | worms   | fur      | by day   | pup
newt      | amphibian | in ponds         | insects | bare skin| by night | tadpole
otter     | mammal    | near rivers      | fish    | fur      | by night | pup
owl       | bird      | in forests       | rodents | feathers | by night | owlet
parrot    | bird      | in forests       | seeds   | feathers | by day   | chick
pelican   | bird      | near the sea     | fish    | feathers | by day   | chick
penguin   | bird      | near the sea     | fish    | feathers | by day   | chick
pike      | fish      | in lakes         | fish    | scales   | by day   | fry
rabbit    | mammal    | on grassland     | grass   | fur      | by night | kit
robin     | bird      | in gardens       | worms   | feathers | by day   | chick
salmon    | fish      | in rivers        | insects | scales   | by day   | fry
seal      | mammal    | near the sea     | fish    | fur      | by day   | pup
sparrow   | bird      | in towns         | seeds   | feathers | by day   | chick
squirrel  | mammal    | in woods         | seeds   | fur      | by day   | kit
toad      | amphibian | in gardens       | insects | bare skin| by night | tadpole
tortoise  | reptile   | in deserts       | grass   | a shell  | by day   | hatchling
wolf      | mammal    | in forests       | meat    | fur      | by night | pup
zebra     | mammal    | on grassland     | grass   | fur      | by day   | foal
"""

_STATEMENTS = (
    ("The {name} is a kind of {kind}.", "Among the animals, the {name} is a {kind}."),
    ("The {name} lives {home}.", "Look {home} and you may meet the {name}."),
    ("The {name} eats {food}.", "Food of the {name}: it eats {food}."),
    ("The {name} has {cover}.", "The body of the {name} has {cover}."),
    ("The {name} is active {time}.", "You can watch the {name} {time}."),
    ("The young of the {name} is called a {young}.", "A {young} grows up to be a {name}."),
)

_QUESTIONS = (
    (("What kind of animal is the {name}?", "How is the {name} classed?"), "The {name} is a kind of {kind}."),
    (("Where does the {name} live?", "What is the home of the {name}?"), "The {name} lives {home}."),
    (("What does the {name} eat?", "What is the food of the {name}?"), "The {name} eats {food}."),
    (("What covers the {name}?", "What has the {name} on its body?"), "The {name} has {cover}."),
    (("When is the {name} active?", "When can you watch the {name}?"), "The {name} is active {time}."),
    (
        ("What is the young of the {name} called?", "What grows up to be a {name}?"),
        "The young of the {name} is called a {young}.",
    ),
)

_HELD_OUT_ANIMALS = 10


def animals() -> list[dict[str, str]]:
    """Return the table: one dict an animal."""
    rows = [line.split("|") for line in _TABLE.strip().splitlines()]
    return [dict(zip(_COLUMNS, (cell.strip() for cell in row), strict=True)) for row in rows]


def make_statements(*, num_rounds: int, seed: int) -> list[str]:
    """Return short paragraphs, one an animal and round: all its facts, in random order and wording."""
    draw = random.Random(seed)
    paragraphs = []
    for _ in range(num_rounds):
        for animal in draw.sample(animals(), len(animals())):
            sentences = [draw.choice(wordings).format(**animal) for wordings in _STATEMENTS]
            paragraphs.append(" ".join(draw.sample(sentences, len(sentences))))
    return paragraphs


def make_clozes() -> list[dict[str, str]]:
    """Return records of `source`, a sentence about an animal with a gap, and `target`, what is missing."""
    facts = _COLUMNS[1:]
    return [
        {"source": wording.format(**{**animal, fact: "<gap>"}), "target": animal[fact]}
        for animal in animals()
        for fact, wordings in zip(facts, _STATEMENTS, strict=True)
        for wording in wordings
        if "{name}" in wording
    ]


def make_questions(*, seed: int) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """Return records of `prompt` and `completion`: those to train on, and those of the animals held out."""
    trained, held_out = _split(seed)
    return _question_records(trained), _question_records(held_out)


def make_preferences(*, seed: int) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """Return records of `prompt`, `chosen` and `rejected`, with the questions and the split of `make_questions`.

    Rejected is the answer to another question about the same animal: as true and as well formed, but beside the point.
    """
    draw = random.Random(seed)
    trained, held_out = _split(seed)
    return _preference_records(trained, draw), _preference_records(held_out, draw)


def _split(seed: int) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    order = animals()
    random.Random(seed).shuffle(order)
    return order[_HELD_OUT_ANIMALS:], order[:_HELD_OUT_ANIMALS]


def _question_records(rows: list[dict[str, str]]) -> list[dict[str, str]]:
    return [
        {"prompt": f"Question: {wording.format(**row)}\nAnswer:", "completion": f" {answer.format(**row)}"}
        for row in rows
        for wordings, answer in _QUESTIONS
        for wording in wordings
    ]


def _preference_records(rows: list[dict[str, str]], draw: random.Random) -> list[dict[str, str]]:
    records = []
    for row in rows:
        answers = [f" {answer.format(**row)}" for _, answer in _QUESTIONS]
        for question in _question_records([row]):
            others = [answer for answer in answers if answer != question["completion"]]
            chosen, rejected = question["completion"], draw.choice(others)
            records.append({"prompt": question["prompt"], "chosen": chosen, "rejected": rejected})
    return records
