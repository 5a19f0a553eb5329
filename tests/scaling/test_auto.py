"""Recipes that the images and the machine make."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from simclr_scale.errors import InputError
from simclr_scale.scaling.auto import Hardware, Look, Wishes, choose, look_at

CPU = Hardware("cpu", "a CPU", 16 * 2**30)
GPU = Hardware("cuda", "a GPU", 40 * 2**30)
PHOTOS = Look(5000, 64, 3, False, 375, 300)
CIFAR = Look(50_000, 64, 3, False, 32, 32)


def write(folder: Path, count: int, side: int, kind: str) -> Path:
    folder.mkdir()
    rng = np.random.default_rng(0)
    for index in range(count):
        shape = (side, side + index)
        if kind == "array":
            np.save(folder / f"{index}.npy", rng.integers(0, 255, (*shape, 7), dtype=np.uint8))
            continue
        if kind == "16 bits":
            picture = Image.fromarray(rng.integers(0, 60_000, shape).astype(np.uint16))
        else:
            pixels = rng.integers(0, 255, (*shape, 3), dtype=np.uint8)
            if kind == "equal channels":
                pixels[..., 1:] = pixels[..., :1]
            picture = Image.fromarray(pixels).convert("L" if kind == "grey" else "RGB")
        picture.save(folder / f"{index}.png")
    return folder


@pytest.mark.parametrize(
    ("kind", "channels"), [("RGB", 3), ("grey", 1), ("equal channels", 1), ("16 bits", 1), ("array", 7)]
)
def test_a_look_tells_channels_and_size(kind: str, channels: int, tmp_path: Path) -> None:
    look = look_at(str(write(tmp_path / "x", 9, 20, kind)))
    assert look == Look(9, 9, channels, kind == "array", 20, 20)


def test_a_look_reads_few_and_passes_over_bad_files(tmp_path: Path) -> None:
    folder = write(tmp_path / "x", 70, 20, "RGB")
    (folder / "0.png").write_bytes(b"nothing")
    look = look_at(str(folder))
    assert (look.images, look.looked_at) == (70, 63)
    assert look_at(str(folder), subset=10).images == 10
    for file in folder.iterdir():
        file.write_bytes(b"nothing")
    with pytest.raises(InputError, match=r"\.png"):
        look_at(str(folder))


def settings(look: Look, hardware: Hardware, **wishes: Any) -> dict[str, Any]:
    recipe = choose(look, hardware, Wishes(**wishes)).recipe
    encoder = recipe["model"]["encoder"]["init_args"]
    return {**recipe["data"], **recipe["model"], "encoder": encoder["name"], "in_chans": encoder.get("in_chans", 3)}


@pytest.mark.parametrize(
    ("look", "hardware", "expected"),
    [
        (PHOTOS, CPU, {"image_size": 64, "encoder": "simclr_resnet_tiny", "preset": "small", "global_batch_size": 128}),
        (PHOTOS, GPU, {"image_size": 224, "encoder": "simclr_resnet18", "preset": "natural", "global_batch_size": 256}),
        (CIFAR, CPU, {"image_size": 32, "encoder": "simclr_resnet_tiny", "preset": "small", "global_batch_size": 128}),
        (CIFAR, GPU, {"image_size": 32, "encoder": "simclr_resnet18", "temperature": 0.5, "global_batch_size": 512}),
        (Look(70, 64, 1, False, 90, 90), CPU, {"image_size": 64, "preset": "grey", "in_chans": 1}),
        (Look(70, 64, 1, False, 190, 150), GPU, {"image_size": 160, "preset": "grey", "global_batch_size": 16}),
        (Look(900, 64, 7, True, 20, 20), CPU, {"image_size": 20, "preset": "multiband", "in_chans": 7}),
    ],
)
def test_the_rules(look: Look, hardware: Hardware, expected: dict[str, Any]) -> None:
    assert settings(look, hardware).items() >= expected.items()


def test_many_photographs_on_large_gpus_take_the_papers_encoder() -> None:
    chosen = settings(Look(1_281_167, 64, 3, False, 375, 200), GPU)
    assert (chosen["encoder"], chosen["lr_scaling"], chosen["learning_rate"]) == ("simclr_resnet50", "sqrt", 0.075)
    assert chosen["chunk_size"] is None


def test_a_small_device_takes_chunks_that_fit() -> None:
    chosen = settings(PHOTOS, Hardware("cuda", "a small GPU", 4 * 2**30))
    assert chosen["chunk_size"] in range(2, 512)
    with pytest.raises(InputError, match=r"not even 2 views of 224 px fit into 0\.09 GiB"):
        choose(PHOTOS, Hardware("cuda", "a tiny GPU", 2**30 // 10), Wishes(global_batch_size=4))


def test_what_the_user_settled_is_kept_and_the_rest_follows() -> None:
    chosen = settings(PHOTOS, CPU, image_size=32, global_batch_size=64, preset="natural", max_epochs=5)
    assert (chosen["image_size"], chosen["global_batch_size"], chosen["preset"]) == (32, 64, "natural")
    assert chosen["learning_rate"] == pytest.approx(0.002 * 256 / 64)
    assert chosen["warmup_epochs"] == 0.5
    assert choose(PHOTOS, CPU, Wishes(max_epochs=5)).recipe["trainer"]["max_epochs"] == 5
    # 3 steps of 39 an epoch: a warm-up of a tenth of that
    assert settings(PHOTOS, CPU, max_steps=3)["warmup_epochs"] == pytest.approx(0.1 * 3 / 39, abs=1e-3)


@pytest.mark.parametrize("ranks", [2, 3, 8])
def test_the_batch_divides_by_the_ranks(ranks: int) -> None:
    batch = settings(PHOTOS, Hardware("cpu", "a CPU", 2**36, ranks, ranks))["global_batch_size"]
    assert batch % ranks == 0
    assert 64 <= batch <= 128


def test_too_few_images_for_the_ranks() -> None:
    with pytest.raises(InputError, match="7 training images are fewer than 2 for each of 4 processes"):
        choose(Look(7, 7, 3, False, 20, 20), Hardware("cpu", "a CPU", 2**34, 4, 4))


def test_the_same_every_time_with_a_reason_for_each_setting() -> None:
    first, second = choose(PHOTOS, CPU), choose(PHOTOS, CPU)
    assert first == second
    told = "\n".join(first.reasons)
    for name in ("data.image_size", "data.preset", "model.encoder", "data.global_batch_size", "model.chunk_size"):
        assert name in told
    assert not any("\n" in reason for reason in first.reasons)
