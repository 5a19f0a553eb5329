"""The contact sheet: what training would see, never over another file."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from simclr_scale import SimCLRDataModule
from simclr_scale.cli.views import draw_sheet
from simclr_scale.data.augmentation import resolve
from simclr_scale.data.contact_sheet import contact_sheet, describe_draws
from simclr_scale.data.draws import Draw, draw_views
from simclr_scale.errors import InputError
from tests.cli.commands import Outcome, write_images
from tests.data.damaged import write_photographs

GAP, SIDE = 10, 160


def test_a_sheet_is_written_once(command: Callable[..., Outcome], tmp_path: Path) -> None:
    images, output = write_images(tmp_path / "images", "a", "b"), tmp_path / "views.png"
    arguments = ("views", "--data.source", images, "--output", output, "--n", 3, "--data.preset", "small")
    outcome = command(*arguments)
    assert outcome.status == 0, outcome.err
    with Image.open(output) as sheet:
        assert sheet.width == GAP + 3 * (SIDE + GAP)
        assert f"{sheet.width} x {sheet.height} px" in outcome.out
    before = output.read_bytes()
    again = command(*arguments)
    assert again.status == 2
    assert "exists already" in again.err
    assert output.read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["images", "views.png"]


def test_the_views_are_those_of_training(tmp_path: Path) -> None:
    folder = write_photographs(tmp_path, 24, (5,), size=(200, 230))
    data = SimCLRDataModule(
        str(folder),
        global_batch_size=4,
        image_size=SIDE,
        num_workers=0,
        seed=3,
        subset=12,
        augmentation={"blur_per": "batch", "blur": 1.0},  # images of a batch draw something together
    )
    sheet = np.asarray(draw_sheet(data, 8))
    data.setup()
    height = (sheet.shape[0] - GAP) // 8
    for number, batch in zip(range(2), data.train_dataloader(), strict=False):
        inputs = data.on_after_batch_transfer(batch, 0)["inputs"]
        expected = (inputs * 255).round().byte().permute(0, 2, 3, 1).numpy()
        for place in range(4):
            for view in range(2):
                top, left = GAP + (number * 4 + place) * height, GAP + (view + 1) * (SIDE + GAP)
                shown = sheet[top : top + SIDE, left : left + SIDE]
                assert np.array_equal(shown, expected[view * 4 + place])


def test_a_recipe_gives_the_settings(command: Callable[..., Outcome], tmp_path: Path) -> None:
    outcomes = [
        command("views", *options, "--n", 2, "--output", tmp_path / f"{number}.png")
        for number, options in enumerate(
            [
                ("--config", "quickstart"),
                ("--config", "quickstart", "--data.augmentation.hue", "0.1"),
                ("--config", "quickstart", "--seed", "1"),
            ]
        )
    ]
    assert [outcome.status for outcome in outcomes] == [0, 0, 0], outcomes
    contents = {(tmp_path / f"{number}.png").read_bytes() for number in range(3)}
    assert len(contents) == 3


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--n", "0"), "--n must be at least 1"),
        (("--output", "views.xyz"), "ends in .png"),
        (("--output", "no/folder/views.png"), "no folder"),
        (("--config", "quickstar"), "did you mean quickstart"),
        (("--data.image_size", "0"), "image_size"),
        (("--bands", "[0, 7, 9]"), "bands are one or three of 0 to 2"),
    ],
)
def test_mistakes_are_one_line(refusal: Callable[..., str], options: tuple[str, ...], says: str) -> None:
    line = refusal("views", "--data.source", "textures", "--output", "views.png", *options)
    assert says in line


def test_bands_of_many_are_chosen() -> None:
    generator = torch.Generator().manual_seed(0)
    images = [torch.rand(7, 40, 30, generator=generator) * 1000 for _ in range(2)]
    views = torch.rand(4, 7, SIDE, SIDE, generator=generator)
    natural = resolve("natural", {})
    draws = draw_views(natural, 0, 0, [0, 1], np.array([40, 30]))
    for bands, shown in ((None, [0, 1, 2]), ([6, 2, 4], [6, 2, 4]), ([5], [5, 5, 5])):
        sheet = np.asarray(contact_sheet(images, ["a", "b"], views, draws, natural, bands))
        corner = sheet[GAP : GAP + SIDE, 2 * GAP + SIDE : 2 * GAP + 2 * SIDE]
        assert np.array_equal(corner, (views[0, shown] * 255).round().byte().permute(1, 2, 0).numpy())
    grey = contact_sheet([image[:1] for image in images], ["a", "b"], views[:, :1], draws, natural)
    pixels = np.asarray(grey)[GAP : GAP + SIDE, 2 * GAP + SIDE : 2 * GAP + 2 * SIDE]
    assert (pixels == pixels[..., :1]).all()
    with pytest.raises(InputError, match="0 to 6"):
        contact_sheet(images, ["a", "b"], views, draws, natural, [0, 1])


def test_the_draws_are_told_in_their_order() -> None:
    draws = np.zeros(len(Draw), np.float32)
    draws[[Draw.HEIGHT, Draw.WIDTH]] = 20, 30
    assert describe_draws(draws, (40, 60), resolve("natural", {})) == ["crop 25%, 30 x 20"]
    draws[[Draw.FLIP, Draw.JITTER, Draw.GREY, Draw.BLUR]] = 1
    draws[[Draw.BRIGHTNESS, Draw.CONTRAST, Draw.SATURATION, Draw.HUE]] = 0.5, 0.6, 1.7, 0.1
    draws[Draw.SIGMA], draws[Draw.ORDER] = 1.25, 23  # hue, saturation, contrast, brightness
    assert describe_draws(draws, (40, 60), resolve("natural", {}))[1:] == [
        "flip",
        "hue +0.10",
        "saturation 1.70",
        "contrast 0.60",
        "brightness 0.50",
        "grey",
        "blur 1.2 px",
    ]
    google = resolve("natural", {"color_ops": "google", "brightness_mode": "additive"})
    assert "brightness +0.50" in describe_draws(draws, (40, 60), google)
