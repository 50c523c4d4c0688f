"""A text that is on any machine with Python, the help on its own language, as numbers."""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from hpc_dl.data.streams import Purpose, stream

#: The part of the text that is kept to be tested on: its end.
TEST_PART = 0.1


class Text(NamedTuple):
    """A text to learn from, and another to be tested on."""

    train: NDArray[np.int64]
    test: NDArray[np.int64]
    alphabet: str
    """Number -> character."""


def python_help() -> Text:
    """Load Python's help on its statements and types: half a million characters of English."""
    from pydoc_data.topics import topics

    text = "\n".join(topics[name] for name in sorted(topics))
    alphabet = "".join(sorted(set(text)))
    number = {character: i for i, character in enumerate(alphabet)}
    numbers = np.array([number[character] for character in text], np.int64)
    end = int(len(numbers) * (1 - TEST_PART))
    return Text(numbers[:end], numbers[end:], alphabet)


def windows(
    text: NDArray[np.int64], count: int, length: int, seed: int, step: int, rank: int
) -> NDArray[np.int64]:
    """Cut pieces out of a text at random places, others in each step and on each rank.

    Returns:
        Shape (count, length + 1): each piece and the character that follows it.
    """
    bits = stream(Purpose.WINDOWS, seed, step, rank).random_raw(count)
    starts = (bits % np.uint64(len(text) - length)).astype(np.int64)
    pieces: NDArray[np.int64] = text[starts[:, None] + np.arange(length + 1)]
    return pieces
