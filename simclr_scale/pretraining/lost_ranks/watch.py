"""Notices that a rank is lost, and ends this process: the main thread may wait for that rank for ever."""

import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from simclr_scale.pretraining.lost_ranks import judgement
from simclr_scale.pretraining.lost_ranks.beats import ENDED, FAILED, RUNNING, Exchange, Heard, Pulse
from simclr_scale.pretraining.lost_ranks.judgement import Loss
from simclr_scale.pretraining.lost_ranks.limits import AwakeClock, Limits
from simclr_scale.pretraining.lost_ranks.processes import kill_own_workers


@dataclass
class Watch:
    """A thread that judges what an :class:`Exchange` hears, and ends the process where a rank is lost.

    Rank 0 hears all ranks, judges them and tells the others; every other one hears rank 0 and those of its machine.
    So the work grows with the ranks, not with their square, and a rank that is killed is missed at once where others
    share its machine.

    Args:
        pulse: of this rank.
        size: number of ranks.
        limits: of silence and standstill.
        say: prints a verdict for the user.
        tidy: called before the sudden end, for instance to give the terminal its cursor back.
    """

    pulse: Pulse
    size: int

    limits: Limits
    say: Callable[[str], None]
    tidy: Callable[[], None]
    launched: Mapping[int, "subprocess.Popen[bytes]"] = field(default_factory=dict)  # by this process, by rank

    def __post_init__(self) -> None:
        self.clock = AwakeClock(longest=2 * self.limits.interval)
        self.exchange: Exchange | None = None
        self._closed = threading.Event()
        self._missed: dict[int, int] = {}  # processes found to be gone, and the round of the exchange at the time
        self._child_failed_at: float | None = None
        self._failed_at = self._joined_at = 0.0
        self.ends = False
        self.waits_for_verdict = False  # the main thread has lost its connections: the watch is to say why
        self._thread = threading.Thread(target=self._run, daemon=True, name="rank-watch")

    def start(self) -> None:
        self._thread.start()

    def join(self, exchange: Exchange) -> None:
        """From now on other ranks can be heard."""
        self._joined_at = self.clock.now
        exchange.start()
        self.exchange = exchange

    def failing(self, message: str, state: str = FAILED) -> None:
        """The main thread of this rank is about to end by itself, with an error or (ENDED) without.

        Does not return where the watch is ending the process: what fails then fails because of that.
        """
        if self.ends:
            threading.Event().wait()
        # In this order: the other thread looks at the time as soon as it sees the state.
        self._failed_at = self.clock.now
        self.pulse.message = message
        self.pulse.state = state
        if self.exchange is not None:
            self.exchange.hurry()

    def close(self) -> bool:
        """Ends the watch, once the others have heard that this rank ends.

        The first rank, which may host the store and may have launched the others, leaves last.

        Returns:
            Whether another rank of this machine tells the error of this one already.
        """
        if self.pulse.state == RUNNING:
            self.failing("", ENDED)
        others_tell = False
        if self.exchange is not None:
            others_tell = self._take_leave(self.exchange)
            self.exchange.close()
        failed = self.pulse.state == FAILED
        self._wait_for_launched(self.limits.grace if failed else self.limits.silence)
        if failed:
            self._kill_launched()
        self._closed.set()
        self._thread.join(self.limits.interval)
        return others_tell

    def _take_leave(self, exchange: Exchange) -> bool:
        patience = self.limits.silence if self.pulse.state == ENDED else self.limits.grace
        rounds, began = exchange.rounds, self.clock.now
        while self.clock.now - began < patience:
            exchange.hurry()
            told = exchange.rounds >= rounds + 2 or exchange.failure is not None
            leaving = not any(self._is_there(h) for h in self._peers(exchange).values())
            # Another rank waits only for those that may tell the same error.
            if told and (leaving or (self.pulse.rank > 0 and self.pulse.state == ENDED)):
                break
            if self._closed.wait(min(0.1, self.limits.interval / 10)):
                break
        return self.pulse.state == FAILED and any(
            h.pulse.state == FAILED and h.pulse.message == self.pulse.message and rank < self.pulse.rank
            for rank, h in self._neighbours(exchange).items()
        )

    def _is_there(self, heard: Heard) -> bool:
        process = heard.pulse.process
        here = process.is_seen_from(self.pulse.process)
        return heard.pulse.state == RUNNING and (not here or process.runs())

    def _run(self) -> None:
        while not self._closed.wait(self.limits.interval / 2):
            loss = self._judge(self.clock.tick())
            if loss is not None:
                self._end(loss)

    def _judge(self, now: float) -> Loss | None:
        if self.pulse.state != RUNNING:
            # It ends by itself, unless even that hangs. To take leave of the others has a limit of its own.
            leave = self.limits.silence + self.limits.interval if self.pulse.state == ENDED else 0.0
            late = now - self._failed_at > self.limits.standstill + leave
            return Loss(self.pulse.message or "the end of the run hangs") if late else None
        exchange = self.exchange
        if exchange is None:
            return self._gone_before_the_start(now)
        if exchange.verdict is not None:
            return Loss.decode(exchange.verdict)
        neighbours = self._neighbours(exchange)
        missing = [h.pulse for rank, h in neighbours.items() if self._is_gone(rank, h, exchange)]
        if missing:
            return judgement.gone(missing, self.size, **self._how(missing))
        unanswered = now - exchange.talked_at
        if unanswered > self.limits.silence:
            return self._cut_off(exchange, unanswered)
        if unanswered > 2 * self.limits.interval:
            return None  # as long as nothing can be heard, silence says nothing of the others
        return self._judge_all(exchange, now)

    def _judge_all(self, exchange: Exchange, now: float) -> Loss | None:
        heard = dict(exchange.heard)
        limits = self.limits._replace(grace=0.0) if self.waits_for_verdict else self.limits
        loss = judgement.failed(heard, now, limits, self.size) or judgement.silent(heard, now, limits, self.size)
        if loss is not None or self.pulse.rank > 0:
            return loss
        unheard = [rank for rank in range(self.size) if rank not in heard]
        since = now - self._joined_at
        if since > limits.silence and unheard:
            return judgement.never_heard(unheard, since, self.size)
        return judgement.standing_still(heard, now, limits, self.size)

    def _peers(self, exchange: Exchange) -> dict[int, Heard]:
        return {rank: heard for rank, heard in dict(exchange.heard).items() if rank != self.pulse.rank}

    def _neighbours(self, exchange: Exchange) -> dict[int, Heard]:
        """Those on this machine."""
        here = self.pulse.process
        return {r: h for r, h in self._peers(exchange).items() if h.pulse.process.is_seen_from(here)}

    def _is_gone(self, rank: int, heard: Heard, exchange: Exchange) -> bool:
        if heard.pulse.state != RUNNING or heard.pulse.process.runs():
            self._missed.pop(rank, None)
            return False
        # Its last word may be on its way: only after another whole round is it known that it has left none.
        noticed_in = self._missed.setdefault(rank, exchange.rounds)
        exchange.hurry()
        return exchange.rounds >= noticed_in + 2 or exchange.failure is not None

    def _how(self, missing: list[Pulse]) -> dict[str, str]:
        """In the words of the system, where this process launched the one that is missing."""
        child = self.launched.get(min(pulse.rank for pulse in missing))
        code = child.poll() if child is not None else None
        return {} if code is None else {"how": _ended(code)}

    def _gone_before_the_start(self, now: float) -> Loss | None:
        """Of the processes that this one has launched: without the others it would wait for them for a long time."""
        for rank, child in self.launched.items():
            code = child.poll()
            if code:
                if self._child_failed_at is None:
                    self._child_failed_at = now
                # The same error may come up here in a moment.
                if code < 0 or now - self._child_failed_at > self.limits.grace:
                    who = f"rank {rank} of {self.size} (process {child.pid})"
                    return Loss(f"{who} {_ended(code)} at its start", (rank,))
        return None

    def _cut_off(self, exchange: Exchange, seconds: float) -> Loss | None:
        if self.pulse.rank == 0:
            return judgement.cut_off(None, seconds, self.size, exchange.failure)
        first = exchange.heard.get(0)
        if first is None or first.pulse.state == RUNNING:
            return judgement.cut_off(first.pulse if first else None, seconds, self.size, exchange.failure)
        # It has ended as it should, and the store with it.
        return judgement.failed({0: first}, self.clock.now, self.limits, self.size)

    def _end(self, loss: Loss) -> None:
        """The end of this process, from beside its main thread; the other ranks are told first."""
        self.ends = True
        exchange = self.exchange
        neighbours = self._neighbours(exchange) if exchange is not None else {}
        judged_here = exchange is not None and exchange.verdict is None
        if exchange is not None and judged_here:
            exchange.publish(loss.encode())
        # One line from each machine, and from a rank to blame only where it is alone there.
        here = [self.pulse.rank, *(rank for rank, h in neighbours.items() if h.pulse.state == RUNNING)]
        if self.pulse.rank == min([rank for rank in here if rank not in loss.ranks] or here):
            _attempt(lambda: self.say(loss.reason))
        _attempt(self.tidy)
        kill_own_workers()
        lost_here = [neighbours[rank].pulse.process for rank in loss.ranks if rank in neighbours]
        if judged_here or self.pulse.rank == 0 or any(process.runs() for process in lost_here):
            # The others hear of it from the store, which may end with this process, and end by themselves.
            time.sleep(2 * self.limits.interval)
        for process in lost_here:
            process.kill()  # stopped, it would stay for ever
        self._kill_launched()
        os._exit(1)

    def _wait_for_launched(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        while time.monotonic() < end and any(child.poll() is None for child in self.launched.values()):
            time.sleep(0.05)

    def _kill_launched(self) -> None:
        for child in self.launched.values():
            child.kill()
        for child in self.launched.values():
            child.wait()


def _attempt(action: Callable[[], None]) -> None:
    """What may fail or block, as a pipe that nobody reads does, and must not keep the process from its end."""
    thread = threading.Thread(target=action, daemon=True)
    thread.start()
    thread.join(1.0)


def _ended(code: int) -> str:
    """From the return code of a process."""
    if code >= 0:
        return f"ended with status {code}"
    try:
        return f"was killed ({signal.Signals(-code).name})"
    except ValueError:
        return f"was killed (signal {-code})"
