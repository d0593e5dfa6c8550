"""The training text: which kinds of exchange there are, how often each comes, and how they make documents.

Deterministic: shard k of seed s is the same text on every machine, however many processes make the shards.
"""

import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import arithmetic
import facts
import lists
import stories
from documents import Document, Exchange, chat_prompt, conversation, plain_text


@dataclass(frozen=True, slots=True)
class Family:
    """One kind of exchange. Weights are relative frequencies."""

    exchange: Callable[[random.Random], Exchange]
    weight: float
    plain: Callable[[random.Random], str] | None = None  # text without roles, where completions make sense
    plain_weight: float = 0.0


FAMILIES: Mapping[str, Family] = {
    "sum": Family(arithmetic.sum_exchange, 40, arithmetic.sum_lines, 3),
    "difference": Family(arithmetic.difference_exchange, 8),
    "product": Family(arithmetic.product_exchange, 3),
    "comparison": Family(arithmetic.comparison_exchange, 4),
    "sort": Family(lists.sort_exchange, 11),
    "reverse": Family(lists.reverse_exchange, 9),
    "count": Family(lists.count_exchange, 9, lists.plain_count, 1),
    "story": Family(stories.story_exchange, 9, stories.plain_story, 4),
    "fact": Family(facts.fact_exchange, 7, facts.plain_facts, 1),
    "small_talk": Family(facts.small_talk_exchange, 3),
    "unknown": Family(facts.unknown_exchange, 2),
}
_PLAIN_SHARE = 0.08
_SYSTEM_SHARE = 0.1
_TURNS, _TURN_WEIGHTS = (1, 2, 3, 4), (70, 16, 9, 5)


class Corpus:
    """Documents drawn from some of the families."""

    def __init__(self, seed: int, families: tuple[str, ...] = tuple(FAMILIES)) -> None:
        self._seed = seed
        self._names = families
        self._weights = [FAMILIES[name].weight for name in families]
        self._plain_names = [name for name in families if FAMILIES[name].plain is not None]
        self._plain_weights = [FAMILIES[name].plain_weight for name in self._plain_names]

    def shard(self, index: int, num_documents: int) -> Iterator[Document]:
        rng = random.Random(f"octavo-demo/{self._seed}/{index}")
        return (self._document(rng) for _ in range(num_documents))

    def _document(self, rng: random.Random) -> Document:
        if self._plain_names and rng.random() < _PLAIN_SHARE:
            return self._plain_document(rng)
        num_turns = rng.choices(_TURNS, _TURN_WEIGHTS)[0]
        names = rng.choices(self._names, self._weights, k=num_turns)
        exchanges = [FAMILIES[name].exchange(rng) for name in names]
        system = rng.choice(facts.SYSTEM_PROMPTS) if rng.random() < _SYSTEM_SHARE else None
        return Document(tuple(names), chat_prompt(conversation(system, exchanges), add_generation_prompt=False))

    def _plain_document(self, rng: random.Random) -> Document:
        name = rng.choices(self._plain_names, self._plain_weights)[0]
        plain = FAMILIES[name].plain
        assert plain is not None
        return Document((name,), plain_text(plain(rng)))
