from __future__ import annotations

import errno
import fcntl
import os
import signal
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

from moesaic.bench.lock import LOCK_FILE, RunLock
from moesaic.bench.plan import InputError

HOLDER = """
import sys
from pathlib import Path
from moesaic.bench.lock import RunLock
RunLock(Path(sys.argv[1])).acquire()
print("held", flush=True)
sys.stdin.read()
"""


def test_a_killed_holder_gives_the_lock_back(tmp_path: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER, tmp_path], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"held\n"
        with pytest.raises(InputError, match=rf"--out {tmp_path}: .*\(host \S+, process {holder.pid}, since 20\S+\)"):
            RunLock(tmp_path).acquire()
        holder.send_signal(signal.SIGKILL)
        holder.wait()
    assert (tmp_path / LOCK_FILE).exists()
    with RunLock(tmp_path) as lock:
        lock.acquire()


def test_the_lock_ends_with_the_block_and_begins_with_acquire(tmp_path: Path) -> None:
    with RunLock(tmp_path):
        assert list(tmp_path.iterdir()) == []
    with RunLock(tmp_path) as lock:
        lock.acquire()
        with pytest.raises(InputError, match="another sweep is writing there"):
            RunLock(tmp_path).acquire()
    with RunLock(tmp_path) as lock:
        lock.acquire()


def test_a_holder_that_has_not_said_who_it_is_holds_it_too(tmp_path: Path) -> None:
    with (tmp_path / LOCK_FILE).open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(InputError, match="it began a moment ago"):
            RunLock(tmp_path).acquire()


def test_a_forked_child_does_not_hold_the_lock_of_a_dead_driver(tmp_path: Path) -> None:
    with RunLock(tmp_path) as lock:
        lock.acquire()
        reading, writing = os.pipe()
        begun, begins = os.pipe()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # of forks of processes with threads
            child = os.fork()
        if child == 0:
            os.close(writing)
            os.write(begins, b"1")
            os.read(reading, 1)
            os._exit(0)
        os.close(reading)
        os.read(begun, 1)  # the child gives the lock back as it begins
    try:
        with RunLock(tmp_path) as lock:
            lock.acquire()
    finally:
        for descriptor in (writing, begun, begins):
            os.close(descriptor)
        os.waitpid(child, 0)


def test_what_was_made_for_nothing_is_removed(tmp_path: Path) -> None:
    deep = tmp_path / "a" / "b"
    with RunLock(deep) as lock:
        lock.acquire()
        with pytest.raises(InputError, match="another sweep"), RunLock(deep) as second:
            second.acquire()
        assert (deep / LOCK_FILE).exists()
    assert list(tmp_path.iterdir()) == []
    with RunLock(deep) as lock:
        lock.acquire()
        (tmp_path / "a" / "file").touch()
    assert list((tmp_path / "a").iterdir()) == [tmp_path / "a" / "file"]
    with RunLock(deep) as lock:
        lock.acquire()
        lock.keep()
    with RunLock(deep) as lock:
        lock.acquire()
    assert (deep / LOCK_FILE).exists()


def test_a_lock_file_that_its_maker_removed_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flock, folder = fcntl.flock, tmp_path / "run"

    def too_late(descriptor: int, operation: int) -> None:
        monkeypatch.setattr(fcntl, "flock", flock)
        (folder / LOCK_FILE).unlink()
        folder.rmdir()
        flock(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", too_late)
    with RunLock(folder) as lock:
        lock.acquire()
        with pytest.raises(InputError, match="another sweep"):
            RunLock(folder).acquire()
    assert not folder.exists()


def test_a_file_system_without_locks_is_said_and_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(number: int) -> None:
        def flock(descriptor: int, operation: int) -> None:
            raise OSError(number, os.strerror(number))

        monkeypatch.setattr(fcntl, "flock", flock)

    fail(errno.ENOLCK)
    with RunLock(tmp_path) as lock:
        lock.acquire()
    assert "this file system has no locks (No locks available)" in capsys.readouterr().err
    fail(errno.EIO)
    with RunLock(tmp_path) as lock, pytest.raises(OSError, match="Input/output"):
        lock.acquire()
