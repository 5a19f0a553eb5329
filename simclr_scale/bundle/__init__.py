"""An encoder with its transform, in one folder, in timm's own format."""

from simclr_scale.bundle.loading import describe_specs, load_encoder
from simclr_scale.bundle.saving import BUNDLE_KEY, encoder_config, save_encoder
from simclr_scale.bundle.transform import ImageTransform

__all__ = ["BUNDLE_KEY", "ImageTransform", "describe_specs", "encoder_config", "load_encoder", "save_encoder"]
