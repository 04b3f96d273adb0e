"""Threads for compiled code that holds no lock."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from functools import cache


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="moesaic")


# A child process has none of its parent's threads.
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_pool.cache_clear)


def in_parts(part: Callable[[int], None], n_parts: int, threads: int) -> None:
    """Call ``part`` with 0 … n_parts − 1, each thread taking the next; the caller is one of them, the others stay.

    An error ends it when the parts that have begun are done, and is raised.
    """
    numbers = iter(range(n_parts))

    def take() -> None:
        for number in numbers:
            part(number)

    others = [_pool(threads - 1).submit(take) for _ in range(min(threads, n_parts) - 1)]
    try:
        take()
        for job in others:
            job.result()
    finally:
        for _ in numbers:
            pass
        wait(others)
