"""The names that other people's scripts call: what they are, how they are called, and what they load."""

import json
import subprocess
import sys
from collections.abc import Iterable
from inspect import Parameter, signature
from pathlib import Path

import pytest

import simclr_scale

CHECKOUT = Path(__file__).parents[1]

# The arguments of each name; `...` stands for a default that is free to change.
CONTRACT = {
    "LARS": "params, lr, momentum=0.9, weight_decay=0.0, trust_coefficient=1e-3, nesterov=False",
    "LocalSGD": "start=0, period=16, outer=None, negatives='global'",
    "LocalSimCLR": "encoder, *, partition='stages', overlap=0, noise_std=0.25",
    "NTXentLoss": "temperature=0.1, *, group=None, gather=True, engine='auto'",
    "ProjectionHead": "in_features, hidden_features=None, out_features=128, num_layers=2",
    "SimCLR": "encoder, *, head=None, loss=None, optimizer=None, learning_rate=None, lr_scaling='linear', "
    "weight_decay=1e-6, warmup_epochs=10, temperature=0.1, loss_scale=1.0, chunk_size=None, probe_classes=None",
    "SimCLRDataModule": "source, *, root=None, global_batch_size=256, image_size=None, num_workers=..., "
    "preset='natural'",
    "create_encoder": "name, in_chans=3, **kwargs",
    "extract_features": "encoder, loader",
    "knn_classify": "train_features, train_labels, test_features, k=200, temperature=0.07",
    "linear_probe": "train_features, train_labels",
    "load_encoder": "spec",
    "nt_xent": "z, temperature=0.1, *, group=None, gather=True, engine='auto'",
    "param_groups": "module, weight_decay, exclude=()",
    "save_encoder": "encoder, transform, folder, **facts",
}
WITHOUT_A_TRAINER = sorted(CONTRACT.keys() - {"LocalSGD", "LocalSimCLR", "SimCLR", "SimCLRDataModule"})
TRAINER = {"pytorch_lightning", "lightning", "torchmetrics"}


def parameters(arguments: str) -> list[Parameter]:
    return list(signature(eval(f"lambda {arguments}: None")).parameters.values())


def positional(signed: Iterable[Parameter]) -> list[str]:
    return [p.name for p in signed if p.kind is Parameter.POSITIONAL_OR_KEYWORD]


def test_the_public_names_are_those_of_the_contract() -> None:
    assert sorted(simclr_scale.__all__) == sorted(CONTRACT)
    assert set(CONTRACT) <= set(dir(simclr_scale))


@pytest.mark.parametrize("name", sorted(CONTRACT))
def test_a_call_by_the_contract_means_what_it_says(name: str) -> None:
    ours = signature(getattr(simclr_scale, name)).parameters
    promised = parameters(CONTRACT[name])
    by_position = positional(promised)
    assert positional(ours.values())[: len(by_position)] == by_position
    for promise in promised:
        assert ours[promise.name].kind is promise.kind, promise.name
        if promise.default is ...:
            assert ours[promise.name].default is not Parameter.empty, promise.name
        else:
            assert ours[promise.name].default == promise.default, promise.name


@pytest.mark.parametrize("name", sorted(CONTRACT.keys() - {"linear_probe"}))  # the contract leaves its others open
def test_no_further_argument_is_required(name: str) -> None:
    ours = signature(getattr(simclr_scale, name)).parameters
    promised = {promise.name for promise in parameters(CONTRACT[name])}
    required = {p.name for p in ours.values() if p.default is Parameter.empty and p.kind is not Parameter.VAR_KEYWORD}
    assert required <= promised


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match=r"module 'simclr_scale' has no attribute 'load_encoders'"):
        simclr_scale.load_encoders  # noqa: B018


def modules_after(statement: str) -> set[str]:
    """The top-level modules that a fresh interpreter holds after a statement."""
    command = f"{statement}; import json, sys; print(json.dumps(sorted(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", command], cwd=CHECKOUT, capture_output=True, text=True, check=True)
    return {name.split(".")[0] for name in json.loads(done.stdout)}


def test_importing_the_package_imports_nothing_heavy() -> None:
    loaded = modules_after("import simclr_scale")
    assert "simclr_scale" in loaded
    assert not loaded & {"torch", "numpy", "timm", "torchvision", *TRAINER}


def test_load_encoder_comes_without_the_trainer_faiss_or_sklearn() -> None:
    loaded = modules_after("from simclr_scale import load_encoder")
    assert "torch" in loaded
    assert not loaded & {"faiss", "sklearn", *TRAINER}


def test_what_needs_no_trainer_imports_none() -> None:
    loaded = modules_after(f"from simclr_scale import {', '.join(WITHOUT_A_TRAINER)}")
    assert "torch" in loaded
    assert not loaded & TRAINER
