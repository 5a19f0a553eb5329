"""Processes are forked at rest: not while another thread may hold what their children want."""

import hashlib
import itertools
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from simclr_scale.data import forking

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="elsewhere processes are not forked")

# A thread enters Python without the GIL, again and again: lfind calls what it is given until that returns 0. Much of
# the time it holds the lock that a child of Python 3.11 wants.
FORKS_BESIDE_A_THREAD = """
import ctypes, os, sys, threading, time
if sys.argv[1] == "at rest":
    import simclr_scale.data
libc, python = ctypes.CDLL(None), ctypes.pythonapi
python.PyInterpreterState_Get.restype = ctypes.c_void_p
interpreter = ctypes.c_void_p(python.PyInterpreterState_Get())
enter = ctypes.cast(python.PyThreadState_New, ctypes.c_void_p)

def enter_again_and_again():
    times = ctypes.c_size_t(20_000)
    libc.lfind(interpreter, None, ctypes.byref(times), ctypes.c_size_t(0), enter)

for _ in range(int(sys.argv[2])):
    thread = threading.Thread(target=enter_again_and_again)
    thread.start()
    time.sleep(0.0005)
    child = os.fork()
    if child == 0:
        os._exit(0)
    for _ in range(2000):
        if os.waitpid(child, os.WNOHANG)[0]:
            break
        time.sleep(0.001)
    else:
        os.kill(child, 9)
        os.waitpid(child, 0)
        print("hangs")
        break
    thread.join()
"""


def forks_beside_a_thread(how: str, times: int) -> str:
    path = os.pathsep.join([str(Path(__file__).parents[2]), *filter(None, sys.path)])
    return subprocess.run(
        [sys.executable, "-c", FORKS_BESIDE_A_THREAD, how, str(times)],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": path},
    ).stdout.strip()


def test_no_child_hangs() -> None:
    assert forks_beside_a_thread("at rest", 12) == ""


def test_without_the_wait_children_hang_where_python_has_the_fault() -> None:
    """About every third, so that the test above can fail. Later releases of Python 3.11 may be mended."""
    hangs = forks_beside_a_thread("at once", 40) == "hangs"
    if sys.version_info < (3, 11, 8):
        assert hangs
    elif sys.version_info >= (3, 12):
        assert not hangs


def test_it_takes_two_looks_in_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    looks = iter([True, False, True, True, False, False])
    monkeypatch.setattr(forking, "_LONGEST_WAIT", 60.0)
    monkeypatch.setattr(forking, "_others_run", lambda: next(looks))
    forking.wait_for_other_threads()
    assert list(looks) == []


def test_a_thread_that_never_rests_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    looks = itertools.repeat(True, 10_000)
    monkeypatch.setattr(forking, "_LONGEST_WAIT", 0.01)
    monkeypatch.setattr(forking, "_others_run", lambda: next(looks))
    forking.wait_for_other_threads()
    assert next(looks), "it looked without end"


def test_threads_that_run_and_that_sleep() -> None:
    ends = threading.Event()

    def work() -> None:
        while not ends.is_set():
            hashlib.pbkdf2_hmac("sha256", b"", b"", 100_000)  # without the GIL

    thread = threading.Thread(target=work)
    thread.start()
    try:
        wait_until(forking._others_run)
    finally:
        ends.set()
        thread.join()
    sleeper = threading.Thread(target=(wake := threading.Event()).wait)
    sleeper.start()
    try:
        wait_until(lambda: not forking._others_run())
        assert sleeper.is_alive()
    finally:
        wake.set()
        sleeper.join()


def wait_until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.001)
