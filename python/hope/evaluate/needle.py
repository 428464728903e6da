"""A needle in a haystack: whether a trained model finds one sentence in a long text.

As the single-needle task of RULER (S-NIAH, arXiv 2404.06654) and passkey retrieval (arXiv
2305.16300): sentences that say nothing, and between two of them one that gives a number; at the end
the number is asked for. All texts are generated.
"""

import itertools
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tqdm import tqdm

from hope.errors import HopeError
from hope.evaluate.aligned import aligned
from hope.evaluate.reader import Reader

FILLER = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
DIGITS = 5
_NEEDLE = "The pass key is {key}. Remember it."
_QUESTION = "What is the pass key? The pass key is"


@dataclass(frozen=True)
class Needle:
    """A text that ends with the question for a number in it, and the answers to choose from.

    text: without the separator in front. key: the right one of choices, which all differ and have
    as many digits; an answer in a text has a space before it.
    """

    text: str
    key: str
    choices: tuple[str, ...]


def make_needle(
    reader: Reader,
    length: int,
    depth: float,
    random_: random.Random,
    *,
    choices: int = 10,
    sentences: Sequence[str] = (),
) -> Needle:
    """A text of at most `length` tokens of the reader, the separator in front and the answer
    included, with as many sentences as fit.

    depth: the needle's place, from 0 (it begins the text) to 1 (the question follows it). choices:
    from how many numbers to choose. sentences: the haystack, repeated as often as needed; none:
    those of FILLER.
    """
    if not 0 <= depth <= 1:
        raise HopeError(f"depth must be between 0 and 1, not {depth}")
    if not 2 <= choices <= 9 * 10 ** (DIGITS - 1):
        raise HopeError(f"choices must be between 2 and {9 * 10 ** (DIGITS - 1)}, not {choices}")
    keys = random_.sample(range(10 ** (DIGITS - 1), 10**DIGITS), choices)
    names = tuple(map(str, keys))
    sentences = sentences or _sentences(FILLER)
    room = length - 1 - max(len(reader.encode(f" {name}")) for name in names)

    def text(count: int) -> str:
        before = round(depth * count)
        hay = [sentences[i % len(sentences)] for i in range(count)]
        needle = _NEEDLE.format(key=names[0])
        return " ".join([*hay[:before], needle, *hay[before:], _QUESTION])

    def fits(count: int) -> bool:
        return len(reader.encode(text(count))) <= room

    if not fits(0):
        least = len(reader.encode(text(0))) + length - room
        raise HopeError(f"length must be at least {least} for the needle alone, not {length}")
    low, high = 0, 1  # low sentences fit
    while fits(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    shuffled = random_.sample(names, choices)
    return Needle(text(low), names[0], tuple(shuffled))


def haystack(text: str) -> list[str]:
    """The sentences of a text, to hide a needle among; HopeError if it has less than two."""
    found = _sentences(text)
    if len(found) < 2:
        raise HopeError(f"a haystack must have at least two sentences, not {len(found)}")
    return found


def _sentences(text: str) -> list[str]:
    return [part for part in re.split(r"(?<=[.!?])\s+", " ".join(text.split())) if part]


def find(reader: Reader, needles: Sequence[Needle]) -> list[dict[str, Any]]:
    """What a model answers: for each needle `ranked`, `written`, and whether each is right.

    ranked: the choice with the largest probability. written: what the model writes, always its
    likeliest token, as far as the key is long. A text is read once: all answers start from the
    state after it, but for its last token, which every answer begins with.
    """
    results = []
    for begin in range(0, len(needles), reader.batch):
        some = needles[begin : begin + reader.batch]
        texts = [[reader.tokenizer.separator, *reader.encode(needle.text)] for needle in some]
        states = reader.states([text[:-1] for text in texts])
        for needle, text, state in zip(some, texts, states, strict=True):
            answers = [[text[-1], *reader.encode(f" {name}")] for name in needle.choices]
            scores = reader.score(answers, [1] * len(answers), state)
            ranked = needle.choices[max(range(len(scores)), key=lambda i: scores[i][0])]
            written = _write(reader, text[-1], state, len(f" {needle.key}".encode()))
            results.append(
                {
                    "key": needle.key,
                    "ranked": ranked,
                    "written": written,
                    "ranked_right": ranked == needle.key,
                    "written_right": written == f" {needle.key}",
                }
            )
    return results


def _write(reader: Reader, token: int, state: Any, size: int) -> str:
    """`size` bytes, or fewer if the model ends the text."""
    tokens: list[int] = []
    for following in itertools.islice(reader.continuation(token, state), size):
        tokens.append(following)
        if len(reader.tokenizer.decode(tokens)) >= size:
            break
    return reader.tokenizer.decode(tokens)[:size].decode(errors="replace")


def search(
    reader: Reader,
    lengths: Sequence[int],
    depths: Sequence[float],
    *,
    examples: int = 20,
    choices: int = 10,
    seed: int = 0,
    sentences: Sequence[str] = (),
    progress: bool = True,
) -> list[dict[str, Any]]:
    """The share of needles found, for every length and depth: `ranked`, `written` and examples.

    The same arguments give the same needles. sentences: of the haystack (FILLER's without any).
    """
    if examples < 1:
        raise HopeError(f"examples must be at least 1, not {examples}")
    results = []
    grid = [(length, depth) for length in lengths for depth in depths]
    for length, depth in tqdm(grid, desc="needles", leave=False, disable=not progress):
        random_ = random.Random(f"{seed} {length} {depth}")
        needles = [
            make_needle(reader, length, depth, random_, choices=choices, sentences=sentences)
            for _ in range(examples)
        ]
        answers = find(reader, needles)
        results.append(
            {
                "length": length,
                "depth": depth,
                "examples": examples,
                "ranked": sum(answer["ranked_right"] for answer in answers) / examples,
                "written": sum(answer["written_right"] for answer in answers) / examples,
                "answers": answers,
            }
        )
    return results


def table(results: Sequence[dict[str, Any]]) -> str:
    """A line for each length, a column for each depth: shares ranked right / written right."""
    depths = list(dict.fromkeys(result["depth"] for result in results))
    cells = {(r["length"], r["depth"]): f"{r['ranked']:.2f} / {r['written']:.2f}" for r in results}
    lengths = dict.fromkeys(result["length"] for result in results)
    rows = [("length", *(f"depth {depth:g}" for depth in depths))]
    rows += [(f"{n:,}", *(cells[n, depth] for depth in depths)) for n in lengths]
    return aligned(rows)
