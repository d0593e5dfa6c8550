"""Sums, differences, products and comparisons, asked and answered; a part of the two-digit sums is held out.

Sums of two two-digit numbers that `is_held_out` names never appear in training text, in either order, in any phrasing,
nor as the difference that undoes them: they measure whether the model adds or only remembers.
"""

import random
import zlib
from collections.abc import Iterator

from documents import Exchange

HELD_OUT_SHARE = 10  # one unordered pair in so many

SUM_QUESTIONS = (
    "What is {a} + {b}?",
    "What is {a} plus {b}?",
    "{a} + {b} = ?",
    "What is {a}+{b}?",
    "Add {a} and {b}.",
    "What is the sum of {a} and {b}?",
    "How much is {a} + {b}?",
    "Compute {a} + {b}.",
    "{a} + {b}",
    "{a}+{b}",
    "{a} + {b} =",
    "{a}+{b}=?",
    "What's {a} + {b}?",
    "what is {a} + {b}",
    "Calculate {a} + {b}.",
    "Please add {a} and {b}.",
    "Can you add {a} and {b}?",
    "How much is {a} plus {b}?",
    "Tell me what {a} + {b} is.",
    "If you add {a} and {b}, what do you get?",
)
_DIFFERENCE_QUESTIONS = (
    "What is {a} - {b}?",
    "What is {a} minus {b}?",
    "{a} - {b} = ?",
    "{a} - {b}",
    "Subtract {b} from {a}.",
    "How much is {a} - {b}?",
    "Compute {a} - {b}.",
    "Take {b} away from {a}.",
)
_PRODUCT_QUESTIONS = (
    "What is {a} times {b}?",
    "What is {a} * {b}?",
    "{a} * {b} = ?",
    "{a} * {b}",
    "Multiply {a} by {b}.",
    "How much is {a} times {b}?",
)
_WORD_PROBLEMS = (
    "{name} has {a} {things} and finds {b} more. How many {things} does {name} have now?",
    "{name} picks {a} {things} in the morning and {b} {things} in the evening. How many {things} is that?",
    "There are {a} {things} in one box and {b} {things} in another. How many {things} are there together?",
    "{name} has {a} {things}. A friend gives {name} {b} more. How many {things} does {name} have?",
)
_NAMES = ("Mia", "Ben", "Ada", "Tom", "Lena", "Omar", "Rosa", "Finn", "Nora", "Ivan", "Yuki", "Sam")
_THINGS = (
    "apples",
    "books",
    "shells",
    "coins",
    "cards",
    "stones",
    "stamps",
    "nuts",
    "pens",
    "plums",
    "buttons",
    "keys",
)


def is_held_out(a: int, b: int) -> bool:
    """Whether a + b is kept for the test: both of two digits, and their unordered pair drawn by its checksum."""
    low, high = min(a, b), max(a, b)
    return low >= 10 and high <= 99 and zlib.crc32(f"{low}+{high}".encode()) % HELD_OUT_SHARE == 0


def held_out_pairs() -> Iterator[tuple[int, int]]:
    return ((a, b) for a in range(10, 100) for b in range(10, 100) if is_held_out(a, b))


def sum_answer(a: int, b: int) -> str:
    return f"{a} + {b} = {a + b}."


def sum_exchange(rng: random.Random) -> Exchange:
    a, b = _addends(rng)
    if rng.random() < 0.08:
        return _word_problem(rng, a, b)
    # The first phrasing is the one that most people type.
    question = SUM_QUESTIONS[0] if rng.random() < 0.2 else rng.choice(SUM_QUESTIONS)
    return Exchange(question.format(a=a, b=b), sum_answer(a, b))


def _word_problem(rng: random.Random, a: int, b: int) -> Exchange:
    things = rng.choice(_THINGS)
    question = rng.choice(_WORD_PROBLEMS).format(name=rng.choice(_NAMES), things=things, a=a, b=b)
    return Exchange(question, f"{sum_answer(a, b)} That is {a + b} {things}.")


def sum_lines(rng: random.Random) -> str:
    """Plain text, for completions such as `27 + 15 =`."""
    return "\n".join(sum_answer(*_addends(rng)) for _ in range(rng.randint(1, 6)))


def _addends(rng: random.Random) -> tuple[int, int]:
    """Mostly of two digits each; the other lengths teach the carry on far more pairs than there are of those."""
    while True:
        lengths = (2, 2) if rng.random() < 0.65 else (rng.randint(1, 3), rng.randint(1, 3))
        a, b = (_number_of_length(rng, length) for length in lengths)
        if not is_held_out(a, b):
            return a, b


def _number_of_length(rng: random.Random, length: int) -> int:
    return rng.randint(0 if length == 1 else 10 ** (length - 1), 10**length - 1)


def difference_exchange(rng: random.Random) -> Exchange:
    while True:
        high, low = sorted((rng.randint(0, 99), rng.randint(0, 99)), reverse=True)
        if not is_held_out(high - low, low) and not is_held_out(high, low):
            question = rng.choice(_DIFFERENCE_QUESTIONS).format(a=high, b=low)
            return Exchange(question, f"{high} - {low} = {high - low}.")


def product_exchange(rng: random.Random) -> Exchange:
    a, b = rng.randint(0, 10), rng.randint(0, 10)
    return Exchange(rng.choice(_PRODUCT_QUESTIONS).format(a=a, b=b), f"{a} * {b} = {a * b}.")


def comparison_exchange(rng: random.Random) -> Exchange:
    a, b = rng.sample(range(100), 2)
    word, answer = rng.choice((("larger", max(a, b)), ("smaller", min(a, b)), ("greater", max(a, b))))
    question = rng.choice(("Which is {w}, {a} or {b}?", "Which number is {w}: {a} or {b}?", "What is {w}, {a} or {b}?"))
    return Exchange(question.format(w=word, a=a, b=b), f"{answer} is {word}.")
