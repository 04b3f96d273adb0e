"""One writer per run folder: a lock that the kernel gives back however its holder ends.

The lock is `flock` on the open file ``.lock`` of the run folder, so SIGKILL, a crash and a power cut release it, and
the file that stays behind means nothing. What it holds is only for the message: who writes there and since when. Where
the file system has no locks the sweep says so and goes on, because there the size check of `RunStore.append` still ends
a second writer before it damages a row. Reading a run folder needs no lock.
"""

from __future__ import annotations

import contextlib
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
    """The right to write into a run folder, from `acquire` to the end of the ``with`` block.

    What `acquire` had to make is removed at the end of the block unless `keep` was called.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = Path(folder)
        self._path = self.folder / LOCK_FILE
        self._descriptor: int | None = None
        self._made: list[Path] = []  # the innermost first
        _held.add(self)

    def __enter__(self) -> RunLock:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._withdraw()
        self.release()

    def keep(self) -> None:
        """Says that the folder is to stay."""
        self._made = []

    def release(self) -> None:
        """Gives the lock back, if it is held."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def acquire(self) -> None:
        """Make the folder where it is missing, take its lock and write down who has it.

        Raises:
            InputError: another sweep holds it, saying host, process and since when.
            OSError: the folder cannot be made or written.
        """
        made: list[Path] = []
        while self._descriptor is None:
            made += [path for path in (self.folder, *self.folder.parents) if not path.exists()]
            self.folder.mkdir(parents=True, exist_ok=True)
            made = made if self._path.exists() else [self._path, *made]
            try:
                # Without O_TRUNC: until the lock is ours, the words in it are another's.
                self._descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
            except FileNotFoundError:
                if self.folder.is_dir():
                    raise
                continue
            try:
                self._lock(self._descriptor)
            except BaseException:
                self.release()
                raise
            if not _is_at(self._descriptor, self._path):  # who made it has withdrawn meanwhile
                self.release()
        self._made = made
        mine = {"host": socket.gethostname(), "pid": os.getpid(), "since": environment.now()}
        os.ftruncate(self._descriptor, 0)
        os.pwrite(self._descriptor, json.dumps(mine).encode(), 0)

    def _lock(self, descriptor: int) -> None:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(
                f"--out {self.folder}: another sweep is writing there ({_holder(descriptor)}); "
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

    def _withdraw(self) -> None:
        """Removes what this lock made, while it is held; a folder that holds something stays."""
        for path in self._made:
            with contextlib.suppress(OSError):
                path.unlink() if path == self._path else path.rmdir()
        self._made = []


def _is_at(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


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
