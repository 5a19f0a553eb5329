"""``--config auto``: a recipe made from the images and the machine, in place of one from a file."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml

from simclr_scale.errors import InputError
from simclr_scale.scaling.auto import Choice, Hardware, Wishes, choose, look_at
from simclr_scale.scaling.hardware import best_device, device_name, memory_of

AUTO = "auto"
_TEXTS = ("root", "train_split", "test_split", "image_key", "label_key")


def replace_auto(argv: Sequence[str], folder: Path) -> tuple[list[str], list[str]]:
    """Arguments in which ``auto`` is a file in ``folder`` that holds the recipe, and what to tell the user of it.

    A file called ``auto`` is taken as it is, as every file is before a recipe of that name.

    Raises:
        InputError: there is no ``--data.source`` to look at.
    """
    places = [place for place, value in _configs(argv) if value == AUTO]
    if not places or Path(AUTO).is_file():
        return list(argv), []
    choice = _choose(_given(argv))
    file = folder / f"{AUTO}.yaml"
    file.write_text(yaml.safe_dump(choice.recipe, sort_keys=False))
    replaced = list(argv)
    for place in places:
        option, equals, _ = replaced[place].partition("=")
        replaced[place] = f"{option}={file}" if equals else str(file)
    return replaced, [f"auto: {reason}" for reason in choice.reasons]


def _configs(argv: Sequence[str]) -> Iterator[tuple[int, str]]:
    """Places of the values of ``--config``."""
    for place, argument in enumerate(argv):
        if argument.startswith("--config="):
            yield place, argument.removeprefix("--config=")
        elif argument in ("-c", "--config") and place + 1 < len(argv):
            yield place + 1, argv[place + 1]


def _given(argv: Sequence[str]) -> dict[str, Any]:
    """Values of the options, as YAML; of one that comes twice the last."""
    given = {}
    for place, argument in enumerate(argv):
        if argument.startswith("--"):
            name, equals, value = argument[2:].partition("=")
            if not equals:
                value = argv[place + 1] if place + 1 < len(argv) else ""
            try:
                given[name] = yaml.safe_load(value)
            except yaml.YAMLError:
                given[name] = value
    return given


def _choose(given: dict[str, Any]) -> Choice:
    source = given.get("data.source")
    if not isinstance(source, str):
        raise InputError("--config auto looks at the images: give --data.source")
    seed = given.get("seed_everything", 0)
    preset = given.get("data.preset")
    options = {key: given[f"data.{key}"] for key in _TEXTS if isinstance(given.get(f"data.{key}"), str)}
    options |= {key: value for key in ("patch_size", "channel_axis") if type(value := given.get(f"data.{key}")) is int}
    look = look_at(
        source,
        subset=given.get("data.subset"),
        seed=seed if type(seed) is int else 0,
        arrays=preset == "multiband",
        channels=1 if preset == "grey" else 3,
        **options,
    )
    wishes = Wishes(
        image_size=_whole(given, "data.image_size"),
        global_batch_size=_whole(given, "data.global_batch_size"),
        preset=preset if isinstance(preset, str) else None,
        max_epochs=_whole(given, "trainer.max_epochs"),
        max_steps=_whole(given, "trainer.max_steps"),
    )
    return choose(look, _hardware(given), wishes)


def _whole(given: dict[str, Any], key: str) -> int | None:
    """A number above 0; anything else is for the parser to refuse."""
    value = given.get(key)
    return value if type(value) is int and value > 0 else None


def _hardware(given: dict[str, Any]) -> Hardware:
    device = best_device()
    if given.get("trainer.accelerator") == "cpu":
        device = torch.device("cpu")
    here = _whole(given, "trainer.devices") or (torch.cuda.device_count() if device.type == "cuda" else 1)
    nodes = _whole(given, "trainer.num_nodes") or 1
    return Hardware(device.type, device_name(device), memory_of(device), here, here * nodes)
