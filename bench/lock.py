"""One writer per run folder: a lock that the kernel gives back however its holder ends.

The lock is `flock` on the open file ``.lock`` of the run folder, so SIGKILL, a crash and a power cut release it, and
the file that stays behind means nothing. What it holds is only for the message: who writes there and since when. Where
the file system has no locks the sweep says so and goes on, because there the size check of `RunStore.append` still ends
a second writer before it damages a row. Reading a run folder needs no lock.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
import sys
import weakref
from pathlib import Path
from types import TracebackType

from moesaic.bench import environment
from moesaic.bench.plan import InputError

LOCK_FILE = ".lock"
WITHOUT_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)
"""What `flock` answers on file systems that cannot."""


_held: weakref.WeakSet[RunLock] = weakref.WeakSet()


class RunLock:
    """The right to write into a run folder, from `acquire` to the end of the ``with`` block."""

    def __init__(self, folder: Path) -> None:
        self.folder = Path(folder)
        self._descriptor: int | None = None
        _held.add(self)

    def __enter__(self) -> RunLock:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()

    def release(self) -> None:
        """Gives the lock back, if it is held."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def acquire(self) -> None:
        """Take the lock of an existing folder and write down who has it.

        Raises:
            InputError: another sweep holds it, saying host, process and since when.
            OSError: the folder cannot be written.
        """
        # Opened without O_TRUNC: until the lock is ours, the words in it are another's.
        self._descriptor = os.open(self.folder / LOCK_FILE, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(
                f"--out {self.folder}: another sweep is writing there ({_holder(self._descriptor)}); "
                "wait for it, end it, or name another folder"
            ) from None
        except OSError as error:
            if error.errno not in WITHOUT_LOCKS:
                raise
            print(
                f"--out {self.folder}: this file system has no locks ({error.strerror}); see to it that no second "
                "sweep writes there",
                file=sys.stderr,
            )
        mine = {"host": socket.gethostname(), "pid": os.getpid(), "since": environment.now()}
        os.ftruncate(self._descriptor, 0)
        os.pwrite(self._descriptor, json.dumps(mine).encode(), 0)


def _holder(descriptor: int) -> str:
    try:
        words = json.loads(os.pread(descriptor, 4096, 0))
        return f"host {words['host']}, process {words['pid']}, since {words['since']}"
    except (ValueError, KeyError, TypeError):
        return "it began a moment ago"


def _release_all() -> None:
    for lock in _held:
        lock.release()


# A forked child shares the open file, and would hold the lock after the driver's death.
os.register_at_fork(after_in_child=_release_all)
