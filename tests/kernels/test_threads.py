from __future__ import annotations

import os
import threading

import pytest

from moesaic.kernels._threads import in_parts


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_every_part_is_called_once(threads: int) -> None:
    for n_parts in (0, 1, 2, 13):
        seen: list[int] = []
        in_parts(seen.append, n_parts, threads)
        assert sorted(seen) == list(range(n_parts))


def test_an_error_of_a_part_is_raised() -> None:
    def part(number: int) -> None:
        if number == 3:
            raise ValueError("part 3")

    with pytest.raises(ValueError, match="part 3"):
        in_parts(part, 5, 2)


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_parts_run_in_other_threads_and_in_a_forked_child() -> None:
    seen: set[int] = set()
    barrier = threading.Barrier(2, timeout=20)

    def part(number: int) -> None:
        barrier.wait()
        seen.add(threading.get_ident())

    in_parts(part, 2, 2)
    assert len(seen) == 2
    child = os.fork()
    if child == 0:
        found: list[int] = []
        in_parts(found.append, 4, 2)
        os._exit(0 if sorted(found) == [0, 1, 2, 3] else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
