"""What stands beside the encoder: the projection head and a classifier, by way of bundles, runs and checkpoints."""

import json
import shutil
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file

import simclr_scale.models  # noqa: F401  registers our architectures with timm
from simclr_scale.bundle import (
    BUNDLE_KEY,
    encoder_config,
    load_classifier,
    load_encoder,
    load_head,
    save_encoder,
)
from simclr_scale.errors import InputError
from simclr_scale.models import ClassificationHead, ProjectionHead
from tests.bundle.bundles import images, make_encoder, make_transform, save

NAME, WIDTH = "ours_tiny", 14
CLASSES = ("one", "two", "drei")


def some_head(num_layers: int = 3, last_norm: bool = True) -> ProjectionHead:
    torch.manual_seed(3)
    head = ProjectionHead(WIDTH, hidden_features=9, out_features=5, num_layers=num_layers, last_norm=last_norm)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.add_(torch.randn_like(parameter))
        head.train()(torch.rand(16, WIDTH))
    return head.eval()


def some_classifier(layer: int) -> ClassificationHead:
    classifier = ClassificationHead(WIDTH, CLASSES, some_head() if layer else None, layer).eval()
    with torch.no_grad():
        for parameter in classifier.parameters():
            parameter.add_(torch.randn_like(parameter))
    return classifier


def write(folder: Path, head: ProjectionHead | None = None, layer: int | None = None) -> Path:
    classifier = None if layer is None else some_classifier(layer)
    return save_encoder(make_encoder(NAME), make_transform(NAME), folder, head=head, classifier=classifier, steps=3)


def checkpoint(path: Path, head: ProjectionHead | None) -> Path:
    """As training writes it."""
    encoder = make_encoder(NAME)
    state = {f"encoder.{key}": value for key, value in encoder.state_dict().items()}
    if head is not None:
        state |= {f"head.{key}": value for key, value in head.state_dict().items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(
        {"state_dict": state, BUNDLE_KEY: {"encoder": encoder_config(encoder, make_transform(NAME))}},
        path,
    )
    return path


def same(head: ProjectionHead, expected: ProjectionHead) -> bool:
    ours, theirs = head.state_dict(), expected.state_dict()
    h = torch.rand(5, WIDTH)
    return (
        list(ours) == list(theirs)
        and all(torch.equal(ours[key], theirs[key]) for key in ours)
        and torch.equal(head(h), expected(h))
        and not head.training
    )


@pytest.mark.parametrize("last_norm", [True, False])
@pytest.mark.parametrize("num_layers", [0, 1, 2, 3, 11])
def test_a_head_comes_back_bit_for_bit(num_layers: int, last_norm: bool, tmp_path: Path) -> None:
    head = some_head(num_layers, last_norm)
    assert same(load_head(write(tmp_path / "bundle", head)), head)
    if num_layers:
        assert same(load_head(checkpoint(tmp_path / "step=7.ckpt", head)), head)
    shutil.copytree(tmp_path / "bundle", tmp_path / "run" / "encoder")
    assert same(load_head(tmp_path / "run"), head)


@torch.no_grad()
def test_a_head_and_a_classifier_change_nothing_for_timm_and_load_encoder(tmp_path: Path) -> None:
    encoder = save(NAME, tmp_path / "plain")
    write(tmp_path / "full", some_head(), layer=1)
    assert sorted(file.name for file in (tmp_path / "full").iterdir()) == [
        "README.md",
        "classifier.safetensors",
        "config.json",
        "model.safetensors",
        "projection_head.safetensors",
    ]
    weights = (tmp_path / "full" / "model.safetensors").read_bytes()
    assert weights == (tmp_path / "plain" / "model.safetensors").read_bytes()
    expected = encoder(images(NAME))
    loaded, transform = load_encoder(tmp_path / "full")
    assert torch.equal(loaded(images(NAME)), expected)
    assert transform == make_transform(NAME)
    theirs = timm.create_model(f"local-dir:{tmp_path / 'full'}", pretrained=True).eval()
    assert torch.equal(theirs(images(NAME)), expected)


def test_the_model_card_says_what_is_there(tmp_path: Path) -> None:
    write(tmp_path / "full", some_head(), layer=1)
    card = (tmp_path / "full" / "README.md").read_text()
    assert "# simclr_resnet_tiny, fine-tuned after SimCLR" in card
    assert "`projection_head.safetensors` is the projection head" in card
    assert "`classifier.safetensors` is a classifier for 3 classes" in card
    config = json.loads((tmp_path / "full" / "config.json").read_text())
    assert config[BUNDLE_KEY]["facts"] == {"steps": 3}
    save(NAME, tmp_path / "plain")
    assert "safetensors` is" not in (tmp_path / "plain" / "README.md").read_text()


@pytest.mark.parametrize("layer", [0, 1, 3])
@torch.no_grad()
def test_a_classifier_comes_back_with_its_classes(layer: int, tmp_path: Path) -> None:
    write(tmp_path / "bundle", layer=layer)
    network, transform = load_classifier(tmp_path / "bundle")
    expected = some_classifier(layer)(make_encoder(NAME)(images(NAME)))
    assert torch.equal(network(images(NAME)), expected)
    assert network.head.classes == CLASSES
    assert transform == make_transform(NAME)
    assert not any(module.training for module in network.modules())
    # So it can be saved again.
    save_encoder(network.encoder, transform, tmp_path / "again", classifier=network.head)
    assert torch.equal(load_classifier(tmp_path / "again")[0](images(NAME)), expected)


def test_the_head_of_an_older_run_is_in_its_last_checkpoint(tmp_path: Path) -> None:
    head, run = some_head(), tmp_path / "run"
    write(run / "encoder")
    last = checkpoint(run / "checkpoints" / "last.ckpt", head)
    assert same(load_head(run), head)
    content = torch.load(last, weights_only=True)
    content["state_dict"]["encoder.bn1.bias"] += 1e-6
    torch.save(content, last)
    with pytest.raises(InputError, match=r"has no projection head, and .*last.ckpt is of another moment"):
        load_head(run)


@pytest.mark.parametrize("spec", ["timm:resnet18", "random:resnet18", "pixels:4", "nowhere"])
def test_what_has_no_head_says_so(spec: str) -> None:
    with pytest.raises(InputError, match=f"{spec} has no projection head; a run, a bundle or a .ckpt file may have"):
        load_head(spec)
    with pytest.raises(InputError, match=f"{spec} has no classifier; simclr-scale finetune --save FOLDER"):
        load_classifier(spec)


def test_bundles_and_checkpoints_without_a_head_say_so(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"bundle .* has no projection head; pretraining writes one"):
        load_head(write(tmp_path / "bundle"))
    with pytest.raises(InputError, match=r"a\.ckpt has no projection head"):
        load_head(checkpoint(tmp_path / "a.ckpt", None))
    with pytest.raises(InputError, match=r"has no classifier"):
        load_classifier(tmp_path / "bundle")
    with pytest.raises(InputError, match=r"has no classifier"):
        load_classifier(checkpoint(tmp_path / "b.ckpt", some_head()))


def test_a_head_of_another_kind_is_refused(tmp_path: Path) -> None:
    path = checkpoint(tmp_path / "a.ckpt", None)
    content = torch.load(path, weights_only=True)
    content["state_dict"]["head.weight"] = torch.ones(3, 3)
    torch.save(content, path)
    with pytest.raises(InputError, match="its head is not a ProjectionHead"):
        load_head(path)


@pytest.mark.parametrize("what", ["head", "classifier"])
def test_loading_is_strict(what: str, tmp_path: Path) -> None:
    folder = write(tmp_path / "bundle", some_head(), layer=1)
    file = folder / {"head": "projection_head.safetensors", "classifier": "classifier.safetensors"}[what]
    load = {"head": load_head, "classifier": load_classifier}[what]
    whole, weights, config = file.read_bytes(), load_file(file), (folder / "config.json").read_text()

    def refusal() -> str:
        with pytest.raises(InputError) as caught:
            load(folder)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    first = next(iter(weights))
    save_file({key: value for key, value in weights.items() if key != first}, file)
    assert f"{first!r} is missing (1 keys in all)" in refusal()
    save_file({**weights, "extra": torch.ones(1)}, file)
    assert "'extra' is not part of it" in refusal()
    save_file({**weights, first: torch.ones(2, 2)}, file)
    assert f"{first!r} is (2, 2), not " in refusal()
    file.write_bytes(whole[:50])
    assert "cannot be read" in refusal()
    file.write_bytes(whole)
    spoilt = json.loads(config)
    spoilt[BUNDLE_KEY][what] = {"classes": ["a", "b"], "num_layers": "many"}
    (folder / "config.json").write_text(json.dumps(spoilt))
    assert f"does not describe a {'projection head' if what == 'head' else 'classifier'}" in refusal()
    del spoilt[BUNDLE_KEY][what]
    (folder / "config.json").write_text(json.dumps(spoilt))
    assert f"does not describe its {what}: config.json lacks it" in refusal()
    (folder / "config.json").write_text(config)
    file.unlink()
    assert ("has lost its projection head" if what == "head" else "has no classifier") in refusal()
