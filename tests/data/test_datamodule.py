"""The data of a run: the same batches whatever the workers, the ranks, restarts or the place they are held in."""

import hashlib
import pickle
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jsonargparse
import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from PIL import Image
from torch import Tensor

from simclr_scale import SimCLRDataModule
from simclr_scale.data.sampler import epoch_order
from simclr_scale.data.views import Batch
from simclr_scale.errors import InputError
from tests.data.generated import GradientSource


def fake_trainer(rank: int = 0, world_size: int = 1, epoch: int = 0, batch: int = 0) -> Any:
    """What the data module asks of Lightning's trainer."""
    progress = SimpleNamespace(current=SimpleNamespace(ready=batch))
    return SimpleNamespace(
        global_rank=rank,
        world_size=world_size,
        num_devices=world_size,
        current_epoch=epoch,
        strategy=SimpleNamespace(root_device=torch.device("cpu")),
        fit_loop=SimpleNamespace(epoch_loop=SimpleNamespace(batch_progress=progress)),
    )


def ready(data: SimCLRDataModule, trainer: Any = None) -> SimCLRDataModule:
    data.trainer = trainer
    data.setup("fit")
    return data


def batches(data: SimCLRDataModule) -> list[Batch]:
    """An epoch as the model gets it."""
    return [data.on_after_batch_transfer(batch, 0) for batch in data.train_dataloader()]


def assert_same(first: list[Batch], second: list[Batch]) -> None:
    assert len(first) == len(second) > 0
    for one, other in zip(first, second, strict=True):
        assert one.keys() == other.keys()
        for name, value in one.items():
            assert torch.equal(value, other[name]), name


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty images of two classes, of several sizes and formats, without splits."""
    root = tmp_path_factory.mktemp("photographs")
    for index in range(40):
        folder = root / ("cats" if index % 2 else "dogs")
        folder.mkdir(exist_ok=True)
        rng = np.random.default_rng(index)
        height, width = rng.integers(70, 110, 2)
        coarse = Image.fromarray(rng.integers(0, 256, (5, 6, 3), dtype=np.uint8))
        coarse.resize((int(width), int(height))).save(folder / f"{index:02}.{'png' if index % 3 else 'jpg'}")
    return root


@pytest.mark.filterwarnings("ignore:This DataLoader will create 4 worker processes")
def test_workers_do_not_change_the_batches(photographs: Path) -> None:
    runs = [
        batches(ready(SimCLRDataModule(str(photographs), global_batch_size=8, image_size=16, num_workers=workers)))
        for workers in (0, 1, 4)
    ]
    assert_same(runs[0], runs[1])
    assert_same(runs[0], runs[2])


def epochs_with_workers(photographs: Path, workers: int) -> Iterator[list[Batch]]:
    trainer = fake_trainer()
    data = ready(SimCLRDataModule(str(photographs), global_batch_size=8, image_size=16, num_workers=workers), trainer)
    loader = data.train_dataloader()
    for trainer.current_epoch in (0, 1, 2):
        yield list(loader)


def test_workers_that_stay_alive_follow_the_epochs(photographs: Path) -> None:
    with_workers, without = (list(epochs_with_workers(photographs, workers)) for workers in (2, 0))
    for epoch in (0, 1, 2):
        assert_same(with_workers[epoch], without[epoch])
    assert not torch.equal(without[0][0]["index"], without[1][0]["index"])


@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_share_the_batches_of_one_process(photographs: Path, world_size: int) -> None:
    data = SimCLRDataModule(str(photographs), global_batch_size=8, image_size=16, num_workers=0)
    whole = batches(ready(data, fake_trainer(epoch=2)))
    shares = [batches(ready(data, fake_trainer(rank, world_size, epoch=2))) for rank in range(world_size)]
    for batch, *parts in zip(whole, *shares, strict=True):
        for name in ("index", "label"):
            assert torch.equal(torch.cat([part[name] for part in parts]), batch[name])
        # Each rank's inputs are [first views; second views] of its own images.
        views = torch.cat([part["inputs"].unflatten(0, (2, -1)) for part in parts], 1)
        torch.testing.assert_close(views.flatten(0, 1), batch["inputs"], rtol=0, atol=1e-6)


def test_set_up_before_the_trainer_is_known_takes_its_ranks_later(photographs: Path) -> None:
    """As in a script that calls setup() itself, or that fits the same data with a second trainer."""
    data = ready(SimCLRDataModule(str(photographs), global_batch_size=8, image_size=16, num_workers=0))
    source = data.train_source
    alone = next(iter(data.train_dataloader()))["index"]
    shares = [next(iter(ready(data, fake_trainer(rank, 2)).train_dataloader()))["index"] for rank in (0, 1)]
    assert torch.equal(torch.cat(shares), alone)
    assert data.train_source is source


def test_the_order_is_that_of_seed_and_epoch(photographs: Path) -> None:
    data = SimCLRDataModule(str(photographs), global_batch_size=10, image_size=8, num_workers=0, seed=5)
    indices = [batch["index"] for batch in ready(data, fake_trainer(epoch=3)).train_dataloader()]
    np.testing.assert_array_equal(torch.cat(indices), epoch_order(32, seed=5, epoch=3)[:30])


def test_seed_changes_order_and_draws(photographs: Path) -> None:
    first, second = (
        next(iter(ready(SimCLRDataModule(str(photographs), global_batch_size=32, seed=seed)).train_dataloader()))
        for seed in (0, 1)
    )
    assert not torch.equal(first["index"], second["index"])
    assert not torch.equal(first["draws"].sort(0).values, second["draws"].sort(0).values)


def test_memory_and_workers_see_the_same_views_to_rounding(tmp_path: Path) -> None:
    """But for the hue, which rounding can turn to anything where a pixel is almost grey."""
    images = GradientSource(16, (32, 32))
    for index in range(16):
        images.image(index).save(tmp_path / f"{index:02}.png")
    held, decoded = (
        batches(ready(SimCLRDataModule(str(tmp_path), global_batch_size=16, augmentation={"hue": 0.0}, **where)))[0]
        for where in ({}, {"in_memory": False, "num_workers": 0})
    )
    assert torch.equal(held["index"], decoded["index"])
    torch.testing.assert_close(held["inputs"], decoded["inputs"], rtol=0, atol=1.3 / 255 * 1.8**3)
    assert 0 < (held["inputs"] - decoded["inputs"]).abs().mean() < 0.5 / 255


def test_batches_of_anyone_else_pass_unchanged(photographs: Path) -> None:
    data = ready(SimCLRDataModule(str(photographs), global_batch_size=8))
    views = torch.rand(4, 3, 8, 8)
    for batch in ([(views, views), torch.zeros(4)], {"image": views}, views):
        assert data.on_after_batch_transfer(batch, 0) is batch


# Sources.


def test_a_folder_of_classes(photographs: Path) -> None:
    data = ready(SimCLRDataModule(str(photographs), global_batch_size=8, num_workers=0))
    assert data.image_size == 224
    assert data.num_classes == 2
    assert data.train_source is not None
    assert data.test_source is not None
    assert (len(data.train_source), len(data.test_source)) == (32, 8)
    batch = batches(data)[0]
    assert batch["inputs"].shape == (16, 3, 224, 224)
    assert batch["inputs"].dtype == torch.float32
    assert batch["inputs"].min() >= 0
    assert batch["inputs"].max() <= 1
    np.testing.assert_array_equal(batch["label"], data.train_source.labels[batch["index"].numpy()])


def test_a_folder_without_classes(photographs: Path) -> None:
    data = ready(SimCLRDataModule(str(photographs / "cats"), global_batch_size=10, image_size=16, num_workers=0))
    assert data.test_source is None
    assert data.num_classes == 0
    epoch = batches(data)
    assert len(epoch) == 2
    assert all((batch["label"] == -1).all() for batch in epoch)


def test_textures() -> None:
    data = ready(SimCLRDataModule("textures", seed=1))
    assert data.image_size == 32
    assert data.num_classes == 10
    assert data.worker_count() == 0
    assert data.test_source is not None
    assert len(data.test_source) == 1024
    assert set(next(iter(data.train_dataloader()))) == {"images", "draws", "label", "index"}


def test_cifar10_is_held_in_memory(real_data: Path) -> None:
    """Trained on its test split, which is a fifth of the other and so decoded sooner."""
    source = f"hfds/{real_data / 'cifar10'}"
    data = SimCLRDataModule(source, train_split="test", test_split="train", global_batch_size=512, preset="small")
    ready(data)
    assert data.image_size == 32
    assert data.num_classes == 10
    assert data.worker_count() == 0
    assert data.train_source is not None
    assert data.test_source is not None
    assert (len(data.train_source), len(data.test_source)) == (10_000, 50_000)
    batch = next(iter(data.train_dataloader()))
    assert batch["images"].shape == (512, 3, 32, 32)
    for image, index in zip(batch["images"][:20], batch["index"][:20].tolist(), strict=True):
        np.testing.assert_array_equal(image.permute(1, 2, 0), np.asarray(data.train_source.image(index)))
    assert data.on_after_batch_transfer(batch, 0)["inputs"].shape == (1024, 3, 32, 32)


@pytest.mark.parametrize(("side", "expected"), [((40, 64), 40), ((65, 70), 224), ((64, 64), 64)])
def test_size_of_the_views_by_default(tmp_path: Path, side: tuple[int, int], expected: int) -> None:
    for index in range(3):
        Image.new("RGB", side, (80 * index, 0, 0)).save(tmp_path / f"{index}.png")
    assert ready(SimCLRDataModule(str(tmp_path), global_batch_size=2)).image_size == expected
    assert ready(SimCLRDataModule(str(tmp_path), global_batch_size=2, image_size=9)).image_size == 9


def test_workers_by_default(photographs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(6)), raising=False)
    on_disk = SimCLRDataModule(str(photographs), global_batch_size=8)
    assert ready(on_disk).worker_count() == 6
    assert ready(on_disk, fake_trainer(world_size=2)).worker_count() == 3
    assert ready(SimCLRDataModule(str(photographs), global_batch_size=8, num_workers=0)).worker_count() == 0


# A run with a real trainer.


class Recorder(pl.LightningModule):
    """Keeps what it is given; its one parameter is there for the trainer."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen: list[tuple[int, str]] = []

    def training_step(self, batch: dict[str, Tensor], batch_index: int) -> Tensor:
        digest = hashlib.sha256(batch["inputs"].numpy().tobytes()).hexdigest()
        self.seen.append((self.current_epoch, digest))
        return self.weight * 1.0

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD([self.weight], lr=0.0)


class SaveAt(pl.Callback):
    """Writes a checkpoint after one step."""

    def __init__(self, step: int, path: Path) -> None:
        self.step, self.path = step, path

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.path, weights_only=False)


def fit(photographs: Path, workers: int, callback: pl.Callback | None = None, resume: Path | None = None) -> Recorder:
    """Three epochs of four steps."""
    data = SimCLRDataModule(str(photographs), global_batch_size=8, image_size=16, num_workers=workers)
    trainer = pl.Trainer(
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        max_epochs=3,
        callbacks=callback,
    )
    model = Recorder()
    trainer.fit(model, datamodule=data, ckpt_path=resume, weights_only=True)
    return model


@pytest.mark.filterwarnings(
    "ignore:.*does not have many workers", "ignore:.*LeafSpec", "ignore:.*your dataloader is not resumable"
)
@pytest.mark.parametrize("workers", [0, 2])
def test_a_run_resumed_in_mid_epoch_sees_what_the_whole_run_saw(
    photographs: Path, tmp_path: Path, workers: int
) -> None:
    checkpoint = tmp_path / "step=6.ckpt"
    whole = fit(photographs, workers, SaveAt(6, checkpoint))
    assert [epoch for epoch, _ in whole.seen] == [0] * 4 + [1] * 4 + [2] * 4
    assert len({digest for _, digest in whole.seen}) == 12
    resumed = fit(photographs, workers, resume=checkpoint)
    assert resumed.seen == whole.seen[6:]


# Mistakes.


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"global_batch_size": 1}, r"data\.global_batch_size must be at least 2"),
        ({"global_batch_size": 33}, "33 is larger than the training set of 32 images"),
        ({"seed": -1}, r"data\.seed must be 0 or above, got -1"),
        ({"image_size": 0}, r"data\.image_size must be 1 or above, got 0"),
        ({"num_workers": -2}, r"data\.num_workers must be 0 or above, got -2"),
        ({"preset": "imagenet"}, "unknown preset 'imagenet'"),
        ({"augmentation": {"flop": 1.0}}, "augmentation has no field 'flop'"),
        ({"augmentation": {"flip": 2.0}}, r"augmentation\.flip"),
        ({"color_ops": "tensorflow"}, r"augmentation\.color_ops"),
        ({"crop_sampling": "timm"}, r"augmentation\.crop_sampling"),
        ({"preset": "small", "augmentation": {"hue": 1.1}}, r"strength \* hue"),
    ],
)
def test_mistakes_are_named_at_setup_at_the_latest(photographs: Path, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        ready(SimCLRDataModule(str(photographs), **arguments))


def test_a_batch_that_does_not_divide_is_refused_before_images_are_read(tmp_path: Path) -> None:
    for index in range(20):
        (tmp_path / f"{index}.png").write_bytes(b"not an image")
    data = SimCLRDataModule(str(tmp_path), global_batch_size=9, image_size=8)
    with pytest.raises(InputError, match="9 does not divide by the 2 ranks; use 8"):
        ready(data, fake_trainer(world_size=2))


def test_color_ops_and_crop_sampling_are_overrides_too() -> None:
    data = SimCLRDataModule("textures", color_ops="google", crop_sampling="google", augmentation={"flip": 0.0})
    assert (data.augmentation.color_ops, data.augmentation.crop_sampling, data.augmentation.flip) == ("google",) * 2 + (
        0.0,
    )
    assert SimCLRDataModule("textures").augmentation.color_ops == "torchvision"


# The command line.


def parse(*arguments: str) -> SimCLRDataModule:
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(SimCLRDataModule, "data")
    return SimCLRDataModule(**parser.parse_args(list(arguments)).data.as_dict())


def test_arguments_parse_with_their_types() -> None:
    data = parse(
        "--data.source=textures",
        "--data.preset=small",
        "--data.global_batch_size=32",
        "--data.augmentation.crop_scale=[0.3, 1.0]",
        "--data.augmentation.hue=1",
        "--data.color_ops=google",
    )
    assert data.augmentation.crop_scale == (0.3, 1.0)
    assert data.augmentation.hue == 1.0
    assert data.augmentation.strength == 0.5
    assert data.augmentation.color_ops == "google"
    assert data.global_batch_size == 32
    assert data.requested_image_size is None


@pytest.mark.parametrize(
    ("argument", "named"),
    [
        ("--data.augmentation={flop: 0.5}", "flop"),
        ("--data.augmentation={flip: often}", "flip"),
        ("--data.augmentation={crop_scale: [0.3]}", "crop_scale"),
        ("--data.augmentation={color_ops: tensorflow}", "color_ops"),
        ("--data.global_batch_size=many", "global_batch_size"),
        ("--data.preset=imagenet", "preset"),
        ("--data.batch_size=3", "batch_size"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(argument: str, named: str) -> None:
    with pytest.raises(jsonargparse.ArgumentError, match=named):
        parse("--data.source=textures", argument)


def test_a_spawned_worker_can_have_the_data_set(photographs: Path) -> None:
    """On macOS and Windows workers get it pickled."""
    data = ready(SimCLRDataModule(str(photographs), global_batch_size=8, image_size=16, num_workers=0))
    dataset = data.train_dataloader().dataset
    keys = next(iter(data.train_dataloader().batch_sampler))
    assert_same([pickle.loads(pickle.dumps(dataset)).__getitems__(keys)], [dataset.__getitems__(keys)])
