"""What a search chooses from: encoders, their widths, and projection heads."""

import copy
import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from simclr_scale.errors import InputError
from simclr_scale.models import create_encoder

_CREATE_ENCODER = "simclr_scale.models.create_encoder"
_HEAD = "simclr_scale.models.ProjectionHead"
_TAKE_WIDTHS = "simclr_resnet"
_KEYS = ("encoders", "widths", "heads")


@dataclass(frozen=True)
class Candidate:
    """One point of the space.

    Attributes:
        encoder: its label, by which it is known in the study.
        width: None for encoders that take no width.
        head: OUTxLAYERS.
    """

    encoder: str
    width: float | None
    head: str

    @property
    def label(self) -> str:
        """A name for a folder, one for each candidate."""
        width = "" if self.width is None else f"-w{self.width:g}"
        return f"{self.encoder}{width}-{self.head}"

    @property
    def params(self) -> dict[str, Any]:
        """As the study knows it."""
        return {
            "encoder": self.encoder,
            "head": self.head,
            **({} if self.width is None else {"width": self.width}),
        }


@dataclass(frozen=True)
class SearchSpace:
    """All candidates.

    Attributes:
        encoders: arguments of `create_encoder` by label.
        widths: for `simclr_resnet*`; other encoders are taken as they are.
        heads: OUTxLAYERS, such as 128x2.
    """

    encoders: Mapping[str, Mapping[str, Any]]
    widths: tuple[float, ...] = (1.0,)
    heads: tuple[str, ...] = ("128x2",)

    @classmethod
    def of(cls, encoders: Sequence[Any], widths: Sequence[Any], heads: Sequence[Any]) -> "SearchSpace":
        """From names, or mappings of a name and further arguments of `create_encoder`.

        Raises:
            InputError: nothing to choose from, or something that is no encoder, width or head.
        """
        by_label: dict[str, Mapping[str, Any]] = {}
        for encoder in encoders:
            given = {"name": encoder} if isinstance(encoder, str) else encoder
            if not isinstance(given, Mapping) or not isinstance(given.get("name"), str):
                raise InputError(f"search: an encoder is a name, or a mapping with a name, got {encoder!r}")
            label = _label(given)
            if label in by_label:
                raise InputError(f"search: encoder {label} is there twice")
            by_label[label] = dict(given)
        for name, values in (("encoders", by_label), ("widths", widths), ("heads", heads)):
            if not values:
                raise InputError(f"search: {name} is empty: there is nothing to choose from")
        return cls(by_label, tuple(map(_width, widths)), tuple(map(_head, heads)))

    def widths_of(self, encoder: str) -> tuple[float | None, ...]:
        """Those that an encoder can have."""
        return self.widths if str(self.encoders[encoder]["name"]).startswith(_TAKE_WIDTHS) else (None,)

    def candidates(self) -> Iterator[Candidate]:
        """All of them, in the order of the space."""
        for encoder in self.encoders:
            for width, head in itertools.product(self.widths_of(encoder), self.heads):
                yield Candidate(encoder, width, head)

    def check(self, recipe: Mapping[str, Any]) -> None:
        """Builds every encoder once. Raises InputError where one cannot be built."""
        for encoder in self.encoders:
            for width in self.widths_of(encoder):
                create_encoder(**self._arguments(Candidate(encoder, width, self.heads[0]), recipe))

    def recipe_of(self, candidate: Candidate, recipe: Mapping[str, Any]) -> dict[str, Any]:
        """The recipe with a candidate's encoder and head; an encoder of the recipe's own name keeps its arguments."""
        changed = copy.deepcopy(dict(recipe))
        out_features, layers = map(int, candidate.head.split("x"))
        arguments = self._arguments(candidate, recipe)
        model = dict(changed.get("model") or {})
        model["encoder"] = {"class_path": _CREATE_ENCODER, "init_args": arguments}
        model["head"] = {"class_path": _HEAD, "init_args": {"out_features": out_features, "num_layers": layers}}
        changed["model"] = model
        return changed

    def _arguments(self, candidate: Candidate, recipe: Mapping[str, Any]) -> dict[str, Any]:
        given = dict(self.encoders[candidate.encoder])
        own = ((recipe.get("model") or {}).get("encoder") or {}).get("init_args") or {}
        kept = own if own.get("name") == given["name"] else {k: v for k, v in own.items() if k == "in_chans"}
        width = {} if candidate.width is None else {"width": candidate.width}
        return {**kept, **given, **width}

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        return {"encoders": dict(self.encoders), "widths": list(self.widths), "heads": list(self.heads)}


def read_space(path: Path) -> dict[str, Any]:
    """The entries of a file of a space: encoders, widths, heads.

    Raises:
        InputError: it cannot be read, or holds something else.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise InputError(f"{path}: it cannot be read as YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, Mapping) or not content:
        raise InputError(f"{path}: a search space is a mapping with {', '.join(_KEYS)}")
    for key, value in content.items():
        if key not in _KEYS:
            raise InputError(f"{path}: there is no entry {key!r}; there are {', '.join(_KEYS)}")
        if not isinstance(value, list):
            raise InputError(f"{path}: {key} is a list, got {value!r}")
    return dict(content)


def _label(given: Mapping[str, Any]) -> str:
    more = "".join(f"-{key}{value}" for key, value in given.items() if key != "name")
    return re.sub(r"[^\w.-]+", "_", f"{given['name']}{more}")


def _width(value: Any) -> float:
    try:
        width = float(value)
    except (TypeError, ValueError):
        width = 0.0
    if not 0 < width < float("inf"):
        raise InputError(f"search: width {value!r}, wanted a number above 0, such as 0.5")
    return width


def _head(value: Any) -> str:
    if not re.fullmatch(r"[1-9]\d*x[1-9]\d*", str(value)):
        raise InputError(f"search: head {value!r}, wanted OUTxLAYERS, such as 128x2")
    return str(value)
