"""What a bundle or a checkpoint holds beside the encoder: its projection head, and a classifier.

As strict as ``load_encoder``: a key that does not fit is an error.
"""

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from simclr_scale.bundle.loading import (
    LAST_CHECKPOINT,
    load_encoder,
    locate,
    misfit,
    read_bundle,
    read_checkpoint,
    weights_below,
)
from simclr_scale.bundle.saving import BUNDLE_KEY, CLASSIFIER_WEIGHTS, HEAD_WEIGHTS, WEIGHTS
from simclr_scale.bundle.transform import ImageTransform
from simclr_scale.errors import InputError
from simclr_scale.models import ClassificationHead, ImageClassifier, ProjectionHead


def load_head(spec: str | os.PathLike[str]) -> ProjectionHead:
    """The projection head that an encoder was pretrained with, in evaluation mode.

    Args:
        spec: a run directory, a bundle directory or a checkpoint. The bundles of earlier versions lack the head; that
            of a run is then taken from its last checkpoint, if that is of the same encoder to the bit.

    Raises:
        InputError: there is no head, it is not a ProjectionHead, or a file is missing or damaged.
    """
    path = Path(spec).expanduser()
    if not path.exists():
        raise InputError(f"{os.fspath(spec)} has no projection head; a run, a bundle or a .ckpt file may have one")
    found = locate(path)
    if found.is_file():
        return _head_of_checkpoint(read_checkpoint(found), str(found)).eval()
    if (found / HEAD_WEIGHTS).is_file():
        config, weights = read_bundle(found, HEAD_WEIGHTS)
        return _head(_of_ours(config, "head", found), weights, f"bundle {found}").eval()
    config, weights = read_bundle(found, WEIGHTS)
    if isinstance(config, dict) and "head" in config.get(BUNDLE_KEY, {}):
        raise InputError(f"bundle {found} has lost its projection head, the file {HEAD_WEIGHTS}")
    last = found.parent / LAST_CHECKPOINT
    if not last.is_file():
        raise InputError(f"bundle {found} has no projection head; pretraining writes one beside the encoder")
    checkpoint = read_checkpoint(last)
    if not _equal(weights, weights_below(checkpoint["state_dict"], "encoder.")):
        raise InputError(f"bundle {found} has no projection head, and {last} is of another moment of the training")
    return _head_of_checkpoint(checkpoint, str(last)).eval()


def load_classifier(spec: str | os.PathLike[str]) -> tuple[ImageClassifier, ImageTransform]:
    """A fine-tuned encoder with its classifier, in evaluation mode, and the transform that belongs to it.

    Args:
        spec: a bundle that ``simclr-scale finetune --save`` or ``distil --save`` has written.

    Raises:
        InputError: there is no such bundle, it has no classifier, or a file is missing, damaged or does not fit.
    """
    path = Path(spec).expanduser()
    where = f"bundle {os.fspath(spec)}"
    found = locate(path) if path.exists() else path
    if not (found / CLASSIFIER_WEIGHTS).is_file():
        raise InputError(
            f"{os.fspath(spec)} has no classifier; simclr-scale finetune --save FOLDER makes such a bundle"
        )
    encoder, transform = load_encoder(found)
    config, weights = read_bundle(found, CLASSIFIER_WEIGHTS)
    facts = _of_ours(config, "classifier", found)
    try:
        head = None if facts["head"] is None else _new_head(facts["head"])
        classes = tuple(map(str, facts["classes"]))
        classifier = ClassificationHead(config["num_features"], classes, head, facts["from_head_layer"])
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{where} does not describe a classifier: {error}") from error
    _fill(classifier, weights, where)
    return ImageClassifier(encoder, classifier).eval(), transform


def _of_ours(config: Any, key: str, folder: Path) -> Any:
    try:
        return config[BUNDLE_KEY][key]
    except (KeyError, TypeError) as error:
        raise InputError(f"bundle {folder} does not describe its {key}: config.json lacks it") from error


def _head_of_checkpoint(checkpoint: Mapping[str, Any], where: str) -> ProjectionHead:
    weights = weights_below(checkpoint["state_dict"], "head.")
    shapes = [
        tuple(weights[key].shape)
        for key in sorted(weights, key=_number)
        if re.fullmatch(r"layers\.\d+\.0\.weight", key) and isinstance(weights[key], torch.Tensor)
    ]
    if not weights:
        raise InputError(f"{where} has no projection head")
    if not shapes or any(len(shape) != 2 for shape in shapes):
        raise InputError(f"{where}: its head is not a ProjectionHead")
    arguments = {
        "in_features": shapes[0][1],
        "hidden_features": shapes[0][0],
        "out_features": shapes[-1][0],
        "num_layers": len(shapes),
        "last_norm": f"layers.{len(shapes) - 1}.1.weight" in weights,
    }
    return _head(arguments, weights, where)


def _number(key: str) -> int:
    found = re.search(r"\d+", key)
    return int(found[0]) if found else -1


def _head(arguments: Any, weights: Mapping[str, Any], where: str) -> ProjectionHead:
    try:
        head = _new_head(arguments)
    except (TypeError, ValueError) as error:
        raise InputError(f"{where} does not describe a projection head: {error}") from error
    _fill(head, weights, where)
    return head


def _new_head(arguments: Any) -> ProjectionHead:
    # Its initial weights are replaced, and must not move anyone's random numbers.
    with torch.random.fork_rng(devices=[]):
        return ProjectionHead(**arguments)


def _fill(module: nn.Module, weights: Mapping[str, Any], where: str) -> None:
    if problem := misfit(module, weights):
        raise InputError(f"{where}: the weights do not fit the {type(module).__name__}: {problem}")
    module.load_state_dict(weights)


def _equal(some: Mapping[str, torch.Tensor], others: Mapping[str, Any]) -> bool:
    return some.keys() == others.keys() and all(torch.equal(tensor, others[key]) for key, tensor in some.items())
