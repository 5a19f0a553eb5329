"""What a search chooses from."""

from pathlib import Path
from typing import Any

import pytest

from simclr_scale.errors import InputError
from simclr_scale.scaling.search.space import SearchSpace, read_space

RECIPE: dict[str, Any] = {
    "model": {
        "encoder": {"class_path": "x", "init_args": {"name": "simclr_resnet_tiny", "channels": [4, 8, 16]}},
        "learning_rate": 0.1,
    },
    "data": {"source": "textures"},
}


def test_all_candidates_once() -> None:
    vit = {"name": "vit_tiny_patch16_224", "img_size": 32, "patch_size": 4}
    space = SearchSpace.of(["simclr_resnet_tiny", vit], ["0.5", 2], ["128x2", "64x3"])
    labels = [candidate.label for candidate in space.candidates()]
    assert labels == [
        "simclr_resnet_tiny-w0.5-128x2",
        "simclr_resnet_tiny-w0.5-64x3",
        "simclr_resnet_tiny-w2-128x2",
        "simclr_resnet_tiny-w2-64x3",
        "vit_tiny_patch16_224-img_size32-patch_size4-128x2",
        "vit_tiny_patch16_224-img_size32-patch_size4-64x3",
    ]
    again = SearchSpace.of([*space.as_json()["encoders"].values()], space.widths, space.heads)
    assert list(again.candidates()) == list(space.candidates())


def test_the_recipe_of_a_candidate() -> None:
    space = SearchSpace.of(["simclr_resnet_tiny", "resnet10t"], [0.5], ["64x3"])
    ours, other = (space.recipe_of(candidate, RECIPE) for candidate in space.candidates())
    assert ours["model"]["encoder"]["init_args"] == {"name": "simclr_resnet_tiny", "channels": [4, 8, 16], "width": 0.5}
    assert other["model"]["encoder"]["init_args"] == {"name": "resnet10t"}
    assert ours["model"]["head"]["init_args"] == {"out_features": 64, "num_layers": 3}
    assert (ours["data"], ours["model"]["learning_rate"]) == (RECIPE["data"], 0.1)
    assert RECIPE["model"]["encoder"]["class_path"] == "x"


REFUSED = [
    ([], [1], ["128x2"], "encoders is empty"),
    (["resnet18"], [], ["128x2"], "widths is empty"),
    (["resnet18"], [1], [], "heads is empty"),
    (["resnet18", "resnet18"], [1], ["128x2"], "encoder resnet18 is there twice"),
    ([{"width": 2}], [1], ["128x2"], "an encoder is a name, or a mapping with a name"),
    (["resnet18"], ["wide"], ["128x2"], "width 'wide', wanted a number above 0"),
    (["resnet18"], [0], ["128x2"], "width 0, wanted a number above 0"),
    (["resnet18"], [1], ["128"], "head '128', wanted OUTxLAYERS, such as 128x2"),
]


@pytest.mark.parametrize(("encoders", "widths", "heads", "line"), REFUSED)
def test_refused(encoders: list, widths: list, heads: list, line: str) -> None:
    with pytest.raises(InputError, match=line):
        SearchSpace.of(encoders, widths, heads)


def test_every_encoder_is_built_before_anything_is_trained() -> None:
    with pytest.raises(InputError, match="unknown encoder 'resnet19'; did you mean 'resnet18'"):
        SearchSpace.of(["resnet18", "resnet19"], [1], ["128x2"]).check(RECIPE)
    with pytest.raises(InputError, match="takes no argument 'depht'"):
        SearchSpace.of([{"name": "simclr_resnet18", "depht": 3}], [1], ["128x2"]).check(RECIPE)


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("", "a search space is a mapping with encoders, widths, heads"),
        ("- resnet18", "a search space is a mapping"),
        ("encoder: [resnet18]", "there is no entry 'encoder'"),
        ("encoders: resnet18", "encoders is a list, got 'resnet18'"),
        ("encoders: [", "it cannot be read as YAML"),
    ],
)
def test_files_that_are_no_space(text: str, line: str, tmp_path: Path) -> None:
    (tmp_path / "space.yaml").write_text(text)
    with pytest.raises(InputError, match=line):
        read_space(tmp_path / "space.yaml")


def test_a_file(tmp_path: Path) -> None:
    (tmp_path / "space.yaml").write_text("encoders: [resnet18, {name: resnet10t}]\nheads: [64x2]\n")
    assert read_space(tmp_path / "space.yaml") == {"encoders": ["resnet18", {"name": "resnet10t"}], "heads": ["64x2"]}
