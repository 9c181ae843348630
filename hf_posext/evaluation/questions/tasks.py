"""Prompts that ask for something hidden in a long text: five tasks after RULER, with words and sentences of our own.

Hsieh et al., 2024: RULER: What's the Real Context Size of Your Long-Context Language Models?,
https://arxiv.org/abs/2404.06654. Scores are not RULER's: texts, names, answers and lengths are others.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any, NamedTuple

from ...errors import InvalidParameterError
from ..texts.tokens import Bos, special_prefix, token_ids
from .passkey import FILLER, NEEDLE, QUESTION, answer_size, haystack

KEYS, VALUES, VARIABLES, COMMON = 4, 3, 4, 3
"""Keys in the text, of which one is asked; values of one key; variables of a chain; words that are asked."""

COMMON_SHARE = 0.3
"""Share of a word list that its common words take together."""

NUMBERS = tuple(str(number) for number in range(10_007, 100_000, 997))
"""A sample of five-digit numbers, which says how many tokens one takes."""

WORDS = tuple(
    """
    anchor apron arrow bacon badge banjo barley basket beacon bishop blanket bottle bramble bridge bucket butter
    button cabin camel candle canyon carpet castle cellar cherry chimney cider circus cobbler copper coral cotton
    cradle cricket dagger daisy donkey dragon eagle ember engine falcon feather fiddle forest fountain garlic ginger
    goblet hammer harbor hazel helmet hermit hollow honey island ivory jacket jungle kennel kettle kitten ladder
    lantern lemon lizard magnet maple marble meadow mirror mitten monkey mosaic muffin needle nutmeg oyster paddle
    palace parrot pebble pencil pepper pillow pirate planet pocket pony puddle quiver rabbit raven ribbon rocket
    saddle salmon shovel silver spider statue temple thimble thunder timber trumpet tunnel turtle velvet violin wagon
    walnut willow
    """.split()
)


class Material(NamedTuple):
    """Lines to hide, each at a depth from 0 to 1, ascending; the question that follows; and what answers it."""

    lines: list[tuple[float, str]]
    question: str
    answers: tuple[str, ...]


@dataclass(frozen=True)
class Task:
    """How to write a task's material at a depth, and what it is answered with: so many of such items."""

    write: Callable[[Random, float], Material]
    items: Sequence[str]
    count: int
    has_depth: bool = True


@dataclass(frozen=True)
class TaskPrompt:
    """
    One trial.

    Args:
        tokens (`list[int]`): the prompt.
        answers (`tuple[str, ...]`): what is asked for.
    """

    tokens: list[int]
    answers: tuple[str, ...]


def task_prompt(
    tokenizer: Any, task: str, length: int, depth: float | None, *, trial: int = 0, seed: int = 0, bos: Bos = "auto"
) -> TaskPrompt:
    """
    A prompt of exactly `length` tokens less [`answer_room`]; the same for every model and method.

    All follows from `(seed, task, length, depth, trial)`. What is hidden stands on lines of its own between whole
    lines of filler, which is cut at its beginning to fit.

    | task | hidden | depth is that of | asked |
    |---|---|---|---|
    | `passkey` | a number | it | the number |
    | `multi-key` | four numbers, each of a name | the one asked; the others are anywhere | the number of one name |
    | `multi-value` | three numbers of one name | the first; the others follow anywhere | all three |
    | `variable-tracking` | `a = 12345`, `b = a`, ... and another such chain | the first assignment | all four names |
    | `common-words` | a list of words, 30 % of it three words in equal parts | (has none) | the three words |

    Args:
        tokenizer (`PreTrainedTokenizerBase`): the model's.
        task (`str`): a name of the table.
        length (`int`): tokens of prompt and answer together.
        depth (`float`, *optional*): from 0 (beginning) to 1 (end), rounded to whole lines; `None` where there is none.
        trial (`int`, *optional*, defaults to 0): which of the prompts that share the other arguments.
        seed (`int`, *optional*, defaults to 0): of everything drawn.
        bos (`str`, *optional*, defaults to `"auto"`): as in [`special_prefix`].

    Raises:
        InvalidParameterError: the length does not hold what is hidden.
    """
    draw = Random(f"{seed}-{task}-{length}-{depth}-{trial}")
    lines, question, answers = TASKS[task].write(draw, depth or 0.0)
    prefix = special_prefix(tokenizer, bos)
    end = token_ids(tokenizer, question)
    room = length - len(prefix) - len(end) - answer_room(tokenizer, task)
    if lines:
        filler = token_ids(tokenizer, FILLER)
        needles = [(depth, token_ids(tokenizer, line)) for depth, line in lines]
        room -= sum(len(needle) for _, needle in needles)
        _check_room(room, 0, task, length)
        whole_lines = room // len(filler)
        body = haystack(filler, room, [(round(depth * whole_lines), needle) for depth, needle in needles])
    else:
        rows = {word: token_ids(tokenizer, f"{word}\n") for word in WORDS}
        _check_room(room, _word_list_room(rows, answers), task, length)
        body = _word_list(tokenizer, draw, rows, answers, room)
    return TaskPrompt([*prefix, *body, *end], answers)


def answer_room(tokenizer: Any, task: str) -> int:
    """Tokens to leave for, and to generate as, the answer of a task; each item has two to spare, as for `, and`."""
    return TASKS[task].count * answer_size(tokenizer, TASKS[task].items)


def score(answer: str, answers: Sequence[str]) -> float:
    """
    How right an answer is, from 0 to 1.

    One item: 1 if the answer begins with it, white space aside. Several: the share of them that occur in the answer as
    whole words, in any order; there is no room to list much else.
    """
    if len(answers) == 1:
        return float(answer.lstrip().startswith(answers[0]))
    return sum(re.search(rf"\b{item}\b", answer) is not None for item in answers) / len(answers)


def _check_room(room: int, least: int, task: str, length: int) -> None:
    if room < least:
        raise InvalidParameterError(
            f"a prompt of the task {task!r} needs {length + least - room} tokens, and one length is {length}; "
            "leave out the length, or the task"
        )


def _word_list_room(rows: Mapping[str, list[int]], common: Sequence[str]) -> int:
    """Tokens of the shortest list: the common words are there twice."""
    return math.ceil(2 * sum(len(rows[word]) for word in common) / COMMON_SHARE)


def _word_list(
    tokenizer: Any, draw: Random, rows: Mapping[str, list[int]], common: Sequence[str], room: int
) -> list[int]:
    """`room` tokens of words, one a row, shuffled; the other words repeat where they are too few, each as often."""
    words = list(common) * int(COMMON_SHARE * room / sum(len(rows[word]) for word in common))
    left = room - sum(len(rows[word]) for word in words)
    others = draw.sample([word for word in WORDS if word not in common], len(WORDS) - len(common))
    for word in itertools.cycle(others):
        if len(rows[word]) > left:
            break
        words.append(word)
        left -= len(rows[word])
    draw.shuffle(words)
    return haystack(token_ids(tokenizer, FILLER), left, []) + [token for word in words for token in rows[word]]


def _numbers(draw: Random, count: int) -> list[str]:
    return [str(number) for number in draw.sample(range(10_000, 100_000), count)]


def _after(draw: Random, depth: float, count: int) -> list[float]:
    """The depth, and `count - 1` anywhere behind it, ascending."""
    return [depth, *sorted(draw.uniform(depth, 1.0) for _ in range(count - 1))]


def _passkey(draw: Random, depth: float) -> Material:
    (key,) = _numbers(draw, 1)
    return Material([(depth, NEEDLE.format(key=key))], QUESTION, (key,))


def _multi_key(draw: Random, depth: float) -> Material:
    names, keys = draw.sample(WORDS, KEYS), _numbers(draw, KEYS)
    depths = [depth, *(draw.random() for _ in range(KEYS - 1))]
    line = "The pass key of {0} is {1}. Remember it. {1} is the pass key of {0}.\n"
    lines = [(at, line.format(name, key)) for at, name, key in zip(depths, names, keys, strict=True)]
    question = f"What is the pass key of {names[0]}? The pass key of {names[0]} is"
    return Material(sorted(lines), question, (keys[0],))


def _multi_value(draw: Random, depth: float) -> Material:
    name, keys = draw.choice(WORDS), _numbers(draw, VALUES)
    line = "A pass key of {0} is {1}. Remember it. {1} is a pass key of {0}.\n"
    lines = [(at, line.format(name, key)) for at, key in zip(_after(draw, depth, VALUES), keys, strict=True)]
    question = f"What are the {VALUES} pass keys of {name}? The pass keys of {name} are"
    return Material(lines, question, tuple(keys))


def _variable_tracking(draw: Random, depth: float) -> Material:
    names, values = draw.sample(WORDS, 2 * VARIABLES), _numbers(draw, 2)
    lines = []
    for chain, value, start in zip(
        (names[:VARIABLES], names[VARIABLES:]), values, (depth, draw.random()), strict=True
    ):
        assigned = [value, *chain[:-1]]
        places = _after(draw, start, VARIABLES)
        lines += [(at, f"{name} = {to}\n") for at, name, to in zip(places, chain, assigned, strict=True)]
    question = f"Which {VARIABLES} variables are {values[0]}? The variables that are {values[0]} are"
    return Material(sorted(lines, key=lambda line: line[0]), question, tuple(names[:VARIABLES]))


def _common_words(draw: Random, depth: float) -> Material:
    question = f"Which {COMMON} words are the most frequent ones of the list? The most frequent words are"
    return Material([], question, tuple(draw.sample(WORDS, COMMON)))


TASKS = {
    "passkey": Task(_passkey, NUMBERS, 1),
    "multi-key": Task(_multi_key, NUMBERS, 1),
    "multi-value": Task(_multi_value, NUMBERS, VALUES),
    "variable-tracking": Task(_variable_tracking, WORDS, VARIABLES),
    "common-words": Task(_common_words, WORDS, COMMON, has_depth=False),
}
"""The tasks by name."""
