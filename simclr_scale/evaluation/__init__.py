"""How good an encoder is, given it and images and no trainer: kNN, linear, fine-tuning, health without labels."""

from simclr_scale.evaluation.augmented import AugmentedProbe, augmented_probe
from simclr_scale.evaluation.distil import distil, distillation_loss, evaluate_distil
from simclr_scale.evaluation.features import (
    ImageDataset,
    extract_features,
    gather_features,
    image_loader,
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
from simclr_scale.evaluation.multilabel import MultiLabelProbe, multilabel_probe
from simclr_scale.evaluation.network_training import TrainedClassifier, TrainingSettings, classify_images
from simclr_scale.evaluation.outcome import Outcome
from simclr_scale.evaluation.probes import GridProbe, ProbeSetting, TrainedProbes, probe_grid, train_probes
from simclr_scale.evaluation.ranking import mean_auc, voc2007_map
from simclr_scale.evaluation.scorecard import Contestant, Evaluated, Scorecard, Task
from simclr_scale.evaluation.shared_features import source_features
from simclr_scale.evaluation.suites import Suite, SuiteEntry, load_suite
from simclr_scale.evaluation.tasks import evaluate_knn, evaluate_linear
from simclr_scale.evaluation.transfer import TransferResult, evaluate_transfer
from simclr_scale.evaluation.transfer_report import TransferReport
from simclr_scale.evaluation.uncertainty import Comparison, Interval, bootstrap_interval, permutation_test

__all__ = [
    "METRICS",
    "PROTOCOLS",
    "AugmentedProbe",
    "Comparison",
    "Contestant",
    "Evaluated",
    "FewLabelScore",
    "GridProbe",
    "HealthReport",
    "ImageDataset",
    "Interval",
    "LabelBudget",
    "LabelSelection",
    "LinearProbe",
    "Manifest",
    "MultiLabelProbe",
    "Outcome",
    "ProbeSetting",
    "Scorecard",
    "Suite",
    "SuiteEntry",
    "Task",
    "TrainedClassifier",
    "TrainedProbes",
    "TrainingSettings",
    "TransferReport",
    "TransferResult",
    "alignment",
    "alpha_req",
    "augmented_probe",
    "bootstrap_interval",
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
    "evaluate_transfer",
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
    "load_suite",
    "mean_auc",
    "mean_per_class_accuracy",
    "multilabel_probe",
    "permutation_test",
    "probe_grid",
    "rankme",
    "require_new_file",
    "select_labels",
    "source_features",
    "top1",
    "train_probes",
    "uniformity",
    "voc2007_map",
]
