"""A bundle in the hands of someone who has only its folder."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.bundle.bundles import ENCODERS, images, save

CHECKOUT = Path(__file__).parents[2]

# Every bundle by timm, ours once they are registered, then as a network to fine-tune; and all by load_encoder.
SCRIPT = """
import json, sys, timm, torch
torch.set_num_threads(1)
root = sys.argv[1]
images = torch.load(f"{root}/images.pt", weights_only=True)
features = {}

def read(name):
    bundle = f"local-dir:{root}/{name}"
    features[f"timm {name}"] = timm.create_model(bundle, pretrained=True).eval()(images[name])
    classifier = timm.create_model(bundle, pretrained=True, num_classes=10).eval()
    features[f"logits {name}"] = classifier(images[name])
    classifier.reset_classifier(0)
    features[f"below the classifier {name}"] = classifier(images[name])

with torch.no_grad():
    for name in images:
        if not name.startswith("ours"):
            read(name)
    assert not any(name.startswith("simclr_scale") for name in sys.modules)
    import simclr_scale.models
    for name in images:
        if name.startswith("ours"):
            read(name)
    from simclr_scale import load_encoder
    for name in images:
        features[f"load_encoder {name}"] = load_encoder(f"{root}/{name}")[0](images[name])
torch.save(features, f"{root}/features.pt")
print(json.dumps(sorted(sys.modules)))
"""


class Reading:
    """What the other process saw: the features, the modules it imported, and what they should have been."""

    def __init__(self, root: Path) -> None:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        with torch.no_grad():
            self.expected = {name: save(name, root / name)(images(name)) for name in ENCODERS}
        torch.set_num_threads(threads)
        torch.save({name: images(name) for name in ENCODERS}, root / "images.pt")
        command = [sys.executable, "-W", "error", "-c", SCRIPT, str(root)]
        done = subprocess.run(command, cwd=CHECKOUT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        self.modules = set(json.loads(done.stdout))
        self.features: dict[str, Tensor] = torch.load(root / "features.pt", weights_only=True)


@pytest.fixture(scope="module")
def reading(tmp_path_factory: pytest.TempPathFactory) -> Reading:
    return Reading(tmp_path_factory.mktemp("bundles"))


@pytest.mark.parametrize("name", ENCODERS)
def test_timm_gives_the_same_features(reading: Reading, name: str) -> None:
    assert torch.equal(reading.features[f"timm {name}"], reading.expected[name])


@pytest.mark.parametrize("name", ENCODERS)
def test_load_encoder_gives_the_same_features(reading: Reading, name: str) -> None:
    assert torch.equal(reading.features[f"load_encoder {name}"], reading.expected[name])


@pytest.mark.parametrize("name", ENCODERS)
def test_timm_puts_a_classifier_on_top_for_fine_tuning(reading: Reading, name: str) -> None:
    assert reading.features[f"logits {name}"].shape == (4, 10)
    assert torch.equal(reading.features[f"below the classifier {name}"], reading.expected[name])


def test_no_trainer_and_no_index_are_imported(reading: Reading) -> None:
    assert "simclr_scale.bundle" in reading.modules
    assert not reading.modules & {"pytorch_lightning", "lightning", "torchmetrics", "faiss", "sklearn", "datasets"}
