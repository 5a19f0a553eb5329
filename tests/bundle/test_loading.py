"""What load_encoder opens, and what it refuses; the message names the file."""

import io
import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from simclr_scale.bundle import BUNDLE_KEY, ImageTransform, encoder_config, load_encoder, save_encoder
from simclr_scale.bundle.loading import read_checkpoint
from simclr_scale.errors import InputError
from simclr_scale.models import create_encoder
from tests.bundle.bundles import images, make_encoder, make_transform, save

NAME = "ours_tiny"


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("original") / "encoder"
    save(NAME, folder)
    return folder


@pytest.fixture
def bundle(original: Path, tmp_path: Path) -> Path:
    """A bundle to spoil."""
    return Path(shutil.copytree(original, tmp_path / "encoder"))


@pytest.fixture
def checkpoint(original: Path, tmp_path: Path) -> Path:
    """A checkpoint as training writes it: the encoder among other things."""
    encoder, transform = load_encoder(original)
    state = {f"encoder.{key}": value for key, value in encoder.state_dict().items()}
    torch.save(
        {
            "state_dict": {**state, "head.layers.0.weight": torch.ones(3, 3)},
            "global_step": 7,
            BUNDLE_KEY: {"encoder": encoder_config(encoder, transform)},
        },
        tmp_path / "step=7.ckpt",
    )
    return tmp_path / "step=7.ckpt"


def refusal(spec: str | Path) -> str:
    with pytest.raises(InputError) as caught:
        load_encoder(spec)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# --- runs, bundles, checkpoints ---------------------------------------------------------------------------------------


@torch.no_grad()
def test_a_checkpoint_gives_the_features_of_its_encoder(checkpoint: Path) -> None:
    encoder, transform = load_encoder(checkpoint)
    assert torch.equal(encoder(images(NAME)), make_encoder(NAME)(images(NAME)))
    assert transform == make_transform(NAME)
    assert not encoder.training


@torch.no_grad()
def test_a_run_gives_its_bundle_and_before_its_end_its_last_checkpoint(checkpoint: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    shutil.copy(checkpoint, run / "checkpoints" / "last.ckpt")
    assert torch.equal(load_encoder(run)[0](images(NAME)), make_encoder(NAME)(images(NAME)))
    encoder = save("ours_18_grey", run / "encoder")
    assert torch.equal(load_encoder(str(run))[0](images("ours_18_grey")), encoder(images("ours_18_grey")))


def test_a_path_may_begin_at_home(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(bundle.parent))
    assert load_encoder("~/encoder")[1] == make_transform(NAME)


def test_a_folder_may_be_called_like_a_form(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(bundle.parent)
    bundle.rename("random:resnet18")
    assert load_encoder("random:resnet18")[1] == make_transform(NAME)


def test_nothing_there(tmp_path: Path) -> None:
    assert refusal(tmp_path / "none") == (
        f"there is no encoder '{tmp_path / 'none'}'; give a run, a bundle or a .ckpt file, timm:NAME, hf-hub:ID, "
        "random:NAME, pixels:SIZE or histogram:BINS"
    )
    assert refusal(tmp_path) == (
        f"{tmp_path} holds no encoder: neither config.json nor encoder/config.json nor checkpoints/last.ckpt"
    )
    assert "give a run, a bundle" in refusal("pixel:16")


# --- spoilt bundles ---------------------------------------------------------------------------------------------------


def change_weights(change: Callable[[dict[str, Any]], None]) -> Callable[[Path], None]:
    def spoil(bundle: Path) -> None:
        weights = load_file(bundle / "model.safetensors")
        change(weights)
        save_file(weights, bundle / "model.safetensors")

    return spoil


def change_config(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def spoil(bundle: Path) -> None:
        config = json.loads((bundle / "config.json").read_text())
        (bundle / "config.json").write_text(json.dumps(change(config) or config))

    return spoil


def truncate(bundle: Path) -> None:
    os.truncate(bundle / "model.safetensors", (bundle / "model.safetensors").stat().st_size - 100)


def of_another_architecture(bundle: Path) -> None:
    save_file(create_encoder("resnet18").state_dict(), bundle / "model.safetensors")


SPOILT: dict[str, tuple[Callable[[Path], Any], str]] = {
    "missing key": (
        change_weights(lambda weights: weights.pop("conv1.weight")),
        "the weights do not fit the architecture 'simclr_resnet_tiny': 'conv1.weight' is missing (1 keys in all)",
    ),
    "extra key": (
        change_weights(lambda weights: weights.update(fc=torch.ones(1))),
        "'fc' is not part of it (1 keys in all)",
    ),
    "misshapen key": (
        change_weights(lambda weights: weights.update({"bn1.weight": torch.ones(7)})),
        "'bn1.weight' is (7,), not (6,)",
    ),
    "another architecture": (of_another_architecture, "the weights do not fit the architecture 'simclr_resnet_tiny'"),
    "truncated": (truncate, "cannot be read"),
    "no weights": (lambda bundle: (bundle / "model.safetensors").unlink(), "cannot be read"),
    "no JSON": (lambda bundle: (bundle / "config.json").write_text("architecture: x"), "cannot be read"),
    "a list": (lambda bundle: (bundle / "config.json").write_text("[]"), "does not describe an encoder"),
    "another library's": (
        change_config(lambda config: {"model_type": "bert", "hidden_size": 768}),
        "does not describe an encoder: it lacks 'architecture'",
    ),
    "no arguments": (change_config(lambda config: config.pop("model_args") and None), "it lacks 'model_args'"),
    "half a transform": (
        change_config(lambda config: config["pretrained_cfg"].pop("crop_pct") and None),
        "it lacks 'crop_pct'",
    ),
    "transform of 4 channels": (
        change_config(lambda config: config["pretrained_cfg"].update(input_size=[4, 32, 32])),
        "the transform gives 4 channels, the architecture takes 3",
    ),
    "unknown architecture": (
        change_config(lambda config: config.update(architecture="simclr_resnet_tinny")),
        "unknown encoder 'simclr_resnet_tinny'; did you mean 'simclr_resnet_tiny'",
    ),
    "unknown argument": (
        change_config(lambda config: config["model_args"].update(chanels=[1, 2, 3])),
        "takes no argument 'chanels'",
    ),
}


@pytest.mark.parametrize("fault", SPOILT)
def test_a_spoilt_bundle_is_refused(fault: str, bundle: Path) -> None:
    spoil, message = SPOILT[fault]
    spoil(bundle)
    refused = refusal(bundle)
    assert message in refused
    assert refused.startswith(f"bundle {bundle}")


ELSEWHERE: list[tuple[str, str, Any]] = [
    *(("", "architecture", value) for value in ("hf-hub:someone/model", "local-dir:/etc", "/etc/passwd", "C:\\x")),
    *(("", key, value) for key, value in {"pretrained": True, "url": "http://x"}.items()),
    *(("model_args", key, True) for key in ("pretrained", "pretrained_strict", "custom_load")),
    *(("model_args", key, "x") for key in ("checkpoint_path", "cache_dir", "file", "url", "pretrained_filter_fn")),
    *(("model_args", key, {"file": "x"}) for key in ("pretrained_cfg", "pretrained_cfg_overlay")),
    *(("model_args", "norm_layer", value) for value in ("/etc/passwd", "~/x", ["a", {"b": "file:///etc/passwd"}])),
    *(("pretrained_cfg", key, "x") for key in ("file", "url", "hf_hub_id", "hf_hub_filename", "source")),
    *(("pretrained_cfg", key, value) for key, value in {"custom_load": True, "state_dict": {"a": 1}}.items()),
    ("pretrained_cfg", "custom_load", "hf"),
]


@pytest.mark.parametrize(("part", "key", "value"), ELSEWHERE)
def test_a_bundle_that_points_elsewhere_is_refused(
    part: str, key: str, value: Any, bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before anything is built or looked up."""
    change_config(lambda config: (config[part] if part else config).update({key: value}))(bundle)
    monkeypatch.setattr(timm, "create_model", lambda *args, **kwargs: pytest.fail("a model is built"))
    refused = refusal(bundle)
    assert refused.startswith(f"bundle {bundle} points elsewhere, and is not opened: {part}{'.' if part else ''}{key}")


def test_a_bundle_makes_nobody_download_anything(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    create_model = timm.create_model

    def watched(*args: Any, **kwargs: Any) -> Any:
        asked.append(kwargs["pretrained"])
        return create_model(*args, **kwargs)

    monkeypatch.setattr(timm, "create_model", watched)
    load_encoder(bundle)
    assert asked == [False]


# --- spoilt checkpoints -----------------------------------------------------------------------------------------------


class Intruder:
    """Runs code where it is unpickled."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.trace),)


@pytest.mark.parametrize("modern", [True, False])
def test_code_in_a_checkpoint_is_not_run(modern: bool, tmp_path: Path) -> None:
    trace, path = tmp_path / "trace", tmp_path / "evil.ckpt"
    content = {"state_dict": {}, BUNDLE_KEY: Intruder(trace)}
    torch.save(content, path, _use_new_zipfile_serialization=modern)
    assert refusal(path).startswith(f"{path} is truncated, or ")
    assert not trace.exists()
    torch.load(path, weights_only=False)  # it would have
    assert trace.exists()


@pytest.mark.parametrize("content", [b"", b"hello", b"\x80\x02}q\x00.", pickle.dumps({"state_dict": 1})])
def test_what_is_no_checkpoint(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "odd.ckpt").write_bytes(content)
    assert refusal(tmp_path / "odd.ckpt") == f"{tmp_path / 'odd.ckpt'} is truncated, or no checkpoint"


def test_a_truncated_checkpoint(checkpoint: Path) -> None:
    whole = checkpoint.read_bytes()
    for share in (0.1, 0.5, 0.9, 0.999):
        checkpoint.write_bytes(whole[: int(share * len(whole))])
        assert refusal(checkpoint).startswith(f"{checkpoint} is truncated, or ")


def test_changed_bytes_raise_nothing_but_input_errors(tmp_path: Path) -> None:
    small, path = io.BytesIO(), tmp_path / "changed.ckpt"
    torch.save({"state_dict": {"encoder.a": torch.ones(3)}, BUNDLE_KEY: {"encoder": {"architecture": "x"}}}, small)
    rng = np.random.default_rng(0)
    refusals = []
    for _ in range(200):
        content = np.frombuffer(small.getvalue(), dtype=np.uint8).copy()
        content[rng.integers(len(content), size=rng.integers(1, 9))] = rng.integers(256)
        path.write_bytes(content.tobytes())
        try:
            read_checkpoint(path)
        except InputError as error:
            refusals.append(str(error))
    assert len(refusals) > 100
    assert all(message.startswith(str(path)) for message in refusals)


@pytest.mark.parametrize("foreign", [{"conv1.weight": torch.ones(2)}, {"state_dict": {}, "epoch": 3}, [1, 2], 3])
def test_a_checkpoint_of_another_program(foreign: Any, tmp_path: Path) -> None:
    torch.save(foreign, tmp_path / "other.ckpt")
    assert refusal(tmp_path / "other.ckpt") == (
        f"{tmp_path / 'other.ckpt'} was not written by simclr_scale: it has no entry 'simclr_scale'"
    )


@pytest.mark.parametrize("entry", [None, 3, {}, {"encoder": 3}, {"encoder": {}}, {"encoder": {"architecture": []}}])
def test_a_checkpoint_whose_entry_is_not_ours(entry: Any, checkpoint: Path) -> None:
    torch.save({**torch.load(checkpoint, weights_only=True), BUNDLE_KEY: entry}, checkpoint)
    message = refusal(checkpoint)
    assert message.startswith(str(checkpoint))
    assert "holds no encoder" in message or "does not describe an encoder" in message


@pytest.mark.parametrize("weights", [3, {}, {3: torch.ones(1)}, {"encoder.conv1.weight": torch.ones(1)}])
def test_a_checkpoint_without_the_encoders_weights(weights: Any, checkpoint: Path) -> None:
    torch.save({**torch.load(checkpoint, weights_only=True), "state_dict": weights}, checkpoint)
    assert refusal(checkpoint).startswith(str(checkpoint))


def test_a_checkpoint_with_a_number_for_a_tensor(checkpoint: Path) -> None:
    content = torch.load(checkpoint, weights_only=True)
    content["state_dict"]["encoder.bn1.weight"] = 3
    torch.save(content, checkpoint)
    assert "'bn1.weight' is (), not (6,)" in refusal(checkpoint)


# --- forms ------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_random_is_the_same_twice_unlike_a_fresh_one_and_leaves_torchs_generator_alone() -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first, transform = load_encoder("random:simclr_resnet_tiny")
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(6)
    second, _ = load_encoder("random:simclr_resnet_tiny")
    fresh = create_encoder("simclr_resnet_tiny").eval()
    x = torch.rand(2, 3, 32, 32)
    assert torch.equal(first(x), second(x))
    assert not torch.equal(first(x), fresh(x))
    assert transform.config["input_size"] == (3, 32, 32)
    assert not first.training


def test_loading_a_bundle_leaves_torchs_generator_alone(original: Path) -> None:
    before = torch.get_rng_state()
    load_encoder(original)
    assert torch.equal(torch.get_rng_state(), before)


def test_random_of_a_bundle_is_its_architecture_and_transform_untrained(tmp_path: Path) -> None:
    encoder = create_encoder("simclr_resnet_tiny", in_chans=4, channels=(4, 6, 8))
    transform = ImageTransform((4, 20, 20), crop_pct=0.9, value_range=((0.0, 9.0),))
    bundle = save_encoder(encoder, transform, tmp_path / "bundle")
    (first, its_transform), (second, _) = (load_encoder(f"random:{bundle}") for _ in range(2))
    assert its_transform == transform
    assert first.architecture == encoder.architecture
    trained = encoder.state_dict()
    for key, value in first.state_dict().items():
        assert value.shape == trained[key].shape
        assert torch.equal(value, second.state_dict()[key])
    assert not torch.equal(next(first.parameters()), next(encoder.parameters()))


def test_random_takes_the_transform_that_timm_has_for_the_name() -> None:
    _, transform = load_encoder("random:convnext_atto.d2_in1k")
    assert transform.config == {
        "input_size": (3, 224, 224),
        "crop_pct": 0.875,
        "crop_mode": "center",
        "interpolation": "bicubic",
        "mean": (0.485, 0.456, 0.406),
        "std": (0.229, 0.224, 0.225),
    }


def test_pixels_and_histogram() -> None:
    from PIL import Image

    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 30, 3), dtype=np.uint8))
    pixels, transform = load_encoder("pixels:16")
    square = image.resize((16, 21), Image.Resampling.BICUBIC).crop((0, 2, 16, 18))
    expected = np.asarray(square, dtype=np.float32).transpose(2, 0, 1).reshape(1, -1) / 255
    np.testing.assert_array_equal(pixels(transform(image)[None]).numpy(), expected)
    histogram, transform = load_encoder("histogram:8")
    counts = histogram(transform(image)[None])
    assert counts.shape == (1, 512)
    assert counts.sum().item() == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("number", ["", "0", "-1", "1.5", "x", "²", "1e3"])
@pytest.mark.parametrize("form", ["pixels:SIZE", "histogram:BINS"])
def test_numbers_of_the_baselines(form: str, number: str) -> None:
    spec = f"{form.partition(':')[0]}:{number}"
    assert refusal(spec) == f"{form} takes a whole number above 0, got {number!r}"


def test_unknown_names_are_the_users_to_mend() -> None:
    assert "unknown encoder 'resnet19'; did you mean 'resnet18'" in refusal("random:resnet19")
    assert "unknown encoder 'resnet19'; did you mean 'resnet18'" in refusal("timm:resnet19")
    assert "no pretrained weights in timm" in refusal("timm:simclr_resnet18")


@pytest.mark.parametrize("spec", ["timm:resnet18", "hf-hub:someone/model"])
def test_without_a_network_there_is_one_line(spec: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*args: Any, **kwargs: Any) -> nn.Module:
        raise OSError("cannot find the requested files\nplease check your connection")

    monkeypatch.setattr(timm, "create_model", offline)
    assert refusal(spec) == f"{spec} could not be loaded: cannot find the requested files"


@pytest.mark.parametrize("spec", ["timm:convnext_atto.d2_in1k", "hf-hub:someone/model"])
def test_pretrained_weights_come_with_their_transform(spec: str, monkeypatch: pytest.MonkeyPatch) -> None:
    create_model, asked = timm.create_model, []

    def online(name: str, **kwargs: Any) -> nn.Module:
        asked.append((name, kwargs["pretrained"]))
        return create_model("convnext_atto.d2_in1k", **{**kwargs, "pretrained": False})

    monkeypatch.setattr(timm, "create_model", online)
    encoder, transform = load_encoder(spec)
    assert asked == [(spec.removeprefix("timm:"), True)]
    assert encoder(torch.zeros(1, 3, 32, 32)).shape == (1, 320)
    assert transform.config["std"] == (0.229, 0.224, 0.225)
