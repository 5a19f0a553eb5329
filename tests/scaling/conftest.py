from tests.pretraining.conftest import images

__all__ = ["images"]
