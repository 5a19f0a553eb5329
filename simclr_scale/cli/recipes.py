"""Recipes: configuration files by name, from a checkout or an installed wheel."""

from difflib import get_close_matches
from pathlib import Path

from simclr_scale.errors import InputError

_PACKAGE = Path(__file__).parent.parent
_FOLDERS = (_PACKAGE / "configs", _PACKAGE.parent / "configs")


def shipped_recipes(command: str) -> dict[str, Path]:
    """The recipes of a command by name."""
    for folder in _FOLDERS:
        if (folder / command).is_dir():
            return {path.stem: path for path in sorted((folder / command).glob("*.yaml"))}
    return {}


def find_recipe(command: str, name: str) -> Path:
    """The file of that name, or the shipped recipe of that name.

    Raises:
        InputError: there is neither.
    """
    path = Path(name).expanduser()
    if path.is_file():
        return path
    recipes = shipped_recipes(command)
    if name in recipes:
        return recipes[name]
    close = get_close_matches(name, recipes, n=1)
    hint = f"did you mean {close[0]}?" if close else f"shipped recipes are {', '.join(recipes)}"
    raise InputError(f"there is no configuration file or recipe {name!r}; {hint}")
