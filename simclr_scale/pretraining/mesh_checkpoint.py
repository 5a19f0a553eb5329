"""Checkpoints into sharded models: of any mesh, or of no mesh at all."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.optim import Optimizer

from simclr_scale.bundle.sharded import load_shards, read_facts


def load_into(model: nn.Module, optimizers: Sequence[Optimizer], folder: Path) -> dict[str, Any]:
    """A folder of shards into a sharded model and its optimizers; every rank must call it.

    Returns:
        What else the checkpoint holds.

    Raises:
        InputError: damaged files, or weights of another model.
    """
    state: dict[str, Any] = {"state_dict": get_model_state_dict(model)}
    for index, optimizer in enumerate(optimizers):
        state[f"optimizer_{index}"] = get_optimizer_state_dict(model, optimizer)
    load_shards(state, folder)
    set_model_state_dict(model, state["state_dict"])
    for index, optimizer in enumerate(optimizers):
        set_optimizer_state_dict(model, optimizer, state[f"optimizer_{index}"])
    return read_facts(folder)


def load_whole_into(model: nn.Module, optimizers: Sequence[Optimizer], checkpoint: dict[str, Any]) -> dict[str, Any]:
    """The same of a checkpoint of one file, which a run without a mesh has written, or one that gathers its weights."""
    options = StateDictOptions(full_state_dict=True)
    set_model_state_dict(model, checkpoint["state_dict"], options=options)
    for optimizer, state in zip(optimizers, checkpoint["optimizer_states"], strict=True):
        set_optimizer_state_dict(model, optimizer, _by_name(state, model, optimizer), options=options)
    return checkpoint


def _by_name(state: dict[str, Any], model: nn.Module, optimizer: Optimizer) -> dict[str, Any]:
    """An optimizer's state dict with the names of parameters in place of their numbers."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    order = [names[id(parameter)] for group in optimizer.param_groups for parameter in group["params"]]
    return {
        "state": {order[number]: values for number, values in state["state"].items()},
        "param_groups": [
            {**group, "params": [order[number] for number in group["params"]]} for group in state["param_groups"]
        ],
    }
