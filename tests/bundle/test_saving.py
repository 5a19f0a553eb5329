import json
from pathlib import Path

import pytest
import torch
import yaml
from torch import nn

import simclr_scale
from simclr_scale.bundle import ImageTransform, load_encoder, save_encoder, saving
from simclr_scale.distributed import convert_global_batch_norm
from simclr_scale.errors import InputError
from tests.bundle.bundles import ENCODERS, images, make_encoder, make_transform, save


@pytest.mark.parametrize("name", ENCODERS)
@torch.no_grad()
def test_what_is_saved_is_what_is_loaded_bit_for_bit(name: str, tmp_path: Path) -> None:
    encoder = save(name, tmp_path / "encoder")
    loaded, transform = load_encoder(tmp_path / "encoder")
    assert torch.equal(loaded(images(name)), encoder(images(name)))
    assert transform == make_transform(name)
    assert not loaded.training
    assert loaded.num_features == encoder.num_features
    assert loaded.architecture.kwargs == encoder.architecture.kwargs  # so it can be saved again
    assert loaded.architecture.in_chans == encoder.architecture.in_chans


@torch.no_grad()
def test_the_encoder_of_a_run_on_several_ranks_is_an_ordinary_one(tmp_path: Path) -> None:
    encoder = make_encoder("ours_tiny")
    expected = encoder(images("ours_tiny"))
    encoder = convert_global_batch_norm(encoder.to(memory_format=torch.channels_last))
    save_encoder(encoder, make_transform("ours_tiny"), tmp_path / "encoder")
    loaded, _ = load_encoder(tmp_path / "encoder")
    assert torch.equal(loaded(images("ours_tiny")), expected)
    assert type(loaded.bn1) is nn.BatchNorm2d


@torch.no_grad()
def test_a_changed_encoder_does_not_change_its_bundle(tmp_path: Path) -> None:
    encoder = save("ours_tiny", tmp_path / "encoder")
    expected = encoder(images("ours_tiny"))
    for parameter in encoder.parameters():
        parameter.zero_()
    assert torch.equal(load_encoder(tmp_path / "encoder")[0](images("ours_tiny")), expected)


def test_config_json_says_how_to_build_it_and_how_it_was_trained(tmp_path: Path) -> None:
    facts = {"steps": 12, "knn_top1": {"trained": 0.5}, "source": "textures"}
    encoder = save("ours_18_grey", tmp_path / "encoder", **facts)
    config = json.loads((tmp_path / "encoder" / "config.json").read_text())
    assert config["architecture"] == "simclr_resnet18"
    assert config["num_features"] == encoder.num_features
    assert config["num_classes"] == 0
    assert config["model_args"] == {"small_images": True, "width": 0.25, "in_chans": 1, "num_classes": 0}
    assert (
        config["pretrained_cfg"].items()
        >= {
            "input_size": [1, 32, 32],
            "crop_pct": 0.9,
            "crop_mode": "center",
            "interpolation": "bicubic",
            "mean": [0.4],
            "std": [0.2],
            "classifier": "fc",
        }.items()
    )
    assert config["simclr_scale"] == {"version": simclr_scale.__version__, "facts": facts}


def test_the_model_card_shows_the_facts_and_how_to_use_it(tmp_path: Path) -> None:
    encoder = save("ours_tiny", tmp_path / "encoder", steps=1234, knn_top1={"trained": 0.5, "untrained": 0.25})
    front, _, card = (tmp_path / "encoder" / "README.md").read_text().removeprefix("---\n").partition("\n---\n")
    assert yaml.safe_load(front)["library_name"] == "timm"
    assert card.startswith("# simclr_resnet_tiny, pretrained with SimCLR")
    parameters = sum(parameter.numel() for parameter in encoder.parameters())
    assert f"images 3x24x24 in, 14 features out, {parameters:,} parameters" in card
    assert "load_encoder(" in card
    assert repr(make_transform("ours_tiny")) in card
    assert "| steps | 1234 |" in card
    assert "| knn top1: trained | 0.5 |" in card
    assert "| knn top1: untrained | 0.25 |" in card


def test_a_card_without_facts_says_so(tmp_path: Path) -> None:
    save("ours_tiny", tmp_path / "encoder")
    assert "| none given | |" in (tmp_path / "encoder" / "README.md").read_text()


def test_folders_above_are_made_and_an_empty_one_is_taken(tmp_path: Path) -> None:
    save("ours_tiny", tmp_path / "a" / "b" / "encoder")
    (tmp_path / "empty").mkdir()
    save("ours_tiny", tmp_path / "empty")
    for folder in (tmp_path / "a" / "b" / "encoder", tmp_path / "empty"):
        assert sorted(file.name for file in folder.iterdir()) == ["README.md", "config.json", "model.safetensors"]
        assert folder.stat().st_mode & 0o777 == 0o755


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    for name in ("full", "file"):
        with pytest.raises(InputError, match=f"{name} exists and is not an empty folder; choose another"):
            save("ours_tiny", tmp_path / name)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["file", "full", "notes.txt"]


@pytest.mark.parametrize("fails", ["save_file", "_model_card"])
def test_a_failure_leaves_nothing_behind(fails: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full_disk(*args: object, **kwargs: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(saving, fails, full_disk)
    with pytest.raises(OSError, match="no space left"):
        save("ours_tiny", tmp_path / "encoder")
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_built_again_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="only encoders made by create_encoder can be saved"):
        save_encoder(nn.Linear(2, 2), ImageTransform(), tmp_path / "encoder")
    encoder = make_encoder("ours_tiny")
    with pytest.raises(InputError, match=r"transform must be an ImageTransform.*not function"):
        save_encoder(encoder, lambda image: image, tmp_path / "encoder")  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"facts about an encoder must be JSON values.*Tensor"):
        save_encoder(encoder, make_transform("ours_tiny"), tmp_path / "encoder", loss=torch.zeros(()))
    assert list(tmp_path.iterdir()) == []
