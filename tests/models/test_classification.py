"""The classifier on an encoder or on layers of its head."""

import pytest
import torch
from torch import nn

from simclr_scale.errors import InputError
from simclr_scale.models import ClassificationHead, ImageClassifier, ProjectionHead


@pytest.mark.parametrize(("layer", "width"), [(0, 6), (1, 5), (2, 5), (3, 4)])
@torch.no_grad()
def test_logits_are_of_exactly_that_layer_and_start_at_zero(layer: int, width: int) -> None:
    head = ProjectionHead(6, hidden_features=5, out_features=4, num_layers=3)
    for parameter in head.parameters():
        parameter.add_(torch.randn_like(parameter))
    head.train()(torch.rand(20, 6))
    classifier = ClassificationHead(6, ("a", "b", "c"), head.eval(), layer).eval()
    h = torch.randn(7, 6)
    assert torch.equal(classifier(h), torch.zeros(7, 3))
    assert classifier.linear.in_features == width
    classifier.linear.weight.normal_()
    classifier.linear.bias.normal_()
    expected = head(h, layers=layer) @ classifier.linear.weight.T + classifier.linear.bias
    torch.testing.assert_close(classifier(h), expected)
    images = torch.randn(7, 2, 1, 3)
    torch.testing.assert_close(ImageClassifier(nn.Flatten(), classifier)(images), classifier(images.flatten(1)))


def test_the_layers_are_copies() -> None:
    head = ProjectionHead(6)
    classifier = ClassificationHead(6, ("a", "b"), head, 1)
    before = head.layers[0][0].weight.clone()
    with torch.no_grad():
        for parameter in classifier.parameters():
            parameter.fill_(3)
    assert torch.equal(head.layers[0][0].weight, before)


@pytest.mark.parametrize(
    ("classes", "head", "layer", "message"),
    [
        (("a",), None, 0, "at least two classes, got 1"),
        (("a", "b"), None, 1, "from_head_layer: 1, but no projection head was given; wanted 0"),
        (("a", "b"), ProjectionHead(6), -1, "from_head_layer: -1"),
        (("a", "b"), ProjectionHead(6), 3, "from_head_layer: 3, wanted at most 2, the head's layers"),
        (("a", "b"), ProjectionHead(5), 1, "the head takes 5 features, and the encoder gives 6"),
    ],
)
def test_bad_input_is_named(classes: tuple[str, ...], head: ProjectionHead | None, layer: int, message: str) -> None:
    with pytest.raises(InputError, match=message):
        ClassificationHead(6, classes, head, layer)
