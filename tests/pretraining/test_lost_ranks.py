"""Who is lost, from what was heard of all; the beats themselves go through real stores."""

import math
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch.distributed as dist

from simclr_scale.errors import InputError
from simclr_scale.pretraining.lost_ranks import Limits
from simclr_scale.pretraining.lost_ranks.beats import ENDED, FAILED, Exchange, Heard, Pulse, connect_to
from simclr_scale.pretraining.lost_ranks.judgement import (
    Loss,
    cut_off,
    failed,
    gone,
    never_heard,
    silent,
    standing_still,
)
from simclr_scale.pretraining.lost_ranks.limits import AwakeClock
from simclr_scale.pretraining.lost_ranks.processes import Process

LIMITS = Limits.of(1800)
SIZE = 4


def pulse(rank: int, **facts: object) -> Pulse:
    process = Process(f"host{rank}", "space", 100 + rank, "1")
    return replace(Pulse(rank, process, step=7, doing="forward pass"), **facts)  # type: ignore[arg-type]


def world(*, now: float = 10_000.0, **of_rank: Callable[[Heard], object]) -> dict[int, Heard]:
    """Ranks that have just beaten and moved, but for what a function of their own makes of them."""
    heard = {rank: Heard(pulse(rank), now, now, now) for rank in range(SIZE)}
    for name, change in of_rank.items():
        change(heard[int(name.removeprefix("rank"))])
    return heard


NOW = 10_000.0


@pytest.mark.parametrize("timeout", [10, 13, 20, 100, 600, 1800, 86_400])
def test_limits_leave_time_to_tell(timeout: float) -> None:
    """A beat, a look at it, the verdict's way and the end of the last process fit in what is left."""
    limits = Limits.of(timeout)
    for limit in (limits.silence, limits.standstill):
        assert limit + 4.5 * limits.interval <= timeout
    assert limits.silence >= 5 * limits.interval, "one or two beats that are late are no silence"
    assert limits.silence <= limits.standstill


@pytest.mark.parametrize("timeout", [0, -1, 9.9, math.inf, math.nan, 1e9])
def test_limits_that_make_no_sense(timeout: float) -> None:
    with pytest.raises(InputError, match=r"--timeout must be from 10 to 1e\+07 seconds, got "):
        Limits.of(timeout)


def test_a_clock_that_a_suspended_process_does_not_run_down(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([100.0, 101.0, 102.5, 5000.0, 5001.0])
    monkeypatch.setattr(time, "monotonic", lambda: next(times))
    clock = AwakeClock(longest=2.0)
    assert [clock.tick() for _ in range(4)] == [1.0, 2.5, 4.5, 5.5]


def test_all_is_well() -> None:
    heard = world()
    for judge in (silent, failed, standing_still):
        assert judge(heard, NOW, LIMITS, SIZE) is None
    assert gone([], SIZE) is None
    assert never_heard([], 1.0, SIZE) is None


def test_silence() -> None:
    def since(seconds: float) -> Callable[[Heard], None]:
        return lambda heard: setattr(heard, "beat_at", NOW - seconds)

    assert silent(world(rank2=since(LIMITS.silence - 1)), NOW, LIMITS, SIZE) is None
    assert silent(world(rank2=since(200), rank3=since(300)), NOW, LIMITS, SIZE) == Loss(
        "rank 2 of 4 (host2, process 102) has been silent for 200 s, and so has rank 3: it is stopped, its machine "
        "is down or the network is; its last word was of step 7 (forward pass)",
        (2, 3),
    )


def test_one_that_has_ended_may_be_silent_and_stand_still() -> None:
    def ended(heard: Heard) -> None:
        heard.pulse.state, heard.beat_at, heard.moved_at = ENDED, 0.0, 0.0

    heard = world(rank1=ended, rank2=ended, rank3=ended)
    heard[0].moved_at = 0.0  # the last one, which writes what is left to write
    for judge in (silent, failed, standing_still):
        assert judge(heard, NOW, LIMITS, SIZE) is None


def test_an_error_is_given_time_to_come_up_everywhere() -> None:
    def broken(seconds: float) -> Callable[[Heard], None]:
        def change(heard: Heard) -> None:
            heard.pulse.state, heard.pulse.message, heard.state_at = FAILED, "no room", NOW - seconds

        return change

    assert failed(world(rank1=broken(LIMITS.grace - 1)), NOW, LIMITS, SIZE) is None
    assert failed(world(rank1=broken(LIMITS.grace + 1)), NOW, LIMITS, SIZE) == Loss(
        "rank 1 of 4 (host1, process 101) failed in step 7: no room", (1,)
    )


def stuck(position: int, seconds: float = 1795.0, **facts: object) -> Callable[[Heard], None]:
    def change(heard: Heard) -> None:
        heard.pulse = pulse(heard.pulse.rank, position=position, **facts)
        heard.moved_at = NOW - seconds

    return change


def test_the_rank_behind_is_the_one_that_hangs() -> None:
    waiting = stuck(51)
    heard = world(rank0=waiting, rank1=waiting, rank2=stuck(50, doing="waiting for images"), rank3=waiting)
    assert standing_still(heard, NOW, LIMITS, SIZE) == Loss(
        "rank 2 of 4 (host2, process 102) hangs: for 1795 s it has stood in step 7 (waiting for images) while the "
        "others wait",
        (2,),
    )
    heard[3].pulse.position = 50
    loss = standing_still(heard, NOW, LIMITS, SIZE)
    assert loss is not None
    assert loss.ranks == (2, 3)
    assert "as does rank 3, while the others wait" in loss.reason


def test_as_long_as_one_gets_on_nobody_hangs() -> None:
    heard = world(rank0=stuck(51), rank1=stuck(51), rank2=stuck(50, 10.0), rank3=stuck(51))
    assert standing_still(heard, NOW, LIMITS, SIZE) is None


def test_all_stand_in_one_place() -> None:
    heard = world(**{f"rank{rank}": stuck(51, doing="kNN") for rank in range(SIZE)})
    assert standing_still(heard, NOW, LIMITS, SIZE) == Loss(
        "no rank has got on for 1795 s: all 4 stand in step 7 (kNN)", (0, 1, 2, 3)
    )


def test_other_words() -> None:
    loss = gone([pulse(3), pulse(1)], SIZE)
    assert loss == Loss(
        "rank 1 of 4 (host1, process 101) is gone: it was killed, perhaps for want of memory, in step 7 (forward "
        "pass); so is rank 3",
        (1, 3),
    )
    assert Loss.decode(loss.encode()) == loss
    assert never_heard([2], 61, SIZE) == Loss("nothing has been heard of rank 2 of 4 for 61 s", (2,))
    assert cut_off(None, 70, SIZE, "reset").reason == (
        "the store of the process group has not answered for 70 s (reset)"
    )
    assert cut_off(pulse(0), 70, SIZE, None).ranks == (0,)


def test_processes() -> None:
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    here = Process.this()
    assert here.runs()
    assert here.pid == os.getpid()
    stat = Path(f"/proc/{child.pid}/stat").read_text().rpartition(")")[2].split()
    process = replace(here, pid=child.pid, started=stat[19])
    assert process.runs()
    assert process.is_seen_from(here)
    assert not replace(process, started="0").runs(), "another process that has its pid now"
    replace(process, started="0").kill()
    assert child.poll() is None
    process.kill()
    while Path(f"/proc/{child.pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z":
        time.sleep(0.01)
    assert not process.runs(), "a zombie has ended"
    with child:
        pass


def exchanges(size: int, port: int) -> list[Exchange]:
    made = []
    for rank in range(size):
        limits = Limits.of(10)._replace(interval=0.05)
        peers = range(size) if rank == 0 else [0]
        connect = lambda: connect_to("127.0.0.1", port, "test", 5.0)  # noqa: E731
        made.append(Exchange(connect, pulse(rank), peers, limits, AwakeClock(1.0)))
    return made


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_beats_through_a_store() -> None:
    """Of three ranks, the first hears all, each other one the first; a verdict reaches everybody."""
    server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    ranks = exchanges(3, server.port)
    for exchange in ranks:
        exchange.start()
    wait_until(lambda: sorted(ranks[0].heard) == [0, 1, 2] and all(0 in r.heard for r in ranks))
    assert sorted(ranks[2].heard) == [0, 2]
    ranks[1].own.move("backward pass", 8)
    wait_until(lambda: ranks[0].heard[1].pulse.doing == "backward pass")
    assert (ranks[0].heard[1].pulse.step, ranks[0].heard[1].pulse.position) == (8, 1)
    ranks[1].own.move("backward pass", 9)
    wait_until(lambda: ranks[0].heard[1].pulse.moves == 2)
    assert ranks[0].heard[1].pulse.position == 1, "more of the same is progress, and no other place"

    # One that no longer beats is heard of as it was; the clock says for how long.
    ranks[2].close()
    ranks[2]._thread.join()
    rounds = ranks[0].rounds
    wait_until(lambda: ranks[0].rounds > rounds + 1)  # by then its last word has been heard
    ranks[0].clock.now = 5.0
    wait_until(lambda: ranks[0].heard[1].beat_at == 5.0)
    assert ranks[0].heard[2].beat_at < 5.0

    ranks[0].publish(Loss("because", (2,)).encode())
    wait_until(lambda: ranks[1].verdict is not None)
    assert Loss.decode(ranks[1].verdict or "") == Loss("because", (2,))
    for exchange in ranks:
        exchange.close()


def test_a_store_that_goes_away_is_told_and_does_not_end_the_thread() -> None:
    code = (
        "import sys, torch.distributed as d; s = d.TCPStore('127.0.0.1', 0, is_master=True, wait_for_workers=False); "
        "print(s.port, flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as host:
        assert host.stdout is not None
        [exchange] = exchanges(1, int(host.stdout.readline()))
        exchange.start()
        wait_until(lambda: exchange.rounds >= 2)
        assert exchange.failure is None
        host.kill()
    wait_until(lambda: exchange.failure is not None)
    assert re.search("[Cc]onnect|reset|refused|recv|send|Broken pipe", exchange.failure or "")
    exchange.close()
