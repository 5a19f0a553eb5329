"""An encoder with its transform, in one folder, in timm's own format."""

from simclr_scale.bundle.export import Exported, export_encoder
from simclr_scale.bundle.heads import load_classifier, load_head
from simclr_scale.bundle.loading import BASELINES, baseline, describe_specs, load_encoder
from simclr_scale.bundle.saving import BUNDLE_KEY, encoder_config, require_new_folder, save_encoder
from simclr_scale.bundle.transform import ImageTransform

__all__ = [
    "BASELINES",
    "BUNDLE_KEY",
    "Exported",
    "ImageTransform",
    "baseline",
    "describe_specs",
    "encoder_config",
    "export_encoder",
    "load_classifier",
    "load_encoder",
    "load_head",
    "require_new_folder",
    "save_encoder",
]
