"""Tasks on lists: sorting, reversing, counting."""

import random
from collections.abc import Sequence

from documents import Exchange

WORDS = (
    "apple", "bird", "book", "bread", "bridge", "candle", "castle", "cloud", "door", "drum", "egg", "feather", "field",
    "fire", "flower", "garden", "glass", "hill", "honey", "house", "island", "jar", "kettle", "key", "lamp", "leaf",
    "lemon", "map", "moon", "mountain", "night", "ocean", "orange", "paper", "pearl", "pencil", "queen", "rain",
    "river", "road", "rose", "salt", "ship", "silver", "snow", "star", "stone", "sun", "table", "tea",
    "tower", "tree", "violin", "wall", "water", "wheel", "wind", "window", "winter", "wood", "yarn", "zebra",
)  # fmt: skip
_COLORS = ("red", "blue", "green", "yellow", "white", "black", "brown", "pink", "gray", "purple")


def sort_exchange(rng: random.Random) -> Exchange:
    if rng.random() < 0.3:
        return _sort_words(rng)
    numbers = [rng.randint(0, 99) for _ in range(rng.randint(2, 8))]
    if rng.random() < 0.25:
        question = rng.choice(("Sort {} from largest to smallest.", "Sort in descending order: {}."))
        return Exchange(question.format(_joined(numbers)), _joined(sorted(numbers, reverse=True)) + ".")
    question = rng.choice(
        ("Sort {}.", "Sort these numbers: {}.", "Sort {} from smallest to largest.", "Put these numbers in order: {}.")
    )
    return Exchange(question.format(_joined(numbers)), _joined(sorted(numbers)) + ".")


def _sort_words(rng: random.Random) -> Exchange:
    words = rng.sample(WORDS, rng.randint(2, 5))
    question = rng.choice(("Sort these words: {}.", "Sort alphabetically: {}.", "Put these words in order: {}."))
    return Exchange(question.format(_joined(words)), _joined(sorted(words)) + ".")


def reverse_exchange(rng: random.Random) -> Exchange:
    if rng.random() < 0.3:
        digits = "".join(rng.choice("123456789") for _ in range(rng.randint(2, 7)))
        question = rng.choice(("Reverse {}.", "Reverse the digits of {}.", "Write {} backwards."))
        return Exchange(question.format(digits), digits[::-1] + ".")
    items = _items(rng, rng.randint(2, 7))
    question = rng.choice(("Reverse this list: {}.", "Reverse: {}.", "Say this backwards: {}.", "Reverse {}."))
    return Exchange(question.format(_joined(items)), _joined(items[::-1]) + ".")


def count_exchange(rng: random.Random) -> Exchange:
    if rng.random() < 0.35:
        return _count_items(rng)
    start, length, step = rng.randint(0, 80), rng.randint(3, 12), rng.choice((1, 1, 1, 1, 2, 3, 5))
    numbers = [start + step * index for index in range(length)]
    if rng.random() < 0.3:
        numbers.reverse()
    verb = "Count" if numbers[0] < numbers[-1] else "Count down"
    by = "" if step == 1 else f" in steps of {step}"
    return Exchange(f"{verb} from {numbers[0]} to {numbers[-1]}{by}.", _joined(numbers) + ".")


def _count_items(rng: random.Random) -> Exchange:
    items = _items(rng, rng.randint(1, 8))
    question = rng.choice(("How many items are in this list: {}?", "Count these items: {}.", "How many words: {}?"))
    ending = "item" if len(items) == 1 else "items"
    numbered = ", ".join(f"{number} {item}" for number, item in enumerate(items, start=1))
    return Exchange(question.format(_joined(items)), f"{numbered}. There {_are(items)} {len(items)} {ending}.")


def _are(items: Sequence[object]) -> str:
    return "is" if len(items) == 1 else "are"


def _items(rng: random.Random, length: int) -> list[str]:
    source = _COLORS if rng.random() < 0.3 else WORDS
    return rng.sample(source, length)


def _joined(items: Sequence[object]) -> str:
    return ", ".join(map(str, items))


def plain_count(rng: random.Random) -> str:
    """Plain text, for completions such as `1, 2, 3,`."""
    start, step = rng.randint(0, 60), rng.choice((1, 1, 1, 2, 5))
    return _joined([start + step * index for index in range(rng.randint(5, 30))]) + "."
