"""Which rank is lost, from what is known of all of them: plain functions of beats and a clock."""

import json
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from simclr_scale.pretraining.lost_ranks.beats import FAILED, RUNNING, Heard, Pulse
from simclr_scale.pretraining.lost_ranks.limits import Limits


class Loss(NamedTuple):
    """Why a run cannot go on: a text without its end, and the ranks that are to blame."""

    reason: str
    ranks: tuple[int, ...] = ()

    def encode(self) -> str:
        return json.dumps(self._asdict())

    @classmethod
    def decode(cls, text: str) -> "Loss":
        facts = json.loads(text)
        return cls(facts["reason"], tuple(facts["ranks"]))


def name_of(pulse: Pulse, size: int) -> str:
    return f"rank {pulse.rank} of {size} ({pulse.process.host}, process {pulse.process.pid})"


def gone(pulses: list[Pulse], size: int, how: str = "was killed, perhaps for want of memory") -> Loss | None:
    """Ranks whose processes have ended without a word."""
    if not pulses:
        return None
    pulse, *others = sorted(pulses, key=lambda pulse: pulse.rank)
    more = f"; so {'is' if len(others) == 1 else 'are'} {_listed(other.rank for other in others)}" if others else ""
    reason = f"{name_of(pulse, size)} is gone: it {how}, in step {pulse.step} ({pulse.doing}){more}"
    return Loss(reason, (pulse.rank, *(other.rank for other in others)))


def never_heard(ranks: list[int], seconds: float, size: int) -> Loss | None:
    """Ranks that met the others and have not beaten once since."""
    if not ranks:
        return None
    return Loss(f"nothing has been heard of {_listed(ranks)} of {size} for {seconds:.0f} s", tuple(ranks))


def cut_off(first: Pulse | None, seconds: float, size: int, failure: str | None) -> Loss:
    """The store, which the first rank or its launcher keeps, does not answer."""
    said = f" ({failure})" if failure else ""
    if first is None:
        return Loss(f"the store of the process group has not answered for {seconds:.0f} s{said}")
    reason = (
        f"{name_of(first, size)} has been silent for {seconds:.0f} s{said}: it is stopped, its machine is down or the "
        f"network is; its last word was of step {first.step} ({first.doing})"
    )
    return Loss(reason, (first.rank,))


def silent(heard: Mapping[int, Heard], now: float, limits: Limits, size: int) -> Loss | None:
    """Ranks that beat no longer."""
    lost = [(rank, h) for rank, h in sorted(heard.items()) if _runs(h) and now - h.beat_at > limits.silence]
    if not lost:
        return None
    (rank, h), *others = lost
    more = f", and so {'has' if len(others) == 1 else 'have'} {_listed(r for r, _ in others)}" if others else ""
    reason = (
        f"{name_of(h.pulse, size)} has been silent for {now - h.beat_at:.0f} s{more}: it is stopped, its machine is "
        f"down or the network is; its last word was of step {h.pulse.step} ({h.pulse.doing})"
    )
    return Loss(reason, (rank, *(r for r, _ in others)))


def failed(heard: Mapping[int, Heard], now: float, limits: Limits, size: int) -> Loss | None:
    """A rank that has ended with an error, by which the others have not ended within the time that one takes."""
    for rank, h in sorted(heard.items()):
        if h.pulse.state == FAILED and now - h.state_at > limits.grace:
            return Loss(f"{name_of(h.pulse, size)} failed in step {h.pulse.step}: {h.pulse.message}", (rank,))
    return None


def standing_still(heard: Mapping[int, Heard], now: float, limits: Limits, size: int) -> Loss | None:
    """All ranks beat and none gets on: those that are behind keep the others waiting."""
    running = [h for h in heard.values() if _runs(h)]
    if len(running) < 2 or not all(now - h.moved_at > limits.standstill for h in running):
        return None
    seconds = min(now - h.moved_at for h in running)
    first = min(h.pulse.position for h in running)
    behind = sorted((h.pulse for h in running if h.pulse.position == first), key=lambda pulse: pulse.rank)
    lost = tuple(pulse.rank for pulse in behind)
    pulse = behind[0]
    where = f"step {pulse.step} ({pulse.doing})"
    if len(behind) == len(running):
        return Loss(f"no rank has got on for {seconds:.0f} s: all {size} stand in {where}", lost)
    who = name_of(pulse, size)
    more = f", as {'does' if len(behind) == 2 else 'do'} {_listed(lost[1:])}," if len(behind) > 1 else ""
    return Loss(f"{who} hangs: for {seconds:.0f} s it has stood in {where}{more} while the others wait", lost)


def _runs(heard: Heard) -> bool:
    return heard.pulse.state == RUNNING


def _listed(ranks: Iterable[int]) -> str:
    numbers = [str(rank) for rank in ranks]
    if len(numbers) == 1:
        return f"rank {numbers[0]}"
    return f"ranks {', '.join(numbers[:8])}" + (f" and {len(numbers) - 8} more" if len(numbers) > 8 else "")
