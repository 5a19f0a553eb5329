"""``simclr-scale distil``: a network that learns the answers of a fine-tuned one, on images without labels."""

from typing import Literal

from simclr_scale.bundle import encoder_config, load_classifier, load_encoder, require_new_folder, save_encoder
from simclr_scale.cli.evaluated import EvaluationData, check_before_work, chosen_device, open_evaluated, run_on_data
from simclr_scale.cli.finetune import facts_of
from simclr_scale.cli.ranks import launched_ranks
from simclr_scale.data.workers import killed_workers_explained
from simclr_scale.evaluation import TrainedClassifier, evaluate_distil
from simclr_scale.evaluation.distil import ALPHA, BATCH_SIZE, EPOCHS, LEARNING_RATE


def main(argv: list[str]) -> None:
    """``simclr-scale distil``."""
    run_on_data("distil", run_distil, "--encoder TEACHER --data.source SOURCE --save FOLDER [options]", argv)


def run_distil(
    encoder: str,
    data: EvaluationData,
    save: str,
    student: str | None = None,
    temperature: float = 1.0,
    labels: str | None = None,
    alpha: float = ALPHA,
    optimizer: Literal["sgd", "lars"] = "lars",
    learning_rate: float = LEARNING_RATE,
    weight_decay: float = 0.0,
    epochs: int = EPOCHS,
    finetune_batch_size: int = BATCH_SIZE,
    seed: int = 0,
    batch_size: int = 256,
    device: str = "auto",
    output: str | None = None,
) -> None:
    """Teach a student the answers of a fine-tuned network on training images, whose labels are not read.

    Args:
        encoder: the teacher, a bundle with a classifier, as finetune --save writes it.
        data: the images; the labels of the test part score the student and the teacher.
        save: folder for the student with its classifier, a bundle.
        student: the encoder that learns, a run, a bundle, a .ckpt file or random:NAME; where not given, a copy of the
            teacher, classifier included.
        temperature: of the answers of both.
        labels: those of the training images that are used beside the answers: a fraction or a list file; none where not
            given.
        alpha: weight of the answers where labels are used; these have the rest.
        optimizer: sgd or lars.
        learning_rate: times batch / 256 of sgd, times the root of the batch of lars.
        weight_decay: of all but norms, biases and the linear layer.
        epochs: over the training images.
        finetune_batch_size: images a step.
        seed: of the training, and of the draw of labels.
        batch_size: images a forward on the test images.
        device: cpu, cuda, mps; auto takes the best there is.
        output: file of the JSON manifest; must not exist.
    """
    check_before_work(output, batch_size)
    require_new_folder(save)
    teacher, _ = load_classifier(encoder)
    learner = None if student is None else load_encoder(student)[0]
    _, transform, train, test = open_evaluated(encoder, data)
    encoder_config(teacher.encoder if learner is None else learner, transform)  # what cannot be saved is told now
    made: list[TrainedClassifier] = []
    with launched_ranks() as ranks, killed_workers_explained():
        manifest = evaluate_distil(
            teacher,
            transform,
            train,
            test,
            student=learner,
            temperature=temperature,
            labels=labels,
            alpha=alpha,
            optimizer=optimizer,
            learning_rate=learning_rate,
            weight_decay=weight_decay,
            epochs=epochs,
            finetune_batch_size=finetune_batch_size,
            seed=seed,
            batch_size=batch_size,
            num_workers=data.workers(train),
            device=chosen_device(device),
            spec=encoder,
            student_spec=student or "",
            keep=made.append,
        )
    if ranks.rank:
        return
    network = made[0].network
    save_encoder(network.encoder, transform, save, classifier=network.head, **facts_of(manifest))
    manifest.print_table()
    print(f"The student, with its classifier, is in {save}")
    if output is not None:
        manifest.write(output)
