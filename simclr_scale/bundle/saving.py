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
from simclr_scale.models import ClassificationHead, ProjectionHead

BUNDLE_KEY = "simclr_scale"  # of config.json and of a checkpoint: what timm's own format has no place for
WEIGHTS, CONFIG, CARD = "model.safetensors", "config.json", "README.md"
HEAD_WEIGHTS, CLASSIFIER_WEIGHTS = "projection_head.safetensors", "classifier.safetensors"


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


def save_encoder(
    encoder: nn.Module,
    transform: ImageTransform,
    folder: str | os.PathLike[str],
    *,
    head: ProjectionHead | None = None,
    classifier: ClassificationHead | None = None,
    **facts: Any,
) -> Path:
    """Writes the bundle: ``model.safetensors``, ``config.json`` and ``README.md`` (a model card).

    ``load_encoder(folder)`` reads it, and so does ``timm.create_model("local-dir:FOLDER", pretrained=True)`` (after
    ``import simclr_scale.models`` where the architecture is one of ours).

    Args:
        encoder: made by ``create_encoder``.
        transform: the evaluation transform that belongs to it.
        folder: must not exist, or be empty: nothing is overwritten.
        head: the projection head that it was trained with, for `load_head`, in a file of its own that timm ignores.
        classifier: the one that it was fine-tuned with, for `load_classifier`, in a file of its own too.
        facts: anything worth knowing about the training, JSON values; they go into config.json and the model card.

    Returns:
        The folder.
    """
    folder = require_new_folder(folder)
    config = encoder_config(encoder, transform, **facts)
    parts: dict[str, nn.Module] = {WEIGHTS: encoder}
    if head is not None:
        config[BUNDLE_KEY]["head"] = head.arguments
        parts[HEAD_WEIGHTS] = head
    if classifier is not None:
        config[BUNDLE_KEY]["classifier"] = {
            "classes": list(classifier.classes),
            "from_head_layer": classifier.from_head_layer,
            "head": classifier.head_arguments,
        }
        parts[CLASSIFIER_WEIGHTS] = classifier
    folder.parent.mkdir(parents=True, exist_ok=True)
    # A reader never sees half a bundle: it is written beside and moved into place.
    beside = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}-"))
    try:
        beside.chmod(0o755)
        for file, part in parts.items():
            weights = {key: value.detach().cpu().contiguous().clone() for key, value in part.state_dict().items()}
            save_file(weights, beside / file, metadata={"format": "pt"})
        (beside / CONFIG).write_text(json.dumps(config, indent=2) + "\n")
        (beside / CARD).write_text(_model_card(config, encoder, facts))
        os.replace(beside, folder)
    except BaseException:
        shutil.rmtree(beside, ignore_errors=True)
        raise
    return folder


def require_new_folder(folder: str | os.PathLike[str]) -> Path:
    """`folder`, where a bundle can be written. Raises InputError if something is there already.

    For a command to call before its work rather than after.
    """
    path = Path(folder)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise InputError(f"{path} exists and is not an empty folder; choose another folder for the encoder")
    return path


def _model_card(config: dict[str, Any], encoder: nn.Module, facts: dict[str, Any]) -> str:
    size = "x".join(map(str, config["pretrained_cfg"]["input_size"]))
    parameters = sum(parameter.numel() for parameter in encoder.parameters())
    rows = "\n".join(_rows(facts))
    transform = transform_of(config)
    image = "a PIL picture" if transform.channels in (1, 3) else "a tensor of the raw values, (C, H, W)"
    ours = config[BUNDLE_KEY]
    story, kind = "pretrained with SimCLR", "An image encoder without classifier, trained without labels"
    if "classifier" in ours:
        story, kind = (
            "fine-tuned after SimCLR",
            "An image encoder, and beside it its classifier, trained for its classes",
        )
    return f"""---
library_name: timm
tags: [image-feature-extraction, timm, self-supervised-learning, simclr]
---
# {config["architecture"]}, {story}

{kind} by simclr_scale {ours["version"]}:
images {size} in, {config["num_features"]} features out, {parameters:,} parameters.

```python
from simclr_scale import load_encoder

encoder, transform = load_encoder("PATH_OF_THIS_FOLDER")
features = encoder(transform(image)[None])  # image: {image}; features: (1, {config["num_features"]})
```

The transform is part of the bundle: `{transform!r}`.
{_beside(ours)}
| fact | value |
|---|---|
{rows or "| none given | |"}
"""


def _beside(ours: Mapping[str, Any]) -> str:
    """What a bundle of ours holds beside the encoder."""
    lines = ""
    if "head" in ours:
        lines += f"\n`{HEAD_WEIGHTS}` is the projection head; `simclr_scale.bundle.load_head` reads it.\n"
    if "classifier" in ours:
        classes = ours["classifier"]["classes"]
        lines += (
            f"\n`{CLASSIFIER_WEIGHTS}` is a classifier for {len(classes)} classes; "
            "`simclr_scale.bundle.load_classifier` puts it on the encoder.\n"
        )
    return lines


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
