"""Checkpoints in shards: what is in them is read, and none of it is run."""

import io
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.metadata import Metadata

from simclr_scale import load_encoder
from simclr_scale.bundle import BUNDLE_KEY, ImageTransform, encoder_config
from simclr_scale.bundle.sharded import FACTS, SHARDS_METADATA, load_shards, read_metadata, read_whole
from simclr_scale.errors import InputError
from simclr_scale.models import create_encoder

# Of writing by one process, as only these tests do.
pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled, unavailable or uninitialized")


class Hostile:
    """Makes a folder where it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = str(mark)

    def __reduce__(self) -> Any:
        return os.mkdir, (self.mark,)


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """As training writes them, by one process."""
    folder = tmp_path / "step=4.ckpt"
    torch.manual_seed(0)
    encoder = create_encoder("simclr_resnet_tiny", channels=(4, 6, 8))
    state = {f"encoder.{key}": value for key, value in encoder.state_dict().items()}
    optimizer = {"state": {"x": {"m": torch.ones(3)}}, "param_groups": [{"lr": 0.5, "params": ["x"]}]}
    written = {"state_dict": state, "optimizer_0": optimizer}
    dcp.save(written, storage_writer=dcp.FileSystemWriter(folder), no_dist=True)
    config = encoder_config(encoder, ImageTransform((3, 16, 16)))
    torch.save({BUNDLE_KEY: {"encoder": config}, "epoch": 3}, folder / FACTS)
    return folder


def test_weights_and_facts_are_read_whole(shards: Path) -> None:
    torch.manual_seed(0)
    expected = create_encoder("simclr_resnet_tiny", channels=(4, 6, 8)).state_dict()
    read = read_whole(shards)
    assert read["epoch"] == 3
    assert read["state_dict"].keys() == {f"encoder.{key}" for key in expected}
    for loaded in (load_encoder(shards)[0], load_encoder(os.fspath(shards))[0]):
        for key, value in loaded.state_dict().items():
            assert torch.equal(value, expected[key])


def test_plain_values_and_tensors_are_filled_in(shards: Path) -> None:
    state = {"optimizer_0": {"state": {"x": {"m": torch.zeros(3)}}, "param_groups": [{"lr": 9.0, "params": []}]}}
    load_shards(state, shards, alone=True)
    assert state["optimizer_0"]["param_groups"] == [{"lr": 0.5, "params": ["x"]}]
    assert torch.equal(state["optimizer_0"]["state"]["x"]["m"], torch.ones(3))  # type: ignore[index, call-overload]


def with_metadata(change: Callable[[Metadata], Any]) -> Callable[[Path, Path], None]:
    def damage(folder: Path, mark: Path) -> None:
        file = folder / SHARDS_METADATA
        read = pickle.loads(file.read_bytes())
        file.write_bytes(pickle.dumps(change(read) or read))

    return damage


def point_to(name: str) -> Callable[[Metadata], None]:
    def change(read: Metadata) -> None:
        for info in read.storage_data.values():
            info.relative_path = name

    return change


def enlarge(read: Metadata) -> None:
    for entry in read.state_dict_metadata.values():
        if hasattr(entry, "size"):
            entry.size = torch.Size([10**12])


def transform(read: Metadata) -> None:
    for info in read.storage_data.values():
        info.transform_descriptors = ["stream.zstd"]


def hostile_metadata(folder: Path, mark: Path) -> None:
    (folder / SHARDS_METADATA).write_bytes(pickle.dumps(Hostile(mark)))


def hostile_within_metadata(folder: Path, mark: Path) -> None:
    read = pickle.loads((folder / SHARDS_METADATA).read_bytes())
    read.planner_data = Hostile(mark)
    (folder / SHARDS_METADATA).write_bytes(pickle.dumps(read))


def cut(folder: Path, mark: Path) -> None:
    file = folder / SHARDS_METADATA
    file.write_bytes(file.read_bytes()[:-40])


def linked(folder: Path, mark: Path) -> None:
    [shard] = folder.glob("*.distcp")
    shutil.move(shard, folder.parent / "elsewhere")
    shard.symlink_to(folder.parent / "elsewhere")


def hostile_facts(folder: Path, mark: Path) -> None:
    torch.save({"x": Hostile(mark)}, folder / FACTS)


def lost_shard(folder: Path, mark: Path) -> None:
    for shard in folder.glob("*.distcp"):
        shard.unlink()


def damaged_shard(folder: Path, mark: Path) -> None:
    [shard] = folder.glob("*.distcp")
    shard.write_bytes(b"\0" * shard.stat().st_size)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (hostile_metadata, "it names posix.mkdir"),
        (hostile_within_metadata, "it names posix.mkdir"),
        (with_metadata(lambda _: {"x": 1}), "it is a dict"),
        (with_metadata(point_to("../x.distcp")), "it points to '../x.distcp'"),
        (with_metadata(point_to("/etc/passwd")), "it points to '/etc/passwd'"),
        (with_metadata(enlarge), "its tensors have .* bytes, its files"),
        (with_metadata(transform), "its shards are transformed"),
        (linked, "it points to '__0_0.distcp'"),
        (cut, "is damaged"),
        (lost_shard, "No such file"),
        (damaged_shard, "the shards in .* cannot be read"),
        (hostile_facts, "meta.pt is missing or truncated, or holds more than"),
    ],
)
def test_damaged_and_hostile_folders_are_refused(
    shards: Path, tmp_path: Path, damage: Callable[[Path, Path], None], message: str
) -> None:
    mark = tmp_path / "run"
    damage(shards, mark)
    with pytest.raises(InputError, match=message) as refused:
        load_encoder(shards)
    assert "\n" not in str(refused.value)
    assert not mark.exists(), "code that was in it has run"


def test_a_hostile_value_is_not_run(tmp_path: Path) -> None:
    folder, mark = tmp_path / "shards", tmp_path / "run"
    dcp.save({"x": Hostile(mark)}, storage_writer=dcp.FileSystemWriter(folder), no_dist=True)
    with pytest.raises(InputError, match="cannot be read"):
        load_shards({"x": 0}, folder, alone=True)
    assert not mark.exists()
    with pytest.raises(InputError, match=r"cannot be read.*nothing"):
        load_shards({"nothing": torch.zeros(1)}, folder, alone=True)


def test_the_mark_would_be_made() -> None:
    """The trap works: plain unpickling falls into it."""
    calls: list[str] = []

    class Recorder(pickle.Unpickler):
        def find_class(self, module: str, name: str) -> Any:
            calls.append(f"{module}.{name}")
            return lambda path: path

    Recorder(io.BytesIO(pickle.dumps(Hostile(Path("x"))))).load()
    assert calls == ["posix.mkdir"]


def test_metadata_of_several_precisions_is_admitted(tmp_path: Path) -> None:
    kinds = (torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.uint8, torch.bool)
    state = {str(kind): torch.zeros(2, 3, dtype=kind) for kind in kinds} | {"scalar": torch.tensor(1.0)}
    dcp.save(state, storage_writer=dcp.FileSystemWriter(tmp_path / "shards"), no_dist=True)
    assert read_metadata(tmp_path / "shards").state_dict_metadata.keys() == state.keys()
