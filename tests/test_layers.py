"""Who may import whom: a part of the package knows only the parts below it, and few know the trainer.

The rules are read from the source, so an import inside a function or under TYPE_CHECKING counts like any other.
"""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "simclr_scale"

# From the ground up. Parts of one row are siblings: none imports another.
LAYERS = [
    {"errors"},
    {"distributed"},
    {"losses", "optim", "models", "data"},
    {"bundle"},
    {"evaluation"},
    {"pretraining"},
    {"scaling"},
    {"cli"},
    {"__main__"},
]
LEVEL = {part: level for level, row in enumerate(LAYERS) for part in row}

TRAINER = {"pytorch_lightning", "lightning", "lightning_fabric", "torchmetrics"}
MAY_KNOW_THE_TRAINER = {"pretraining", "scaling", "cli", "__main__"}
DATA_MODULE = Path("data/datamodule.py")


def imported_names(source: str, package: str) -> Iterator[tuple[int, str]]:
    """Line and absolute dotted name of all that a module of `package` imports, wherever in it the statement stands."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")
            base = parents[: len(parents) - node.level + 1] if node.level else []
            origin = ".".join([*base, *filter(None, [node.module])])
            for alias in node.names:
                yield node.lineno, f"{origin}.{alias.name}"


def eager_part(source: str) -> str:
    """A module's source without its `if TYPE_CHECKING:` blocks."""
    tree = ast.parse(source)
    tree.body = [
        node for node in tree.body if not (isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test))
    ]
    return ast.unparse(tree)


def violations(package: Path) -> Iterator[str]:
    """Every import under a package's folder that breaks a rule, as `file:line what is wrong`."""
    for path in sorted(package.rglob("*.py")):
        file = path.relative_to(package)
        part = file.parts[0].removesuffix(".py")
        source = path.read_text()
        if part == "__init__":
            ours = {name for _, name in imported_names(eager_part(source), package.name) if _is_ours(name, package)}
            yield from (f"{file}: the package itself imports {name} eagerly" for name in sorted(ours))
            continue
        if part not in LEVEL:
            yield f"{file}: {part} has no place among the layers"
            continue
        for line, name in imported_names(source, ".".join([package.name, *file.parts[:-1]])):
            if complaint := _complaint(file, part, name, package):
                yield f"{file}:{line} {complaint}"


def _is_ours(name: str, package: Path) -> bool:
    return name.split(".")[0] == package.name


def _complaint(file: Path, part: str, name: str, package: Path) -> str | None:
    if name.split(".")[0] in TRAINER:
        allowed = part in MAY_KNOW_THE_TRAINER or file == DATA_MODULE
        return None if allowed else f"{part} imports the trainer: {name}"
    if not _is_ours(name, package):
        return None
    target = name.split(".")[1] if "." in name else ""
    if target == "__version__" or target == part:
        return None
    if target not in LEVEL:
        return f"{part} imports {name}, which hides the part that it needs"
    if LEVEL[target] < LEVEL[part]:
        return None
    relation = "its sibling" if LEVEL[target] == LEVEL[part] else "from above"
    return f"{part} imports {relation}: {name}"


def test_every_import_of_the_package_obeys_the_layers() -> None:
    assert list(violations(PACKAGE)) == []


def test_the_walk_sees_the_package() -> None:
    found = {name for path in PACKAGE.rglob("*.py") for _, name in imported_names(path.read_text(), "simclr_scale")}
    assert {"simclr_scale.errors.InputError", "torch"} <= found


# One file each, added to a faultless package, with what the walk must say of it.
FAULTS = {
    "losses/above.py": ("from made_up.pretraining.simclr import SimCLR", "losses imports from above"),
    "losses/sibling.py": ("import made_up.models.heads", "losses imports its sibling"),
    "optim/inner.py": ("def f():\n    from made_up.data import crops", "optim imports its sibling"),
    "models/deep/relative.py": ("from ...losses import nt_xent", "models imports its sibling: made_up.losses.nt_xent"),
    "data/relative.py": ("from .. import evaluation", "data imports from above: made_up.evaluation"),
    "evaluation/typed.py": (
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import pytorch_lightning as pl",
        "evaluation imports the trainer: pytorch_lightning",
    ),
    "distributed.py": ("from . import losses", "distributed imports from above: made_up.losses"),
    "bundle.py": ("from torchmetrics.functional import accuracy", "bundle imports the trainer"),
    "data/sampler.py": ("import pytorch_lightning", "data imports the trainer"),
    "evaluation/lazy.py": ("from made_up import load_encoder", "hides the part that it needs"),
    "cli/whole.py": ("import made_up", "hides the part that it needs"),
    "utils.py": ("import math", "utils has no place among the layers"),
    "__init__.py": ("from made_up.losses import nt_xent", "imports made_up.losses.nt_xent eagerly"),
}

FAULTLESS = {
    "losses/__init__.py": "from made_up.losses.nt_xent import nt_xent\nfrom . import tiled",
    "losses/nt_xent.py": "import torch\nfrom made_up.distributed import gather\nfrom ..errors import InputError",
    "data/datamodule.py": "import pytorch_lightning as pl\nfrom .sampler import Sampler",
    "pretraining/simclr.py": "from pytorch_lightning import Trainer\nfrom made_up.evaluation import knn_classify",
    "cli/__init__.py": "from made_up import __version__\nimport made_up.pretraining.simclr",
    "__main__.py": "from made_up.cli import main",
    "__init__.py": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from made_up.losses import nt_xent",
}


def made_up_package(folder: Path, files: dict[str, str]) -> Path:
    package = folder / "made_up"
    for name, source in files.items():
        (package / name).parent.mkdir(parents=True, exist_ok=True)
        (package / name).write_text(source)
    return package


@pytest.mark.parametrize("file", FAULTS)
def test_the_walk_catches(file: str, tmp_path: Path) -> None:
    source, complaint = FAULTS[file]
    [found] = violations(made_up_package(tmp_path, {**FAULTLESS, file: source}))
    assert found.startswith(file)
    assert complaint in found


def test_the_walk_passes_what_is_allowed(tmp_path: Path) -> None:
    assert list(violations(made_up_package(tmp_path, FAULTLESS))) == []
