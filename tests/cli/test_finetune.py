"""The commands finetune and distil."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from simclr_scale.bundle import load_classifier, load_encoder, load_head, save_encoder
from simclr_scale.data.sources import open_source
from simclr_scale.evaluation import Manifest, classify_images, evaluate_distil, evaluate_finetune, top1
from simclr_scale.models import ClassificationHead, create_encoder
from tests.bundle.bundles import make_transform
from tests.cli.commands import Outcome, TrainedRun, files_below, write_images
from tests.evaluation.stripes import TRANSFORM, tiny_encoder, tiny_head

Command = Callable[..., Outcome]
QUICK = ("--epochs", 2, "--finetune_batch_size", 8, "--data.num_workers", 0)


@pytest.fixture
def images(tmp_path: Path) -> Path:
    return write_images(tmp_path / "images", "red", "green", "blue", count=15)


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    """With a head of two layers."""
    return save_encoder(tiny_encoder(), TRANSFORM, tmp_path / "bundle", head=tiny_head())


def parts(images: Path) -> list[Any]:
    return [open_source(str(images), split=part) for part in ("train", "test")]


def as_read(manifest: Manifest) -> dict[str, Any]:
    return json.loads(json.dumps(manifest.as_dict()))


def test_a_run_is_fine_tuned_from_a_layer_of_its_head(
    trained: TrainedRun, images: Path, command: Command, tmp_path: Path
) -> None:
    before = files_below(trained.folder)
    manifest = tmp_path / "m.json"
    what = ("finetune", "--encoder", trained.folder, "--data.source", images, *QUICK)
    outcome = command(*what, "--protocol", "v2", "--labels", "0.5", "--seed", 2, "--output", manifest)
    assert outcome.status == 0
    record = json.loads(manifest.read_text())
    head = load_head(trained.folder)
    assert len(head.layers) == 2
    expected = as_read(
        evaluate_finetune(
            *load_encoder(trained.folder),
            *parts(images),
            protocol="v2",
            head=head,
            epochs=2,
            finetune_batch_size=8,
            labels="0.5",
            seed=2,
        )
    )
    for key in ("value", "train", "test", "settings", "details", "label_selection"):
        assert record[key] == expected[key]
    assert (record["task"], record["settings"]["from_head_layer"]) == ("finetune", 1)
    assert record["encoder"]["spec"] == str(trained.folder)
    assert f"{record['value']['mean']:.2%}" in outcome.out
    assert files_below(trained.folder) == before


def test_the_head_of_a_run_is_that_of_its_last_checkpoint(trained: TrainedRun) -> None:
    of_bundle = load_head(trained.folder / "encoder")
    of_checkpoint = load_head(trained.folder / "checkpoints" / "last.ckpt")
    assert list(of_bundle.state_dict()) == list(of_checkpoint.state_dict())
    for ours, theirs in zip(of_bundle.state_dict().values(), of_checkpoint.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs)


def test_finetune_save_and_distil(bundle: Path, images: Path, command: Command, tmp_path: Path) -> None:
    teacher, manifest = tmp_path / "teacher", tmp_path / "m.json"
    what = ("finetune", "--encoder", bundle, "--data.source", images, *QUICK, "--learning_rate", 1.0)
    outcome = command(*what, "--from_head_layer", 1, "--save", teacher, "--output", manifest)
    assert outcome.status == 0
    assert f"is in {teacher}" in outcome.out
    record = json.loads(manifest.read_text())
    network, transform = load_classifier(teacher)
    assert network.head.classes == ("blue", "green", "red")
    assert network.head.from_head_layer == 1
    train, test = parts(images)
    predicted, read = classify_images(network, transform, test)
    assert top1(predicted, test.labels[read.numpy()]) == record["value"]["mean"]
    facts = json.loads((teacher / "config.json").read_text())["simclr_scale"]["facts"]
    assert (facts["task"], facts["test_top1"], facts["from"]) == ("finetune", record["value"]["mean"], str(bundle))
    assert not torch.equal(load_encoder(teacher)[0].conv1.weight, load_encoder(bundle)[0].conv1.weight)

    student, told = tmp_path / "student", tmp_path / "d.json"
    before = files_below(teacher)
    what = ("distil", "--encoder", teacher, "--data.source", images, *QUICK, "--temperature", 2.0)
    small = save_encoder(tiny_encoder((4, 4, 6), seed=2), TRANSFORM, tmp_path / "small")
    outcome = command(*what, "--student", small, "--save", student, "--output", told)
    assert outcome.status == 0
    record = json.loads(told.read_text())
    expected = as_read(
        evaluate_distil(
            network,
            transform,
            train,
            test,
            student=load_encoder(small)[0],
            student_spec=str(small),
            temperature=2.0,
            epochs=2,
            finetune_batch_size=8,
        )
    )
    for key in ("value", "train", "test", "settings", "details", "label_selection"):
        assert record[key] == expected[key]
    assert record["details"]["teacher_top1"] == facts["test_top1"]
    assert files_below(teacher) == before
    made, _ = load_classifier(student)
    assert made.encoder.num_features == 6
    predicted, _ = classify_images(made, transform, test)
    assert top1(predicted, test.labels[read.numpy()]) == record["value"]["mean"]

    # By default the student is a copy of the teacher; and labels can stand beside its answers.
    outcome = command(*what, "--labels", "0.5", "--alpha", 0.2, "--save", tmp_path / "copy")
    assert outcome.status == 0
    assert "beside the teacher's answers" in " ".join(outcome.out.split())
    assert load_classifier(tmp_path / "copy")[0].head.from_head_layer == 1


def test_five_draws_are_averaged(images: Path, command: Command, tmp_path: Path) -> None:
    manifest = tmp_path / "m.json"
    what = ("finetune", "--encoder", "pixels:4", "--data.source", images, *QUICK, "--labels", "2-shot")
    outcome = command(*what, "--output", manifest)
    assert outcome.status == 0
    assert json.loads(manifest.read_text())["value"]["seeds"] == 5
    assert "over 5 seeds" in outcome.out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--protocol v3", "protocol: expected one of 'v1', 'v2'; got v3"),
        ("--protocol v2", "pixels:4 has no projection head; a run, a bundle or a .ckpt file may have one; "),
        ("--from_head_layer 1", "pixels:4 has no projection head"),
        ("--encoder bundle --from_head_layer 3", "from_head_layer: 3, wanted at most 2, the head's layers"),
        ("--from_head_layer -1", "from_head_layer: -1"),
        ("--optimizer adam", "optimizer: expected one of 'sgd', 'lars'; got adam"),
        ("--learning_rate nan", "learning_rate: expected float; got nan"),
        ("--learning_rate .nan", "learning_rate: nan, wanted a finite number above 0"),
        ("--learning_rate 0", "learning_rate: 0.0"),
        ("--weight_decay -1", "weight_decay: -1.0"),
        ("--epochs 0", "epochs: 0"),
        ("--finetune_batch_size 1", "batch_size: 1, wanted at least 2"),
        ("--batch_size 0", "--batch_size must be at least 1, got 0"),
        ("--labels 13-shot", "labels: 13-shot, but class 'blue' has 12 labelled training images"),
        ("--labels 5-shot --seeds 3", "seeds: 3, wanted at least 5 of 5-shot"),
        ("--labels 5-shot --save new", "--save: 5 draws of labels make as many networks"),
        ("--labels 0.5 --seeds 2 --save new", "--save: 2 draws of labels make as many networks"),
        ("--save bundle", "bundle exists and is not an empty folder"),
        ("--save new", "only encoders made by create_encoder can be saved"),
        ("--output there.json", "there.json exists already; results are never overwritten"),
        ("--data.source one", "one: has no labels, so there is no test part to evaluate on; labels come from"),
        ("--data.source flat", "flat: has no labels, so there is no test part to evaluate on"),
    ],
)
def test_mistakes_of_finetune_are_one_line(
    options: str, message: str, images: Path, bundle: Path, refusal: Callable[..., str], tmp_path: Path
) -> None:
    (tmp_path / "there.json").write_text("{}")
    write_images(tmp_path / "one", "only", count=3)
    write_images(tmp_path / "flat", count=3)
    given = {"--encoder": "pixels:4", "--data.source": str(images)}
    words = options.split()
    given |= dict(zip(words[::2], words[1::2], strict=True))
    assert message in refusal("finetune", *(f"{name}={value}" for name, value in given.items()))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--encoder bundle", "bundle has no classifier; simclr-scale finetune --save FOLDER makes such a bundle"),
        ("--encoder pixels:4", "pixels:4 has no classifier"),
        ("--save bundle", "bundle exists and is not an empty folder"),
        ("--student pixels:4", "only encoders made by create_encoder can be saved"),
        ("--student nowhere", "there is no encoder 'nowhere'"),
        ("--student grey", "the encoder takes no images of 3 x 12 x 12"),
        ("--temperature 0", "temperature: 0.0, wanted a finite number above 0"),
        ("--labels 5-shot", "labels: 5-shot, whose scores take several draws"),
        ("--alpha 2 --labels 0.5", "alpha: 2.0"),
        ("--learning_rate .nan", "learning_rate: nan"),
        ("--data.source others", "class 'cats' is none of the teacher's 3; wanted a data set of the same classes"),
        ("--output there.json", "there.json exists already"),
    ],
)
def test_mistakes_of_distil_are_one_line(
    options: str, message: str, images: Path, bundle: Path, refusal: Callable[..., str], tmp_path: Path
) -> None:
    (tmp_path / "there.json").write_text("{}")
    write_images(tmp_path / "others", "cats", "green", count=5)
    save_encoder(
        tiny_encoder(), TRANSFORM, tmp_path / "teacher", classifier=ClassificationHead(8, ("blue", "green", "red"))
    )
    grey = create_encoder("simclr_resnet18", in_chans=1, width=0.25, small_images=True)
    save_encoder(grey, make_transform("ours_18_grey"), tmp_path / "grey")
    given = {"--encoder": "teacher", "--data.source": str(images), "--save": "new"}
    words = options.split()
    given |= dict(zip(words[::2], words[1::2], strict=True))
    assert message in refusal("distil", *(f"{name}={value}" for name, value in given.items()))


def test_a_loss_that_explodes_ends_in_one_line_and_saves_nothing(
    bundle: Path, images: Path, refusal: Callable[..., str]
) -> None:
    line = refusal(
        *("finetune", "--encoder", bundle, "--data.source", images, "--data.num_workers", 0, "--epochs", 3),
        *("--finetune_batch_size", 6, "--learning_rate", 1e36, "--save", "new"),
    )
    assert "learning_rate: the loss is" in line
    assert not math.isfinite(float(line.partition("the loss is ")[2].split()[0]))
    assert np.isfinite(load_encoder(bundle)[0].conv1.weight.detach().numpy()).all()
