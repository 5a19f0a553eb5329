"""Encoders and projection heads. Importing this package registers `simclr_resnet*` with timm."""

from simclr_scale.models.baselines import BandHistogramEncoder, ColorHistogramEncoder, PixelEncoder
from simclr_scale.models.classification import ClassificationHead, ImageClassifier
from simclr_scale.models.encoders import Architecture, create_encoder
from simclr_scale.models.heads import ProjectionHead

__all__ = [
    "Architecture",
    "BandHistogramEncoder",
    "ClassificationHead",
    "ColorHistogramEncoder",
    "ImageClassifier",
    "PixelEncoder",
    "ProjectionHead",
    "create_encoder",
]
