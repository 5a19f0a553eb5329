"""``simclr-scale plan``: what a training will need, before it is launched."""

import math
from pathlib import Path
from typing import Any

import torch
from pytorch_lightning.cli import LightningArgumentParser

from simclr_scale.cli.precision import fastest_precision
from simclr_scale.cli.pretrain import PretrainCLI, quieten
from simclr_scale.errors import InputError
from simclr_scale.evaluation import require_new_file
from simclr_scale.evaluation.manifest import write_json
from simclr_scale.evaluation.progress import show_progress
from simclr_scale.scaling.hardware import best_device, memory_of
from simclr_scale.scaling.plan import Plan, Settings, make_plan
from simclr_scale.scaling.plan.printing import print_plan

EPILOG = """examples:
  simclr-scale plan --config imagenet_resnet50 --data.source PATH --devices 4 --num_nodes 8 --device_memory 40
  simclr-scale plan --config cifar10_small --data.source torch/CIFAR10 --data.root PATH --measure_steps 5
"""


class PlanCLI(PretrainCLI):
    """The parser of ``pretrain`` with a few options more; builds model and data, and no trainer."""

    program, description, epilog = "simclr-scale plan", "Plan a training before it is launched.", EPILOG

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        super().add_arguments_to_parser(parser)
        parser.add_argument("--devices", type=int | None, help="devices of a machine, in place of trainer.devices")
        parser.add_argument("--num_nodes", type=int | None, help="machines, in place of trainer.num_nodes")
        parser.add_argument("--measure_steps", type=int, default=3, help="steps to time here; 0: none, FLOPs alone")
        parser.add_argument(
            "--device_memory", type=float | None, help="GiB of one device; default: that of this machine's"
        )
        parser.add_argument("--output", type=str | None, help="file of the JSON plan; must not exist")

    def before_instantiate_classes(self) -> None:
        config = self.config
        self.refuse_accumulation()
        for name, least in {"devices": 1, "num_nodes": 1, "measure_steps": 0}.items():
            if config[name] is not None and config[name] < least:
                raise InputError(f"--{name} must be at least {least}, got {config[name]}")
        if config.device_memory is not None and not 0 < config.device_memory < math.inf:
            raise InputError(f"--device_memory must be above 0 GiB, got {config.device_memory}")
        self.output: Path | None = require_new_file(config.output) if config.output is not None else None
        if config.trainer.precision == "auto":
            config.trainer.precision = fastest_precision(config.trainer.accelerator)
        self.set_threads()

    def instantiate_trainer(self, **kwargs: Any) -> Any:
        """Not here: the devices that are planned for need not be in this machine."""
        return None


def main(argv: list[str]) -> None:
    """``simclr-scale plan``."""
    quieten()
    cli = PlanCLI(argv)
    plan = _plan(cli)
    for note in cli.auto_notes:
        print(note)
    print_plan(plan)
    if cli.output is not None:
        write_json(plan.as_json(), cli.output)


def _plan(cli: PlanCLI) -> Plan:
    config, data = cli.config, cli.datamodule
    _refuse_sharding(config.trainer.strategy)
    if cli.model.local is not None:
        raise InputError("plan counts one loss at the end of the encoder: leave out model.local_losses, for a bound")
    source = data.open_training_images()
    data.settle(source)
    cpu = config.trainer.accelerator == "cpu"
    device = torch.device("cpu") if cpu else best_device()
    memory = config.device_memory * 2**30 if config.device_memory is not None else memory_of(device)
    whole = len(source) // data.global_batch_size
    limit = config.trainer.limit_train_batches
    epochs, max_steps = config.trainer.max_epochs, config.trainer.max_steps
    if epochs is None and max_steps < 0:
        epochs = 1000  # as Lightning has it
    settings = Settings(
        train_images=len(source),
        image=(data.channels, data.image_size, data.image_size),
        global_batch_size=data.global_batch_size,
        ranks=_devices(cli) * (config.num_nodes or config.trainer.num_nodes),
        epochs=None if epochs == -1 else epochs,
        max_steps=max_steps,
        precision=str(config.trainer.precision or "32-true"),
        device_memory=round(memory),
        default_rate=config.model.learning_rate is None,
        steps_of_an_epoch=None
        if limit is None
        else min(whole, limit if isinstance(limit, int) else int(whole * limit)),
    )
    with show_progress("plan", 1, "training") as advance:
        plan = make_plan(cli.model, settings, device=device, measure_steps=config.measure_steps)
        advance(1)
    return plan


def _refuse_sharding(strategy: Any) -> None:
    name = strategy if isinstance(strategy, str) else str(strategy.get("class_path"))
    if name == "model_parallel" or name.endswith(("MeshStrategy", "ModelParallelStrategy")):
        raise InputError(
            f"trainer.strategy {name}: plan does not model weights that are sharded; with --trainer.strategy ddp it "
            "tells what a device needs without, which is an upper bound"
        )


def _devices(cli: PlanCLI) -> int:
    """Of one machine, as Lightning reads ``trainer.devices``, but for devices that are not in this one."""
    if cli.config.devices is not None:
        return cli.config.devices
    given = cli.config.trainer.devices
    if isinstance(given, list):
        return len(given)
    text = str(given)
    if text in ("auto", "-1"):
        cuda = cli.config.trainer.accelerator != "cpu" and torch.cuda.is_available()
        return torch.cuda.device_count() if cuda else 1
    if "," in text:
        return len([part for part in text.split(",") if part.strip()])
    if not text.isdigit() or int(text) < 1:
        raise InputError(f"trainer.devices {given}: plan takes a number of devices (--devices N)")
    return int(text)
