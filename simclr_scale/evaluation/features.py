"""From images to features: what every evaluation on a frozen encoder starts with."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain
from typing import Any

import torch
import torch.distributed as dist
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, Dataset, Subset, default_collate

from simclr_scale.data.sources import Source
from simclr_scale.data.workers import outlive_first_sigterm
from simclr_scale.distributed import all_gather, require_equal_across_ranks, world
from simclr_scale.errors import InputError

Transform = Callable[[Image.Image | torch.Tensor], torch.Tensor]


class ImageDataset(Dataset[dict[str, Any]]):
    """The images of a source under a transform: {"image": (C, H, W), "label": int, "index": int}.

    A label of -1 marks an image without one. Of an image that cannot be read there is {"index": int, "unreadable":
    str}, the reason.
    """

    def __init__(self, source: Source, transform: Transform) -> None:
        self.source = source
        self.transform = transform

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> dict[str, Any]:
        try:
            image = self.source.image(index)
        except InputError as error:
            return {"index": index, "unreadable": str(error)}
        return {"image": self.transform(image), "label": int(self.source.labels[index]), "index": index}


def image_loader(
    source: Source,
    transform: Transform,
    *,
    batch_size: int = 256,
    num_workers: int = 0,
    indices: Sequence[int] | None = None,
) -> DataLoader[dict[str, Any]]:
    """Batches of the images of `source`, each image once and in order; `indices` chooses some of them.

    Yields {"image": (B, C, H, W), "label": (B,) int64, "index": (B,) int64}, the index being that in `source`. Images
    that cannot be read are missing there; "unreadable": [(index, reason), ...] then names them.
    """
    images: Dataset[dict[str, Any]] = ImageDataset(source, transform)
    if indices is not None:
        images = Subset(images, indices)
    return DataLoader(
        images,
        batch_size=batch_size,
        num_workers=num_workers,
        collate_fn=_collate_readable,
        worker_init_fn=outlive_first_sigterm,
        pin_memory=torch.cuda.is_available(),
    )


def _collate_readable(items: list[dict[str, Any]]) -> dict[str, Any]:
    readable = [item for item in items if "unreadable" not in item]
    none = {"image": torch.empty(0), "label": torch.empty(0, dtype=torch.int64), "index": torch.empty(0)}
    batch = default_collate(readable) if readable else none
    unreadable = [(item["index"], item["unreadable"]) for item in items if "unreadable" in item]
    return batch | {"unreadable": unreadable} if unreadable else batch


def extract_features(
    encoder: nn.Module,
    loader: Iterable[Any],
    *,
    device: torch.device | str | None = None,
    progress: Callable[[int], object] | None = None,
    unreadable: dict[int, str] | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Features of every image of `loader`, in the order of the index, by the encoder in evaluation mode.

    Args:
        encoder: images (B, C, H, W) in, features (B, D) out. Its modes (training or evaluation) and its device are
            afterwards what they were, also when this raises.
        loader: yields {"image": (B, C, H, W), "label": (B,), "index": (B,)}, or (images, labels), whose indices then
            count up from 0.
        device: where the encoder runs; None for where it is. Precision is the encoder's own, or that of the autocast
            the caller has on.
        progress: is told how many images are done, after each batch.
        unreadable: is told of images of `image_loader` that cannot be read, by index and with the reason; they are
            missing in the result. None: the first of them is an error.

    Returns:
        Features (N, D) float32, labels (N,) int64 and indices (N,) int64, on the CPU.

    Raises:
        InputError: the loader is empty or yields something else; an image cannot be read; the encoder's output is not
            (B, D) or not finite.
    """
    features, labels, indices = [], [], []
    done = 0
    left_out: dict[int, str] = {}
    with evaluating(encoder, device) as there, torch.inference_mode():
        for batch in loader:
            if isinstance(batch, Mapping):
                left_out.update(batch.get("unreadable", ()))
            if left_out and unreadable is None:
                raise InputError(next(iter(left_out.values())))
            images, batch_labels, batch_indices = _unpack(batch, first_index=done)
            if not len(images):
                continue
            features.append(checked_features(encoder(images.to(there, non_blocking=True)), batch_indices))
            labels.append(batch_labels.long().cpu())
            indices.append(batch_indices.long().cpu())
            done += len(images)
            if progress:
                progress(done)
    if left_out and unreadable is not None:
        unreadable.update(left_out)
    if not done and left_out:
        reason = next(iter(left_out.values()))
        raise InputError(f"none of the {len(left_out):,} images can be read; the first: {reason}")
    if not done:
        raise InputError("the loader yields no images")
    # Outside inference mode, so that the caller may train on the result.
    return by_index(torch.cat(features), torch.cat(labels), torch.cat(indices))


def gather_features(
    features: torch.Tensor,
    labels: torch.Tensor,
    indices: torch.Tensor,
    group: dist.ProcessGroup | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What `extract_features` gave on each rank, put together: every image once, by index, equal on every rank.

    Ranks may hold different numbers of images, none included, and an image that several hold (a sampler pads its last
    batch) is kept once. Without torch.distributed, or on one process, the arguments come back as they are.

    Args:
        features: (n, D) of this rank; D and dtype equal on every rank.
        labels: (n,) int64.
        indices: (n,) int64, the number of the image in its data set.

    Raises:
        ValueError: on every rank, when D differs between them.
    """
    if world(group).size == 1:
        return features, labels, indices
    require_equal_across_ranks(features.shape[1], "number of features", group)
    device = torch.device("cuda", torch.cuda.current_device()) if "nccl" in dist.get_backend(group) else features.device
    sizes = all_gather(torch.tensor([len(features)], device=device), group).tolist()

    def gathered(rows: torch.Tensor) -> torch.Tensor:
        padded = rows.new_zeros(max(sizes), *rows.shape[1:])
        padded[: len(rows)] = rows
        parts = all_gather(padded.to(device), group).to(rows.device).split(max(sizes))
        return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])

    features, labels, indices = by_index(gathered(features), gathered(labels), gathered(indices))
    first = torch.ones_like(indices, dtype=torch.bool)
    first[1:] = indices[1:] != indices[:-1]
    return features[first], labels[first], indices[first]


@contextmanager
def evaluating(encoder: nn.Module, device: torch.device | str | None) -> Iterator[torch.device]:
    """The encoder in evaluation mode on `device`, which is yielded; both as before when the block ends."""
    training = {module: module.training for module in encoder.modules()}
    tensor = next(chain(encoder.parameters(), encoder.buffers()), None)
    home = torch.device("cpu") if tensor is None else tensor.device
    there = home if device is None else torch.device(device)
    try:
        encoder.eval().to(there)
        yield there
    finally:
        encoder.to(home)
        # Not by train(), which a module may override to keep a part frozen.
        for module, flag in training.items():
            module.training = flag


def _unpack(batch: Any, first_index: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    if isinstance(batch, Mapping) and {"image", "label", "index"} <= batch.keys():
        return batch["image"], batch["label"], batch["index"]
    if isinstance(batch, Sequence) and len(batch) == 2:
        images, labels = batch
        return images, labels, torch.arange(first_index, first_index + len(images))
    form = f"a mapping of {sorted(batch)}" if isinstance(batch, Mapping) else f"a {type(batch).__name__}"
    raise InputError(f'the loader yields {form}, wanted {{"image", "label", "index"}} or (images, labels)')


def checked_features(features: Any, indices: torch.Tensor) -> torch.Tensor:
    if not isinstance(features, torch.Tensor) or features.ndim != 2 or len(features) != len(indices):
        form = tuple(features.shape) if isinstance(features, torch.Tensor) else f"a {type(features).__name__}"
        raise InputError(f"the encoder gives {form} for {len(indices)} images, wanted ({len(indices)}, features)")
    features = features.float().cpu()
    finite = features.isfinite().all(dim=1)
    if not finite.all():
        raise InputError(f"the encoder gives NaN or infinity for image {int(indices[int(finite.int().argmin())])}")
    return features


def by_index(
    features: torch.Tensor, labels: torch.Tensor, indices: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    if (indices[1:] >= indices[:-1]).all():
        return features, labels, indices
    order = indices.argsort(stable=True)
    return features[order], labels[order], indices[order]
