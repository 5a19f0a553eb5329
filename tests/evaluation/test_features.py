import pytest
import torch
from torch import nn

from simclr_scale.errors import InputError
from simclr_scale.evaluation import ImageDataset, extract_features, gather_features, image_loader
from tests.evaluation.synthetic import ColorSource, DamagedSource, small_encoder, to_tensor
from tests.gloo_pool import GlooPool

SOURCE = ColorSource([0, 1, -1, 2, 0, 1, 2], classes=("a", "b", "c"))


def test_dataset_gives_image_label_and_index() -> None:
    item = ImageDataset(SOURCE, to_tensor)[2]
    assert item["image"].shape == (3, 8, 8)
    assert (item["label"], item["index"]) == (-1, 2)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_features_are_those_of_each_image_alone_in_evaluation_mode(num_workers: int) -> None:
    encoder = small_encoder()
    loader = image_loader(SOURCE, to_tensor, batch_size=3, num_workers=num_workers)
    features, labels, indices = extract_features(encoder, loader)
    encoder.eval()
    with torch.no_grad():
        alone = torch.cat([encoder(to_tensor(SOURCE.image(i))[None]) for i in range(7)])
    assert (features.shape, features.dtype) == ((7, 8), torch.float32)
    torch.testing.assert_close(features, alone)
    assert labels.tolist() == SOURCE.labels.tolist()
    assert indices.tolist() == list(range(7))
    assert labels.dtype == indices.dtype == torch.int64
    assert not features.is_inference()


@pytest.mark.parametrize("num_workers", [0, 2])
def test_images_that_cannot_be_read_are_left_out_and_told(num_workers: int) -> None:
    """Also where none of a batch can be read."""
    source = DamagedSource([0, 1, -1, 2, 0, 1, 2], ("a", "b", "c"), 0, bad=(0, 1, 2, 5))
    loader = image_loader(source, to_tensor, batch_size=3, num_workers=num_workers)
    unreadable: dict[int, str] = {}
    features, labels, indices = extract_features(small_encoder(), loader, unreadable=unreadable)
    everything, _, _ = extract_features(small_encoder(), image_loader(SOURCE, to_tensor))
    assert indices.tolist() == [3, 4, 6]
    assert labels.tolist() == [2, 0, 2]
    torch.testing.assert_close(features, everything[[3, 4, 6]])
    assert unreadable == {index: f"image {index}: not a readable image (cut off)" for index in (0, 1, 2, 5)}


def test_an_image_that_cannot_be_read_is_an_error_unless_it_is_asked_for() -> None:
    source = DamagedSource([0, 1, 2], ("a", "b", "c"), 0, bad=(1,))
    with pytest.raises(InputError, match=r"^image 1: not a readable image \(cut off\)$"):
        extract_features(small_encoder(), image_loader(source, to_tensor))
    source.bad = range(3)
    with pytest.raises(InputError, match=r"^none of the 3 images can be read; the first: image 0: "):
        extract_features(small_encoder(), image_loader(source, to_tensor), unreadable={})


def test_results_are_in_order_of_the_index() -> None:
    loader = image_loader(SOURCE, to_tensor, batch_size=2, indices=[5, 0, 3])
    features, labels, indices = extract_features(small_encoder(), loader)
    everything, _, _ = extract_features(small_encoder(), image_loader(SOURCE, to_tensor))
    assert indices.tolist() == [0, 3, 5]
    assert labels.tolist() == [0, 2, 1]
    torch.testing.assert_close(features, everything[[0, 3, 5]])


def test_pairs_of_images_and_labels_are_counted_up() -> None:
    batches = [(torch.rand(2, 3, 8, 8), torch.tensor([4, 5])), (torch.rand(1, 3, 8, 8), torch.tensor([6]))]
    features, labels, indices = extract_features(small_encoder(), batches)
    assert features.shape == (3, 8)
    assert labels.tolist() == [4, 5, 6]
    assert indices.tolist() == [0, 1, 2]


def test_modes_and_statistics_survive_also_an_error() -> None:
    encoder = small_encoder().train()
    encoder[1].eval()
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    modes = [module.training for module in encoder.modules()]
    assert len(set(modes)) == 2
    extract_features(encoder, image_loader(SOURCE, to_tensor))
    assert [module.training for module in encoder.modules()] == modes
    with pytest.raises(InputError):
        extract_features(encoder, [{"views": torch.rand(2, 2, 3, 8, 8)}])
    assert [module.training for module in encoder.modules()] == modes
    assert all(torch.equal(value, before[name]) for name, value in encoder.state_dict().items())


def test_progress_counts_images() -> None:
    told: list[int] = []
    extract_features(small_encoder(), image_loader(SOURCE, to_tensor, batch_size=3), progress=told.append)
    assert told == [3, 6, 7]


class _Broken(nn.Module):
    """NaN for the fourth image, which is white."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        mean = images.mean(dim=(1, 2, 3))
        return torch.where(mean == 1, torch.nan, mean)[:, None]


def test_non_finite_features_name_the_image() -> None:
    images = torch.rand(6, 3, 4, 4)
    images[3] = 1
    indices = torch.arange(10, 16)
    batches = [
        {"image": images[part], "label": torch.zeros(2), "index": indices[part]}
        for part in (slice(0, 2), slice(2, 4), slice(4, 6))
    ]
    with pytest.raises(InputError, match="NaN or infinity for image 13"):
        extract_features(_Broken(), batches)


@pytest.mark.parametrize(
    ("encoder", "message"),
    [
        (nn.Conv2d(3, 5, 3), r"gives \(2, 5, 6, 6\) for 2 images, wanted \(2, features\)"),
        (nn.Flatten(0), r"gives \(384,\) for 2 images"),
    ],
)
def test_an_encoder_that_gives_no_matrix_is_refused(encoder: nn.Module, message: str) -> None:
    with pytest.raises(InputError, match=message):
        extract_features(encoder, [(torch.rand(2, 3, 8, 8), torch.zeros(2))])


def test_a_loader_of_the_wrong_kind_is_refused() -> None:
    with pytest.raises(InputError, match=r"a mapping of \['views'\]"):
        extract_features(small_encoder(), [{"views": torch.rand(1, 2, 3, 8, 8)}])
    with pytest.raises(InputError, match="yields a Tensor"):
        extract_features(small_encoder(), [torch.rand(1, 3, 8, 8)])
    with pytest.raises(InputError, match="no images"):
        extract_features(small_encoder(), [])


def test_gather_alone_is_the_identity() -> None:
    parts = torch.rand(3, 2), torch.zeros(3), torch.tensor([2, 0, 1])
    assert all(after is before for after, before in zip(gather_features(*parts), parts, strict=True))


def _gather(rank: int, world_size: int, assignment: list[list[int]]) -> tuple[torch.Tensor, ...]:
    assert len(assignment) == world_size
    mine = torch.tensor(assignment[rank], dtype=torch.int64)
    return gather_features(mine[:, None] * torch.tensor([1.0, 0.5, 0.25]), mine % 3, mine)


@pytest.mark.parametrize(
    "assignment",
    [
        [[0, 2, 4, 6], [1, 3, 5, 0]],  # padded by a sampler: 0 twice
        [[7, 1, 4], []],
        [[3], [9, 8, 2, 5], [0, 1]],
    ],
)
def test_gather_gives_every_rank_every_image_once(gloo: GlooPool, assignment: list[list[int]]) -> None:
    wanted = sorted({index for part in assignment for index in part})
    for features, labels, indices in gloo(len(assignment), _gather, assignment):
        assert indices.tolist() == wanted
        assert labels.tolist() == [index % 3 for index in wanted]
        assert torch.equal(features, torch.tensor(wanted)[:, None] * torch.tensor([1.0, 0.5, 0.25]))


def _gather_unequal(rank: int, world_size: int) -> str:
    del world_size
    with pytest.raises(ValueError, match="number of features") as caught:
        gather_features(torch.rand(2, 3 + rank), torch.zeros(2), torch.arange(2))
    return str(caught.value)


def test_gather_refuses_unequal_widths_on_every_rank(gloo: GlooPool) -> None:
    first, second = gloo(2, _gather_unequal)
    assert first == second
