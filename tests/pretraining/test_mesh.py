"""FSDP2 and tensor parallelism on real gloo processes, against one process that holds the whole batch, in float64."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from simclr_scale import load_encoder
from simclr_scale.bundle import load_head
from simclr_scale.data.datamodule import SimCLRDataModule
from simclr_scale.data.sampler import Position
from simclr_scale.errors import InputError
from simclr_scale.models import create_encoder
from simclr_scale.models.tensor_parallel import require_divisible
from simclr_scale.optim.norms import whole_norms
from simclr_scale.pretraining.agreement import Agreement
from simclr_scale.pretraining.bad_steps import BadSteps
from simclr_scale.pretraining.sharding import blocks_of
from simclr_scale.pretraining.strategies import MeshStrategy
from tests.gloo_pool import GlooPool
from tests.pretraining.mesh import STEPS, model, save_to, train, weights
from tests.pretraining.runs import QUIET

pytestmark = QUIET
TOLERANCE = 1e-9


def differences(a: dict[str, Tensor], b: dict[str, Tensor]) -> dict[str, float]:
    assert a.keys() == b.keys()
    return {key: (a[key].double() - b[key].double()).abs().max().item() for key in a}


def largest(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    return max(differences(a, b).values())


def in_one_process(encoder: str, optimizer: str, **options: Any) -> tuple[list[float], dict[str, Tensor]]:
    options, training = split(options)
    module = model(encoder, optimizer, **options)
    return train(module, **training), weights(module)


def split(options: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Arguments of the model, and those of the trainer."""
    ours = {key: value for key, value in options.items() if key != "gradient_clip_val"}
    return ours, {key: value for key, value in options.items() if key not in ours}


def on_a_mesh(
    rank: int, world_size: int, mesh: tuple[int, int], encoder: str, optimizer: str, options: dict[str, Any]
) -> tuple[list[float], dict[str, Tensor], dict[str, Any]]:
    # Every rank begins with other weights: those of the first one count.
    options, training = split(options)
    module = model(encoder, optimizer, seed=rank, **options)
    losses = train(module, rank, mesh, **training)
    facts: dict[str, Any] = {
        "norms": whole_norms([parameter.detach() for parameter in module.encoder.parameters()]).tolist(),
        "stored": sum(p.to_local().numel() for p in module.encoder.parameters()),  # type: ignore[operator]
        "drawn": torch.rand(()).item(),
    }
    return losses, {key: value.clone() for key, value in weights(module).items()}, facts


@pytest.mark.parametrize(
    ("mesh", "encoder", "optimizer", "options"),
    [
        ((2, 2), "vit", "lars", {}),
        ((1, 2), "vit", "adamw", {"gradient_clip_val": 0.01}),
        ((2, 1), "resnet", "lars", {"channels_last": True}),
        pytest.param((2, 1), "vit", "lars", {}, marks=pytest.mark.slow),
        pytest.param((1, 2), "vit", "lars", {}, marks=pytest.mark.slow),
        pytest.param((2, 2), "vit", "adamw", {"gradient_clip_val": 0.01}, marks=pytest.mark.slow),
        pytest.param((1, 2), "vit", "adamw in lists", {}, marks=pytest.mark.slow),
        pytest.param((2, 1), "resnet", "adamw", {}, marks=pytest.mark.slow),
        pytest.param((2, 2), "vit", "adamw", {"chunk_size": 3}, marks=pytest.mark.slow),
    ],
)
def test_a_mesh_trains_as_one_process(
    gloo: GlooPool, mesh: tuple[int, int], encoder: str, optimizer: str, options: dict[str, Any]
) -> None:
    losses, after = in_one_process(encoder, optimizer, **options)
    before = model(encoder, optimizer)
    assert len(losses) == STEPS
    moved = differences({k: v for k, v in after.items() if k in before.state_dict()}, before.state_dict())
    assert max(moved.values()) > 1e-3, "there must be something to compare"
    parameters = sum(p.numel() for p in before.encoder.parameters())
    for mine, whole, facts in gloo(mesh[0] * mesh[1], on_a_mesh, mesh, encoder, optimizer, options):
        assert mine == pytest.approx(losses, abs=TOLERANCE)
        assert largest(whole, after) < TOLERANCE
        expected = [after[f"encoder.{name}"].norm().item() for name, _ in before.encoder.named_parameters()]
        assert facts["norms"] == pytest.approx(expected, rel=1e-6, abs=TOLERANCE)
        assert facts["stored"] < 0.75 * parameters, "each rank keeps a part"


def test_the_heads_of_a_joint_projection_may_not_be_cut_in_a_row(gloo: GlooPool) -> None:
    """What tensor parallelism by torch's plan for the projection's rows would compute is something else."""
    wrong, right = gloo(2, forward_by_rows)[0]
    assert right < 1e-12
    assert wrong > 1e-3


def forward_by_rows(rank: int, world_size: int) -> tuple[float, float]:
    from torch.distributed.device_mesh import init_device_mesh

    from simclr_scale.models.tensor_parallel import divide_heads

    torch.manual_seed(0)
    encoder: Any = create_encoder("test_vit", img_size=16, patch_size=8).double()
    divided = copy.deepcopy(encoder)
    layers = divide_heads(divided, init_device_mesh("cpu", (world_size,)))
    x = torch.rand(2, 3, 16, 16, dtype=torch.float64)
    expected = encoder(x)
    right = (divided(x) - expected).abs().max().item()
    for layer in layers:
        layer._own = lambda parameter: parameter.chunk(world_size)[rank]  # type: ignore[method-assign]
    return (divided(x) - expected).abs().max().item(), right


class Poison(pl.Callback):
    """Spoils one shard of one gradient, on one rank, in the second step."""

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        if trainer.global_step == 1 and trainer.global_rank == 1:
            pl_module.encoder.blocks[1].attn.qkv.weight.grad.to_local()[0, 0] = torch.nan


def with_a_bad_step(rank: int, world_size: int, mesh: tuple[int, int], folder: str) -> tuple[int, dict[str, Tensor]]:
    module, bad_steps = model("vit", "adamw"), BadSteps(folder=Path(folder))
    train(module, rank, mesh, Poison(), Agreement(), bad_steps)
    return bad_steps.total, {key: value.clone() for key, value in weights(module).items()}


def test_a_shard_that_is_not_finite_is_everyones_bad_step(gloo: GlooPool, tmp_path: Path) -> None:
    results = gloo(4, with_a_bad_step, (2, 2), str(tmp_path))
    assert [total for total, _ in results] == [1] * 4
    for _, whole in results:
        assert all(value.isfinite().all() for value in whole.values())
        assert largest(whole, results[0][1]) == 0
    [record] = map(json.loads, (tmp_path / "bad_steps.jsonl").read_text().splitlines())
    assert (record["step"], record["not_finite"]) == (1, ["encoder.blocks.1.attn.qkv.weight"])
    assert record["gradient_norm"] == "nan"
    assert 1 < record["weight_norm"] < 1000


def save_on_a_mesh(rank: int, world_size: int, mesh: tuple[int, int], path: str, whole: bool) -> dict[str, Tensor]:
    module = model("vit", "adamw")
    train(module, rank, mesh, save_to(Path(path)), whole=whole)
    return {key: value.clone() for key, value in weights(module).items()}


def resume_on_a_mesh(rank: int, world_size: int, mesh: tuple[int, int], path: str) -> tuple[int, dict[str, Tensor]]:
    module = model("vit", "adamw", seed=5)
    losses = train(module, rank, mesh, ckpt_path=path)
    return len(losses), {key: value.clone() for key, value in weights(module).items()}


@pytest.mark.parametrize(
    "meshes", [[(1, 2)], pytest.param([(2, 2), (2, 1), (1, 1)], marks=pytest.mark.slow)], ids=["another", "all"]
)
def test_a_checkpoint_is_resumed_on_any_mesh(gloo: GlooPool, tmp_path: Path, meshes: list[tuple[int, int]]) -> None:
    _, after = in_one_process("vit", "adamw")
    shards = tmp_path / "step=2.ckpt"
    assert largest(gloo(4, save_on_a_mesh, (2, 2), str(shards), False)[0], after) < TOLERANCE
    assert sorted(file.name for file in shards.iterdir()) == [
        ".metadata",
        *(f"__{rank}_0.distcp" for rank in range(4)),
        "meta.pt",
    ]
    for mesh in meshes:
        for steps, whole in gloo(mesh[0] * mesh[1], resume_on_a_mesh, mesh, str(shards)):
            assert steps == STEPS // 2
            assert largest(whole, after) < TOLERANCE, mesh


def test_a_checkpoint_of_one_file_goes_to_a_mesh_and_back(gloo: GlooPool, tmp_path: Path) -> None:
    _, after = in_one_process("vit", "adamw")
    file, gathered = tmp_path / "one.ckpt", tmp_path / "gathered.ckpt"
    train(model("vit", "adamw"), 0, None, save_to(file))
    for _, whole in gloo(2, resume_on_a_mesh, (1, 2), str(file)):
        assert largest(whole, after) < TOLERANCE
    gloo(2, save_on_a_mesh, (2, 1), str(gathered), True)
    assert gathered.is_file()
    back = model("vit", "adamw", seed=7)
    train(back, ckpt_path=str(gathered))
    assert largest(weights(back), after) < TOLERANCE


def test_an_encoder_and_its_head_are_read_from_shards(gloo: GlooPool, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shards = run / "checkpoints" / "step=2.ckpt"
    gloo(4, save_on_a_mesh, (2, 2), str(shards), False)
    (run / "checkpoints" / "last.ckpt").symlink_to(shards.name)
    module = model("vit", "adamw")
    file = tmp_path / "one.ckpt"
    train(module, 0, None, save_to(file))
    for spec in (shards, run):
        for load in (lambda of: load_encoder(of)[0], load_head):
            read, expected = load(spec).state_dict(), load(file).state_dict()
            assert largest(read, expected) < 1e-6


def test_partners_have_the_same_images_and_draws(gloo: GlooPool) -> None:
    keys = gloo(4, images_of_a_rank)
    assert keys[0] == keys[1] != keys[2] == keys[3]
    [everything] = gloo(1, images_of_a_rank)
    for batch, (first, second) in zip(everything, zip(keys[0], keys[2], strict=True), strict=True):
        assert [*first, *second] == batch


def images_of_a_rank(rank: int, world_size: int) -> list[list[int]]:
    from types import SimpleNamespace

    from torch.distributed.device_mesh import init_device_mesh

    mesh = None
    if world_size == 4:
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data_parallel", "tensor_parallel"))
    data = SimCLRDataModule("textures", global_batch_size=16, image_size=8)
    data.trainer = SimpleNamespace(  # type: ignore[assignment]
        lightning_module=SimpleNamespace(device_mesh=mesh), global_rank=rank, world_size=world_size
    )
    sampler = data._make_sampler(64)
    sampler.position = lambda: Position(3, 0)
    return [[key.image for key in batch] for batch in sampler]


@pytest.mark.parametrize(
    ("name", "options", "size", "message"),
    [
        (
            "simclr_resnet_tiny",
            {},
            2,
            "is for vision transformers of timm's plain blocks, and model.encoder simclr_resn",
        ),
        ("test_vit", {"img_size": 16, "patch_size": 8}, 4, "does not divide the 2 heads of model.encoder test_vit"),
        ("test_vit", {"img_size": 16, "patch_size": 8, "proj_drop_rate": 0.1}, 2, "without attn_drop_rate"),
        ("test_vit", {"img_size": 16, "patch_size": 8, "qk_norm": True}, 2, r"blocks.0.attn is of another kind"),
    ],
)
def test_what_cannot_be_divided(name: str, options: dict[str, Any], size: int, message: str) -> None:
    encoder = create_encoder(name, **options)  # type: ignore[arg-type]
    with pytest.raises(InputError, match=message):
        require_divisible(encoder, size)


def test_sizes_that_are_not_those_of_the_processes() -> None:
    strategy = MeshStrategy(tensor_parallel_size=2)
    strategy.parallel_devices = [torch.device("cpu")] * 3
    with pytest.raises(InputError, match=r"data_parallel_size 1 by tensor_parallel_size 2 are 2 processes, and .* 3"):
        strategy.settle_sizes()
    with pytest.raises(InputError, match="tensor_parallel_size must be at least 1, got 0"):
        MeshStrategy(tensor_parallel_size=0)


def test_blocks_are_the_members_of_sequences() -> None:
    vit: Any = create_encoder("test_vit", img_size=16, patch_size=8)
    assert list(blocks_of(vit)) == list(vit.blocks)
    resnet = create_encoder("simclr_resnet_tiny", channels=(4, 6, 8))
    assert {type(block).__name__ for block in blocks_of(resnet)} == {"BasicBlock"}
    assert list(blocks_of(nn.Linear(2, 2))) == []
