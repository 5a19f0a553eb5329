"""Memory of a training step, without its memory: the step is run on tensors that have sizes alone.

Torch's fake tensors go through the very code that training runs, the encoder's forward and backward, autocast and
activation checkpoints included; each allocation is noted when its storage is made and when it dies. So no formula for
a kind of network is needed. Not in it is what a kernel allocates for itself and what lies beside torch's allocations:
the context of a GPU, workspaces of cuDNN, memory that the allocator keeps. On CPUs oneDNN makes reordered copies of one
layer's images that are not channels-last, and processors without bfloat16 unfold convolutions in it.
"""

import copy
import weakref
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from simclr_scale.losses.contrast import ContrastiveLoss
from simclr_scale.models.chunked import encode_in_chunks

# What Lightning calls a precision, and the type in which autocast then computes (None: that of the weights).
AUTOCAST = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16, "bf16": torch.bfloat16, "16": torch.float16}
WEIGHTS = {"bf16-true": torch.bfloat16, "16-true": torch.float16, "64-true": torch.float64, "64": torch.float64}
# Two chunks show what many do: one alive, one to be encoded again.
_CHUNKS = 2


class Peak(NamedTuple):
    """Bytes, beyond weights, optimizer state and images.

    Attributes:
        step: the most at any moment of forward and backward.
        loss: of it, what the loss keeps and works with.
    """

    step: int
    loss: int


class Network:
    """Encoder, head and loss of a model as fakes, to be asked about steps of any size.

    Args:
        image: (channels, height, width).
        precision: as Lightning's Trainer takes it.
        channels_last: the memory format of the images in the encoder.
    """

    def __init__(
        self,
        encoder: nn.Module,
        head: nn.Module,
        loss: nn.Module,
        *,
        image: tuple[int, int, int],
        precision: str = "32-true",
        channels_last: bool = False,
    ) -> None:
        self._mode = FakeTensorMode()
        self.weights = WEIGHTS.get(precision, torch.float32)
        self._encoder, self._head, self._loss = (self._fake(part) for part in (encoder, head, loss))
        self.image, self._autocast = image, AUTOCAST.get(precision)
        self._format = torch.channels_last if channels_last else torch.preserve_format
        self._parts = nn.ModuleList([self._encoder, self._head, self._loss])

    def _fake(self, module: nn.Module) -> nn.Module:
        """A copy whose tensors are fake: deepcopy takes each from the memo and copies none."""
        memo: dict[int, Any] = {}
        for tensor in (*module.parameters(), *module.buffers()):
            data: Tensor = self._mode.from_tensor(tensor.detach())
            if data.is_floating_point():
                with self._mode:
                    data = data.to(self.weights)
            fake = nn.Parameter(data, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else data
            memo[id(tensor)] = fake
        return copy.deepcopy(module, memo).train()

    def weight_bytes(self) -> int:
        """Of parameters and buffers."""
        return sum(t.nbytes for t in (*self._parts.parameters(), *self._parts.buffers()))

    def gradient_bytes(self) -> int:
        """Of all trained parameters."""
        return sum(p.nbytes for p in self._parts.parameters() if p.requires_grad)

    def image_bytes(self, rows: int) -> int:
        """Of the augmented views."""
        channels, height, width = self.image
        return rows * channels * height * width * 4

    def peak(self, rows: int, chunk_size: int | None = None) -> Peak:
        """Of one step of ``rows`` views, ``chunk_size`` of them encoded at a time."""
        if chunk_size is None or chunk_size >= rows:
            step, width = self._run(rows, None)
            return Peak(step, self._loss_bytes(rows, width))
        step, width = self._run(rows, chunk_size)
        return Peak(step, self._loss_bytes(rows, width))

    def flops(self, rows: int, chunk_size: int | None = None) -> int:
        """Of one step's forward and backward: two for each product and sum. Matrix products and convolutions count."""
        # Proportional to the rows, but for the head's and loss's small part.
        few = min(rows, 8)
        self._clear()
        with self._mode, FlopCounterMode(display=False) as counter, self._casting():
            self._head(self._encoder(self._images(few).to(memory_format=self._format))).float().sum().backward()
        once = counter.get_total_flops() * rows / few
        if chunk_size is None or chunk_size >= rows:
            return round(once)
        chunks = -(-rows // chunk_size)
        return round(once * (4 * chunks - 1) / (3 * chunks))

    def width(self, rows: int = 4) -> int:
        """d, that of a projection."""
        with self._mode, torch.no_grad():
            return self._head(self._features(rows)).shape[1]

    def _features(self, rows: int) -> Tensor:
        width: Any = self._encoder.num_features
        return torch.empty(rows, width, dtype=self.weights)

    def _images(self, rows: int) -> Tensor:
        return torch.empty(rows, *self.image, dtype=self.weights)

    def _casting(self) -> Any:
        return torch.autocast("cpu", dtype=self._autocast or torch.bfloat16, enabled=self._autocast is not None)

    def _clear(self) -> None:
        for parameter in self._parts.parameters():
            parameter.grad = None

    def _run(self, rows: int, chunk_size: int | None) -> tuple[int, int]:
        self._clear()
        encoded = rows if chunk_size is None else min(rows, _CHUNKS * chunk_size)
        with self._mode:
            x = self._images(encoded)
        with self._mode, Allocations([x, *self._parts.parameters(), *self._parts.buffers()]) as allocations:
            with self._casting():
                if chunk_size is None:
                    h = self._encoder(x.to(memory_format=self._format))
                else:
                    h = encode_in_chunks(self._encoder, x, chunk_size, self._format)
                    # The features of the chunks left out are alive all together, and so is what follows them.
                    h = torch.cat([h, h.new_empty(rows - encoded, h.shape[1], requires_grad=True)])
                z = self._head(h)
                value = self._loss(z)
            value.backward()
        self._clear()
        return allocations.peak, z.shape[1]

    def _loss_bytes(self, rows: int, width: int) -> int:
        with self._mode:
            z = torch.empty(rows, width, dtype=self._autocast or self.weights, requires_grad=True)
        with self._mode, Allocations([z]) as allocations:
            self._loss(z).backward()
        return allocations.peak


def gathered_bytes(loss: nn.Module, rows: int, ranks: int, width: int, element_size: int) -> int:
    """What the loss holds of the other ranks' rows: as they came, in float32, normalised, and as an engine scales them.

    A few numbers a row come on top.
    """
    if not isinstance(loss, ContrastiveLoss) or not loss.gather:
        return 0
    others = rows * (ranks - 1)
    return others * (width * (element_size + 3 * 4) + 6 * 4)


class Allocations(TorchDispatchMode):
    """Bytes of storages that operations make, while they are alive.

    Args:
        known: tensors that were there before and are not counted.
    """

    def __init__(self, known: list[Tensor]) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._seen = {tensor.untyped_storage()._cdata for tensor in known}

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, Tensor):
                self._add(tensor)
        return made

    def _add(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._seen:
            return
        self._seen.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._free, key, size)

    def _free(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self.now -= size
