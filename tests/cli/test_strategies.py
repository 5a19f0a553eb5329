"""Strategies beside Lightning's own: by a short name or with arguments, and in the configuration that is saved."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from simclr_scale.cli.pretrain import PretrainCLI
from simclr_scale.pretraining.strategies import CompressedDDPStrategy, MeshStrategy

ENCODER = ["--model.encoder.name", "test_vit", "--model.encoder.img_size", "16", "--model.encoder.patch_size", "8"]
BASE = ["--model.encoder", "simclr_scale.models.create_encoder", *ENCODER, "--data.source", "textures"]
CLASSES = "simclr_scale.pretraining.strategies"


@pytest.mark.parametrize(
    ("options", "kind", "sizes", "saved"),
    [
        ("model_parallel", MeshStrategy, (4, 1), "model_parallel"),
        ("ddp_bf16", CompressedDDPStrategy, None, "ddp_bf16"),
        (
            "MeshStrategy --trainer.strategy.tensor_parallel_size 2",
            MeshStrategy,
            (2, 2),
            {"class_path": f"{CLASSES}.MeshStrategy", "tensor_parallel_size": 2, "data_parallel_size": "auto"},
        ),
        (
            f"{CLASSES}.MeshStrategy --trainer.strategy.save_distributed_checkpoint false",
            MeshStrategy,
            (4, 1),
            {"class_path": f"{CLASSES}.MeshStrategy", "save_distributed_checkpoint": False},
        ),
        (
            "CompressedDDPStrategy --trainer.strategy.find_unused_parameters true",
            CompressedDDPStrategy,
            None,
            {"class_path": f"{CLASSES}.CompressedDDPStrategy", "find_unused_parameters": True, "static_graph": False},
        ),
    ],
)
def test_strategies(
    options: str,
    kind: type,
    sizes: tuple[int, int] | None,
    saved: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    four = ["--trainer.accelerator", "cpu", "--trainer.devices", "4", "--trainer.strategy", *options.split()]
    cli = PretrainCLI([*BASE, "--name", "x", *four])
    assert type(cli.trainer.strategy) is kind
    if isinstance(cli.trainer.strategy, MeshStrategy):
        strategy = cli.trainer.strategy
        assert (strategy._data_parallel_size, strategy.tensor_parallel_size) == sizes
    text = cli.saved_config()
    found = yaml.safe_load(text)["trainer"]["strategy"]
    if isinstance(saved, dict):
        found = {"class_path": found["class_path"], **found["init_args"]}
        assert {key: found[key] for key in saved} == saved
    else:
        assert found == saved

    (tmp_path / "saved.yaml").write_text(text)
    again = PretrainCLI(["--config", "saved.yaml", "--name", "y"])
    assert type(again.trainer.strategy) is kind
    kept = [yaml.safe_load(saved_text)["trainer"]["strategy"] for saved_text in (text, again.saved_config())]
    assert kept[0] == kept[1]
