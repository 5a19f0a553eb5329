"""How good an encoder is, given it and images and no trainer: kNN, linear, fine-tuning, health without labels."""

from simclr_scale.evaluation.augmented import AugmentedProbe, augmented_probe
from simclr_scale.evaluation.distil import distil, distillation_loss, evaluate_distil
from simclr_scale.evaluation.features import (
    ImageDataset,
    extract_features,
    gather_features,
    image_loader,
    source_features,
)
from simclr_scale.evaluation.few_labels import (
    FewLabelScore,
    LabelBudget,
    LabelSelection,
    few_label_knn,
    few_label_linear,
    select_labels,
)
from simclr_scale.evaluation.finetune import PROTOCOLS, evaluate_finetune, fine_tune
from simclr_scale.evaluation.health import alignment, alpha_req, collapse_warnings, rankme, uniformity
from simclr_scale.evaluation.health_report import HealthReport, evaluate_health
from simclr_scale.evaluation.knn import knn_classify, knn_classify_each, knn_neighbors
from simclr_scale.evaluation.linear import LinearProbe, linear_probe
from simclr_scale.evaluation.manifest import Manifest, encoder_fingerprint, require_new_file
from simclr_scale.evaluation.metrics import METRICS, mean_per_class_accuracy, top1
from simclr_scale.evaluation.network_training import TrainedClassifier, TrainingSettings, classify_images
from simclr_scale.evaluation.outcome import Outcome
from simclr_scale.evaluation.probes import GridProbe, ProbeSetting, TrainedProbes, probe_grid, train_probes
from simclr_scale.evaluation.tasks import evaluate_knn, evaluate_linear

__all__ = [
    "METRICS",
    "PROTOCOLS",
    "AugmentedProbe",
    "FewLabelScore",
    "GridProbe",
    "HealthReport",
    "ImageDataset",
    "LabelBudget",
    "LabelSelection",
    "LinearProbe",
    "Manifest",
    "Outcome",
    "ProbeSetting",
    "TrainedClassifier",
    "TrainedProbes",
    "TrainingSettings",
    "alignment",
    "alpha_req",
    "augmented_probe",
    "classify_images",
    "collapse_warnings",
    "distil",
    "distillation_loss",
    "encoder_fingerprint",
    "evaluate_distil",
    "evaluate_finetune",
    "evaluate_health",
    "evaluate_knn",
    "evaluate_linear",
    "extract_features",
    "few_label_knn",
    "few_label_linear",
    "fine_tune",
    "gather_features",
    "image_loader",
    "knn_classify",
    "knn_classify_each",
    "knn_neighbors",
    "linear_probe",
    "mean_per_class_accuracy",
    "probe_grid",
    "rankme",
    "require_new_file",
    "select_labels",
    "source_features",
    "top1",
    "train_probes",
    "uniformity",
]
