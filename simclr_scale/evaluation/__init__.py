"""How good a frozen encoder is: kNN and linear evaluation, given an encoder and images and no trainer."""

from simclr_scale.evaluation.features import (
    ImageDataset,
    extract_features,
    gather_features,
    image_loader,
    source_features,
)
from simclr_scale.evaluation.knn import knn_classify, knn_classify_each, knn_neighbors
from simclr_scale.evaluation.linear import LinearProbe, linear_probe
from simclr_scale.evaluation.manifest import Manifest, encoder_fingerprint, require_new_file
from simclr_scale.evaluation.metrics import mean_per_class_accuracy, top1
from simclr_scale.evaluation.tasks import evaluate_knn, evaluate_linear

__all__ = [
    "ImageDataset",
    "LinearProbe",
    "Manifest",
    "encoder_fingerprint",
    "evaluate_knn",
    "evaluate_linear",
    "extract_features",
    "gather_features",
    "image_loader",
    "knn_classify",
    "knn_classify_each",
    "knn_neighbors",
    "linear_probe",
    "mean_per_class_accuracy",
    "require_new_file",
    "source_features",
    "top1",
]
