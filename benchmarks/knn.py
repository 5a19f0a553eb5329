"""Memory of exact kNN on features that lie on disk: ImageNet's training images, 2,048 features each.

    python benchmarks/knn.py --output benchmarks/results/knn_cpu.json

A file of 1.3 million feature vectors (10.6 GB, in a temporary folder, removed at the end) is mapped into memory, as the
feature cache does, and searched for the neighbours of 256 test images. Counted is anonymous memory: pages of the file
are the system's to drop. The answers of some of the test images are compared with a search by brute force in float64.
Linux alone tells anonymous memory from the rest.
"""

import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from measure import arguments, bound, environment, report
from simclr_scale.evaluation import knn_classify

CLASSES, WIDTH, K, TEMPERATURE = 1000, 2048, 200, 0.07
BLOCK = 16_384
GIB = 2**30
LIMIT = 1.0  # GiB, a tenth of the features
COMPARED = 16


def write_features(path: Path, images: int) -> np.ndarray:
    """Around a centre for each class, as wide as the centres lie apart; returns the labels (N,)."""
    draw = np.random.default_rng(0)
    labels = draw.integers(CLASSES, size=images)
    with path.open("wb") as file:
        for start in range(0, images, BLOCK):
            file.write(draw_features(labels[start : start + BLOCK], seed=start).tobytes())
    return labels


def draw_features(labels: np.ndarray, seed: int) -> np.ndarray:
    centres = np.random.default_rng(1).standard_normal((CLASSES, WIDTH), dtype=np.float32)
    noise = np.random.default_rng([2, seed]).standard_normal((len(labels), WIDTH), dtype=np.float32)
    return np.maximum(centres[labels] + 4 * noise, 0)


def anonymous_bytes() -> int:
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon")]
    return int(line.split()[1]) * 1024


def peak_of(work: Callable[[], torch.Tensor]) -> tuple[int, torch.Tensor]:
    """Anonymous memory beyond that before, at its peak, looked at every 10 ms, and what `work` returns."""
    before, peak, done = anonymous_bytes(), 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.01):
            peak = max(peak, anonymous_bytes())

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        result = work()
    finally:
        done.set()
        watcher.join()
    return peak - before, result


def by_brute_force(features: np.ndarray, labels: np.ndarray, test: np.ndarray) -> np.ndarray:
    """The classes of (T, D) test images, in float64 and block by block."""
    wanted = test / np.linalg.norm(test, axis=1, keepdims=True)
    similarity = np.empty((len(test), len(features)))
    for start in range(0, len(features), BLOCK):
        block = features[start : start + BLOCK].astype(np.float64)
        similarity[:, start : start + BLOCK] = wanted @ (block / np.linalg.norm(block, axis=1, keepdims=True)).T
    nearest = np.argpartition(-similarity, K, axis=1)[:, :K]
    votes = np.zeros((len(test), CLASSES))
    for row, neighbors in enumerate(nearest):
        np.add.at(votes[row], labels[neighbors], np.exp(similarity[row, neighbors] / TEMPERATURE))
    return votes.argmax(axis=1)


def main() -> int:
    parser = arguments(__doc__ or "", devices=("cpu",))
    parser.add_argument("--images", type=int, default=1_300_000)
    parser.add_argument("--test_images", type=int, default=256)
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "features.f32"
        labels = write_features(path, options.images)
        features = np.memmap(path, dtype=np.float32, mode="c", shape=(options.images, WIDTH))
        truth = np.random.default_rng(3).integers(CLASSES, size=options.test_images)
        test = draw_features(truth, seed=options.images)
        start = time.perf_counter()
        peak, predicted = peak_of(lambda: knn_classify(torch.from_numpy(features), labels, test, K, TEMPERATURE))
        seconds = time.perf_counter() - start
        exact = by_brute_force(features, labels, test[:COMPARED].astype(np.float64))
        if not np.array_equal(predicted[:COMPARED].numpy(), exact):
            raise SystemExit("kNN and brute force do not agree")
        size = features.nbytes
    claim = bound(f"memory of kNN, {options.images:,} x {WIDTH}", peak / GIB, LIMIT, "GiB")
    return report(
        [claim],
        environment(("faiss-cpu", "numpy")),
        options.output,
        features_gib=size / GIB,
        test_images=options.test_images,
        seconds=seconds,
        top1=float((predicted.numpy() == truth).mean()),
        compared_with_brute_force=COMPARED,
    )


if __name__ == "__main__":
    raise SystemExit(main())
