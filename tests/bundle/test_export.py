"""Exported encoders, opened by the other library as its users would, against our own features."""

import json
import sys
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import pytest
import timm
import torch
import torchvision
from torch import Tensor, nn

from simclr_scale.bundle import ImageTransform, load_encoder
from simclr_scale.bundle.export import Exported, ExportFormat, export_encoder
from simclr_scale.errors import InputError
from simclr_scale.models import create_encoder
from simclr_scale.models.resnet import Bottleneck, SimCLRResNet
from tests.bundle.bundles import ENCODERS, images, make_encoder, make_transform

TOLERANCE = 1e-4


def export(name: str, format: ExportFormat, path: Path) -> tuple[nn.Module, Exported]:
    encoder = make_encoder(name)
    return encoder, export_encoder(encoder, make_transform(name), format, path)


def equal(ours: Tensor, theirs: Tensor) -> bool:
    # Features that are all 0, or the same for all images, would be equal by chance.
    assert ours.std(dim=0).max() > 1e-3
    return torch.allclose(ours, theirs, rtol=0, atol=TOLERANCE * ours.abs().max().item())


def batches(name: str) -> list[Tensor]:
    return [images(name)[:count] for count in (4, 3, 2)] + [images(name).repeat(5, 1, 1, 1)]


@pytest.mark.parametrize("name", ENCODERS)
def test_timm_by_local_dir(name: str, tmp_path: Path) -> None:
    encoder, exported = export(name, "timm", tmp_path / "out")
    theirs = timm.create_model(f"local-dir:{exported.path}", pretrained=True).eval()
    with torch.no_grad():
        assert equal(encoder(images(name)), theirs(images(name)))
    assert exported.difference <= TOLERANCE
    assert ("simclr_scale.models" in exported.usage) == name.startswith("ours")


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "resnext50_32x4d", "wide_resnet50_2"])
def test_torchvision_by_state_dict(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    encoder = create_encoder(name, drop_path_rate=0.1)
    with torch.no_grad():
        encoder.train()(torch.rand(4, 3, 48, 48))
        for parameter in encoder.parameters():
            parameter.add_(0.01 * torch.randn_like(parameter))
    exported = export_encoder(encoder, ImageTransform((3, 48, 48)), "torchvision", tmp_path / "weights.pth")
    theirs = getattr(torchvision.models, name)()
    theirs.fc = nn.Identity()
    theirs.load_state_dict(torch.load(exported.path, weights_only=True))
    picture = torch.rand(2, 3, 61, 64)
    with torch.no_grad():
        assert equal(encoder.eval()(picture), theirs.eval()(picture))


@pytest.mark.parametrize("name", ["ours_tiny", "ours_18_grey", "resnet18", pytest.param("vit", marks=pytest.mark.slow)])
def test_onnx_by_onnxruntime(name: str, tmp_path: Path) -> None:
    encoder, exported = export(name, "onnx", tmp_path / "encoder.onnx")
    assert [file.name for file in tmp_path.iterdir()] == ["encoder.onnx"]
    model = onnx.load(exported.path)
    onnx.checker.check_model(model, full_check=True)
    session = onnxruntime.InferenceSession(exported.path, providers=["CPUExecutionProvider"])
    assert [put.name for put in (*session.get_inputs(), *session.get_outputs())] == ["images", "features"]
    for batch in batches(name):
        [theirs] = session.run(None, {"images": batch.numpy()})
        with torch.no_grad():
            assert equal(encoder(batch), torch.from_numpy(theirs))
    [entry] = [entry for entry in model.metadata_props if entry.key == "simclr_scale"]
    assert ImageTransform.from_config(json.loads(entry.value)) == make_transform(name)


@pytest.mark.parametrize("name", ENCODERS)
def test_torch_export_by_load(name: str, tmp_path: Path) -> None:
    encoder, exported = export(name, "torch-export", tmp_path / "encoder.pt2")
    extra = {"transform.json": ""}
    theirs = torch.export.load(exported.path, extra_files=extra).module()
    for batch in batches(name):
        with torch.no_grad():
            assert equal(encoder(batch), theirs(batch))
    assert ImageTransform.from_config(json.loads(extra["transform.json"])) == make_transform(name)


@pytest.mark.parametrize("format", ["onnx", "torch-export"])
def test_selective_kernels_at_odd_sizes(format: ExportFormat, tmp_path: Path) -> None:
    torch.manual_seed(0)
    encoder = SimCLRResNet(Bottleneck, (1, 1, 1, 1), (8, 16, 32, 64), sk_ratio=0.0625)
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    exported = export_encoder(encoder, ImageTransform((3, 75, 70)), format, tmp_path / "encoder.pt2")
    assert exported.difference <= TOLERANCE


@pytest.mark.parametrize("format", ["onnx", "torch-export"])
def test_the_pixels_can_be_exported_too(format: ExportFormat, tmp_path: Path) -> None:
    assert export_encoder(*load_encoder("pixels:5"), format, tmp_path / "pixels.pt2").difference == 0


@pytest.mark.parametrize("format", ["timm", "torchvision", "onnx", "torch-export"])
def test_the_usage_that_is_shown_is_right(format: ExportFormat, tmp_path: Path) -> None:
    encoder, exported = export("resnet18", format, tmp_path / "it's {here}.pt2")
    pictures = images("resnet18")
    names: dict[str, Any] = {"images": pictures.numpy() if format == "onnx" else pictures}
    exec(exported.usage, names)
    with torch.no_grad():
        assert equal(encoder(pictures), torch.as_tensor(names["features"]).detach())


def test_the_encoder_is_left_as_it_was(tmp_path: Path) -> None:
    encoder = make_encoder("ours_tiny")
    encoder.train()
    encoder.bn1.eval()
    before = {key: value.clone() for key, value in encoder.state_dict().items()}
    export_encoder(encoder, make_transform("ours_tiny"), "torch-export", tmp_path / "e.pt2")
    assert encoder.training
    assert encoder.layer1.training
    assert not encoder.bn1.training
    assert all(torch.equal(before[key], value) for key, value in encoder.state_dict().items())


def made(name: str, **arguments: Any) -> tuple[nn.Module, ImageTransform]:
    encoder = create_encoder(name, **arguments)
    return encoder, ImageTransform((arguments.get("in_chans", 3), 32, 32))


REFUSED: list[tuple[str, tuple[nn.Module, ImageTransform], str]] = [
    ("torchvision", made("simclr_resnet18"), "torchvision cannot hold 'simclr_resnet18'"),
    ("torchvision", made("convnext_atto"), "torchvision has no network like 'convnext_atto'; it has resnet101"),
    ("torchvision", made("resnet18", in_chans=1), "torchvision's resnet18 has no place for 1 channels"),
    ("torchvision", made("resnet18", output_stride=8), "no place for the argument 'output_stride'"),
    ("torchvision", load_encoder("pixels:5"), "torchvision has no network like 'PixelEncoder'"),
    ("timm", load_encoder("pixels:5"), "only encoders made by create_encoder can be saved"),
    ("onnx", load_encoder("histogram:2"), "'ColorHistogramEncoder' cannot be traced for batches of any size"),
    ("torch-export", load_encoder("histogram:2"), "cannot be traced for batches of any size"),
    ("tflite", made("resnet18"), "unknown format 'tflite'; there are timm, torchvision, onnx, torch-export"),
]


@pytest.mark.parametrize(("format", "what", "says"), REFUSED)
def test_what_a_format_cannot_hold(
    format: ExportFormat, what: tuple[nn.Module, ImageTransform], says: str, tmp_path: Path
) -> None:
    with pytest.raises(InputError) as raised:
        export_encoder(*what, format, tmp_path / "out.pt2")
    assert says in str(raised.value)
    assert "\n" not in str(raised.value)
    assert list(tmp_path.iterdir()) == []


def test_the_name_that_torch_export_wants(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"end in \.pt2 alone, so name it out\.onnx\.pt2"):
        export_encoder(*made("resnet18"), "torch-export", tmp_path / "out.onnx")
    assert list(tmp_path.iterdir()) == []


def test_features_that_differ_are_never_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder, transform = made("resnet18")
    build = torchvision.models.get_model

    def otherwise(name: str) -> nn.Module:
        model = build(name)
        model.maxpool = nn.MaxPool2d(3, 2, padding=0, ceil_mode=True)
        return model

    monkeypatch.setattr(torchvision.models, "get_model", otherwise)
    with pytest.raises(InputError, match="torchvision cannot hold this encoder: its features differ by"):
        export_encoder(encoder, transform, "torchvision", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_what_is_too_large_for_one_onnx_file(tmp_path: Path) -> None:
    with torch.device("meta"):
        encoder = nn.Linear(2**15, 2**14)
    with pytest.raises(InputError, match=r"at most 2 GiB, and the weights are 2\.0; take torch-export"):
        export_encoder(encoder, ImageTransform((3, 8, 8)), "onnx", tmp_path / "out")


def test_without_the_libraries_of_onnx(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(InputError, match=r"pip install 'simclr_scale\[export\]'"):
        export_encoder(*made("resnet18"), "onnx", tmp_path / "out")


@pytest.mark.parametrize("format", ["timm", "torchvision", "onnx", "torch-export"])
def test_nothing_is_overwritten(format: ExportFormat, tmp_path: Path) -> None:
    there = tmp_path / "out"
    for make in (there.mkdir, there.rmdir, lambda: there.write_text("mine")):
        make()
        if there.exists():
            with pytest.raises(InputError, match="exists already"):
                export_encoder(*made("resnet18"), format, there)
    assert there.read_text() == "mine"
    with pytest.raises(InputError, match="there is no folder"):
        export_encoder(*made("resnet18"), format, tmp_path / "no" / "out")
    assert list(tmp_path.iterdir()) == [there]
