"""Threads for what is read, decoded and encoded: Pillow and zlib let others work meanwhile."""

import concurrent.futures
import itertools
import os
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

S = TypeVar("S")
T = TypeVar("T")


def several_at_a_time(function: Callable[[S], T], items: Iterable[S]) -> Iterator[T]:
    """What a function gives for each of some items, in their order, on all cores.

    Of items and of results, however large, as many are held as there are cores, twice.
    """
    cores = os.cpu_count() or 1
    items = iter(items)
    with concurrent.futures.ThreadPoolExecutor(cores) as pool:
        while some := list(itertools.islice(items, 2 * cores)):
            yield from pool.map(function, some)
