"""Fine-tuning: the whole network trained on few or all labels, by the protocols of SimCLR and SimCLRv2.

v1 (Chen et al. 2020a, appendix B.5; google-research/simclr, README): SGD with Nesterov momentum .9, learning rate
.05 * batch / 256, cosine without warm-up, 60 epochs for 1% of the labels and 30 for 10%, no regularisation.
v2 (Chen et al. 2020b, section 2; the same code with `ft_proj_selector=1`): LARS with .005 * sqrt(batch), 60 epochs at a
batch of 1024, no weight decay, from the output of the first layer of the projection head.
Both: crops and flips, batch norm over the global batch, a linear layer whose logits start at 0. Nothing is chosen, so
no image is held out.
"""

from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Any, Literal, cast

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from simclr_scale.bundle import ImageTransform
from simclr_scale.data.sources import Source
from simclr_scale.errors import InputError
from simclr_scale.evaluation.augmented_images import (
    AugmentedImages,
    check_crops,
    check_labelled,
    unreadable_images,
)
from simclr_scale.evaluation.features import Transform, evaluating
from simclr_scale.evaluation.manifest import EncoderRecord, Manifest, encoder_fingerprint
from simclr_scale.evaluation.metrics import top1
from simclr_scale.evaluation.network_training import (
    OptimizerName,
    TrainedClassifier,
    TrainingSettings,
    classify_images,
    train_network,
)
from simclr_scale.evaluation.pairs import Chosen, LabelledPair
from simclr_scale.evaluation.progress import show_progress
from simclr_scale.models import ClassificationHead, ImageClassifier, ProjectionHead
from simclr_scale.models.classification import check_head_layer

ProtocolName = Literal["v1", "v2"]

LEARNING_RATES: dict[OptimizerName, float] = {"sgd": 0.05, "lars": 0.005}
"""Base rates: times batch / 256 of SGD, times the root of the batch of LARS."""

_FEW = 0.05
"""Below this share of labels, v1 trains for the epochs of 1%, else for those of 10%: the paper names only these two."""


@dataclass(frozen=True)
class Protocol:
    """A published protocol: what counts where the caller does not say otherwise."""

    optimizer: OptimizerName
    batch_size: int
    from_head_layer: int
    epochs_of_few: int
    """For about 1% of the labels."""
    epochs_of_many: int
    """For about 10% and more."""

    def epochs(self, share: float) -> int:
        """For a share of the labels."""
        return self.epochs_of_few if share < _FEW else self.epochs_of_many


PROTOCOLS: dict[ProtocolName, Protocol] = {
    "v1": Protocol("sgd", 256, 0, 60, 30),
    "v2": Protocol("lars", 1024, 1, 60, 60),
}


@dataclass(frozen=True)
class Choices:
    """A protocol, and what a caller wants otherwise; None: as the protocol has it."""

    protocol: ProtocolName = "v1"
    head: ProjectionHead | None = None
    from_head_layer: int | None = None
    optimizer: OptimizerName | None = None
    learning_rate: float | None = None
    weight_decay: float = 0.0
    epochs: int | None = None
    batch_size: int | None = None

    def settled(self, share: float = 1.0) -> tuple[TrainingSettings, int]:
        """The settings, and the layer of the head.

        Args:
            share: of the labelled images that are used, which the epochs of v1 follow.

        Raises:
            InputError: an unknown protocol, a setting out of range, or a layer that the head does not have.
        """
        if self.protocol not in PROTOCOLS:
            raise InputError(f"protocol: {self.protocol!r}, wanted {' or '.join(PROTOCOLS)}")
        published = PROTOCOLS[self.protocol]
        optimizer = published.optimizer if self.optimizer is None else self.optimizer
        if optimizer not in LEARNING_RATES:
            raise InputError(f"optimizer: {optimizer!r}, wanted sgd or lars")
        settings = TrainingSettings(
            optimizer=optimizer,
            learning_rate=LEARNING_RATES[optimizer] if self.learning_rate is None else self.learning_rate,
            epochs=published.epochs(share) if self.epochs is None else self.epochs,
            batch_size=published.batch_size if self.batch_size is None else self.batch_size,
            weight_decay=self.weight_decay,
        )
        settings.check()
        return settings, self._layer(published)

    def _layer(self, published: Protocol) -> int:
        layer = published.from_head_layer if self.from_head_layer is None else self.from_head_layer
        if self.from_head_layer is None and layer and self.head is None:
            raise InputError(
                f"protocol: {self.protocol} starts from layer {layer} of the projection head, and there is none; "
                "give from_head_layer 0 to start from the features"
            )
        check_head_layer(self.head, layer)
        return layer


def fine_tune(
    encoder: nn.Module,
    transform: ImageTransform,
    source: Source,
    indices: Sequence[int] | np.ndarray | None = None,
    *,
    protocol: ProtocolName = "v1",
    head: ProjectionHead | None = None,
    from_head_layer: int | None = None,
    optimizer: OptimizerName | None = None,
    learning_rate: float | None = None,
    weight_decay: float = 0.0,
    epochs: int | None = None,
    batch_size: int | None = None,
    seed: int = 0,
    num_workers: int = 0,
    device: torch.device | str | None = None,
    progress: Callable[[int], object] | None = None,
    group: dist.ProcessGroup | None = None,
) -> TrainedClassifier:
    """Trains a copy of an encoder, and a linear layer on it, on random crops and flips of labelled images.

    On several ranks the gradient is that of the global batch, and so are the statistics of batch norm: all arrive at
    the same network, that of one rank to the rounding of float32. Arguments are then equal on all of them, and every
    image must be readable.

    Args:
        encoder: images (B, C, H, W) in, features (B, D) out. It stays as it is.
        transform: says the size, square, and the normalisation of its images.
        source: the images.
        indices: which of them, (n,), all labelled; None for all that have a label.
        protocol: "v1" or "v2"; the settings below are its own where they are None.
        head: the projection head, where training starts from one of its layers.
        from_head_layer: the linear layer is on the output of that layer of the head; 0: on the features.
        optimizer: "sgd" (Nesterov) or "lars".
        learning_rate: base rate, times B / 256 of SGD and times sqrt(B) of LARS.
        weight_decay: of all but norms, biases and the linear layer.
        epochs: over the images.
        batch_size: B, of all ranks together; n where that is less. What does not fill the last batch is left out, other
            images every epoch.
        seed: of the orders, the crops, the flips and dropout.
        num_workers: processes that read images.
        device: where it is trained; None for where the encoder is.
        progress: is told how many epochs are done.
        group: the ranks; None for all.

    Raises:
        InputError: an image is unlabelled or cannot be read, there are fewer than two classes, a setting is out of
            range, the head lacks that layer, the transform cannot crop, the encoder gives no features, a batch is
            smaller than the number of ranks, or the loss stops being finite.
    """
    check_crops(transform)
    chosen, classes = check_labelled(source, indices)
    choices = Choices(protocol, head, from_head_layer, optimizer, learning_rate, weight_decay, epochs, batch_size)
    settings, layer = choices.settled(share=len(chosen) / int((source.labels >= 0).sum()))
    names = [source.classes[label] for label in classes]
    width = features_of(encoder, transform)
    network = ImageClassifier(deepcopy(encoder), ClassificationHead(width, names, head, layer))
    there = device
    if there is None and (weights := next(encoder.parameters(), None)) is not None:
        there = weights.device
    target_of = torch.from_numpy(np.searchsorted(classes, source.labels))

    def cross_entropy(logits: Tensor, _: Tensor, index: Tensor) -> Tensor:
        return F.cross_entropy(logits.float(), target_of[index].to(logits.device), reduction="sum")

    return train_network(
        network,
        cross_entropy,
        AugmentedImages(source, transform, seed),
        chosen,
        settings,
        num_workers=num_workers,
        device=there,
        progress=progress,
        group=group,
    )


def features_of(encoder: nn.Module, transform: ImageTransform) -> int:
    """D, the features that `encoder` gives for one black image such as `transform` makes; it stays as it is.

    Raises:
        InputError: it takes no such images, or does not give (1, D).
    """
    size = tuple(transform.config["input_size"])
    with evaluating(encoder, None) as there, torch.no_grad():
        try:
            features = encoder(torch.zeros(1, *size, device=there))
        except (RuntimeError, AssertionError, ValueError) as error:
            reason = " ".join(str(error).split())
            raise InputError(f"the encoder takes no images of {' x '.join(map(str, size))}: {reason}") from error
    if not isinstance(features, Tensor) or features.ndim != 2:
        form = tuple(features.shape) if isinstance(features, Tensor) else f"a {type(features).__name__}"
        raise InputError(f"the encoder gives {form} for 1 image, wanted (1, features)")
    return features.shape[1]


def evaluate_finetune(
    encoder: nn.Module,
    transform: Transform,
    train_source: Source,
    test_source: Source,
    *,
    protocol: ProtocolName = "v1",
    head: ProjectionHead | None = None,
    from_head_layer: int | None = None,
    optimizer: OptimizerName | None = None,
    learning_rate: float | None = None,
    weight_decay: float = 0.0,
    epochs: int | None = None,
    finetune_batch_size: int | None = None,
    labels: str | float = 1.0,
    seeds: int | None = None,
    seed: int = 0,
    batch_size: int = 256,
    num_workers: int = 0,
    device: torch.device | str | None = None,
    spec: str = "",
    label_selection: str = "all",
    allow_missing_classes: bool = False,
    keep: Callable[[TrainedClassifier], object] | None = None,
    group: dist.ProcessGroup | None = None,
) -> Manifest:
    """Top-1 of a fine-tuned copy of an encoder on the labelled images of `test_source`, looked at once, at the end.

    `protocol` to `finetune_batch_size` and `num_workers` to `device` are those of `fine_tune`; `labels`, `seeds` and
    what follows them are those of `evaluate_knn`. Every draw of labels is a training of its own, by the seed of the
    draw. Images that cannot be read are left out, and the manifest names them.

    Args:
        batch_size: images a forward on the test images.
        keep: is given the network of every draw.

    Raises:
        InputError: as `fine_tune`, and as `evaluate_knn` about labels and classes: before any image is read, but for
            a loss that stops being finite and for images of which none can be read.
    """
    check_crops(transform)
    square = cast(ImageTransform, transform)  # checked above
    choices = Choices(
        protocol, head, from_head_layer, optimizer, learning_rate, weight_decay, epochs, finetune_batch_size
    )
    choices.settled()
    chosen = Chosen.of(train_source, labels, seeds, seed, label_selection)
    pair = LabelledPair.of(train_source, test_source, chosen.union(), allow_missing_classes)
    share = max(len(pair.rows(selection)) for selection in chosen.selections) / int((train_source.labels >= 0).sum())
    settings, layer = choices.settled(share)
    features_of(encoder, square)
    pair = pair.without(unreadable_images(train_source, pair.train_indices, num_workers, group))

    values: list[float] = []
    answers: list[np.ndarray] = []
    fits: list[dict[str, Any]] = []
    draws = len(chosen.selections)
    with show_progress("fine-tuning", draws * settings.epochs, "epochs") as progress:
        for number, selection in enumerate(chosen.selections):
            rows = pair.rows(selection)

            def told(done: int, before: int = number * settings.epochs) -> None:
                progress(before + done)

            tuned = fine_tune(
                encoder,
                square,
                train_source,
                pair.train_indices[rows],
                **vars(replace(choices, epochs=settings.epochs)),
                seed=selection.seed,
                num_workers=num_workers,
                device=device,
                progress=told,
                group=group,
            )
            unreadable: dict[int, str] = {}
            predicted, _ = classify_images(
                tuned.network,
                square,
                test_source,
                indices=pair.test_indices,
                batch_size=batch_size,
                num_workers=num_workers,
                unreadable=unreadable,
                group=group,
            )
            if unreadable:
                pair = pair.without(test_unreadable=unreadable)
            label_of = np.array([train_source.classes.index(name) for name in tuned.network.head.classes])
            answers.append(label_of[predicted.numpy()])
            values.append(top1(answers[-1], pair.test_labels))
            fits.append({"batch": min(settings.batch_size, len(rows)), "losses": list(tuned.losses)})
            if keep:
                keep(tuned)
    details: dict[str, Any] = fits[0] if draws == 1 else {"fits": fits}
    if layer and head is not None:
        details = {"head_fingerprint": encoder_fingerprint(head), **details}
    return pair.manifest(
        task="finetune",
        values=tuple(values),
        encoder=EncoderRecord.of(encoder, transform, spec),
        chosen=chosen,
        settings={"protocol": protocol, "from_head_layer": layer, **settings.record(), "seed": seed},
        details=details,
        answers=answers,
        warnings=settings.warnings(max(len(pair.rows(selection)) for selection in chosen.selections)),
    )
