"""Generator of the demo model's training and evaluation conversations, deterministic from a seed.

`Generator(seed).stream()` yields an endless mixture of `Example`s; with `held_out=True` the same tasks are made
of what training never sees: other sums, names, cities and made-up words, and other wordings of the questions.
Run as a script it prints a few examples as JSON lines.
"""

from __future__ import annotations

import argparse
import json
import random
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import toolbox
import wordlists as words
from extraction import EXTRACTION_REQUESTS, EXTRACTIONS
from smalltalk import ABOUT_ME, ABOUT_QUIRE, SYSTEM_PROMPTS, UNKNOWN
from stories import OPEN_REQUESTS, REQUESTS, article, story

Message = dict[str, Any]

# Share of each task among the examples. A conversation with tools is about five times as long as the others.
MIXTURE = {
    "arithmetic": 26.0,
    "facts": 6.0,
    "counting": 3.0,
    "spelling": 4.0,
    "extraction": 28.0,
    "tools": 11.0,
    "smalltalk": 4.0,
    "repeat": 10.0,
    "memory": 3.0,
    "stories": 1.5,
    "unknown": 1.0,
    "thinking": 4.0,
    "text": 3.5,
}


@dataclass
class Example:
    """A conversation (or plain `text`) of one task; `messages[-1]` is the answer that the evaluation expects."""

    task: str
    messages: list[Message]
    tools: list[dict[str, Any]] | None = None
    thinking: bool = False
    text: str | None = None


@dataclass
class Turn:
    """A question with its answer and the thought that leads to it."""

    question: str
    answer: str
    thought: str = ""

    def messages(self) -> list[Message]:
        """The turn as a user message and an assistant message."""
        return [{"role": "user", "content": self.question}, {"role": "assistant", "content": self.answer}]


def is_held_out(key: str) -> bool:
    """Whether `key` belongs to the tenth that only the evaluation sees."""
    return zlib.crc32(key.encode()) % 10 == 0


def split_phrases(options: list[str], held_out: bool) -> list[str]:
    """The wordings for the evaluation (the last fifth, at least one) or those for training (the others)."""
    count = max(1, len(options) // 5)
    return options[-count:] if held_out else options[:-count]


def tool_call(name: str, arguments: dict[str, Any]) -> dict[str, Any]:
    """A tool call of an assistant message."""
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


class Generator:
    """Draws examples; `held_out` selects the evaluation's share of values and wordings.

    `pieces` are the tokenizer's tokens that are letters only: training makes words of them too. A token that never
    occurs in training, because only held-out names have it, cannot be copied.
    """

    def __init__(
        self,
        seed: int,
        held_out: bool = False,
        mixture: dict[str, float] | None = None,
        pieces: Sequence[str] = (),
    ) -> None:
        self.rng = random.Random(seed)
        self.pieces = pieces
        self.held_out = held_out
        self.mixture = MIXTURE if mixture is None else mixture
        self.names = words.HELD_NAMES if held_out else words.NAMES
        self.cities = words.HELD_CITIES if held_out else words.CITIES
        self.pairs = [pair for pair in toolbox.all_pairs() if is_held_out("_".join(pair)) == held_out]

    # ---- values ----------------------------------------------------------------------------------------------

    def phrase(self, options: list[str]) -> str:
        """A wording of this split."""
        return self.rng.choice(split_phrases(options, self.held_out))

    def made_up(self) -> str:
        """A capitalized made-up word such as `Talvek` or `Hamtor`, for copying what was never seen."""
        while True:
            if self.pieces and self.rng.random() < 0.5:
                word = "".join(self.rng.choice(self.pieces) for _ in range(self.rng.randint(1, 3)))
                if word in words.HELD_NAMES or word in words.HELD_CITIES:
                    continue
            elif self.rng.random() < 0.5:  # spliced from two names, for parts of names that are whole tokens otherwise
                head, tail = self.rng.choice(words.NAME_PARTS), self.rng.choice(words.NAME_PARTS)
                word = head[: self.rng.randint(2, len(head))] + tail[self.rng.randint(1, len(tail) - 1) :]
            else:
                syllables = [
                    self.rng.choice("b d f g h k l m n p r s t v w z br dr gr kl st tr sh ch th".split())
                    + self.rng.choice("a e i o u a e i o u ai ee oa".split())
                    + self.rng.choice(["", "", "", "n", "r", "l", "s", "m", "t", "k", "nd"])
                    for _ in range(self.rng.randint(2, 3))
                ]
                word = "".join(syllables).capitalize()
            if is_held_out(word) == self.held_out:
                return word

    def value(self, kind: str) -> Any:
        """A random value of a kind of parameter, field or key."""
        rng = self.rng
        if kind in ("name", "city"):
            pool = self.names if kind == "name" else self.cities
            value = rng.choice(pool) if rng.random() < 0.6 else self.made_up()
            return f"{value} {rng.choice(words.SURNAMES)}" if kind == "name" and rng.random() < 0.2 else value
        choices: dict[str, list[str]] = {
            "job": words.JOBS,
            "item": words.ITEMS,
            "product": words.PRODUCTS,
            "color": words.COLORS,
            "event": words.EVENTS,
            "day": words.DAYS,
            "room": words.ROOMS,
            "language": words.LANGUAGES,
            "currency": words.CURRENCIES,
            "topic": words.TOPICS,
            "message": words.MESSAGES,
            "task": words.TASKS,
            "word": words.PLAIN_WORDS,
            "unit": ["celsius", "fahrenheit"],
            "priority": ["high", "low", "medium"],
            "genre": ["jazz", "rock", "folk", "classical", "pop", "blues", "soul"],
            "condition": ["sunny", "cloudy", "rainy", "windy", "foggy", "snowy", "clear"],
        }
        if kind in ("topic", "message", "task") and rng.random() < 0.4:
            return " ".join(rng.choice(words.PLAIN_WORDS) for _ in range(rng.randint(1, 4)))
        if kind in choices:
            return rng.choice(choices[kind])
        return self.coded_value(kind)

    def coded_value(self, kind: str) -> Any:
        """A random value made of digits and letters."""
        rng = self.rng
        if kind == "small":
            return rng.randint(1, 60)
        if kind == "number":
            return rng.randint(1, rng.choice([9, 99, 99, 999]))
        if kind == "time":
            return f"{rng.randint(0, 23):02d}:{rng.choice([0, 15, 30, 45, rng.randint(0, 59)]):02d}"
        if kind == "date":
            return f"{rng.randint(1, 28)} {rng.choice(words.MONTHS)}"
        if kind == "symbol":
            return "".join(rng.choice("ABCDEFGHIJKLMNOPQRSTUVWXYZ") for _ in range(rng.randint(3, 4)))
        if kind == "email":
            host = rng.choice(["example.com", "example.org", "mail.com", "quire.dev"])
            return f"{self.made_up().lower() if rng.random() < 0.5 else rng.choice(self.names).lower()}@{host}"
        if kind == "phone":
            return f"555-{rng.randint(0, 9999):04d}"
        if kind == "label":
            pick = rng.random()
            if pick < 0.4:
                return self.made_up()
            return rng.choice(words.PLAIN_WORDS) if pick < 0.7 else f"{self.value('symbol')[0]}-{rng.randint(1, 99)}"
        raise ValueError(f"unknown kind of value: {kind}")

    def operands(self) -> tuple[int, str, int]:
        """Two numbers and an operator. Sums and differences are split by pair; the times table is all taught."""
        rng = self.rng
        while True:
            operator = rng.choice("++--*")
            if operator == "*":
                return rng.randint(0, 12), operator, rng.randint(0, 12)
            a, b = (rng.randint(0, 99 if rng.random() < 0.85 else 12) for _ in range(2))
            if operator == "-" and a < b and rng.random() < 0.8:
                a, b = b, a
            if is_held_out(f"{a}{operator}{b}") == self.held_out:
                return a, operator, b

    # ---- single turns ----------------------------------------------------------------------------------------

    def arithmetic(self) -> Turn:
        """A sum, difference or product; in training also a few at once, which teaches more in the same space."""
        if not self.held_out and self.rng.random() < 0.45:
            return self.several_sums()
        a, operator, b = self.operands()
        symbol = self.rng.choice({"+": ["+"], "-": ["-"], "*": ["*", "*", "x", "×"]}[operator])
        word = {"+": "plus", "-": "minus", "*": "times"}[operator]
        special = {
            "+": [f"Add {a} and {b}.", f"What is the sum of {a} and {b}?", f"Add {b} to {a}."],
            "-": [f"Subtract {b} from {a}.", f"Take {b} away from {a}.", f"What is {a} take away {b}?"],
            "*": [f"Multiply {a} by {b}.", f"What is the product of {a} and {b}?", f"Multiply {a} and {b}."],
        }[operator]
        sign = f"{a} {symbol} {b}" if self.rng.random() < 0.75 else f"{a}{symbol}{b}"
        general = [
            f"What is {sign}?",
            f"What is {sign}?",
            sign,
            f"{sign} =",
            f"{sign}?",
            f"Compute {sign}.",
            f"Calculate {sign}.",
            f"How much is {sign}?",
            f"{a} {word} {b}",
            f"What is {a} {word} {b}?",
            f"compute {a} {word} {b}",
            f"How much is {a} {word} {b}?",
            f"Solve {sign}",
            f"What does {sign} make?",
            f"Please compute {sign}.",
        ]
        question = self.rng.choice(general if self.rng.random() < 0.8 else special)
        answer = f"{a} {operator} {b} = {arith(a, operator, b)}."
        return Turn(question, answer, arithmetic_thought(a, operator, b))

    def several_sums(self) -> Turn:
        """Two to six sums in one turn."""
        sums = [self.operands() for _ in range(self.rng.randint(2, 6))]
        question = "; ".join(f"{a} {operator} {b}" for a, operator, b in sums)
        answer = "; ".join(f"{a} {operator} {b} = {arith(a, operator, b)}" for a, operator, b in sums)
        return Turn(
            self.rng.choice(["Compute: {}", "Solve: {}", "{}", "Calculate {}"]).format(question),
            answer + ".",
            "One sum after another.",
        )

    def facts(self) -> Turn:
        """A capital, an opposite or a plural."""
        kind = self.rng.choice(["capital", "opposite", "plural"])
        if kind == "capital":
            country, capital = self.rng.choice(list(words.CAPITALS.items()))
            question = self.phrase(
                [
                    "What is the capital of {}?",
                    "What is the capital of {}?",
                    "Capital of {}?",
                    "Name the capital of {}.",
                    "Which city is the capital of {}?",
                    "Tell me the capital of {}.",
                    "capital of {}",
                    "What's the capital of {}?",
                    "What is the capital city of {}?",
                    "{}: what is its capital?",
                    "Do you know the capital of {}?",
                    "Please name the capital city of {}.",
                ]
            ).format(country)
            return Turn(question, f"The capital of {country} is {capital}.", f"{country}: {capital}.")
        table = words.OPPOSITES if kind == "opposite" else words.PLURALS
        key, value = self.rng.choice(list(table.items()))
        if kind == "opposite":
            options = [
                "What is the opposite of {}?",
                "Opposite of {}?",
                "Name the opposite of {}.",
                "Tell me the opposite of {}.",
                "Which word is the opposite of {}?",
                "opposite of {}",
                "What's the opposite of {}?",
                "Give me the opposite of {}.",
                'What is the opposite of "{}"?',
                "Do you know the opposite of {}?",
                "Please name the opposite of {}.",
            ]
        else:
            options = [
                "What is the plural of {}?",
                "Plural of {}?",
                "Name the plural of {}.",
                "Tell me the plural of {}.",
                "One {}, two what?",
                "plural of {}",
                "What's the plural of {}?",
                "Give me the plural of {}.",
                'What is the plural of "{}"?',
                "Do you know the plural of {}?",
                "Please name the plural of {}.",
            ]
        return Turn(self.phrase(options).format(key), f"The {kind} of {key} is {value}.", f"{key}: {value}.")

    def counting(self) -> Turn:
        """Counting up or down."""
        rng = self.rng
        if rng.random() < 0.35:
            start, end = 1, rng.randint(3, 20)
            question = self.phrase(
                ["Count to {}.", "Count up to {}.", "count to {}", "Please count to {}.", "Can you count to {}?"]
            ).format(end)
        else:
            start = rng.randint(0, 20 if rng.random() < 0.7 else 90)
            end = start + rng.randint(2, 12)
            if rng.random() < 0.35:
                start, end = end, start
            back = " backwards" if start > end and rng.random() < 0.4 else ""
            question = self.phrase(
                [
                    "Count from {} to {}.",
                    "Count{back} from {} to {}.",
                    "count from {} to {}",
                    "Please count{back} from {} to {}.",
                    "List the numbers from {} to {}.",
                    "Can you count from {} to {}?",
                ]
            ).format(start, end, back=back)
        step = 1 if start <= end else -1
        numbers = ", ".join(str(number) for number in range(start, end + step, step))
        return Turn(question, numbers, f"Start at {start} and stop at {end}.")

    def spelling(self) -> Turn:
        """Spelling a word with hyphens."""
        pools = [
            words.PLAIN_WORDS,
            list(words.OPPOSITES),
            list(words.PLURALS),
            words.ANIMALS,
            words.COLORS,
            words.PRODUCTS,
            words.JOBS,
        ]
        word = self.rng.choice(self.rng.choice(pools))
        if self.rng.random() < 0.12:
            word = self.made_up().lower()
        question = self.phrase(
            [
                "How is {} spelled?",
                "What is the spelling of {}?",
                "Spell the word {}.",
                "Spell {}.",
                "How do you spell {}?",
                "spell {}",
                'Spell "{}".',
                "Please spell the word {}.",
                "Spell {} for me.",
                "Spell out {}.",
                "Can you spell {}?",
                "How is the word {} spelled?",
            ]
        ).format(word)
        return Turn(question, "-".join(word), f"The letters of {word}.")

    def smalltalk(self) -> Turn:
        """A question about Quire or about the model."""
        questions, answer = self.rng.choice(ABOUT_QUIRE if self.rng.random() < 0.5 else ABOUT_ME)
        return Turn(self.phrase(questions), answer, "This is small talk. I answer in a sentence.")

    def unknown(self) -> Turn:
        """A question that the model was not taught to answer."""
        question = self.rng.choice(UNKNOWN).format(
            year=self.rng.randint(1200, 2030),
            name=self.value("name"),
            topic=self.value("topic"),
            country=self.rng.choice(words.UNKNOWN_COUNTRIES),
        )
        return Turn(question, "I do not know that.", "I was not taught this.")

    def repeat(self) -> Turn:
        """Saying again what the user says."""
        pieces = [
            self.value(self.rng.choice(["word", "word", "word", "label", "name", "color", "number", "city"]))
            for _ in range(self.rng.randint(1, self.rng.choice([3, 6, 10])))
        ]
        text = " ".join(str(piece) for piece in pieces)
        question = self.phrase(
            [
                "Write: {}",
                "Type: {}",
                "Print {}",
                "Output: {}",
                "Please repeat: {}",
                "Please reply with: {}",
                "Repeat: {}",
                "Say: {}",
                "Say {}",
                "Repeat after me: {}",
                'Say "{}"',
                "Echo: {}",
                "Reply with: {}",
                "Reply with exactly: {}",
                "Repeat this text: {}",
                'Repeat "{}"',
                "Respond with: {}",
                "Answer with: {}",
                "Please say: {}",
            ]
        ).format(text)
        return Turn(question, text, f"I say {text}.")

    def stories(self) -> Turn:
        """A short story."""
        hero = self.rng.choice(words.ANIMALS)
        open_request = not self.held_out and self.rng.random() < 0.1
        question = self.rng.choice(OPEN_REQUESTS) if open_request else self.phrase(REQUESTS).format(a=article(hero))
        return Turn(question, story(self.rng, hero), f"A story about {article(hero)}.")

    def extraction(self) -> Turn:
        """A sentence about a person, an order, an event or a thing, and its values as JSON."""
        rng = self.rng
        kinds, templates = rng.choice(EXTRACTIONS)
        template = rng.choice(templates)
        fields = {key: self.value(kind) for key, kind in kinds.items() if "{" + key + "}" in template}
        sentence = template.format(**fields)
        keys = list(fields)
        if rng.random() < 0.5:
            rng.shuffle(keys)
        if rng.random() < 0.3:
            keys = keys[: rng.randint(1, len(keys))]
        answer = json.dumps({key: fields[key] for key in keys}, ensure_ascii=False)
        comma = ", ".join(keys)
        listed = rng.choice([comma, f"{', '.join(keys[:-1])} and {keys[-1]}" if len(keys) > 1 else comma])
        question = rng.choice(EXTRACTION_REQUESTS).format(keys=listed, text=sentence)
        return Turn(question, answer, f"The keys are {comma}.")

    # ---- whole conversations ---------------------------------------------------------------------------------

    def memory(self) -> list[Message]:
        """The user tells something, maybe asks something else, and asks for it again."""
        rng = self.rng
        key, kind = rng.choice(
            [
                ("name", "name"),
                ("name", "name"),
                ("favorite color", "color"),
                ("job", "job"),
                ("favorite city", "city"),
                ("favorite animal", "animal"),
            ]
        )
        value = rng.choice(words.ANIMALS) if kind == "animal" else self.value(kind)
        tell = [f"My {key} is {value}."] + ([f"I am {value}.", f"Call me {value}."] if key == "name" else [])
        reply = f"Nice to meet you, {value}." if key == "name" else f"I will remember that your {key} is {value}."
        messages = Turn(rng.choice(tell), reply).messages()
        for _ in range(rng.choice([0, 0, 1, 2])):
            messages += self.turn(rng.choice(["arithmetic", "facts", "smalltalk", "repeat"])).messages()
        ask = [f"What is my {key}?", f"Do you remember my {key}?", f"Tell me my {key}.", f"What was my {key}?"]
        return messages + Turn(self.phrase(ask), f"Your {key} is {value}.").messages()

    def any_tool(self) -> toolbox.Tool:
        """A tool of the catalogue or a made-up one."""
        if self.rng.random() < 0.55:
            return self.rng.choice(toolbox.CATALOGUE)
        verb, noun = self.rng.choice(self.pairs)
        key = self.rng.choice(toolbox.KEY_NAMES)
        extra = self.rng.choice(list(toolbox.EXTRAS)) if self.rng.random() < 0.35 else None
        return toolbox.made_up_tool(verb, noun, key, extra)

    def call_turn(self, tool: toolbox.Tool, close: bool) -> list[Message]:
        """A request, the call of `tool`, and if `close` its result and the final answer."""
        request = self.rng.choice(tool.requests)
        fields = {name: self.value(kind) for name, (_, kind, _) in tool.params.items() if kind != "expression"}
        fields["a"], operator, fields["b"] = self.rng.randint(1, 99), self.rng.choice("+-*/"), self.rng.randint(1, 99)
        fields["op"] = operator
        fields["expression"] = f"{fields['a']} {operator} {fields['b']}"
        spoken = {"*": ["*", "times"], "+": ["+", "plus"], "-": ["-", "minus"], "/": ["/", "divided by"]}[operator]
        question = request.format(**{**fields, "op": self.rng.choice(spoken)})
        given = [name for name in tool.params if "{" + name + "}" in request or name == "expression"]
        second = None
        if tool.name in ("get_weather", "get_time") and given == ["city"] and self.rng.random() < 0.15:
            second = self.value("city")
            question = request.format(city=f"{fields['city']} and {second}")
        calls = [tool_call(tool.name, {name: fields[name] for name in given})]
        if second is not None:
            calls.append(tool_call(tool.name, {"city": second}))
        messages = [{"role": "user", "content": question}, {"role": "assistant", "content": None, "tool_calls": calls}]
        if close and second is None:
            result = {name: self.result(kind, fields) for name, kind in tool.results.items()}
            messages += [
                {"role": "tool", "name": tool.name, "content": json.dumps(result)},
                {"role": "assistant", "content": tool.answer.format(**{**fields, **result})},
            ]
        return messages

    def result(self, kind: str, fields: dict[str, Any]) -> Any:
        """The value of a field of a tool's result."""
        if kind in ("sum", "product"):
            return fields["a"] + fields["b"] if kind == "sum" else fields["a"] * fields["b"]
        if kind == "ok":
            return "ok"
        return self.rng.randint(-99, 9999) if kind == "result" else self.value(kind)

    def tools(self) -> Example:
        """A conversation with one to three tools, of which one fits (or none)."""
        rng = self.rng
        offered: dict[str, toolbox.Tool] = {}
        for _ in range(rng.choice([1, 1, 1, 2, 2, 3])):
            tool = self.any_tool()
            if not any({tool.name, other} <= group for other in offered for group in toolbox.RIVALS):
                offered[tool.name] = tool
        schemas = [tool.schema(described=rng.random() < 0.35) for tool in offered.values()]
        if rng.random() < 0.2:
            schemas = [json.loads(json.dumps(schema, sort_keys=True)) for schema in schemas]
        messages: list[Message] = []
        turns = 1 if self.held_out else rng.choice([2, 3, 4])
        for index in range(turns):
            if rng.random() < 0.12:
                if messages and messages[-1].get("tool_calls"):
                    break
                messages += self.turn(rng.choice(["facts", "smalltalk", "spelling", "counting", "repeat"])).messages()
                continue
            last = index == turns - 1
            messages += self.call_turn(rng.choice(list(offered.values())), close=not last or rng.random() < 0.4)
            if messages[-1].get("tool_calls"):
                break
        return Example("tools", messages, tools=schemas)

    def text(self) -> Example:
        """Plain text without a chat template."""
        pick = self.rng.random()
        if pick < 0.4:
            text = story(self.rng, self.rng.choice(words.ANIMALS))
        elif pick < 0.5:
            text = self.rng.choice(ABOUT_QUIRE)[1] + " " + self.rng.choice(ABOUT_QUIRE)[1]
        elif pick < 0.75:
            sums = [self.operands() for _ in range(self.rng.randint(1, 8))]
            text = " ".join(f"{a} {operator} {b} = {arith(a, operator, b)}." for a, operator, b in sums)
        else:
            makers: list[Callable[[], Turn]] = [self.facts, self.facts, self.counting]
            text = " ".join(self.rng.choice(makers)().answer for _ in range(self.rng.randint(1, 4)))
        return Example("text", [], text=text)

    # ---- mixture ---------------------------------------------------------------------------------------------

    def turn(self, task: str) -> Turn:
        """A single turn of a task, its question now and then written carelessly."""
        turn: Turn = getattr(self, task)()
        if not self.held_out and task not in ("repeat", "extraction") and self.rng.random() < 0.12:
            question = turn.question[0].lower() + turn.question[1:]
            turn.question = question.rstrip("?.") if self.rng.random() < 0.5 else question
        return turn

    def thinking(self) -> Example:
        """A single turn whose answer comes after a thought."""
        tasks = ["arithmetic"] * 5 + ["facts", "counting", "spelling", "smalltalk", "unknown", "extraction", "repeat"]
        turn = self.turn(self.rng.choice(tasks))
        messages = turn.messages()
        messages[-1]["reasoning_content"] = turn.thought
        return Example("thinking", messages, thinking=True)

    def example(self, task: str) -> Example:
        """An example of one task; while training, some carry a system prompt and some have several turns."""
        rng = self.rng
        if task == "text":
            return self.text()
        if task == "tools":
            example = self.tools()
        elif task == "thinking":
            example = self.thinking()
        elif task == "memory":
            example = Example(task, self.memory())
        else:
            example = Example(task, self.turn(task).messages())
        plain = task not in ("tools", "memory")
        while plain and not self.held_out and rng.random() < 0.3:
            other = rng.choice(["arithmetic", "facts", "smalltalk", "spelling", "extraction", "counting", "repeat"])
            example.messages = self.turn(other).messages() + example.messages
        if rng.random() < (0.15 if task == "tools" else 0.25):
            example.messages.insert(0, {"role": "system", "content": rng.choice(SYSTEM_PROMPTS)})
        return example

    def stream(self) -> Iterator[Example]:
        """An endless stream of examples in the proportions of the mixture."""
        tasks, weights = list(self.mixture), list(self.mixture.values())
        while True:
            yield self.example(self.rng.choices(tasks, weights)[0])


def arith(a: int, operator: str, b: int) -> int:
    """The result of a sum, difference or product."""
    return {"+": a + b, "-": a - b, "*": a * b}[operator]


def arithmetic_thought(a: int, operator: str, b: int) -> str:
    """The steps that lead to the result."""
    if operator == "*":
        return f"{a} times {b} is {a * b}."
    if b < 10:
        return f"{a} {operator} {b} is {arith(a, operator, b)}."
    tens, ones = b - b % 10, b % 10
    middle = arith(a, operator, tens)
    return f"{a} {operator} {tens} = {middle}. {middle} {operator} {ones} = {arith(middle, operator, ones)}."


def main() -> None:
    """Print examples as JSON lines."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", type=int, default=20)
    parser.add_argument("--held-out", action="store_true", help="print the evaluation's examples")
    args = parser.parse_args()
    stream = Generator(args.seed, args.held_out).stream()
    for _ in range(args.count):
        print(json.dumps(asdict(next(stream)), ensure_ascii=False))


if __name__ == "__main__":
    main()
