"""Decoupled learning: a loss after each stage of the encoder, whose gradient does not leave that stage.

Siddiqui et al. 2023, "Blockwise Self-Supervised Learning at Scale": each stage's map is expanded to many channels,
pooled, projected and contrasted; between stages the gradient is cut. Xiong et al. 2020, "LoCo": adjacent losses share a
stage. As nothing flows back from later stages, a stage is back-propagated as soon as its output is there, and its
activations are freed before the next one begins.
"""

import copy
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from simclr_scale.errors import InputError
from simclr_scale.models import ProjectionHead
from simclr_scale.models.stages import Partition, Stages, cut_at, find_stages


@dataclass
class LocalLosses:
    """A loss for each stage of the encoder.

    Args:
        partition: "stages": the resolutions of the encoder; a number: that many parts; a list: the modules to cut
            after. See :func:`~simclr_scale.models.stages.find_stages`.
        overlap: how many stages before its own the gradient of a loss goes on into; a loss whose gradient would reach
            beyond the first stage is left out. 0: none; 1: as in LoCo; stages - 1: one loss at the end, for all.
        noise_std: standard deviation of the noise on a stage's output, in that of the output; 0 for none.
        expansion: channels to which a stage's output is expanded before it is pooled.
        full_resolution: expand at the stage's own resolution, as Siddiqui et al. do, instead of that of the coarsest
            cut. An early map of a ResNet-50, expanded to 2048 channels, takes more memory than the stage itself.
    """

    partition: Partition = "stages"
    overlap: int = 0
    noise_std: float = 0.25
    expansion: int = 2048
    full_resolution: bool = False


class Expansion(nn.Module):
    """1x1 convolution to many channels, batch norm, ReLU, and the mean over places: map or tokens -> (B, channels)."""

    def __init__(self, in_channels: int, out_channels: int, stride: int, channels_last: bool) -> None:
        super().__init__()
        self.stride, self.channels_last = stride, channels_last
        self.linear = nn.Conv2d(in_channels, out_channels, 1, bias=False)
        self.norm = nn.BatchNorm2d(out_channels)

    def forward(self, y: Tensor) -> Tensor:
        if y.ndim == 3:
            y = y[:, :, None]
        if self.channels_last:
            y = y.movedim(-1, 1)
        if self.stride > 1:
            y = F.avg_pool2d(y, self.stride, ceil_mode=True)
        return F.relu(self.norm(self.linear(y)), inplace=True).mean((2, 3))


class StageLosses(nn.Module):
    """Heads and losses of all stages but the last, which has those of the model.

    Args:
        encoder: its stages are found here, and it is given again at every step.
        head: of the model; a stage has one like it where it is a ``ProjectionHead``, else a ``ProjectionHead``.
        loss: of the model; a stage has a copy.
        options: what and where.
    """

    def __init__(self, encoder: nn.Module, head: nn.Module, loss: nn.Module, options: LocalLosses) -> None:
        super().__init__()
        for name, value in {"noise_std": options.noise_std, "expansion": options.expansion - 1}.items():
            if not 0 <= value < float("inf"):
                raise InputError(f"local losses: {name} is out of range, got {getattr(options, name)}")
        self.options = options
        self.stages: Stages = find_stages(encoder, options.partition)
        if not 0 <= options.overlap < len(self.stages):
            raise InputError(
                f"local losses: overlap must be from 0 to {len(self.stages) - 1}, one less than there are stages, "
                f"got {options.overlap}"
            )
        arguments = dict(head.arguments) if isinstance(head, ProjectionHead) else {}
        arguments |= {"in_features": options.expansion, "hidden_features": options.expansion}
        self.expansions, self.heads, self.losses = nn.ModuleDict(), nn.ModuleDict(), nn.ModuleDict()
        for number in range(options.overlap, len(self.stages) - 1):
            stride = 1 if options.full_resolution else self.stages.strides[number]
            self.expansions[str(number)] = Expansion(
                self.stages.channels[number], options.expansion, stride, self.stages.channels_last[number]
            )
            self.heads[str(number)] = ProjectionHead(**arguments)
            self.losses[str(number)] = copy.deepcopy(loss)

    def backward_passes(self, module: nn.Module, prefix: str) -> int:
        """How many losses' gradients go through a module of the encoder, of this name."""
        for number, names in enumerate(self.stages.parameters):
            if any(f"{prefix}.{name}" in names for name, _ in module.named_parameters(recurse=False)):
                first = max(number, self.options.overlap)
                return min(number + self.options.overlap, len(self.stages) - 1) - first + 1
        return 0


@dataclass
class StagedStep:
    """What a step of local losses gives.

    Attributes:
        loss: their sum, whose backward pass hands over the gradients that are there already.
        features: (B, D) of the encoder, and projections (B, d) of the model's head, without graph.
        of_stages: each loss by the number of its stage from 1.
    """

    loss: Tensor
    features: Tensor
    projections: Tensor
    of_stages: dict[int, Tensor]


def staged_step(model: Any, x: Tensor, scale: float = 1.0) -> StagedStep:
    """Forward and backward of one stage after another.

    The sum of the losses is given as a function of all parameters at once, with the gradients computed here. So what
    comes after (DistributedDataParallel's reduction, a gradient scaler, clipping) meets one ordinary backward pass.

    Args:
        model: a SimCLR with ``local`` losses.
        x: views (M, C, H, W).
        scale: by which the losses are multiplied while gradients are computed, and these divided after it: that of
            the gradient scaler, for float16.
    """
    trained = [p for part in (model.encoder, model.head, model.loss, model.local) for p in part.parameters()]
    parameters = [p for p in dict.fromkeys(trained) if p.requires_grad]
    for parameter in parameters:
        parameter.grad = None  # of the step before: what is computed here would stand beside it
    walk = _Walk(model, parameters, scale)
    loss = _Gradients.apply(walk, x, *parameters)
    return StagedStep(loss, walk.features, walk.projections, walk.of_stages)


class _Gradients(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, walk: "_Walk", x: Tensor, *parameters: Tensor) -> Tensor:
        with torch.enable_grad():
            ctx.gradients = walk.run(x)
        ctx.scale = walk.scale
        return torch.stack(list(walk.of_stages.values())).sum()

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Any, ...]:
        gradients, ctx.gradients = ctx.gradients, None
        factor = grads[0] / ctx.scale
        return None, None, *(None if g is None else g.mul_(factor.to(g.dtype)) for g in gradients)


class _Walk:
    """From stage to stage: forward, loss, backward."""

    def __init__(self, model: Any, parameters: list[nn.Parameter], scale: float) -> None:
        self.model, self.local, self.scale = model, model.local, scale
        named = dict(model.encoder.named_parameters())
        self.of_stage = [[named[name] for name in names] for names in self.local.stages.parameters]
        self.parameters = parameters
        self.gradients: dict[Tensor, Tensor] = {}
        self.of_stages: dict[int, Tensor] = {}
        # Of the stages whose graph a later loss still needs: what went in and what came out.
        self.inputs: dict[int, Tensor] = {}
        self.outputs: dict[int, Tensor] = {}

    def run(self, x: Tensor) -> list[Tensor | None]:
        """Gradients of all parameters."""
        last = len(self.of_stage) - 1
        with cut_at(self.model.encoder, self.local.stages.cuts, self._at_cut):
            features = self.model(x)
        projections = self.model.head(features)
        self.outputs[last] = features
        self._descend(
            last, self.model.loss(projections), [*self.model.head.parameters(), *self.model.loss.parameters()]
        )
        self.features, self.projections = features.detach(), projections.detach()
        self.inputs.clear()
        self.outputs.clear()
        return [self.gradients.pop(parameter, None) for parameter in self.parameters]

    def _at_cut(self, number: int, y: Tensor) -> Tensor:
        options = self.local.options
        if options.noise_std:
            y = y + torch.randn_like(y).mul_(options.noise_std * y.detach().std())
        self.outputs[number] = y
        if (key := str(number)) in self.local.losses:
            parts = (self.local.expansions[key], self.local.heads[key], self.local.losses[key])
            of_loss = [parameter for part in parts for parameter in part.parameters()]
            self._descend(number, parts[2](parts[1](parts[0](y))), of_loss)
        following = y.detach()
        if options.overlap:
            self.inputs[number + 1] = following.requires_grad_()
        return following

    def _descend(self, number: int, loss: Tensor, of_loss: list[nn.Parameter]) -> None:
        """Takes the gradient of a loss through its own stage, and through as many before it as overlap."""
        self.of_stages[number + 1] = loss.detach()
        overlap, last = self.local.options.overlap, len(self.of_stage) - 1
        came_out: Tensor = loss * self.scale
        gradient: Tensor | None = None
        # Backward as outside of autocast, which would cast anew what is given in the types of the forward pass.
        with torch.autocast(loss.device.type, enabled=False):
            for stage in range(number, max(0, number - overlap) - 1, -1):
                wanted = [p for p in (*of_loss, *self.of_stage[stage]) if p.requires_grad]
                goes_on = stage > max(0, number - overlap)
                still_needed = number < min(stage + overlap, last)
                found = torch.autograd.grad(
                    came_out,
                    [*wanted, self.inputs[stage]] if goes_on else wanted,
                    gradient,
                    retain_graph=still_needed,
                    allow_unused=True,
                )
                self._add(wanted, found)
                if not still_needed:
                    self.outputs.pop(stage, None)
                    self.inputs.pop(stage, None)
                if goes_on:
                    gradient, came_out, of_loss = found[-1], self.outputs[stage - 1], []

    def _add(self, parameters: list[nn.Parameter], found: tuple[Tensor | None, ...]) -> None:
        for parameter, gradient in zip(parameters, found, strict=False):
            if gradient is not None:
                before = self.gradients.get(parameter)
                self.gradients[parameter] = gradient if before is None else before + gradient
