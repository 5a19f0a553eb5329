"""Size, encoder, batch, chunk and the rest of a recipe, each by a rule that is told in a line.

The rules are those of the shipped recipes, carried over to other sizes: ``cifar10_small`` and ``chest_xray`` on CPUs,
``cifar10`` and ``imagenet_resnet50`` on GPUs. They are a start, not an optimum.
"""

import math
from dataclasses import dataclass
from typing import Any

from simclr_scale.errors import InputError
from simclr_scale.losses import NTXentLoss
from simclr_scale.models import ProjectionHead, create_encoder
from simclr_scale.scaling.auto.looking import Look
from simclr_scale.scaling.plan.chunks import largest_chunk
from simclr_scale.scaling.plan.footprint import Network

_SMALL = 64  # px; up to here images are trained on as they are
_PHOTOGRAPH = 224
_TINY = 40
_FEWEST_IMAGES = 16
_GIB = 2**30


@dataclass(frozen=True)
class Hardware:
    """Where it is to be trained.

    Attributes:
        device: "cpu", "cuda" or "mps".
        name: as its maker calls it.
        memory: bytes of one device; of a CPU those of the machine.
        ranks_here: processes that share a CPU's memory.
        ranks: processes on all machines.
    """

    device: str
    name: str
    memory: int
    ranks_here: int = 1
    ranks: int = 1

    @property
    def budget(self) -> int:
        """Bytes that training may take: of a GPU nine tenths, of a CPU's memory the half, shared by its processes."""
        return int(0.9 * self.memory) if self.device == "cuda" else self.memory // 2 // self.ranks_here


@dataclass(frozen=True)
class Wishes:
    """What the user has settled already; None: what suits."""

    image_size: int | None = None
    global_batch_size: int | None = None
    preset: str | None = None
    max_epochs: int | None = None
    max_steps: int | None = None


@dataclass(frozen=True)
class Choice:
    """A recipe, and why it is this one: a line for each setting."""

    recipe: dict[str, Any]
    reasons: tuple[str, ...]


def choose(look: Look, hardware: Hardware, wishes: Wishes = Wishes()) -> Choice:
    """The same recipe for the same images, machine and wishes, every time.

    Raises:
        InputError: fewer than 2 images a rank, or a machine on which not even two views fit.
    """
    gpu = hardware.device != "cpu"
    processes = f"{hardware.ranks} process{'es' if hardware.ranks > 1 else ''}"
    reasons = [str(look), f"{hardware.name}, {hardware.memory / _GIB:.1f} GiB, {processes}"]
    size = wishes.image_size or _size(look, gpu)
    reasons.append(f"data.image_size {size}: {_why_size(look, gpu, wishes)}")
    preset = wishes.preset or ("multiband" if look.channels not in (1, 3) else "grey" if look.channels == 1 else "")
    preset = preset or ("small" if size <= _SMALL else "natural")
    reasons.append(
        f"data.preset {preset}: {'as given' if wishes.preset else f'for {look.channels} channels at {size} px'}"
    )
    channels = 1 if preset == "grey" and not look.arrays else look.channels
    if preset in ("small", "natural") and not look.arrays:
        channels = 3
    encoder, why = _encoder(look, size, channels, gpu, hardware)
    reasons.append(f"model.encoder {encoder['name']}: {why}")
    batch = wishes.global_batch_size or _batch(look, size, gpu, hardware.ranks)
    chosen = (
        "as given"
        if wishes.global_batch_size
        else "a sixteenth of the images, between limits; a power of two a process"
    )
    reasons.append(f"data.global_batch_size {batch}: {chosen}")
    chunk = _chunk(encoder, size, channels, batch, hardware, gpu)
    reasons.append(
        f"model.chunk_size {chunk or 'null'}: "
        + (f"{chunk} views at a time fit" if chunk else f"all {2 * batch // hardware.ranks} views of a process fit")
        + f" into {hardware.budget / _GIB:.1f} GiB"
    )
    an_epoch = max(1, look.images // batch)
    epochs = wishes.max_epochs or _epochs(look, an_epoch, gpu)
    trained = min(float(epochs), wishes.max_steps / an_epoch) if wishes.max_steps else float(epochs)
    reasons.append(
        f"trainer.max_epochs {epochs}: {'as given' if wishes.max_epochs else f'{epochs * an_epoch:,} steps'}"
    )
    model, why = _optimization(batch, size, gpu)
    reasons.append(f"model.optimizer {model['optimizer']['class_path'].rpartition('.')[2]}: {why}")
    recipe: dict[str, Any] = {
        "model": {
            "encoder": {"class_path": "simclr_scale.models.create_encoder", "init_args": encoder},
            **model,
            # A tenth of training, as 10 of 100 epochs.
            "warmup_epochs": round(min(10.0, trained / 10), 3),
            "chunk_size": chunk,
            "channels_last": True,
        },
        "data": {"global_batch_size": batch, "image_size": size, "preset": preset},
        "knn": {"every_n_epochs": max(1, epochs // 10), "k": max(1, min(200, look.images // 50))},
        "trainer": {
            "accelerator": {"cuda": "gpu"}.get(hardware.device, hardware.device),
            "precision": "auto",
            "max_epochs": epochs,
            "log_every_n_steps": max(1, min(20, an_epoch)),
        },
    }
    if not gpu and (augmentation := _AUGMENTATION_OF_SMALL_NETWORKS.get(preset)):
        recipe["data"]["augmentation"] = augmentation
    return Choice(recipe, tuple(reasons))


# Small networks learn little from crops of a tenth of the image.
_AUGMENTATION_OF_SMALL_NETWORKS: dict[str, dict[str, Any]] = {
    "small": {"crop_scale": [0.2, 1.0]},
    "natural": {"crop_scale": [0.2, 1.0]},
    "grey": {"crop_scale": [0.3, 1.0], "strength": 0.5, "blur": 0.0},
}


def _size(look: Look, gpu: bool) -> int:
    if look.median_side <= _SMALL:
        return look.smallest_side
    if not gpu:
        return _SMALL
    return min(_PHOTOGRAPH, look.median_side // 32 * 32)


def _why_size(look: Look, gpu: bool, wishes: Wishes) -> str:
    if wishes.image_size:
        return "as given"
    if look.median_side <= _SMALL:
        return f"images of at most {_SMALL} px are taken as they are"
    return "the paper's, or what the images have" if gpu else "what a CPU gets through"


def _encoder(look: Look, size: int, channels: int, gpu: bool, hardware: Hardware) -> tuple[dict[str, Any], str]:
    if not gpu:
        wide = look.images >= 10_000
        encoder: dict[str, Any] = {"name": "simclr_resnet_tiny", "channels": [48, 96, 192] if wide else [32, 64, 128]}
        if size > _TINY:
            encoder["stem_stride"] = 4
        why = "small, for a CPU; wider from 10,000 images on"
    elif size <= _SMALL:
        encoder, why = {"name": "simclr_resnet18", "small_images": True}, "the recipe for CIFAR-10"
    elif look.images >= 100_000 and hardware.memory >= 16 * _GIB:
        encoder, why = {"name": "simclr_resnet50"}, "100,000 images or more, and 16 GiB or more"
    else:
        encoder, why = {"name": "simclr_resnet18"}, "fewer than 100,000 images, or less than 16 GiB"
    return ({**encoder, "in_chans": channels} if channels != 3 else encoder), why


def _batch(look: Look, size: int, gpu: bool, ranks: int) -> int:
    most = (512 if size <= _SMALL else 256) * ranks if gpu else 128
    # Below 16 images there are hardly any negatives.
    wanted = min(most, max(look.images // 16, min(_FEWEST_IMAGES, look.images // 2)))
    batch = ranks * 2 ** int(math.log2(max(2, wanted / ranks)))
    if batch > look.images:
        raise InputError(
            f"--config auto: {look.images} training images are fewer than 2 for each of {ranks} processes; give more"
        )
    return batch


def _epochs(look: Look, an_epoch: int, gpu: bool) -> int:
    if gpu:
        return 100 if look.images >= 1_000_000 else 200 if look.images >= 100_000 else 800
    return max(10, min(200, math.ceil(4000 / an_epoch)))


def _optimization(batch: int, size: int, gpu: bool) -> tuple[dict[str, Any], str]:
    if gpu and batch >= 256:
        return {
            "optimizer": {"class_path": "simclr_scale.optim.LARS", "init_args": {"momentum": 0.9}},
            "learning_rate": 0.075,
            "lr_scaling": "sqrt",
            "weight_decay": 1e-6,
            "temperature": 0.5 if size <= _SMALL else 0.1,
        }, f"the paper's, its rate by the square root of the batch: {0.075 * math.sqrt(batch):.3g}"
    return {
        "optimizer": {"class_path": "torch.optim.AdamW"},
        "learning_rate": 0.002 * 256 / batch,
        "lr_scaling": "linear",
        "weight_decay": 1e-4,
        "temperature": 0.2,
    }, "for batches below 256 and small networks; its rate .002 at this batch"


def _chunk(encoder: dict[str, Any], size: int, channels: int, batch: int, hardware: Hardware, gpu: bool) -> int | None:
    rows = 2 * max(1, batch // hardware.ranks)
    network: Any = create_encoder(**{"in_chans": channels, **encoder})
    head = ProjectionHead(network.num_features)
    fakes = Network(
        network,
        head,
        NTXentLoss(),
        image=(channels, size, size),
        precision="bf16-mixed" if gpu else "32-true",
        channels_last=True,
    )
    fixed = fakes.weight_bytes() + 3 * fakes.gradient_bytes() + fakes.image_bytes(rows)
    chunk = largest_chunk(fakes, rows, hardware.budget - fixed)
    if chunk is None:
        raise InputError(
            f"--config auto: not even 2 views of {size} px fit into {hardware.budget / _GIB:.2f} GiB beside the "
            f"{rows} of a process; give a smaller --data.image_size or --data.global_batch_size"
        )
    return None if chunk == rows else chunk
