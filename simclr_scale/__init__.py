"""Self-supervised contrastive pretraining of image encoders (SimCLR), exact on one laptop or a thousand GPUs.

The public names load when they are first used: `load_encoder` needs no trainer, and importing the package alone needs
not even torch.
"""

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from simclr_scale.bundle import load_encoder, save_encoder
    from simclr_scale.data.datamodule import SimCLRDataModule
    from simclr_scale.evaluation import extract_features, knn_classify, linear_probe
    from simclr_scale.losses import NTXentLoss, nt_xent
    from simclr_scale.models import ProjectionHead, create_encoder
    from simclr_scale.optim import LARS, param_groups
    from simclr_scale.pretraining import SimCLR
    from simclr_scale.pretraining.local_simclr import LocalSimCLR
    from simclr_scale.scaling.local_sgd import LocalSGD

__all__ = [
    "LARS",
    "LocalSGD",
    "LocalSimCLR",
    "NTXentLoss",
    "ProjectionHead",
    "SimCLR",
    "SimCLRDataModule",
    "create_encoder",
    "extract_features",
    "knn_classify",
    "linear_probe",
    "load_encoder",
    "nt_xent",
    "param_groups",
    "save_encoder",
]

_MODULE_OF = {
    "LARS": "optim",
    "LocalSGD": "scaling.local_sgd",
    "LocalSimCLR": "pretraining.local_simclr",
    "NTXentLoss": "losses",
    "ProjectionHead": "models",
    "SimCLR": "pretraining",
    "SimCLRDataModule": "data.datamodule",
    "create_encoder": "models",
    "extract_features": "evaluation",
    "knn_classify": "evaluation",
    "linear_probe": "evaluation",
    "load_encoder": "bundle",
    "nt_xent": "losses",
    "param_groups": "optim",
    "save_encoder": "bundle",
}

try:
    __version__ = version("simclr-scale")
except PackageNotFoundError:
    __version__ = "0+unknown"  # imported from a checkout that is not installed


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
    globals()[name] = value  # the next use does not come here
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
