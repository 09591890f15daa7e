"""Find documents that are almost the same as an earlier one, and documents that contain a question of an exam.

Both compare n-grams of units: a Chinese or Japanese character, or a word of another language, without punctuation.

Near duplicates are found by MinHash: of the signatures of two documents, each number is the same with a probability that is
their Jaccard similarity J, the share of their n-grams that both have. The numbers are compared in bands, and one band that
is the same is enough, so that a document is found with the probability 1 - (1 - J^ROWS)^BANDS: 5% at J = 0.5, 21% at 0.6,
56% at 0.7, 92% at 0.8 and 99.9% at 0.9. No signature is kept, only the keys of the bands (`KeySet`, on the disk).
"""

from __future__ import annotations

import array
import functools
import hashlib
import re
import unicodedata
from collections import Counter

UNIT = re.compile(r"[\u3040-\u30ff\u3400-\u9fff]|[^\W_\u3040-\u30ff\u3400-\u9fff]+")
BANDS, ROWS = 14, 8  # those of FineWeb: https://arxiv.org/abs/2406.17557
DUPLICATE_UNITS = 5  # in an n-gram, for near duplicates
QUESTION_UNITS = 10  # for questions
OVERLAP = 0.8  # of the n-grams of a question that a document contains it with


def ngrams(text: str, n: int) -> list[str]:
    """Return the n-grams of a text, in order; of a shorter text the whole of it, of one without any unit nothing."""
    units = UNIT.findall(unicodedata.normalize("NFKC", text).lower())
    return [" ".join(units[i : i + n]) for i in range(max(len(units) - n, 0) + 1)] if units else []


def band_keys(text: str) -> list[bytes]:
    """Return a key of 8 bytes for each band: texts are near duplicates where they share one. No keys without any unit."""
    from rensa import RMinHash  # type: ignore[import-untyped]

    if not (found := ngrams(text, DUPLICATE_UNITS)):
        return []
    sketch = RMinHash(num_perm=BANDS * ROWS, seed=1)
    sketch.update(found)
    signature = sketch.digest()
    bands = [array.array("I", [i, *signature[i * ROWS : (i + 1) * ROWS]]) for i in range(BANDS)]
    return [hashlib.blake2b(band.tobytes(), digest_size=8).digest() for band in bands]


def contained_question(text: str, questions: tuple[str, ...]) -> str | None:
    """Return the first of the questions that `text` contains; None: none.

    It contains a question if it has OVERLAP of its n-grams. Questions of fewer than QUESTION_UNITS units are not looked
    for: many texts have them by chance.
    """
    index, sizes = _index(questions)
    hits = Counter(i for gram in {*ngrams(text, QUESTION_UNITS)} for i in index.get(gram, ()))
    return next((questions[i] for i in sorted(hits) if hits[i] >= OVERLAP * sizes[i]), None)


def count_too_short(questions: tuple[str, ...]) -> int:
    """Return how many of the questions `contained_question` does not look for."""
    return _index(questions)[1].count(0)


@functools.lru_cache(1)
def _index(questions: tuple[str, ...]) -> tuple[dict[str, list[int]], list[int]]:
    """Return the questions that have each n-gram, and the number of different n-grams of each question."""
    index: dict[str, list[int]] = {}
    sizes = []
    for i, question in enumerate(questions):
        grams = {gram for gram in ngrams(question, QUESTION_UNITS) if gram.count(" ") == QUESTION_UNITS - 1}
        sizes.append(len(grams))
        for gram in grams:
            index.setdefault(gram, []).append(i)
    return index, sizes
