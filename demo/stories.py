"""Short stories from a small grammar."""

from __future__ import annotations

import random

REQUESTS = [
    "Write me a tale of {a}.",
    "A tale about {a}, please.",
    "Tell a story with {a} in it.",
    "I would like a little tale about {a}.",
    "Tell me a short story about {a}.",
    "Tell me a story about {a}.",
    "Write a short story about {a}.",
    "A short story about {a}, please.",
    "Write a story about {a}",
    "I want to hear a story about {a}.",
    "Make up a story about {a}.",
    "Please tell a story about {a}.",
    "Can you tell me a story about {a}?",
    "Tell a short tale about {a}.",
]
OPEN_REQUESTS = ["Tell me a story.", "Tell me a short story.", "Write a story.", "Write a short story, please."]
ADJECTIVES = "little old young brave shy clever hungry kind lonely happy tired curious".split()
PLACES = [
    "in a dark forest",
    "near a quiet river",
    "on a green hill",
    "in a small village",
    "by the sea",
    "under an old bridge",
    "behind the mill",
    "at the edge of a meadow",
]
WISHES = [
    "find a friend",
    "see the sea",
    "bake a cake",
    "learn to sing",
    "build a boat",
    "catch the moon",
    "find a warm bed",
    "plant a garden",
]
TIMES = ["One morning", "One day", "One evening", "On a rainy day", "In the spring", "On a cold night"]
FINDS = [
    "a golden key",
    "a red balloon",
    "an old map",
    "a broken cart",
    "a silver bell",
    "a lost kitten",
    "a box of apples",
    "a tiny door",
]
TROUBLES = [
    "it started to rain",
    "the wind grew strong",
    "the path was gone",
    "the night came early",
    "the bridge was broken",
    "the snow began to fall",
]
HELPERS = "owl hare crow snail bee frog goat deer".split()
ADVICE = [
    "Do not give up",
    "Follow the river",
    "Come with me",
    "Wait for the sun",
    "We can do it together",
    "Look behind the tree",
]
ENDINGS = [
    "From that day on they were friends.",
    "In the end everyone was happy.",
    "They laughed all the way home.",
    "That night the {hero} slept very well.",
    "And so the {hero} was never lonely again.",
]


def article(noun: str) -> str:
    """The noun with its indefinite article."""
    return f"an {noun}" if noun[0] in "aeiou" else f"a {noun}"


def story(rng: random.Random, hero: str) -> str:
    """A story of five to eight sentences about `hero`, an animal."""
    adjective, helper = rng.choice(ADJECTIVES), rng.choice([name for name in HELPERS if name != hero])
    find, wish = rng.choice(FINDS), rng.choice(WISHES)
    sentences = [
        f"Once upon a time there was {article(adjective)} {hero}.",
        f"The {hero} lived {rng.choice(PLACES)}.",
        f"The {hero} wanted to {wish}.",
        f"{rng.choice(TIMES)} the {hero} found {find}.",
        f"But then {rng.choice(TROUBLES)}.",
        f'"{rng.choice(ADVICE)}," said {article(helper)}.',
        f"So the {hero} went on with the {helper}.",
        rng.choice(ENDINGS).format(hero=hero),
    ]
    for optional in (6, 4, 2):
        if rng.random() < 0.3:
            del sentences[optional]
    return " ".join(sentences)
