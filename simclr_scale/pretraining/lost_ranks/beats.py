"""What every rank tells the others of itself, again and again, in a store beside that of the training."""

import json
import threading
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from datetime import timedelta

import torch.distributed as dist

from simclr_scale.pretraining.lost_ranks.limits import AwakeClock, Limits
from simclr_scale.pretraining.lost_ranks.processes import Process

RUNNING, ENDED, FAILED = "running", "ended", "failed"
_VERDICT = "verdict"


@dataclass
class Pulse:
    """The state of one rank.

    ``moves`` counts whatever is progress. ``position`` counts changes of what it does, which all ranks do in the same
    order: of ranks that wait for one another, the smallest is behind.
    """

    rank: int
    process: Process
    number: int = 0
    moves: int = 0
    position: int = 0
    step: int = 0
    doing: str = "starting"
    state: str = RUNNING
    message: str = ""

    def move(self, doing: str, step: int | None = None) -> None:
        self.moves += 1
        if doing != self.doing:
            self.position += 1
            self.doing = doing
        if step is not None:
            self.step = step

    def encode(self) -> str:
        self.number += 1
        return json.dumps(asdict(self))

    @classmethod
    def decode(cls, text: bytes) -> "Pulse":
        facts = json.loads(text)
        return cls(**{**facts, "process": Process(**facts["process"])})


@dataclass
class Heard:
    """The newest that is known of a rank, and when it last beat, moved and changed its state."""

    pulse: Pulse
    beat_at: float
    moved_at: float
    state_at: float


@dataclass
class Exchange:
    """Tells of this rank and hears of others, in a thread of its own and over a connection of its own.

    Whoever judges reads only what lies here, and its age: a request may block for ever, where the store's host is
    stopped or cut off.

    Args:
        connect: makes the connection; called again when it breaks.
        own: of this rank.
        peers: the ranks to hear of.
    """

    connect: Callable[[], dist.Store]
    own: Pulse
    peers: Iterable[int]
    limits: Limits
    clock: AwakeClock
    heard: dict[int, Heard] = field(default_factory=dict)
    rounds: int = 0
    talked_at: float = 0.0
    failure: str | None = None  # of the store, at the last attempt
    verdict: str | None = None  # of rank 0

    def __post_init__(self) -> None:
        self.peers = [rank for rank in self.peers if rank != self.own.rank]
        self._to_publish: str | None = None
        self._store: dist.Store | None = None
        self._wake = threading.Event()
        self._closed = False
        self.talked_at = self.clock.now
        self._thread = threading.Thread(target=self._run, daemon=True, name="heartbeat")

    def start(self) -> None:
        self._thread.start()

    def publish(self, verdict: str) -> None:
        """Tells all others why they are to end."""
        self._to_publish = verdict
        self._wake.set()

    def hurry(self) -> None:
        """Another round at once."""
        self._wake.set()

    def close(self) -> None:
        self._closed = True
        self._wake.set()
        self._thread.join(self.limits.interval)

    def _run(self) -> None:
        while not self._closed:
            try:
                if self._store is None:
                    self._store = self.connect()
                self._round(self._store)
                self.failure = None
            except (RuntimeError, ValueError) as error:  # what torch's stores raise
                self.failure, self._store = str(error).partition("\n")[0], None
            self._wake.wait(self.limits.interval)
            self._wake.clear()

    def _round(self, store: dist.Store) -> None:
        if self._to_publish is not None:
            store.set(_VERDICT, self._to_publish)
            self._to_publish = None
        own = self.own.encode()
        store.set(str(self.own.rank), own)
        known = [rank for rank in self.peers if rank in self.heard or store.check([str(rank)])]
        for text in store.multi_get([str(rank) for rank in known]) if known else ():
            self._hear(Pulse.decode(text))
        self._hear(Pulse.decode(own.encode()))
        if self.verdict is None and store.check([_VERDICT]):
            self.verdict = store.get(_VERDICT).decode()
        self.talked_at = self.clock.now
        self.rounds += 1

    def _hear(self, pulse: Pulse) -> None:
        now = self.clock.now
        last = self.heard.get(pulse.rank)
        if last is None:
            self.heard[pulse.rank] = Heard(pulse, now, now, now)
            return
        last.beat_at = now if pulse.number != last.pulse.number else last.beat_at
        last.moved_at = now if pulse.moves != last.pulse.moves else last.moved_at
        last.state_at = now if pulse.state != last.pulse.state else last.state_at
        last.pulse = pulse


def connect_to(address: str, port: int, prefix: str, patience: float) -> dist.Store:
    """A connection of its own to the store in which a process group has met."""
    store = dist.TCPStore(
        address, port, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=max(1.0, patience))
    )
    return dist.PrefixStore(prefix, store)
