"""Bytes that leave a rank in a step, under DDP and under local SGD with periods of 1 to 64 steps: counts, no run.

    PYTHONPATH=. python benchmarks/local_sgd_traffic.py --output benchmarks/results/local_sgd_traffic.json

The counts are those of `summary.json`, which tests hold against every collective of real processes
(tests/scaling/test_communication.py). ResNet-50 and its head take a minute to make.
"""

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from torch import nn

from measure import environment
from simclr_scale import NTXentLoss, ProjectionHead, create_encoder
from simclr_scale.pretraining.probe import OnlineProbe
from simclr_scale.scaling.communication import Collective, collectives_of_a_step, mean_by_part, sent_by_part

PERIODS = (1, 4, 16, 64)


@dataclass(frozen=True)
class Setting:
    """A network on so many ranks of so many images."""

    label: str
    encoder: nn.Module
    ranks: int
    images: int
    classes: int
    element_size: int

    def collectives(self, *, ddp: bool, alone: bool = False) -> dict[str, int]:
        """Bytes of an ordinary step, or of a local one."""
        width = self.encoder.num_features
        found = collectives_of_a_step(
            self.encoder,
            ProjectionHead(width),
            NTXentLoss(),
            rows=2 * self.images,
            width=128,
            element_size=self.element_size,
            ddp=ddp,
            probe=OnlineProbe(width, self.classes) if ddp else None,
            alone=alone,
        )
        assert found is not None
        return sent_by_part(found, self.ranks)

    def averaged_bytes(self) -> int:
        """Of weights and running statistics, all that is floating point; the probe's among them."""
        width = self.encoder.num_features
        modules = (self.encoder, ProjectionHead(width), OnlineProbe(width, self.classes))
        values = [value for module in modules for value in module.state_dict().values() if value.is_floating_point()]
        return sum(value.nbytes for value in values)

    def step(self, period: int, negatives: Literal["global", "local"]) -> int:
        """Mean bytes of a step."""
        averages = Collective("averages", "all_reduce", self.averaged_bytes()).sent(self.ranks) / period
        alone = self.collectives(ddp=False, alone=negatives == "local")
        return sum(mean_by_part([(1, {**alone, "averages": averages})]).values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path)
    output = parser.parse_args().output
    tiny = create_encoder("simclr_resnet_tiny", channels=[24, 48, 96])
    settings = [
        Setting("ResNet-50, 32 ranks of 128 images, bfloat16", create_encoder("simclr_resnet50"), 32, 128, 1000, 2),
        Setting("cifar10_tiny, 2 ranks of 64 images, float32", tiny, 2, 64, 10, 4),
    ]
    table = []
    for setting in settings:
        ddp = sum(setting.collectives(ddp=True).values())
        print(f"{setting.label}: DDP {ddp / 1e6:.3f} MB a step")
        row = {"setting": setting.label, "ddp_bytes": ddp}
        for negatives in ("global", "local"):
            row[negatives] = {period: setting.step(period, negatives) for period in PERIODS}
            print(
                f"  negatives {negatives}:", *(f"{period}: {sent / 1e6:.3f}" for period, sent in row[negatives].items())
            )
        table.append(row)
    if output is not None:
        text = json.dumps({"claims": [], "environment": environment(), "bytes_per_step": table}, indent=1)
        output.write_text(text + "\n")


if __name__ == "__main__":
    main()
