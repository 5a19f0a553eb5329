"""Trainers that take turns, batch by batch, and the seconds that each of their steps takes."""

import threading
import time
from collections.abc import Iterator
from typing import Any

import torch


class Turns:
    """Lets threads run one at a time, in turn, each as long as it likes."""

    def __init__(self, names: list[str]) -> None:
        self._waiting = list(names)
        self._changed = threading.Condition()
        self._failed = False

    def wait(self, name: str) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._failed or self._waiting[0] == name)
            if self._failed:
                raise RuntimeError("another side has failed")

    def hand_on(self) -> None:
        with self._changed:
            self._waiting.append(self._waiting.pop(0))
            self._changed.notify_all()

    def retire(self, name: str, failed: bool) -> None:
        with self._changed:
            self._waiting.remove(name)
            self._failed = self._failed or failed
            self._changed.notify_all()


class Clock:
    """Seconds of every step of one side: of its thread on the CPU, between events on CUDA."""

    def __init__(self, name: str, turns: Turns, device: str) -> None:
        self.name, self.turns, self.device = name, turns, device
        self.seconds: list[float] = []

    def start(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()
            self._event = torch.cuda.Event(enable_timing=True)
            self._event.record()
        else:
            self._from = time.thread_time()

    def stop(self) -> None:
        if self.device == "cuda":
            end = torch.cuda.Event(enable_timing=True)
            end.record()
            torch.cuda.synchronize()
            self.seconds.append(self._event.elapsed_time(end) / 1e3)
        else:
            self.seconds.append(time.thread_time() - self._from)

    def on_train_start(self, *_: Any) -> None:
        self.start()

    def on_train_batch_end(self, *_: Any) -> None:
        self.stop()
        self.turns.hand_on()
        self.turns.wait(self.name)
        self.start()


class Batches:
    """A loader that yields one batch again and again."""

    def __init__(self, batch: dict[str, Any] | tuple[Any, ...], images: int, count: int) -> None:
        self.batch, self.batch_size, self.count = batch, images, count

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[Any]:
        for _ in range(self.count):
            yield dict(self.batch) if isinstance(self.batch, dict) else self.batch
