"""Writing a bundle: weights, configuration and model card."""

import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import nn

from simclr_scale import __version__
from simclr_scale.bundle.transform import ImageTransform
from simclr_scale.errors import InputError

BUNDLE_KEY = "simclr_scale"  # of config.json and of a checkpoint: what timm's own format has no place for
WEIGHTS, CONFIG, CARD = "model.safetensors", "config.json", "README.md"


def encoder_config(encoder: nn.Module, transform: ImageTransform, **facts: Any) -> dict[str, Any]:
    """Everything but the weights, as JSON values, in the layout of timm's config.json.

    Raises:
        InputError: an encoder that was not made by ``create_encoder``, another kind of transform, or facts that are no
            JSON values.
    """
    architecture = getattr(encoder, "architecture", None)
    if architecture is None:
        raise InputError("only encoders made by create_encoder can be saved: this one does not know its architecture")
    if not isinstance(transform, ImageTransform):
        raise InputError(
            f"transform must be an ImageTransform, whose settings can be saved, not {type(transform).__name__}"
        )
    # The classifier's name lets timm put another one there. Not so first_conv: given it, timm would turn the stem of
    # an encoder for 1 or 4 channels into one for 3 when it loads the weights.
    inherited = {
        key: value
        for key, value in dict(getattr(encoder, "pretrained_cfg", {})).items()
        if key in ("classifier", "fixed_input_size") and value is not None
    }
    config: dict[str, Any] = {
        "architecture": architecture.name.partition(".")[0],
        "num_classes": 0,
        "num_features": encoder.num_features,
        "model_args": {**architecture.kwargs, "in_chans": architecture.in_chans, "num_classes": 0},
        "pretrained_cfg": {**inherited, **transform.config, "num_classes": 0, "custom_load": False},
        BUNDLE_KEY: {"version": __version__, "facts": facts},
    }
    if transform.value_range is not None:
        config[BUNDLE_KEY]["value_range"] = transform.value_range
    try:
        return json.loads(json.dumps(config))
    except (TypeError, ValueError) as error:
        raise InputError(f"the facts about an encoder must be JSON values: {error}") from error


def save_encoder(encoder: nn.Module, transform: ImageTransform, folder: str | os.PathLike[str], **facts: Any) -> Path:
    """Writes the bundle: ``model.safetensors``, ``config.json`` and ``README.md`` (a model card).

    ``load_encoder(folder)`` reads it, and so does ``timm.create_model("local-dir:FOLDER", pretrained=True)`` (after
    ``import simclr_scale.models`` where the architecture is one of ours).

    Args:
        encoder: made by ``create_encoder``.
        transform: the evaluation transform that belongs to it.
        folder: must not exist, or be empty: nothing is overwritten.
        facts: anything worth knowing about the training, JSON values; they go into config.json and the model card.

    Returns:
        The folder.
    """
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"{folder} exists and is not an empty folder; choose another folder for the encoder")
    config = encoder_config(encoder, transform, **facts)
    folder.parent.mkdir(parents=True, exist_ok=True)
    # A reader never sees half a bundle: it is written beside and moved into place.
    beside = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}-"))
    try:
        beside.chmod(0o755)
        weights = {key: value.detach().cpu().contiguous().clone() for key, value in encoder.state_dict().items()}
        save_file(weights, beside / WEIGHTS, metadata={"format": "pt"})
        (beside / CONFIG).write_text(json.dumps(config, indent=2) + "\n")
        (beside / CARD).write_text(_model_card(config, encoder, facts))
        os.replace(beside, folder)
    except BaseException:
        shutil.rmtree(beside, ignore_errors=True)
        raise
    return folder


def _model_card(config: dict[str, Any], encoder: nn.Module, facts: dict[str, Any]) -> str:
    size = "x".join(map(str, config["pretrained_cfg"]["input_size"]))
    parameters = sum(parameter.numel() for parameter in encoder.parameters())
    rows = "\n".join(_rows(facts))
    transform = transform_of(config)
    image = "a PIL picture" if transform.channels in (1, 3) else "a tensor of the raw values, (C, H, W)"
    return f"""---
library_name: timm
tags: [image-feature-extraction, timm, self-supervised-learning, simclr]
---
# {config["architecture"]}, pretrained with SimCLR

An image encoder without classifier, trained without labels by simclr_scale {config[BUNDLE_KEY]["version"]}:
images {size} in, {config["num_features"]} features out, {parameters:,} parameters.

```python
from simclr_scale import load_encoder

encoder, transform = load_encoder("PATH_OF_THIS_FOLDER")
features = encoder(transform(image)[None])  # image: {image}; features: (1, {config["num_features"]})
```

The transform is part of the bundle: `{transform!r}`.

| fact | value |
|---|---|
{rows or "| none given | |"}
"""


def transform_of(config: Mapping[str, Any]) -> ImageTransform:
    """The transform that ``encoder_config`` has written down; KeyError where a setting is missing."""
    return ImageTransform.from_config(config["pretrained_cfg"], config.get(BUNDLE_KEY, {}).get("value_range"))


def _rows(facts: dict[str, Any], group: str = "") -> Iterator[str]:
    for key, value in facts.items():
        name = group + key.replace("_", " ")
        if isinstance(value, dict):
            yield from _rows(value, f"{name}: ")
        else:
            yield f"| {name} | {value} |".replace("\n", " ")
