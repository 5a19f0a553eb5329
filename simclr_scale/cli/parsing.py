"""Parsers that answer a mistake with one line, and whose help fits on two screens."""

import re
from argparse import SUPPRESS, Action
from collections.abc import Callable, Collection, Mapping
from difflib import get_close_matches
from typing import Any, ClassVar, NoReturn

from jsonargparse import ActionConfigFile, ArgumentParser, DefaultHelpFormatter

from simclr_scale.cli.recipes import find_recipe
from simclr_scale.errors import InputError

# From jsonargparse's report, which is a tree where a value fits none of several types, to what the user needs of it.
_REWORDINGS = (
    (r"(there is no option .*)[\s\S]*", r"\1"),
    (r"(?:- )?Does not validate against any of the Union subtypes$", ""),
    (r"^ *(Subtypes: .*|Errors:|Given value type: .*|Given value: [{N].*)$", ""),
    (r"^ *- (Expected a <class 'NoneType'>|Expected a path but .*)$", ""),
    (r'Parser key "([^"]+)":', r"\1:"),
    (r"([\w.]+):\s*(?:- )?Unexpected keys: \{'(\w+)'[\s\S]*", r"\1 has no field \2; --\1.help lists what it has"),
    (r"\bExpected a typing\.Literal\[(.*?)\]", r"expected one of \1"),
    (r"\bExpected a dot import path string: (\S+)", r"\1 is not the import path of a class or function"),
    (r"\bExpected an? <class '(?:\w+\.)*(\w+)'>", r"expected \1"),
    (r"\bUnexpected config: [\s\S]*", "it holds no keys with values; --print_config shows what a file may hold"),
    (r"\.? *\b(?:Got|Given) value: ", "\ngot "),
    (r"in \"<unicode string>\", ", ""),
)
_UNKNOWN = re.compile(
    r"unrecognized arguments: (?P<argument>\S+).*"
    r"|Group '(?P<group>[^']+)' does not accept option '(?P<member>[^']+)'"
    r"|Option '(?P<option>[^']+)' is not accepted"
)


class OneLineErrors(ArgumentParser):
    """A parser whose errors are InputErrors of one line, which the command table prints."""

    # What an option is called elsewhere, and its name here.
    synonyms: ClassVar[Mapping[str, str]] = {}

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{"formatter_class": ShortHelp, "allow_abbrev": False, **kwargs})

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        if isinstance(ex, InputError):
            raise ex
        for pattern, replacement in _REWORDINGS:
            message = re.sub(pattern, replacement, message, flags=re.MULTILINE)
        items = (line.strip().removeprefix("- ") for line in message.splitlines())
        line = "; ".join(filter(None, items)).replace(":;", ":")
        raise InputError(_UNKNOWN.sub(self._describe_unknown, line)) from ex

    def _describe_unknown(self, match: re.Match[str]) -> str:
        given = ".".join(filter(None, match.groups()))
        if match["argument"] and not given.startswith("-"):
            return f"{given!r} has no name before it, as in --NAME {given}; --help lists the names"
        key = given.lstrip("-").partition("=")[0]
        known = [action.dest for action in self._actions]
        synonym = self.synonyms.get(key.rpartition(".")[2])
        close = [synonym] if synonym else get_close_matches(key, known, n=2, cutoff=0.75)
        hint = f"did you mean {' or '.join(close)}?" if close else "--help lists all"
        return f"there is no option {key}; {hint}"


def parser_of(command: str, function: Callable[..., None], usage: str, skip: Collection[str] = ()) -> OneLineErrors:
    """The options of a command are the arguments of a function, but for those to skip; its docstring is their help."""
    parser = OneLineErrors(
        prog=f"simclr-scale {command}",
        usage=f"%(prog)s {usage}",
        description=(function.__doc__ or "").splitlines()[0],
    )
    parser.add_function_arguments(function, as_group=False, skip=set(skip))
    return parser


class ShortHelp(DefaultHelpFormatter):
    """What each option does and its default, without a list of all the classes that could be imported for it."""

    # Options that jsonargparse adds to those of the program: `--GROUP FILE`, `--KEY.help` and links between options.
    hidden = ("_ActionConfigLoad", "_ActionHelpClassPath", "ActionLink")

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=32)

    def add_argument(self, action: Action) -> None:
        if type(action).__name__ not in self.hidden:
            super().add_argument(action)

    def _get_help_string(self, action: Action) -> str:
        text = (action.help or "").replace("``", "").removesuffix(".")
        if action.required:
            return f"{text} (required)"
        return text if action.default in (None, SUPPRESS) else f"{text} (default: %(default)s)"

    def _get_default_metavar_for_optional(self, action: Action) -> str:
        kind = (self._get_type_str(action) or "").partition(" | ")[0]
        return kind.upper() if kind in ("int", "float", "str") else super()._get_default_metavar_for_optional(action)

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return "".join(f"{indent}{line}\n" for line in text.splitlines())


class RecipeFile(ActionConfigFile):
    """``--config``: a file, or the name of a recipe that ships with the package."""

    command = "pretrain"

    def __call__(self, parser: Any, cfg: Any, values: Any, option_string: str | None = None) -> None:
        path = find_recipe(self.command, values)
        try:
            super().__call__(parser, cfg, str(path), option_string)
        except (TypeError, ValueError) as error:
            raise InputError(f"{path}: {error}") from error
