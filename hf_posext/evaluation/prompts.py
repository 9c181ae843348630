"""Prompts that hide information in a long text: passkeys, and five tasks modelled on RULER.

Mohtashami and Jaggi, 2023: Landmark Attention, https://arxiv.org/abs/2305.16300.
Hsieh et al., 2024: RULER: What's the Real Context Size of Your Long-Context Language Models?,
https://arxiv.org/abs/2404.06654. Scores are not comparable with RULER's: texts, names, answers, and lengths differ.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any, NamedTuple

from ..errors import InvalidParameterError
from .tokens import Bos, special_prefix, token_ids

FILLER = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again.\n"
NEEDLE = "The pass key is {key}. Remember it. {key} is the pass key.\n"
QUESTION = "What is the pass key? The pass key is"
SLACK = 2
"""Spare tokens of an answer. A tokenizer may split it into more tokens after a text than alone."""

KEYS, VALUES, VARIABLES, COMMON = 4, 3, 4, 3
"""Keys in the text (one is requested), values per key, variables per chain, and requested common words."""

COMMON_SHARE = 0.3
"""Share of a word list taken by all its common words together."""

NUMBERS = tuple(str(number) for number in range(10_007, 100_000, 997))
"""Sample of five-digit numbers, used to measure how many tokens a number takes."""

TEXT = "[[TEXT]]"
"""Placeholder of the text in a chat message. The tokens of the text replace it."""

CHAT_DATE = "26 Jul 2024"
"""Date of all chats, so prompts do not depend on the day. Templates read `date_string` (Llama 3) or call
`strftime_now` (SmolLM3, Granite)."""

FIXED_DAY = f"{{% macro strftime_now(format) %}}{CHAT_DATE}{{% endmacro %}}"

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
    """Lines to hide, with depths from 0 to 1 in ascending order, the question, and its answers."""

    lines: list[tuple[float, str]]
    question: str
    answers: tuple[str, ...]


@dataclass(frozen=True)
class Task:
    """Retrieval task. `write` creates the material at a depth. The answer has `count` items like those in `items`."""

    write: Callable[[Random, float], Material]
    items: Sequence[str]
    count: int
    has_depth: bool = True


@dataclass(frozen=True)
class Prompt:
    """Prompt of one trial.

    Args:
        tokens (`list[int]`): the prompt. With `room` for its answer it has the requested length.
        answers (`tuple[str, ...]`): the expected items.
        room (`int`): tokens to generate as the answer.
        depth (`float`, *optional*): depth of the hidden lines, from 0 (beginning) to 1 (end); `None` for a task
            without depth.
    """

    tokens: list[int]
    answers: tuple[str, ...]
    room: int
    depth: float | None


def frame(tokenizer: Any, question: str, bos: Bos = "auto", chat: bool = False) -> tuple[list[int], list[int]]:
    """Return the tokens before the text of a prompt, and those after it with the question.

    Without `chat` they are the special prefix and the question. With `chat`, text and question are the user's message
    in the tokenizer's chat template. The assistant's message begins with the opening of the answer (`The pass key
    is`), as in RULER, so both forms are scored alike. The template determines the special tokens, and `bos` is
    ignored.

    Raises:
        InvalidParameterError: no chat template, or one that does not render.
    """
    if chat:
        before, after = chat_frame(tokenizer, question)
        return token_ids(tokenizer, before), token_ids(tokenizer, after)
    return special_prefix(tokenizer, bos), token_ids(tokenizer, question)


def chat_frame(tokenizer: Any, question: str) -> tuple[str, str]:
    """Return the rendered chat before the text, and after it with the question and the opening of the answer."""
    request, _, opening = question.partition("? ")
    name = type(tokenizer).__name__
    if not getattr(tokenizer, "chat_template", None):
        raise InvalidParameterError(
            f"Expected a tokenizer with a chat template for chat=True, got {name} without one. "
            "Pass the tokenizer of a chat model, or leave chat out."
        )
    try:
        chat = tokenizer.apply_chat_template(
            [{"role": "user", "content": f"{TEXT}{request}?"}],
            chat_template=FIXED_DAY + tokenizer.get_chat_template(),
            tokenize=False,
            add_generation_prompt=True,
            date_string=CHAT_DATE,
        )
    except Exception as error:  # a template is code from outside, and may raise anything
        raise InvalidParameterError(
            f"Expected the chat template of {name} to render one message of a user, got "
            f"{' '.join(str(error).split())}. Leave chat out."
        ) from error
    parts = chat.split(TEXT)
    if len(parts) != 2:
        raise InvalidParameterError(
            f"Expected the chat template of {name} to contain the message of the user once, got it "
            f"{len(parts) - 1} times. Leave chat out."
        )
    space = "" if parts[1][-1:].isspace() else " "
    return parts[0], f"{parts[1]}{space}{opening}"


def passkey_prompts(
    tokenizer: Any, length: int, trials: int, seed: int, bos: Bos = "auto", chat: bool = False
) -> list[Prompt]:
    """Return passkey prompts of equal size, the same for every model and method.

    The key and its depth depend only on `(seed, length, trial)`. The filler is truncated at its beginning to fit. The
    key is on its own line, between whole lines of filler.

    Raises:
        InvalidParameterError: the length does not hold the key and the question, or no chat template.
    """
    begin, end = frame(tokenizer, QUESTION, bos, chat)
    filler = token_ids(tokenizer, FILLER)
    draws = [Random(f"{seed}-{length}-{trial}") for trial in range(trials)]
    keys = [f"{draw.randint(10_000, 99_999)}" for draw in draws]
    answer = answer_size(tokenizer, keys)
    prompts = []
    for draw, key in zip(draws, keys, strict=True):
        needle = token_ids(tokenizer, NEEDLE.format(key=key))
        room = _room(length, "passkey", begin, needle, end, answer)
        lines, rest = divmod(room, len(filler))
        before = draw.randint(0, lines)
        tokens = [*begin, *haystack(filler, room, [(before, needle)]), *end]
        prompts.append(Prompt(tokens, (key,), answer, (rest + before * len(filler)) / max(1, room)))
    return prompts


def task_prompt(
    tokenizer: Any,
    task: str,
    length: int,
    depth: float | None,
    *,
    trial: int = 0,
    seed: int = 0,
    bos: Bos = "auto",
    chat: bool = False,
) -> Prompt:
    """Return a prompt of exactly `length` tokens minus [`answer_room`], the same for every model and method.

    The prompt depends only on the tokenizer and `(seed, task, length, depth, trial)`. Hidden lines are inserted
    between whole lines of filler, which is truncated at its beginning to fit. The depth, from 0 (beginning) to 1
    (end), is rounded to whole lines.

    | task | hidden | depth of | answer |
    |---|---|---|---|
    | `passkey` | a number | the number | the number |
    | `multi-key` | four numbers, each with a name | the requested one; the rest are anywhere | its number |
    | `multi-value` | three numbers with one name | the first; the rest follow anywhere | all three numbers |
    | `variable-tracking` | `a = 12345`, `b = a`, ... and a second chain | the first assignment | all four names |
    | `common-words` | a list of words, 30 % of it three words in equal parts | (none) | the three words |

    Raises:
        InvalidParameterError: the length does not hold the hidden lines, or no chat template.
    """
    draw = Random(f"{seed}-{task}-{length}-{depth}-{trial}")
    lines, question, answers = TASKS[task].write(draw, depth or 0.0)
    begin, end = frame(tokenizer, question, bos, chat)
    answer = answer_room(tokenizer, task)
    if lines:
        filler = token_ids(tokenizer, FILLER)
        needles = [(place, token_ids(tokenizer, line)) for place, line in lines]
        hidden = [token for _, needle in needles for token in needle]
        room = _room(length, task, begin, hidden, end, answer)
        whole_lines = room // len(filler)
        body = haystack(filler, room, [(round(place * whole_lines), needle) for place, needle in needles])
    else:
        rows = {word: token_ids(tokenizer, f"{word}\n") for word in WORDS}
        # The shortest list contains the common words twice.
        least = math.ceil(2 * sum(len(rows[word]) for word in answers) / COMMON_SHARE)
        room = _room(length, task, begin, [], end, answer, least)
        body = _word_list(tokenizer, draw, rows, answers, room)
    return Prompt([*begin, *body, *end], answers, answer, depth)


def haystack(filler: list[int], room: int, needles: Sequence[tuple[int, list[int]]]) -> list[int]:
    """Return filler with needles: `room` tokens of filler, truncated at its beginning, plus all needles.

    Each needle is a pair of the number of whole filler lines before it (ascending) and its tokens.
    """
    lines, rest = divmod(room, len(filler))
    tokens, written = filler[len(filler) - rest :], 0
    for before, needle in needles:
        tokens += [*filler * (before - written), *needle]
        written = before
    return tokens + filler * (lines - written)


def answer_size(tokenizer: Any, items: Sequence[str]) -> int:
    """Return the number of tokens to reserve for one item of an answer."""
    return SLACK + max(len(token_ids(tokenizer, f" {item}")) for item in items)


def answer_room(tokenizer: Any, task: str) -> int:
    """Return the number of tokens of a task's answer. Each item has two spare tokens, for example for `, and`."""
    return TASKS[task].count * answer_size(tokenizer, TASKS[task].items)


def _room(
    length: int, task: str, begin: list[int], hidden: list[int], end: list[int], answer: int, least: int = 0
) -> int:
    """Return the number of tokens left for filler or a list. Fewer than `least` is an error."""
    room = length - len(begin) - len(hidden) - len(end) - answer
    if room < least:
        raise InvalidParameterError(
            f"Expected lengths of {length + least - room} tokens or more for a prompt of the task {task!r}, "
            f"got {length}. Leave out the length, or the task."
        )
    return room


def _word_list(
    tokenizer: Any, draw: Random, rows: Mapping[str, list[int]], common: Sequence[str], room: int
) -> list[int]:
    """Return `room` tokens of shuffled words, one per line. Other words repeat equally often if they are too few."""
    words = list(common) * int(COMMON_SHARE * room / sum(len(rows[word]) for word in common))
    rest = room - sum(len(rows[word]) for word in words)
    rare = draw.sample([word for word in WORDS if word not in common], len(WORDS) - len(common))
    for word in itertools.cycle(rare):
        if len(rows[word]) > rest:
            break
        words.append(word)
        rest -= len(rows[word])
    draw.shuffle(words)
    return haystack(token_ids(tokenizer, FILLER), rest, []) + [token for word in words for token in rows[word]]


def _numbers(draw: Random, count: int) -> list[str]:
    return [str(number) for number in draw.sample(range(10_000, 100_000), count)]


def _after(draw: Random, depth: float, count: int) -> list[float]:
    """Return the depth and `count - 1` random depths after it, in ascending order."""
    return [depth, *sorted(draw.uniform(depth, 1.0) for _ in range(count - 1))]


def _passkey(draw: Random, depth: float) -> Material:
    (key,) = _numbers(draw, 1)
    return Material([(depth, NEEDLE.format(key=key))], QUESTION, (key,))


def _multi_key(draw: Random, depth: float) -> Material:
    names, keys = draw.sample(WORDS, KEYS), _numbers(draw, KEYS)
    depths = [depth, *(draw.random() for _ in range(KEYS - 1))]
    line = "The pass key of {0} is {1}. Remember it. {1} is the pass key of {0}.\n"
    lines = [(place, line.format(name, key)) for place, name, key in zip(depths, names, keys, strict=True)]
    question = f"What is the pass key of {names[0]}? The pass key of {names[0]} is"
    return Material(sorted(lines), question, (keys[0],))


def _multi_value(draw: Random, depth: float) -> Material:
    name, keys = draw.choice(WORDS), _numbers(draw, VALUES)
    line = "A pass key of {0} is {1}. Remember it. {1} is a pass key of {0}.\n"
    lines = [(place, line.format(name, key)) for place, key in zip(_after(draw, depth, VALUES), keys, strict=True)]
    question = f"What are the {VALUES} pass keys of {name}? The pass keys of {name} are"
    return Material(lines, question, tuple(keys))


def _variable_tracking(draw: Random, depth: float) -> Material:
    names, values = draw.sample(WORDS, 2 * VARIABLES), _numbers(draw, 2)
    lines = []
    for chain, value, start in zip(
        (names[:VARIABLES], names[VARIABLES:]), values, (depth, draw.random()), strict=True
    ):
        places, sources = _after(draw, start, VARIABLES), [value, *chain[:-1]]
        lines += [(place, f"{name} = {source}\n") for place, name, source in zip(places, chain, sources, strict=True)]
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
"""Retrieval tasks by name."""
