"""Parsers that answer a mistake with one line."""

import argparse
from difflib import get_close_matches
from typing import Any, NoReturn

from jsonargparse import ActionConfigFile, ArgumentParser

from simclr_scale.cli.recipes import find_recipe
from simclr_scale.errors import InputError


class OneLineErrors(ArgumentParser):
    """A parser whose errors are InputErrors of one line, which the command table prints."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        raise InputError(_readable(message, [action.dest for action in self._actions])) from ex


def _readable(message: str, known: list[str]) -> str:
    """jsonargparse's message on one line, with the nearest known key where one is unknown."""
    line = " ".join(message.split())
    if "Unrecognized" not in line and "not expected" not in line:
        return line
    words = (word.lstrip("-").partition("=")[0] for word in line.replace("'", " ").replace('"', " ").split())
    nearest = (get_close_matches(word, known, n=1, cutoff=0.75) for word in words if word not in known)
    close = next((matches[0] for matches in nearest if matches), None)
    return f"{line}; did you mean {close}?" if close else line


class RecipeFile(ActionConfigFile):
    """``--config``: a file, or the name of a recipe that ships with the package."""

    command = "pretrain"

    def __call__(self, parser: Any, cfg: Any, values: Any, option_string: str | None = None) -> None:
        super().__call__(parser, cfg, str(find_recipe(self.command, values)), option_string)


def shorten_help(parser: ArgumentParser, keep: tuple[str, ...]) -> None:
    """Leaves the trainer's rarer options out of ``--help``; they work all the same."""
    for action in parser._actions:
        group, _, name = action.dest.partition(".")
        if group == "trainer" and name.partition(".")[0] not in keep:
            action.help = argparse.SUPPRESS
