"""``simclr-scale finetune``: an encoder's score where all of it is trained on labels."""

from typing import Any, Literal

from simclr_scale.bundle import encoder_config, load_head, require_new_folder, save_encoder
from simclr_scale.cli.evaluated import EvaluationData, check_before_work, chosen_device, open_evaluated, run_on_data
from simclr_scale.cli.ranks import launched_ranks
from simclr_scale.data.workers import killed_workers_explained
from simclr_scale.errors import InputError
from simclr_scale.evaluation import (
    PROTOCOLS,
    LabelBudget,
    Manifest,
    TrainedClassifier,
    evaluate_finetune,
)
from simclr_scale.models import ProjectionHead


def main(argv: list[str]) -> None:
    """``simclr-scale finetune``."""
    run_on_data("finetune", run_finetune, "--encoder ENCODER --data.source SOURCE [options]", argv)


def run_finetune(
    encoder: str,
    data: EvaluationData,
    protocol: Literal["v1", "v2"] = "v1",
    from_head_layer: int | None = None,
    optimizer: Literal["sgd", "lars"] | None = None,
    learning_rate: float | None = None,
    weight_decay: float = 0.0,
    epochs: int | None = None,
    finetune_batch_size: int | None = None,
    labels: str = "1.0",
    seeds: int | None = None,
    seed: int = 0,
    batch_size: int = 256,
    device: str = "auto",
    save: str | None = None,
    output: str | None = None,
    allow_missing_classes: bool = False,
) -> None:
    """Score an encoder by training a copy of it, with a linear layer on top, on labelled images.

    Args:
        encoder: a run, a bundle, a .ckpt file, timm:NAME, hf-hub:ID, random:NAME, pixels:SIZE or histogram:BINS.
        data: the labelled images.
        protocol: v1, SimCLR's (SGD, from the features), or v2, SimCLRv2's (LARS, from the head's first layer).
        from_head_layer: layer of the projection head that the linear layer is put on, 0 for the features; the
            protocol's where not given.
        optimizer: sgd or lars; the protocol's where not given.
        learning_rate: times batch / 256 of sgd, times the root of the batch of lars; .05 and .005 where not given.
        weight_decay: of all but norms, biases and the linear layer.
        epochs: over the labelled images; where not given, 60, but of v1 30 with 5% of the labels or more.
        finetune_batch_size: images a step, at most the labelled ones; 256 of v1 and 1024 of v2 where not given.
        labels: those used of the training images: a fraction, k of every class as in 5-shot, or a list file.
        seeds: draws of the labels; 5 of k-shot, else 1, where not given.
        seed: of the first draw, and of the training.
        batch_size: images a forward on the test images.
        device: cpu, cuda, mps; auto takes the best there is.
        save: folder for the fine-tuned encoder with its classifier, a bundle; takes one draw of labels.
        output: file of the JSON manifest; must not exist.
        allow_missing_classes: goes on where a class has no training or no test image; see the note in the manifest.
    """
    check_before_work(output, batch_size)
    draws = LabelBudget.parse(labels).seeds(seeds, seed)
    if save is not None:
        require_new_folder(save)
        if len(draws) > 1:
            raise InputError(f"--save: {len(draws)} draws of labels make as many networks; wanted one draw, --seeds 1")
    layer = PROTOCOLS[protocol].from_head_layer if from_head_layer is None else from_head_layer
    module, transform, train, test = open_evaluated(encoder, data)
    if save is not None:
        encoder_config(module, transform)  # an encoder that cannot be saved is told before the work
    tuned: list[TrainedClassifier] = []
    with launched_ranks() as ranks, killed_workers_explained():
        manifest = evaluate_finetune(
            module,
            transform,
            train,
            test,
            protocol=protocol,
            head=_head(encoder) if layer > 0 else None,
            from_head_layer=from_head_layer,
            optimizer=optimizer,
            learning_rate=learning_rate,
            weight_decay=weight_decay,
            epochs=epochs,
            finetune_batch_size=finetune_batch_size,
            labels=labels,
            seeds=seeds,
            seed=seed,
            batch_size=batch_size,
            num_workers=data.workers(train),
            device=chosen_device(device),
            spec=encoder,
            allow_missing_classes=allow_missing_classes,
            keep=tuned.append if save is not None else None,
        )
    if ranks.rank:
        return
    if save is not None:
        network = tuned[0].network
        save_encoder(network.encoder, transform, save, classifier=network.head, **facts_of(manifest))
    manifest.print_table()
    if save is not None:
        print(f"The fine-tuned encoder, with its classifier, is in {save}")
    if output is not None:
        manifest.write(output)


def facts_of(manifest: Manifest) -> dict[str, Any]:
    """What the model card of a network says of how it was made, and how good it is."""
    return {
        "task": manifest.task,
        "source": manifest.train.name,
        "split": manifest.train.split,
        "train_images": manifest.train.images,
        "labels": manifest.label_selection,
        "from": manifest.encoder.spec,
        "from_fingerprint": manifest.encoder.fingerprint,
        "settings": dict(manifest.settings),
        "test_top1": manifest.mean,
        "test_images": manifest.test.images,
    }


def _head(spec: str) -> ProjectionHead:
    try:
        return load_head(spec)
    except InputError as error:
        raise InputError(f"{error}; --from_head_layer 0 starts from the features") from error
