"""What a bundle's config must not say: that weights, or code, are to come from somewhere else."""

from collections.abc import Iterator, Mapping
from pathlib import PurePosixPath, PureWindowsPath
from typing import Any

# Of timm's pretrained_cfg and of timm.create_model: where weights lie, and that a function of the model reads them.
_SOURCES = ("custom_load", "file", "hf_hub_filename", "hf_hub_id", "source", "state_dict", "url")
_ARGUMENTS = (*_SOURCES, "cache_dir", "checkpoint_path", "scriptable")
_SCHEMES = ("hf-hub:", "hf_hub:", "local-dir:", "timm:", "://")


def points_elsewhere(config: Mapping[str, Any]) -> str:
    """The first entry of a ``config.json`` that asks for anything outside of the bundle, in words; empty if none does.

    A bundle is not trusted: what it needs is in it. An entry that is there but empty or false asks for nothing.
    """
    transform, arguments = config.get("pretrained_cfg"), config.get("model_args")
    parts = {"": (config, _ARGUMENTS), "pretrained_cfg": (transform, _SOURCES), "model_args": (arguments, _ARGUMENTS)}
    for part, (entries, forbidden) in parts.items():
        for key, value in entries.items() if isinstance(entries, Mapping) else ():
            asks = key in forbidden or (key.startswith("pretrained") and (part, key) != ("", "pretrained_cfg"))
            if asks and value:
                return f"{part}{'.' if part else ''}{key} = {value!r}"
    architecture = config.get("architecture")
    for where, text in (*_texts("architecture", architecture), *_texts("model_args", arguments)):
        path = PurePosixPath(text).is_absolute() or PureWindowsPath(text).is_absolute() or text.startswith("~")
        if path or any(scheme in text for scheme in _SCHEMES):
            return f"{where} = {text!r}"
    return ""


def _texts(where: str, value: Any) -> Iterator[tuple[str, str]]:
    if isinstance(value, str):
        yield where, value
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _texts(f"{where}.{key}", inner)
    elif isinstance(value, list | tuple):
        for index, inner in enumerate(value):
            yield from _texts(f"{where}[{index}]", inner)
