"""Flip, colour jitter, grey and blur of a batch of views: views a second, against Kornia and against torchvision.

    pip install -e ".[bench]"
    python benchmarks/color.py --output benchmarks/results/color_cpu.json
    python benchmarks/color.py --device cuda --output benchmarks/results/color_cuda.json

64 views at 224 px, the recipe for ImageNet: flip .5, jitter .8 (each image its own factors and its own order, clipped
after each operation), grey .2, blur .5 with a kernel of 23. On the CPU one thread. Kornia runs its own modules, which
jitter a whole batch in one order; it does so on the whole batch or on eight views at a time, whichever is faster.
torchvision runs its functional operations image by image with our draws. On CUDA the batch is 1,024 views, and a
synchronisation with the device is an error on our side.
"""

import dataclasses
import functools
import importlib.util
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as tv

from measure import Claim, alternate, arguments, compare, environment, report
from simclr_scale.data import color
from simclr_scale.data.augmentation import Augmentation, resolve
from simclr_scale.data.draws import Draw, draw_views

SIZE, KERNEL = 224, 23
PHOTOGRAPH = np.array([375, 500])
FULL = resolve("natural", {})
COLOR_AND_BLUR = resolve("natural", {"flip": 0.0})
JITTERS = resolve("natural", {"flip": 0.0, "jitter": 1.0, "grey": 0.0, "blur": 0.0})
HUE = dataclasses.replace(JITTERS, brightness=0.0, contrast=0.0, saturation=0.0)
BLUR = resolve("natural", {"flip": 0.0, "jitter": 0.0, "grey": 0.0, "blur": 1.0})
# Each with the ratio to Kornia that it must reach.
PARTS: dict[str, tuple[Augmentation, float | None]] = {
    "the whole recipe": (FULL, 4.0),
    "jitter, grey and blur": (COLOR_AND_BLUR, 4.0),
    "four jitters": (JITTERS, None),
    "hue": (HUE, None),
    "blur": (BLUR, None),
}


def batch(a: Augmentation, count: int, device: str) -> tuple[Tensor, Tensor]:
    """``count`` views, two an image, of smooth colours with some noise, and their draws."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(count, 3, 9, 9, generator=generator)
    smooth = torch.nn.functional.interpolate(coarse, size=(SIZE, SIZE), mode="bicubic")
    noisy = smooth + 0.03 * torch.randn(smooth.shape, generator=generator)
    views = (noisy.clamp(0, 1) * 255).to(torch.uint8).unflatten(0, (-1, 2))
    draws = torch.from_numpy(draw_views(a, 0, 0, range(count // 2), PHOTOGRAPH))
    return views.to(device), draws.to(device)


def by_torchvision(views: Tensor, draws: Tensor) -> Tensor:
    """One functional call after the other."""
    out = []
    operations = {
        color.BRIGHTNESS: (tv.adjust_brightness, Draw.BRIGHTNESS),
        color.CONTRAST: (tv.adjust_contrast, Draw.CONTRAST),
        color.SATURATION: (tv.adjust_saturation, Draw.SATURATION),
        color.HUE: (tv.adjust_hue, Draw.HUE),
    }
    for view, row in zip(views.flatten(0, 1), draws.flatten(0, 1).tolist(), strict=True):
        x = view / 255
        if row[Draw.FLIP]:
            x = tv.horizontal_flip(x)
        if row[Draw.JITTER]:
            for operation in color.ORDERS[int(row[Draw.ORDER])]:
                function, column = operations[operation]
                x = function(x, row[column])
        if row[Draw.GREY]:
            x = tv.rgb_to_grayscale(x, num_output_channels=3)
        if row[Draw.BLUR]:
            x = tv.gaussian_blur(x, [KERNEL] * 2, [row[Draw.SIGMA]] * 2)
        out.append(x)
    return torch.stack(out)


def by_kornia(a: Augmentation, views: Tensor, chunk: int) -> Callable[[], Any]:
    from kornia import augmentation as k

    s = a.strength
    modules = [
        (a.flip, k.RandomHorizontalFlip(p=a.flip)),
        (a.jitter, k.ColorJitter(s * a.brightness, s * a.contrast, s * a.saturation, s * a.hue, p=a.jitter)),
        (a.grey, k.RandomGrayscale(p=a.grey)),
        (a.blur, k.RandomGaussianBlur((KERNEL, KERNEL), a.blur_sigma, p=a.blur)),
    ]
    pipeline = torch.nn.Sequential(*(module for probability, module in modules if probability > 0))
    images = views.flatten(0, 1)
    return lambda: torch.cat([pipeline(part / 255) for part in images.split(chunk)])


def claims(device: str, runs: int) -> list[Claim]:
    found = importlib.util.find_spec("kornia") is not None
    if not found:
        print('kornia is not installed and left out; pip install -e ".[bench]" brings it')
    on_cpu = device == "cpu"
    count = 64 if on_cpu else 1024
    made = []
    for name, (augmentation, target_to_kornia) in PARTS.items():
        views, draws = batch(augmentation, count, device)
        sides: dict[str, Callable[[], Any]] = {"ours": ours(views, draws, augmentation)}
        if found:
            sides["kornia"] = by_kornia(augmentation, views, count)
            sides["kornia by eight"] = by_kornia(augmentation, views, 8)
        if on_cpu:
            sides["torchvision"] = functools.partial(by_torchvision, views, draws)
        results = [alternate(sides, rounds=7, device=device) for _ in range(runs)]
        for result in results if found else ():
            result["kornia"] = min(result["kornia"], result["kornia by eight"], key=min)
        for peer in ("kornia", "torchvision"):
            if peer in sides:
                target = target_to_kornia if peer == "kornia" else None
                made.append(as_rates(compare(f"{name}, against {peer}", results, "ours", peer, target=target), count))
    return made


def ours(views: Tensor, draws: Tensor, augmentation: Augmentation) -> Callable[[], Tensor]:
    def run() -> Tensor:
        if views.device.type != "cuda":
            return color.augment_colors(views, draws, augmentation)
        torch.cuda.set_sync_debug_mode("error")
        try:
            return color.augment_colors(views, draws, augmentation)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    # The compiler synchronises as it pleases while it compiles.
    if views.device.type == "cuda":
        for _ in range(3):
            color.augment_colors(views, draws, augmentation)
    return run


def as_rates(claim: Claim, count: int) -> Claim:
    """Milliseconds for ``count`` views as views a second."""
    rates = (count / time * 1e3 for time in (claim.ours, claim.peer))
    return dataclasses.replace(claim, **dict(zip(("ours", "peer"), rates, strict=True)), unit="views/s")


def main() -> int:
    options = arguments(__doc__).parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    measured = claims(options.device, options.runs)
    return report(measured, environment(["torchvision", "kornia"], device=options.device), options.output)


if __name__ == "__main__":
    raise SystemExit(main())
