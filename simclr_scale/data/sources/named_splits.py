"""Which of the splits that a data set brings along serves as train, validation and test."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches

from simclr_scale.errors import InputError

# In order of preference, compared without case. The long ones are those of torchvision's Places365 and INaturalist.
_TRAIN = ("train", "training", "trainval", "train-standard", "2021_train")
_VALIDATION = ("val", "valid", "validation", "dev", "2021_valid")
_TEST = ("test", "testing", *_VALIDATION)


class NoSuchPart(InputError):
    """The data set has splits, but not the one asked for."""


@dataclass(frozen=True)
class Choice:
    """One split to read."""

    name: str
    whole: bool
    """The data set has no split to test on beside this one, which is therefore to be divided."""
    parts: tuple[str, ...]
    """All splits in use, whose classes together are those of the data set."""


@dataclass(frozen=True)
class SplitRequest:
    """What the user asks for: a part ("train", "val" or "test"), and the names of splits where they are unusual."""

    part: str
    train_split: str | None = None
    test_split: str | None = None

    @property
    def named(self) -> bool:
        return self.train_split is not None or self.test_split is not None

    def choose(self, available: Sequence[str], where: str) -> Choice:
        """Find the split to read.

        Train is `train_split`, else the one called train (or alike), else the only one there is. Test is
        `test_split`, else the one called test, else that called val (ImageNet's layout). A validation split is one
        called val beside a test.

        Raises:
            InputError: a named split does not exist, or the part asked for is not to be had.
        """
        for key, name in (("train_split", self.train_split), ("test_split", self.test_split)):
            if name is not None and name not in available:
                raise InputError(f"{where}: no split {name!r} ({key}); {_offer(name, available)}")
        train = self.train_split or _first(_TRAIN, available) or (available[0] if len(available) == 1 else None)
        if train is None:
            raise InputError(f"{where}: no train split; name one by train_split, there are {listed(available)}")
        test = self.test_split or _first(_TEST, [name for name in available if name != train])
        if test is None:
            return Choice(train, whole=True, parts=(train,))
        if test == train:
            raise InputError(f"{where}: train_split and test_split are both {train!r}; a test needs images of its own")
        validation = _first(_VALIDATION, [name for name in available if name not in (train, test)])
        name = {"train": train, "val": validation, "test": test}[self.part]
        if name is None:
            raise NoSuchPart(f"{where}: has no validation split beside train {train!r} and test {test!r}")
        return Choice(name, whole=False, parts=tuple(part for part in (train, validation, test) if part is not None))


def has_train_and_test(names: Iterable[str]) -> bool:
    names = list(names)
    return _first(_TRAIN, names) is not None and _first(_TEST, names) is not None


def is_split_name(name: str) -> bool:
    return name.lower() in (*_TRAIN, *_TEST)


def is_train_name(name: str) -> bool:
    return name.lower() in _TRAIN


def listed(names: Sequence[str], limit: int = 10) -> str:
    """Names for a message, the first `limit` of them."""
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")


def _offer(name: str, available: Sequence[str]) -> str:
    close = get_close_matches(name, available, n=1)
    return (f"did you mean {close[0]!r}? " if close else "") + f"There are {listed(available) or 'none'}"


def _first(wanted: Sequence[str], available: Sequence[str]) -> str | None:
    by_lower_case = {name.lower(): name for name in reversed(available)}
    return next((by_lower_case[name] for name in wanted if name in by_lower_case), None)
