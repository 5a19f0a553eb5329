"""``python -m tests.data.packing_kills SOURCE FOLDER``: packs again and again, each time killed one step later.

A step is the moment before or after a file is moved into place, which is when the output folder changes. After every
kill (SIGKILL, so that nothing is cleared away) the work goes on in another process, and the result must be that of
an unbroken one. Prints the number of kills. A process of its own, as it forks.
"""

import os
import shutil
import signal
import sys
from pathlib import Path

from simclr_scale.data.packing import Packing, pack
from simclr_scale.data.sources.opening import open_parts

SETTINGS = Packing(size=16, images_per_shard=3)


def work(source: str, output: Path) -> None:
    pack(open_parts(source), str(output), SETTINGS, spec=source)


def kill_at(step: int, source: str, output: Path) -> bool:
    """Whether a process was killed at this step, or there were not so many."""
    child = os.fork()
    if child == 0:
        replace, steps = os.replace, iter(range(10**6))

        def step_on() -> None:
            if next(steps) == step:
                os.kill(os.getpid(), signal.SIGKILL)

        def watched(*arguments: str) -> None:
            step_on()
            replace(*arguments)
            step_on()

        os.replace = watched  # type: ignore[assignment]
        work(source, output)
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    assert status == 0 or os.WTERMSIG(status) == signal.SIGKILL
    return status != 0


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def main(source: str, folder: Path) -> None:
    work(source, folder / "unbroken")
    unbroken = content(folder / "unbroken")
    kills = 0
    while kill_at(kills, source, folder / "killed"):
        kills += 1
        work(source, folder / "killed")
        assert content(folder / "killed") == unbroken, kills
        shutil.rmtree(folder / "killed")
    assert content(folder / "killed") == unbroken
    # Killed at every step in turn, without a start from nothing between.
    for step in range(kills):
        if not kill_at(step % 7, source, folder / "often"):
            break
    work(source, folder / "often")
    assert content(folder / "often") == unbroken
    print(kills)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
