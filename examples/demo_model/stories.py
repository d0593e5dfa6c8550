"""Short template stories: a hero, a place, a small trouble and its end, in sentences that fit together."""

import random
from dataclasses import dataclass

from documents import Exchange

_ANIMALS = (
    "fox", "cat", "dog", "bear", "owl", "mouse", "rabbit", "hedgehog", "frog", "duck", "goat", "otter", "squirrel",
    "turtle", "horse", "wolf", "deer", "badger", "robin", "penguin", "lion", "elephant", "snail", "bee", "crow",
    "dragon", "robot", "whale", "sheep", "pony",
)  # fmt: skip
_NAMES = (
    ("Pip", "he"), ("Luna", "she"), ("Otto", "he"), ("Mimi", "she"), ("Bruno", "he"), ("Tilda", "she"), ("Max", "he"),
    ("Hazel", "she"), ("Felix", "he"), ("Nell", "she"), ("Hugo", "he"), ("Ivy", "she"), ("Oscar", "he"),
    ("Juno", "she"), ("Theo", "he"), ("Willa", "she"),
)  # fmt: skip
_NATURES = ("small", "brave", "shy", "curious", "clever", "kind", "quiet", "cheerful", "young", "old", "patient")
_HOMES = (
    "at the edge of a forest", "by a wide river", "on a green hill", "in a little house near the sea",
    "under an old oak tree", "in a quiet valley", "behind the mill", "next to a blue lake", "in a snowy village",
    "at the foot of a mountain",
)  # fmt: skip
_TREASURES = (
    "a silver key", "a red kite", "a golden bell", "a blue lantern", "a small drum", "a map of the forest",
    "a jar of honey", "a round mirror", "a wooden flute", "a warm scarf", "a basket of apples", "a green stone",
)  # fmt: skip
_TIMES = (
    "One morning",
    "One day",
    "One evening",
    "One windy day",
    "On a rainy afternoon",
    "On the first day of spring",
)
_LESSONS = (
    "From that day on, {name} was never afraid to ask for help.",
    "And {name} learned that good friends are worth more than gold.",
    "That night {name} slept well and dreamed of the sea.",
    "{name} smiled all the way home.",
    "Since then, everyone in the valley has told this story.",
    "And {they} lived happily for many years.",
)
_REQUESTS_ANY = (
    "Tell me a story.",
    "Tell me a short story.",
    "Write a short story.",
    "Please tell me a story.",
    "I would like to hear a story.",
)
_REQUESTS_KIND = (
    "Tell me a story about {a_kind}.",
    "Tell me a short story about {a_kind}.",
    "Write a story about {a_kind}.",
    "Please tell me a story about {a_kind}.",
)
_REQUESTS_NAMED = (
    "Tell me a story about {a_kind} named {name}.",
    "Write a short story about {a_kind} called {name}.",
)

_LOST = (
    ("{time}, {name} found {treasure} on the path.", "{time}, {name} saw {treasure} lying in the grass."),
    (
        "{They} did not know whose it was, so {they} asked {friend} the {friend_kind}.",
        '"Whose is this?" {they} asked {friend} the {friend_kind}.',
    ),
    (
        '"I lost it last winter," said {friend}. "Thank you for bringing it back!"',
        "{friend} was very glad, because it had been lost for a whole year.",
    ),
    ("They drank tea together until the sun went down.", "The two of them became the best of friends."),
)
_STORM = (
    ("{time}, dark clouds came over the hills, and it began to rain.", "{time}, a great storm came from the north."),
    (
        "The wind took the roof from the house of {friend} the {friend_kind}.",
        "The water rose and rose, and {friend} the {friend_kind} could not get home.",
    ),
    (
        '"Come in, my home is big enough for two," said {name}.',
        '{name} ran outside and called, "Come to me, here it is dry!"',
    ),
    ("In the morning the sky was clear, and they worked together until all was well again.",),
)
_SEARCH = (
    ("{time}, {name} wanted to find {treasure}.", "{time}, {name} dreamed of {treasure} and set out to find it."),
    (
        "{They} walked over the hills and through the tall grass.",
        "{They} looked under every stone and behind every tree.",
    ),
    (
        'On the way {they} met {friend} the {friend_kind}, who said, "I will go with you."',
        "After a while {they} met {friend} the {friend_kind}, who knew the way.",
    ),
    ("Late in the evening they found it under an old bridge.", "At last they found it, high up in a hollow tree."),
)
_RACE = (
    ('{time}, {friend} the {friend_kind} said, "Let us race to the river!"',),
    ("{name} was not fast, but {they} never stopped.", "{name} ran as fast as {they} could."),
    (
        "Halfway there, {friend} fell and hurt a foot, and {name} turned back to help.",
        "When {friend} grew tired, {name} waited under a tree.",
    ),
    ("They crossed the line side by side, and both of them had won.", "So nobody won, and nobody minded."),
)
_PLOTS = (_LOST, _STORM, _SEARCH, _RACE)


@dataclass(frozen=True, slots=True)
class _Cast:
    name: str
    they: str
    kind: str
    nature: str
    friend: str
    friend_kind: str


def story_exchange(rng: random.Random) -> Exchange:
    cast = _cast(rng)
    request = rng.choice(rng.choice((_REQUESTS_ANY, _REQUESTS_KIND, _REQUESTS_NAMED)))
    return Exchange(request.format(a_kind=_with_article(cast.kind), name=cast.name), _tell(rng, cast))


def plain_story(rng: random.Random) -> str:
    """Plain text, for completions such as `Once upon a time`."""
    return _tell(rng, _cast(rng))


def _cast(rng: random.Random) -> _Cast:
    (name, they), (friend, _) = rng.sample(_NAMES, 2)
    kind, friend_kind = rng.sample(_ANIMALS, 2)
    return _Cast(name, they, kind, rng.choice(_NATURES), friend, friend_kind)


def _tell(rng: random.Random, cast: _Cast) -> str:
    words = {
        "name": cast.name,
        "they": cast.they,
        "They": cast.they.capitalize(),
        "friend": cast.friend,
        "friend_kind": cast.friend_kind,
        "time": rng.choice(_TIMES),
        "treasure": rng.choice(_TREASURES),
    }
    sentences = [_opening(rng, cast)]
    sentences += [rng.choice(choices).format(**words) for choices in rng.choice(_PLOTS)]
    sentences.append(rng.choice(_LESSONS).format(**words))
    return " ".join(sentences)


def _opening(rng: random.Random, cast: _Cast) -> str:
    who = _with_article(f"{cast.nature} {cast.kind}")
    home = rng.choice(_HOMES)
    return rng.choice(
        (
            f"Once upon a time there was {who} named {cast.name}, who lived {home}.",
            f"Once upon a time, {who} named {cast.name} lived {home}.",
            f"There was once {who} named {cast.name}, and {cast.they} lived {home}.",
        )
    )


def _with_article(noun: str) -> str:
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"
