"""Published results on well-known test sets, to stand beside one's own by the same protocol."""

from dataclasses import dataclass

_SIMCLR = "Chen et al. 2020a"
_SIMCLR_V2 = "google-research/simclr, README of SimCLRv2"
_LIGHTLY = "lightly, benchmarks of its documentation"


@dataclass(frozen=True)
class Published:
    """A top-1 accuracy that others report."""

    dataset: str
    """"imagenet" or "cifar10"."""
    task: str
    """"knn", "linear" or "finetune"."""
    labels: str
    """"As `LabelBudget` writes them: "1", "0.1", "0.01"."""
    encoder: str
    value: float
    """A share, between 0 and 1."""
    source: str


PUBLISHED = (
    Published("imagenet", "linear", "1", "ResNet-50, 1,000 epochs", 0.693, _SIMCLR),
    Published("imagenet", "linear", "1", "ResNet-50 (2x), 1,000 epochs", 0.742, _SIMCLR),
    Published("imagenet", "linear", "1", "ResNet-50 (4x), 1,000 epochs", 0.765, _SIMCLR),
    Published("imagenet", "linear", "1", "SimCLRv2 ResNet-50", 0.717, _SIMCLR_V2),
    Published("imagenet", "linear", "1", "SimCLRv2 ResNet-152 (3x+SK)", 0.798, _SIMCLR_V2),
    Published("imagenet", "finetune", "0.01", "ResNet-50, 1,000 epochs", 0.483, _SIMCLR),
    Published("imagenet", "finetune", "0.01", "ResNet-50 (2x), 1,000 epochs", 0.585, _SIMCLR),
    Published("imagenet", "finetune", "0.01", "ResNet-50 (4x), 1,000 epochs", 0.630, _SIMCLR),
    Published("imagenet", "finetune", "0.01", "SimCLRv2 ResNet-50", 0.579, _SIMCLR_V2),
    Published("imagenet", "finetune", "0.01", "SimCLRv2 ResNet-152 (3x+SK)", 0.749, _SIMCLR_V2),
    Published("imagenet", "finetune", "0.1", "ResNet-50, 1,000 epochs", 0.656, _SIMCLR),
    Published("imagenet", "finetune", "0.1", "ResNet-50 (2x), 1,000 epochs", 0.717, _SIMCLR),
    Published("imagenet", "finetune", "0.1", "ResNet-50 (4x), 1,000 epochs", 0.744, _SIMCLR),
    Published("imagenet", "finetune", "0.1", "SimCLRv2 ResNet-50", 0.684, _SIMCLR_V2),
    Published("imagenet", "finetune", "0.1", "SimCLRv2 ResNet-152 (3x+SK)", 0.801, _SIMCLR_V2),
    Published("imagenet", "finetune", "1", "SimCLRv2 ResNet-50", 0.763, _SIMCLR_V2),
    Published("imagenet", "finetune", "1", "SimCLRv2 ResNet-152 (3x+SK)", 0.831, _SIMCLR_V2),
    Published("imagenet", "knn", "1", "ResNet-50, batch 256, 100 epochs", 0.448, _LIGHTLY),
    Published("cifar10", "linear", "1", "ResNet-50, batch 1,024, 1,000 epochs", 0.940, _SIMCLR),
    Published("cifar10", "knn", "1", "ResNet-18, 200 epochs", 0.848, _LIGHTLY),
    Published("cifar10", "knn", "1", "ResNet-18, 800 epochs", 0.879, _LIGHTLY),
)

# By the number of classes and of test images; where other sets have the same, by two of the classes too.
_IMAGENET = (1000, 50_000)
_CIFAR10 = (10, 10_000)


def known_dataset(classes: tuple[str, ...], test_images: int) -> str | None:
    """The name of a data set that results are published on, told by its test part; None for any other.

    Args:
        classes: their names, or their numbers where no names are known.
        test_images: all that the test part has: a result on some of them is not comparable.
    """
    size = (len(classes), test_images)
    if size == _IMAGENET:
        return "imagenet"
    if size == _CIFAR10 and {"automobile", "frog"} <= {name.lower() for name in classes}:
        return "cifar10"
    return None


def published(dataset: str | None, task: str, labels: str) -> tuple[Published, ...]:
    """What is reported for a task with so many labels; of few labels only class-balanced fractions are comparable."""
    return tuple(one for one in PUBLISHED if (one.dataset, one.task, one.labels) == (dataset, task, labels))
