"""Time to train 16 linear probes by SGD on cached features: a grid in one product against one after another.

    python benchmarks/probes.py --output benchmarks/results/probes_cpu.json

Ten classes, 2,048 features (a ResNet-50's), batches of 256, one epoch, float32, one thread. The peer trains the same 16
probes one after another by the usual loop of torch: nn.Linear, cross_entropy, SGD with Nesterov momentum, a cosine by
the step, batches gathered by index. Reported beside it, without a target: our own code with one head a run, which is
faster than that loop; and how far the grid is from its two products and its gather alone, of which nothing can be
saved. Before anything is timed, all sides are compared in float64: every head of the grid must be the probe that is
trained alone.
"""

from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from measure import alternate, arguments, compare, environment, report
from simclr_scale.data.randomness import Purpose, generator
from simclr_scale.evaluation.probes import LEARNING_RATES, WEIGHT_DECAYS, ProbeSetting, TrainedProbes, train_probes

CLASSES = 10
WIDTH = 2048
BATCH = 256
IMAGES = 20 * BATCH
SETTINGS = [ProbeSetting(rate, decay) for rate in LEARNING_RATES for decay in WEIGHT_DECAYS]
TARGET = 4.0
TOLERANCE = 1e-10


def features_and_targets(images: int, width: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Non-negative features of overlapping classes, such as an average pool after a ReLU gives."""
    draw = torch.Generator().manual_seed(0)
    targets = torch.randint(CLASSES, (images,), generator=draw)
    centres = torch.rand(CLASSES, width, generator=draw)
    noise = torch.randn(images, width, generator=draw)
    return (centres[targets] + noise).relu_().mul_(0.5).to(dtype), targets


def in_one_product(features: torch.Tensor, targets: torch.Tensor, epochs: int = 1) -> TrainedProbes:
    return train_probes(features, targets, CLASSES, SETTINGS, epochs=epochs, batch_size=BATCH)


def one_after_another(features: torch.Tensor, targets: torch.Tensor, epochs: int = 1) -> TrainedProbes:
    alone = [
        train_probes(features, targets, CLASSES, [setting], epochs=epochs, batch_size=BATCH) for setting in SETTINGS
    ]
    return TrainedProbes(
        torch.cat([probe.weight for probe in alone]), torch.cat([probe.bias for probe in alone]), tuple(SETTINGS)
    )


def usual_loop(features: torch.Tensor, targets: torch.Tensor, epochs: int = 1) -> TrainedProbes:
    """The same orders of images, trained as a user of torch would."""
    weights, biases = [], []
    steps = len(features) // BATCH
    for setting in SETTINGS:
        head = nn.Linear(features.shape[1], CLASSES, dtype=features.dtype)
        nn.init.zeros_(head.weight)
        nn.init.zeros_(head.bias)
        groups = [
            {"params": [head.weight], "weight_decay": setting.weight_decay},
            {"params": [head.bias], "weight_decay": 0.0},
        ]
        optimizer = torch.optim.SGD(groups, lr=setting.learning_rate * BATCH / 256, momentum=0.9, nesterov=True)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * steps)
        for epoch in range(epochs):
            raw = generator(Purpose.ORDER, 0, epoch, 0).bit_generator.random_raw(len(features))
            order = torch.from_numpy(raw.argsort(kind="stable"))
            for chosen in order[: steps * BATCH].split(BATCH):
                loss = F.cross_entropy(head(features[chosen]), targets[chosen])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
        weights.append(head.weight.detach())
        biases.append(head.bias.detach())
    return TrainedProbes(torch.stack(weights), torch.stack(biases), tuple(SETTINGS))


def products_alone(features: torch.Tensor) -> None:
    """What a step of the grid cannot do without: a gather, and two products of it with all heads."""
    rows = len(SETTINGS) * CLASSES
    order = torch.randperm(len(features), generator=torch.Generator().manual_seed(0))
    weight, residual = torch.ones(rows, WIDTH), torch.ones(rows, BATCH)
    batch, logits, gradient = torch.empty(BATCH, WIDTH), torch.empty(rows, BATCH), torch.empty(rows, WIDTH)
    for chosen in order.split(BATCH):
        torch.index_select(features, 0, chosen, out=batch)
        torch.mm(weight, batch.T, out=logits)
        torch.mm(residual, batch, out=gradient)


SIDES = {"grid": in_one_product, "one head a run": one_after_another, "torch's loop": usual_loop}


def errors_in_float64() -> dict[str, float]:
    """The largest difference of a weight or bias from the grid's, relative to the largest of them, by peer."""
    features, targets = features_and_targets(3 * BATCH + 17, 96, torch.float64)
    ours = in_one_product(features, targets, epochs=3)
    errors = {}
    for name, train in SIDES.items():
        theirs = train(features, targets, epochs=3)
        errors[name] = max(
            float((mine - other).abs().max() / other.abs().max())
            for mine, other in ((ours.weight, theirs.weight), (ours.bias, theirs.bias))
        )
    return errors


def main() -> int:
    options = arguments(__doc__, devices=("cpu",)).parse_args()
    torch.set_num_threads(1)
    errors = errors_in_float64()
    for name, error in errors.items():
        if not error <= TOLERANCE:
            raise SystemExit(f"the grid is not {name}: relative difference {error:.1e} in float64")
    features, targets = features_and_targets(IMAGES, WIDTH, torch.float32)
    sides = {name: partial(train, features, targets) for name, train in SIDES.items()}
    sides["its products alone"] = partial(products_alone, features)
    runs = [alternate(sides, rounds=3) for _ in range(options.runs)]
    claims = [
        compare(
            f"{len(SETTINGS)} probes of {CLASSES} classes, against {peer}",
            runs,
            "grid",
            peer,
            target=TARGET if peer == "torch's loop" else None,
        )
        for peer in sides
        if peer != "grid"
    ]
    return report(claims, environment(), options.output, differences_in_float64=errors)


if __name__ == "__main__":
    raise SystemExit(main())
