import hashlib
import io
import json
import statistics
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console
from torch import nn

import simclr_scale
from simclr_scale.errors import InputError
from simclr_scale.evaluation import Manifest, encoder_fingerprint, require_new_file
from simclr_scale.evaluation.manifest import DatasetRecord, EncoderRecord
from tests.evaluation.synthetic import ColorSource, small_encoder, to_tensor

ENCODER = EncoderRecord.of(small_encoder(), "CenterCrop(32)", spec="runs/[red]first[/red]")
MANIFEST = Manifest(
    task="knn",
    metric="top1",
    values=(0.8125,),
    train=DatasetRecord.of(ColorSource([0, 1, -1, 1], ("cat", "dog"))),
    test=DatasetRecord.of(ColorSource([0, 1], ("cat", "dog"), seed=1)),
    label_selection="all",
    encoder=ENCODER,
    settings={"k": 200, "temperature": 0.07},
    warnings=("1 of 3 test images count as errors",),
)


def test_the_file_holds_everything(tmp_path: Path) -> None:
    file = MANIFEST.write(tmp_path / "knn.json")
    record = json.loads(file.read_text())
    assert record["task"] == "knn"
    assert record["metric"] == "top1"
    assert record["value"] == {"mean": 0.8125, "std": None, "seeds": 1, "each": [0.8125]}
    assert record["train"] == {
        "name": "colors",
        "split": "seed 0",
        "fingerprint": ColorSource([0, 1, -1, 1], ("cat", "dog")).fingerprint(),
        "images": 3,
        "unlabelled": 1,
        "unreadable": [],
        "classes": ["cat", "dog"],
    }
    assert record["test"]["split"] == "seed 1"
    assert record["label_selection"] == "all"
    assert record["encoder"] == {
        "spec": "runs/[red]first[/red]",
        "fingerprint": encoder_fingerprint(small_encoder()),
        "transform": "'CenterCrop(32)'",
    }
    assert record["settings"] == {"k": 200, "temperature": 0.07}
    assert record["warnings"] == ["1 of 3 test images count as errors"]
    assert record["versions"]["simclr-scale"] == simclr_scale.__version__
    assert record["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert {"timm", "faiss-cpu"} <= record["versions"].keys()
    assert record["created"].endswith("+00:00")
    assert [path.name for path in tmp_path.iterdir()] == ["knn.json"]


def test_seeds_give_a_mean_and_a_sample_deviation() -> None:
    manifest = replace(MANIFEST, values=(0.5, 0.6, 0.85))
    assert manifest.mean == pytest.approx(0.65)
    assert manifest.std == pytest.approx(statistics.stdev([0.5, 0.6, 0.85]))
    assert manifest.as_dict()["value"]["seeds"] == 3


def test_an_existing_file_is_left_alone(tmp_path: Path) -> None:
    file = tmp_path / "knn.json"
    file.write_text("mine")
    for refuse in (MANIFEST.write, require_new_file):
        with pytest.raises(InputError, match=r"knn\.json exists already"):
            refuse(file)
    assert file.read_text() == "mine"
    with pytest.raises(InputError, match="there is no folder"):
        require_new_file(tmp_path / "nowhere" / "knn.json")


def test_what_json_cannot_say_leaves_no_file(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        replace(MANIFEST, values=(float("nan"),)).write(tmp_path / "knn.json")
    assert list(tmp_path.iterdir()) == []


def printed(manifest: Manifest, width: int = 100) -> str:
    console = Console(file=io.StringIO(), width=width)
    manifest.print_table(console)
    return console.file.getvalue()  # type: ignore[attr-defined]


def test_the_table_shows_the_value_first_and_brackets_as_they_are() -> None:
    text = printed(MANIFEST)
    lines = [line for line in text.splitlines() if "│" in line]
    assert "top1" in lines[0]
    assert "81.25%" in lines[0]
    assert "runs/[red]first[/red]" in text
    assert "3 images, 2 classes, labels: all" in text
    assert "temperature 0.07" in text
    assert "1 of 3 test images count as errors" in text
    assert "±" not in text
    assert "65.00% ± 18.03% over 3 seeds" in printed(replace(MANIFEST, values=(0.5, 0.6, 0.85)))
    assert max(len(line) for line in printed(MANIFEST, width=60).splitlines()) <= 60


def test_the_table_sums_up_long_lists() -> None:
    text = printed(
        replace(
            MANIFEST,
            settings={"l2_values": [1e-6, 1.0, 1e5], "seeds": [7]},
            details={"validation": [{"l2": 1.0}], "tried": []},
        )
    )
    assert "l2_values 3 from 1e-06 to 1e+05" in text
    assert "validation 1 in the file" in text
    assert "seeds 7" in text
    assert "tried" not in text


def test_fingerprint_is_the_hash_it_claims_to_be() -> None:
    module = nn.Linear(2, 1)
    parts = [("weight", "(1, 2)"), ("bias", "(1,)")]
    digest = hashlib.sha256()
    for name, shape in parts:
        digest.update(f"{name} {shape} torch.float32\n".encode())
        digest.update(getattr(module, name).detach().numpy().tobytes())
    assert encoder_fingerprint(module) == digest.hexdigest()


def test_fingerprint_tells_weights_statistics_names_shapes_and_dtypes_apart() -> None:
    base = small_encoder()
    changed = small_encoder()
    changed.state_dict()["0.weight"].view(-1)[-1] += 1e-6
    counted = small_encoder()
    counted.state_dict()["1.num_batches_tracked"] += 1  # a tensor of no dimensions
    reshaped = nn.ParameterDict({"w": torch.zeros(2, 3)}), nn.ParameterDict({"w": torch.zeros(3, 2)})
    renamed = nn.ParameterDict({"v": torch.zeros(2, 3)})
    modules = [base, changed, counted, small_encoder().bfloat16(), *reshaped, renamed]
    assert len({encoder_fingerprint(module) for module in modules}) == len(modules)
    strided = small_encoder().to(memory_format=torch.channels_last)
    assert encoder_fingerprint(strided) == encoder_fingerprint(small_encoder()) == encoder_fingerprint(base)


def test_the_transform_is_recorded_by_its_repr() -> None:
    assert EncoderRecord.of(small_encoder(), to_tensor).transform == repr(to_tensor)
