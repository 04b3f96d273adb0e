"""Threads for compiled code that holds no lock."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="moesaic")


# A child process has none of its parent's threads.
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_pool.cache_clear)


def in_parts(part: Callable[[int], None], n_parts: int, threads: int) -> None:
    """Call ``part`` with 0 … n_parts − 1, spread over threads that wait for the next call afterwards."""
    if n_parts <= 1 or threads <= 1:
        for number in range(n_parts):
            part(number)
        return
    jobs = [_pool(threads - 1).submit(part, number) for number in range(1, n_parts)]
    part(0)
    for job in jobs:
        job.result()
