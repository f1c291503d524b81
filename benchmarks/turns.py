"""Contenders take turns: in each round all are measured once, in an order that changes."""

from __future__ import annotations

from collections.abc import Callable, Sequence

Measured = list[float] | Exception


def order(contenders: int, number: int) -> list[int]:
    """Who is measured when in round ``number``: another one begins, and every other round runs backwards.

    Whoever runs finds the caches of whoever ran before, which so is not the same contender each time.
    """
    turned = [(turn + number // 2) % contenders for turn in range(contenders)]
    return turned if number % 2 == 0 else turned[::-1]


def take_turns(measures: Sequence[Callable[[], float]], rounds: int) -> list[Measured]:
    """What each measure returned in every round; of one that raised, the error: it has no more turns."""
    found: list[Measured] = [[] for _ in measures]
    for number in range(rounds):
        for which in order(len(measures), number):
            own = found[which]
            if isinstance(own, list):
                try:
                    own.append(measures[which]())
                except Exception as error:  # one that fails must not take the others' measurements with it
                    found[which] = error
    return found
