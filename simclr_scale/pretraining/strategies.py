"""Strategies for ``--trainer.strategy``, beside Lightning's own: ``model_parallel`` and ``ddp_bf16``."""

from pathlib import Path
from typing import Any, Literal

from pytorch_lightning.strategies import DDPStrategy, ModelParallelStrategy, StrategyRegistry
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook
from torch.distributed.checkpoint.api import CheckpointException
from torch.nn.parallel import DistributedDataParallel

from simclr_scale.bundle.loading import is_sharded_checkpoint, read_checkpoint
from simclr_scale.errors import InputError
from simclr_scale.models.tensor_parallel import require_divisible
from simclr_scale.pretraining.mesh_checkpoint import load_into, load_whole_into


class MeshStrategy(ModelParallelStrategy):
    """FSDP2, tensor parallelism, or both: Lightning's ``ModelParallelStrategy`` with the sizes that one expects.

    ``--trainer.strategy model_parallel`` shards over all devices.

    Args:
        data_parallel_size: ranks that have different images, over which weights, gradients and optimizer states are
            sharded; "auto": all devices by ``tensor_parallel_size``.
        tensor_parallel_size: ranks that have the same images and compute a part of each block of a vision transformer.
        save_distributed_checkpoint: each rank writes its shards, and a checkpoint is a folder; False: a file with the
            whole, as of one process, gathered on the first rank.
        process_group_backend: None: nccl on GPUs, gloo on CPUs.
    """

    def __init__(
        self,
        data_parallel_size: Literal["auto"] | int = "auto",
        tensor_parallel_size: int = 1,
        save_distributed_checkpoint: bool = True,
        process_group_backend: str | None = None,
    ) -> None:
        super().__init__(data_parallel_size, tensor_parallel_size, save_distributed_checkpoint, process_group_backend)
        for name, size in {
            "data_parallel_size": data_parallel_size,
            "tensor_parallel_size": tensor_parallel_size,
        }.items():
            if size != "auto" and size < 1:
                raise InputError(f"trainer.strategy: {name} must be at least 1, got {size}")

    @property
    def tensor_parallel_size(self) -> int:
        return int(self._tensor_parallel_size)

    def settle_sizes(self) -> None:
        """Takes what is "auto" from the number of processes.

        Raises:
            InputError: the sizes are not those of so many processes.
        """
        ranks, partners = self.num_nodes * self.num_processes, self.tensor_parallel_size
        if self._data_parallel_size == "auto":
            self._data_parallel_size = max(1, ranks // partners)
        if self._data_parallel_size * partners != ranks:
            raise InputError(
                f"trainer.strategy: data_parallel_size {self._data_parallel_size} by tensor_parallel_size {partners} "
                f"are {self._data_parallel_size * partners} processes, and trainer.devices by trainer.num_nodes {ranks}"
            )

    def setup_environment(self) -> None:
        self.settle_sizes()
        super().setup_environment()

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        try:
            super().save_checkpoint(checkpoint, filepath, storage_options)
        except CheckpointException as error:
            causes = [cause for cause, *_ in error.failures.values() if isinstance(cause, OSError)]
            if not causes:
                raise
            # As where one process writes one file. Every rank is told of all failures.
            raise causes[0] from error

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        path = Path(self.broadcast(checkpoint_path))
        assert self.model is not None
        if is_sharded_checkpoint(path):
            return load_into(self.model, self.optimizers, path)
        return load_whole_into(self.model, self.optimizers, dict(read_checkpoint(path)))


class CompressedDDPStrategy(DDPStrategy):
    """Data parallelism whose gradients travel in bfloat16, half the bytes: ``--trainer.strategy ddp_bf16``.

    Torch's communication hook ``bf16_compress_hook``: each rank's gradient is rounded to bfloat16, the ranks' are
    summed in it, and the mean goes back to float32. Lightning's own ``ddp_comm_hook`` is registered on GPUs alone, and
    does nothing elsewhere without a word.

    Args:
        find_unused_parameters, static_graph, gradient_as_bucket_view: of ``DistributedDataParallel``.
        process_group_backend: None: nccl on GPUs, gloo on CPUs.
    """

    def __init__(
        self,
        find_unused_parameters: bool = False,
        static_graph: bool = False,
        gradient_as_bucket_view: bool = False,
        process_group_backend: str | None = None,
    ) -> None:
        super().__init__(
            ddp_comm_hook=bf16_compress_hook,
            process_group_backend=process_group_backend,
            find_unused_parameters=find_unused_parameters,
            static_graph=static_graph,
            gradient_as_bucket_view=gradient_as_bucket_view,
        )

    def _register_ddp_hooks(self) -> None:
        assert isinstance(self.model, DistributedDataParallel)
        self.model.register_comm_hook(None, bf16_compress_hook)


def check_strategy(trainer: Any, model: Any, checkpoint: Path | None) -> None:
    """Finds out what cannot work before processes are started.

    Args:
        checkpoint: to be resumed from.

    Raises:
        InputError: it cannot.
    """
    strategy = trainer.strategy
    if isinstance(strategy, MeshStrategy):
        strategy.settle_sizes()
        model.require_shardable()
        if strategy.tensor_parallel_size > 1:
            require_divisible(model.encoder, strategy.tensor_parallel_size)
    elif isinstance(strategy, ModelParallelStrategy):
        raise InputError(
            "trainer.strategy ModelParallelStrategy unpickles checkpoints; give simclr_scale's, MeshStrategy or "
            "model_parallel, which takes the same arguments"
        )
    elif checkpoint is not None and is_sharded_checkpoint(checkpoint):
        raise InputError(
            f"{checkpoint} is a folder of shards: resume it with --trainer.strategy model_parallel, on any number of "
            "devices, one included"
        )


def gradient_bytes_of_a_number(strategy: object) -> int:
    """In which DDP sends a gradient of float32: 4, or 2 where a hook compresses it."""
    hook = getattr(strategy, "_ddp_comm_hook", None)
    return 2 if hook is not None and hook.__name__ in ("bf16_compress_hook", "fp16_compress_hook") else 4


def register() -> None:
    """Makes both known to Lightning by their short names."""
    known = StrategyRegistry.available_strategies()
    if "model_parallel" not in known:
        StrategyRegistry.register("model_parallel", MeshStrategy, "FSDP2 over all devices (MeshStrategy)")
    if "ddp_bf16" not in known:
        StrategyRegistry.register("ddp_bf16", CompressedDDPStrategy, "DDP with gradients in bfloat16")
