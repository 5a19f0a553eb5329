"""The watch over ranks around a fit of Lightning's trainer, under any of its launchers."""

import os
import re
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from typing import Any

import pytorch_lightning as pl
import torch.distributed as dist
from lightning_fabric.utilities.distributed import _set_num_threads_if_needed
from pytorch_lightning.strategies.launchers.subprocess_script import _SubprocessScriptLauncher

from simclr_scale.errors import InputError, Preempted, RunFailed
from simclr_scale.pretraining.lost_ranks.beats import ENDED, RUNNING, Exchange, Pulse, connect_to
from simclr_scale.pretraining.lost_ranks.callback import RankProgress
from simclr_scale.pretraining.lost_ranks.limits import Limits
from simclr_scale.pretraining.lost_ranks.processes import Process
from simclr_scale.pretraining.lost_ranks.watch import Watch

# Processes start at different times, and until they have met no time limit of training applies.
_LEAST_TIME_TO_MEET = 300.0

# What collectives say when a peer has gone.
_LOST_CONNECTION = re.compile(
    r"gloo|NCCL|ncclRemoteError|TCPStore|Connection (closed|reset) by peer|Broken pipe|[Tt]imed out waiting", re.ASCII
)


class _Launcher(_SubprocessScriptLauncher):
    """Lightning's, without its observer.

    That one kills this process together with the others as soon as one has failed, before it can tell its own error,
    and says nothing itself.
    """

    def launch(self, function: Callable[..., Any], *args: Any, trainer: Any = None, **kwargs: Any) -> Any:
        self.cluster_environment.validate_settings(num_devices=self.num_processes, num_nodes=self.num_nodes)
        if not self.cluster_environment.creates_processes_externally:
            self._call_children_scripts()
        _set_num_threads_if_needed(num_processes=self.num_processes)
        return function(*args, **kwargs)


class WatchedRanks:
    """Ends a run in which a rank is lost; does nothing where there is one rank alone.

    Nor for strategies that fork or spawn within one process (``ddp_spawn``, ``ddp_fork``, ``ddp_notebook``), which have
    an end of their own: that process waits for the others and raises what they raise.

    Args:
        limits: of silence and standstill; see :class:`Limits`.
        say: prints a verdict for the user, from any thread.
        tidy: gives the terminal its cursor back.
    """

    def __init__(self, trainer: Any, limits: Limits, *, say: Callable[[str], None], tidy: Callable[[], None]) -> None:
        self._trainer, self._limits = trainer, limits
        self._children: dict[int, subprocess.Popen[bytes]] = {}
        self._pulse = Pulse(trainer.global_rank, Process.this())
        self._watch: Watch | None = None
        self._make_watch = partial(Watch, limits=limits, say=say, tidy=tidy)

    @contextmanager
    def while_fitting(self) -> Iterator[None]:
        """Around ``trainer.fit``.

        Raises:
            RunFailed: the processes do not come together.
            SystemExit: with status 1, where another rank of this machine tells the error of this one.
        """
        launcher = self._trainer.strategy.launcher
        if self._trainer.world_size == 1 or not isinstance(launcher, _SubprocessScriptLauncher):
            yield
            return
        self._install()
        try:
            yield
        except BaseException as error:
            if self._watch is not None and self._ends_together(error):
                raise SystemExit(1) from None
            raise
        if self._watch is not None:
            self._watch.close()

    def _install(self) -> None:
        trainer, strategy = self._trainer, self._trainer.strategy
        if hasattr(strategy, "_timeout"):
            strategy._timeout = timedelta(seconds=max(self._limits.timeout, _LEAST_TIME_TO_MEET))
        launcher = strategy.launcher
        strategy._launcher = _Launcher(launcher.cluster_environment, launcher.num_processes, launcher.num_nodes)
        meet = strategy.setup_environment

        def setup_environment() -> None:
            self._start()
            began = time.monotonic()
            try:
                meet()
            except (dist.DistError, RuntimeError, ValueError) as error:
                if not _LOST_CONNECTION.search(f"{type(error).__name__} {error}"):
                    raise
                raise RunFailed(
                    f"rank {trainer.global_rank} of {trainer.world_size} waited {time.monotonic() - began:.0f} s for "
                    f"the others, which have not all come: {str(error).partition(chr(10))[0]}"
                ) from error
            self._join()

        strategy.setup_environment = setup_environment
        trainer.callbacks.append(_Ending(self))
        trainer.callbacks.insert(0, RankProgress(self._pulse))

    def _start(self) -> None:
        trainer = self._trainer
        launched = getattr(trainer.strategy.launcher, "procs", [])
        first = trainer.global_rank + 1
        self._pulse.rank = trainer.global_rank
        self._watch = self._make_watch(
            self._pulse,
            trainer.world_size,
            launched=dict(enumerate(launched, start=first)),
        )
        self._watch.start()

    def _join(self) -> None:
        assert self._watch is not None
        trainer, environment = self._trainer, self._trainer.strategy.cluster_environment
        rank, size = trainer.global_rank, trainer.world_size
        self._pulse.rank = rank
        first_here = rank - trainer.local_rank
        neighbours = range(max(0, first_here), min(size, first_here + trainer.num_devices))
        # The launcher's store outlives the processes that it starts again.
        prefix = f"simclr_scale/ranks/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"
        connect = partial(
            connect_to, environment.main_address, environment.main_port, prefix, patience=self._limits.silence
        )
        peers = range(size) if rank == 0 else sorted({0, *neighbours})
        self._watch.join(Exchange(connect, self._pulse, peers, self._limits, self._watch.clock))

    def note(self, error: BaseException) -> None:
        """At the moment that the main thread fails, before it tidies up, which takes its time."""
        if self._watch is None:
            return
        if isinstance(error, Preempted):
            self._watch.failing("", ENDED)
        elif isinstance(error, InputError | RunFailed):
            self._watch.failing(" ".join(str(error).split()))
        elif _is_lost_connection(error):
            self._watch.waits_for_verdict = True
            if threading.current_thread() is threading.main_thread():
                # A launcher that has missed the other process sends SIGTERM; the reason is still to be told.
                signal.signal(signal.SIGTERM, signal.SIG_IGN)
        else:
            self._watch.failing(f"{type(error).__name__}: {' '.join(str(error).split())}"[:500])

    def _ends_together(self, error: BaseException) -> bool:
        """Waits for the other ranks; whether one of them tells the same error."""
        assert self._watch is not None
        if self._watch.waits_for_verdict:
            # The watch ends this process as soon as it knows more, which is what took the connection away.
            time.sleep(self._limits.silence + 4 * self._limits.interval)
            self._watch.failing(f"{type(error).__name__}: {' '.join(str(error).split())}"[:500])
        elif self._watch.pulse.state == RUNNING or isinstance(error, InputError | RunFailed):
            self.note(error)  # perhaps again: what the user is told may be put in better words by now
        return self._watch.close() and isinstance(error, RunFailed)


class _Ending(pl.Callback):
    """Hears of an exception before anybody tidies up after it."""

    def __init__(self, ranks: WatchedRanks) -> None:
        self._ranks = ranks

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._ranks.note(exception)


def _is_lost_connection(error: BaseException) -> bool:
    return isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError) and _LOST_CONNECTION.search(str(error)) is not None
    )
