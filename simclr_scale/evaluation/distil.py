"""Distillation: a network learns the answers of a fine-tuned one on images without labels, SimCLRv2's third step.

Chen et al. 2020b, "Big Self-Supervised Models are Strong Semi-Supervised Learners", section 2, equations 2 and 3; the
loss is that of google-research/simclr, colabs/distillation_self_training.ipynb. The student is the same architecture
("self-distillation") or a smaller one. Crops and flips, LARS, cosine. For small data sets the sources name neither rate
nor epochs: the defaults below are ours.

B images a batch, C classes.
"""

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from simclr_scale.bundle import ImageTransform
from simclr_scale.data.sources import Source
from simclr_scale.errors import InputError
from simclr_scale.evaluation.augmented_images import AugmentedImages, check_crops, unreadable_images
from simclr_scale.evaluation.features import evaluating
from simclr_scale.evaluation.few_labels import LabelBudget, select_labels
from simclr_scale.evaluation.finetune import features_of
from simclr_scale.evaluation.manifest import DatasetRecord, EncoderRecord, Manifest, encoder_fingerprint
from simclr_scale.evaluation.metrics import top1
from simclr_scale.evaluation.network_training import (
    OptimizerName,
    TrainedClassifier,
    TrainingSettings,
    classify_images,
    train_network,
)
from simclr_scale.evaluation.outcome import Outcome
from simclr_scale.evaluation.pairs import labelled_images, left_out, renumbered
from simclr_scale.evaluation.progress import show_progress
from simclr_scale.models import ClassificationHead, ImageClassifier

LEARNING_RATE = 0.1
EPOCHS = 30
BATCH_SIZE = 256
ALPHA = 0.5
"""Weight of the teacher's answers beside labels; the paper does not say it."""


def distillation_loss(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """Cross-entropy of softmax(s / T) with respect to softmax(t / T), times T^2, for each image.

    T^2 makes up for the gradient's fall with 1 / T^2 (Hinton et al. 2015, "Distilling the Knowledge in a Neural
    Network", section 2).

    Args:
        student: logits s (B, C); their gradient is T (softmax(s / T) - softmax(t / T)).
        teacher: logits t (B, C).
        temperature: T, above 0.

    Returns:
        (B,)
    """
    wanted = F.softmax(teacher.float() / temperature, dim=1)
    return -(wanted * F.log_softmax(student.float() / temperature, dim=1)).sum(dim=1) * temperature**2


def distil(
    teacher: ImageClassifier,
    transform: ImageTransform,
    source: Source,
    indices: np.ndarray | None = None,
    *,
    student: nn.Module | None = None,
    temperature: float = 1.0,
    labelled: np.ndarray | None = None,
    alpha: float = ALPHA,
    optimizer: OptimizerName = "lars",
    learning_rate: float = LEARNING_RATE,
    weight_decay: float = 0.0,
    epochs: int = EPOCHS,
    batch_size: int = BATCH_SIZE,
    seed: int = 0,
    num_workers: int = 0,
    device: torch.device | str | None = None,
    progress: Callable[[int], object] | None = None,
    group: dist.ProcessGroup | None = None,
) -> TrainedClassifier:
    """Trains a student on what a frozen teacher says about random crops and flips of images.

    Both see the same crop. Without `labelled`, no label of `source` is read.

    Args:
        teacher: in evaluation mode throughout, so that no weight and no statistic changes; its modes and its device are
            afterwards what they were.
        transform: that of the teacher, and so of the student.
        source: the images.
        indices: which of them, (n,); None for all.
        student: an encoder, of which a copy is trained, with a linear layer that starts at 0; None for a copy of the
            teacher with its classifier.
        temperature: of both softmaxes.
        labelled: which images' labels are used, (m,), by names that the teacher knows. The loss is then (1 - alpha) *
            the mean cross-entropy of these + alpha * the mean of `distillation_loss` over all, in expectation: in a
            batch, a labelled image has the weight n / m.
        alpha: from 0 to 1; counts only with `labelled`.

    The others, and how ranks work together, are as in `fine_tune`.

    Raises:
        InputError: an image cannot be read, a class of `labelled` is none of the teacher's, a setting is out of range,
            the student does not take the teacher's images, or the loss stops being finite.
    """
    settings = _settings(optimizer, learning_rate, weight_decay, epochs, batch_size)
    check_distillation(transform, settings, temperature, alpha)
    chosen = np.arange(len(source)) if indices is None else np.asarray(indices, dtype=np.int64)
    if len(chosen) < 2:
        raise InputError(f"{source.name}: {len(chosen)} images; distillation takes at least 2")
    classes = teacher.head.classes
    targets = None if labelled is None else _targets(source, labelled, chosen, classes)
    share = 0.0 if targets is None else int((targets >= 0).sum()) / len(chosen)
    if student is None:
        network = deepcopy(teacher)
    else:
        head = ClassificationHead(features_of(student, transform), classes)
        network = ImageClassifier(deepcopy(student), head)

    with evaluating(teacher, device) as there:

        def loss_of(logits: Tensor, images: Tensor, index: Tensor) -> Tensor:
            with torch.no_grad():
                wanted = teacher(images)
            loss = distillation_loss(logits, wanted, temperature).sum()
            if targets is None:
                return loss
            target = targets[index].to(logits.device)  # -1 where the label is not used
            # F.cross_entropy of no image at all is a sum of nothing, 0, with a gradient of 0.
            supervised = F.cross_entropy(logits.float(), target, ignore_index=-1, reduction="sum")
            return alpha * loss + (1 - alpha) * supervised / share

        return train_network(
            network,
            loss_of,
            AugmentedImages(source, transform, seed),
            chosen,
            settings,
            num_workers=num_workers,
            device=there,
            progress=progress,
            group=group,
        )


def check_distillation(transform: object, settings: TrainingSettings, temperature: float, alpha: float) -> None:
    """Raises InputError for settings out of range; for a command to call before its work."""
    check_crops(transform)
    settings.check()
    if not 0 < temperature < float("inf"):
        raise InputError(f"temperature: {temperature}, wanted a finite number above 0")
    if not 0 <= alpha <= 1:
        raise InputError(f"alpha: {alpha}, the weight of the teacher's answers, wanted from 0 to 1")


def evaluate_distil(
    teacher: ImageClassifier,
    transform: ImageTransform,
    train_source: Source,
    test_source: Source,
    *,
    student: nn.Module | None = None,
    temperature: float = 1.0,
    labels: str | float | None = None,
    alpha: float = ALPHA,
    optimizer: OptimizerName = "lars",
    learning_rate: float = LEARNING_RATE,
    weight_decay: float = 0.0,
    epochs: int = EPOCHS,
    finetune_batch_size: int = BATCH_SIZE,
    seed: int = 0,
    batch_size: int = 256,
    num_workers: int = 0,
    device: torch.device | str | None = None,
    spec: str = "",
    student_spec: str = "",
    keep: Callable[[TrainedClassifier], object] | None = None,
    group: dist.ProcessGroup | None = None,
) -> Manifest:
    """Top-1 of a distilled student on the labelled images of `test_source`, and beside it the teacher's.

    Args:
        labels: those of `train_source` that are used beside the teacher's answers: a fraction or a list file, see
            `LabelBudget`; the same fraction and seed as the teacher's draw are the same images. None: no label is read.
        finetune_batch_size: `batch_size` of `distil`.
        batch_size: images a forward on the test images.
        spec: of the teacher, for the manifest.
        student_spec: of the student.
        keep: is given the student's network.

    The others are those of `distil`. Images that cannot be read are left out, and the manifest names them.

    Raises:
        InputError: as `distil`; no test image has a label, or one is of a class that the teacher does not know.
    """
    settings = _settings(optimizer, learning_rate, weight_decay, epochs, finetune_batch_size)
    check_distillation(transform, settings, temperature, alpha)
    classes = teacher.head.classes
    test_indices = labelled_images(test_source, "test")
    test_labels = renumbered(test_source, classes)[test_indices]
    if (test_labels >= len(classes)).any():
        unknown = test_source.labels[test_indices][test_labels >= len(classes)][0]
        raise InputError(
            f"{test_source.name}: class {test_source.classes[unknown]!r} is none of the teacher's {len(classes)}; "
            "wanted a data set of the same classes"
        )
    if student is not None:
        features_of(student, transform)
    labelled, selection = None, "none: the teacher's answers"
    used: dict[str, Any] = {}
    if labels is not None:
        labelled, selection, used = _labelled(train_source, labels, seed, classes)
    unreadable = unreadable_images(train_source, np.arange(len(train_source)), num_workers, group)
    chosen = np.setdiff1d(np.arange(len(train_source)), list(unreadable))
    labelled = None if labelled is None else np.intersect1d(labelled, chosen)

    with show_progress("distillation", epochs, "epochs") as progress:
        trained = distil(
            teacher,
            transform,
            train_source,
            chosen,
            student=student,
            temperature=temperature,
            labelled=labelled,
            alpha=alpha,
            optimizer=optimizer,
            learning_rate=learning_rate,
            weight_decay=weight_decay,
            epochs=epochs,
            batch_size=finetune_batch_size,
            seed=seed,
            num_workers=num_workers,
            device=device,
            progress=progress,
            group=group,
        )
    untested: dict[int, str] = {}
    answers = []
    for network in (trained.network, teacher):
        predicted, read = classify_images(
            network,
            transform,
            test_source,
            indices=test_indices,
            batch_size=batch_size,
            num_workers=num_workers,
            device=device,
            unreadable=untested,
            group=group,
        )
        answers.append(predicted.numpy())
    test_labels = test_labels[np.isin(test_indices, read.numpy())]
    if keep:
        keep(trained)
    train = DatasetRecord(
        name=train_source.name,
        split=train_source.split_description,
        fingerprint=train_source.fingerprint(),
        images=len(chosen),
        unlabelled=len(chosen) - (0 if labelled is None else len(labelled)),
        classes=() if labelled is None else tuple(train_source.classes),
        unreadable=tuple(unreadable[index] for index in sorted(unreadable)),
    )
    how = settings.record() | {"temperature": temperature, "seed": seed, "student": student_spec or "the teacher's"}
    return Manifest(
        task="distil",
        metric="top1",
        values=(top1(answers[0], test_labels),),
        train=train,
        test=DatasetRecord.of(test_source, untested),
        label_selection=selection,
        encoder=EncoderRecord.of(teacher, transform, spec),
        settings=how if labelled is None else how | {"alpha": alpha, "labels": str(labels)},
        details={
            "teacher_top1": top1(answers[1], test_labels),
            "student_fingerprint": encoder_fingerprint(trained.network),
            "student_parameters": sum(weight.numel() for weight in trained.network.parameters()),
            "teacher_parameters": sum(weight.numel() for weight in teacher.parameters()),
            "batch": min(finetune_batch_size, len(chosen)),
            "losses": list(trained.losses),
            **used,
        },
        warnings=(
            *left_out(unreadable, len(train_source), "training"),
            *left_out(untested, len(test_indices), "test"),
            *settings.warnings(len(chosen)),
        ),
        outcome=Outcome(read.numpy(), test_labels, (answers[0],)),
    )


def _settings(
    optimizer: OptimizerName, learning_rate: float, weight_decay: float, epochs: int, batch_size: int
) -> TrainingSettings:
    return TrainingSettings(optimizer, learning_rate, epochs, batch_size, weight_decay)


def _labelled(
    source: Source, labels: str | float, seed: int, classes: tuple[str, ...]
) -> tuple[np.ndarray, str, dict[str, Any]]:
    """Which labels are used, in words, and for the details of the manifest."""
    budget = LabelBudget.parse(labels)
    if budget.shots is not None:
        raise InputError(
            f"labels: {budget}, whose scores take several draws; wanted a fraction, or a list of the images"
        )
    labelled_images(source, "train")
    [selection], description = select_labels(source, budget, [seed])
    _targets(source, selection.indices, np.arange(len(source)), classes)
    record = {} if budget.is_all else {"chosen": [selection.record(source)]}
    return selection.indices, f"{description}, beside the teacher's answers", record


def _targets(source: Source, labelled: np.ndarray, chosen: np.ndarray, classes: tuple[str, ...]) -> Tensor:
    """The class of each image of `source`, as the teacher numbers them; -1 where the label is not used."""
    used = np.intersect1d(labelled, chosen)
    if not len(used):
        raise InputError(f"{source.name}: none of the images whose labels are to be used is there")
    targets = np.full(len(source), -1, dtype=np.int64)
    targets[used] = renumbered(source, classes)[used]
    if (targets >= len(classes)).any():
        unknown = source.classes[source.labels[targets >= len(classes)][0]]
        raise InputError(f"{source.name}: class {unknown!r} is none of the teacher's {len(classes)}")
    return torch.from_numpy(targets)
