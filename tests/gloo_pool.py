"""Real gloo processes for tests, started once and shared: starting one costs an import of torch.

``pool.run(world_size, function, *args)`` calls ``function(rank, world_size, *args)`` in that many processes, inside a
process group made for the call, and returns the results by rank. The function must be importable (top level of a test
module). An exception in any process fails the call with that process's traceback; a hang fails it after a time limit,
and the processes are then replaced, so that one broken test does not take the others with it.
"""

import multiprocessing
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

HANG_AFTER_SECONDS = 300


def _serve(connection: Connection) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    while (job := connection.recv()) is not None:
        function, rank, world_size, store, args = job
        try:
            dist.init_process_group(
                "gloo",
                init_method=f"file://{store}",
                rank=rank,
                world_size=world_size,
                timeout=timedelta(seconds=HANG_AFTER_SECONDS // 2),
            )
            result = ("done", function(rank, world_size, *args))
        except BaseException:
            result = ("failed", traceback.format_exc())
        finally:
            if dist.is_initialized():
                dist.destroy_process_group()
        connection.send(result)


class GlooPool:
    """A growing set of worker processes; see the module's text."""

    def __init__(self) -> None:
        self._context = multiprocessing.get_context("spawn")
        self._workers: list[tuple[Any, Connection]] = []

    def __call__(self, world_size: int, function: Callable[..., Any], *args: Any) -> list[Any]:
        while len(self._workers) < world_size:
            here, there = self._context.Pipe()
            process = self._context.Process(target=_serve, args=(there,), daemon=True)
            process.start()
            self._workers.append((process, here))
        with tempfile.TemporaryDirectory() as folder:
            store = Path(folder) / "store"
            for rank in range(world_size):
                self._workers[rank][1].send((function, rank, world_size, str(store), args))
            outcomes = []
            for rank in range(world_size):
                connection = self._workers[rank][1]
                if not connection.poll(HANG_AFTER_SECONDS):
                    self.close()
                    raise TimeoutError(f"rank {rank} of {world_size} hung in {function.__name__}")
                outcomes.append(connection.recv())
        failures = [f"rank {rank}:\n{text}" for rank, (state, text) in enumerate(outcomes) if state == "failed"]
        if failures:
            raise RuntimeError("\n".join(failures))
        return [value for _, value in outcomes]

    def close(self) -> None:
        for process, connection in self._workers:
            connection.close()
            process.kill()
            process.join()
        self._workers.clear()
