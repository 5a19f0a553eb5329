from pathlib import Path

import pytest

from tests.pretraining.runs import write_classes


@pytest.fixture(scope="session")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of images in train/ and test/, by class."""
    return write_classes(tmp_path_factory.mktemp("images"))
