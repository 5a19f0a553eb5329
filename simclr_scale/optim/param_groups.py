"""Which parameters are decayed and adapted: all but norms, biases and what a model or its user names.

Google excludes batch normalization and biases from weight decay and from layer adaptation by the names of its Keras
layers (google-research/simclr, tf2/model.py, `build_optimizer`). In PyTorch a norm may be called `downsample.1`, so the
type of the module decides here.
"""

from collections.abc import Iterator, Sequence
from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import Any

from timm.layers import evo_norm, filter_response_norm, grn, norm, norm_act
from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from simclr_scale.errors import InputError

_TORCH_NORMS = (_NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)  # _NormBase: batch (also synchronised), instance

# Only some of timm's norms derive from torch's: every layer that its files of norms define counts.
_TIMM_NORMS = tuple(
    layer
    for file in (norm, norm_act, evo_norm, filter_response_norm, grn)
    for layer in vars(file).values()
    if isinstance(layer, type) and issubclass(layer, nn.Module) and layer.__module__ == file.__name__
)


def param_groups(module: nn.Module, weight_decay: float, exclude: Sequence[str] = ()) -> list[dict[str, Any]]:
    """Split the trainable parameters of a module into those LARS decays and adapts, and those it does not.

    Excluded from both are the parameters of normalization layers, by the type of the module; biases; what the
    `no_weight_decay()` of the module or of any module within it names, in timm's convention (a vision transformer's
    tokens and position embedding, for instance; patterns are allowed); and what `exclude` names.

    Args:
        module: Encoder, head, or both in one module.
        weight_decay: Coefficient for the parameters that are not excluded.
        exclude: Names of further parameters, as in `module.named_parameters()`; `*`, `?` and `[...]` are wildcards
            (`fnmatch`).

    Returns:
        At most two groups, empty ones left out:
        `{"name": "adapted", "params": [...], "weight_decay": weight_decay, "adapt": True}` and
        `{"name": "excluded", "params": [...], "weight_decay": 0.0, "adapt": False}`.
        Parameters keep the module's order; a shared one appears once, and is excluded if it is so under any of its
        names. Optimizers that know nothing of `adapt` ignore it.

    Raises:
        InputError: A pattern of `exclude` matches no parameter.
    """
    excluded = {id(parameter) for parameter in _excluded_by_module(module)}
    named = list(module.named_parameters(remove_duplicate=False))
    for pattern in exclude:
        matches = [parameter for name, parameter in named if fnmatchcase(name, pattern)]
        if not matches:
            close = get_close_matches(pattern, [name for name, _ in named])
            hint = f"; close to it: {', '.join(close)}" if close else ""
            raise InputError(f"exclude: {pattern!r} matches no parameter of {type(module).__name__}{hint}")
        excluded.update(map(id, matches))

    trainable = [parameter for parameter in module.parameters() if parameter.requires_grad]
    groups: list[dict[str, Any]] = [
        {
            "name": "adapted",
            "params": [parameter for parameter in trainable if id(parameter) not in excluded],
            "weight_decay": weight_decay,
            "adapt": True,
        },
        {
            "name": "excluded",
            "params": [parameter for parameter in trainable if id(parameter) in excluded],
            "weight_decay": 0.0,
            "adapt": False,
        },
    ]
    return [group for group in groups if group["params"]]


def _excluded_by_module(module: nn.Module) -> Iterator[nn.Parameter]:
    for owner in module.modules():
        is_norm = isinstance(owner, (*_TORCH_NORMS, *_TIMM_NORMS))
        for name, parameter in owner.named_parameters(recurse=False):
            if is_norm or "bias" in name.split("_"):  # also `in_proj_bias` of attention and `bias_ih_l0` of an LSTM
                yield parameter
        if callable(declare := getattr(owner, "no_weight_decay", None)):
            patterns = list(declare())
            for name, parameter in owner.named_parameters(remove_duplicate=False):
                if any(fnmatchcase(name, pattern) for pattern in patterns):
                    yield parameter
