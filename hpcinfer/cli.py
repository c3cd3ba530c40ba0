"""Command-line flags out of config dataclasses: name, type, default and help exist once, in the field."""

import argparse
import dataclasses
import types
from collections.abc import Callable
from typing import Any, TypeVar, get_args, get_type_hints

C = TypeVar("C")


def add_options(parser: argparse.ArgumentParser, config: type, *, title: str, given_only: bool = False) -> None:
    """Add a flag for each option of a config dataclass.

    Args:
        parser: gets an argument group of that title.
        config: a dataclass whose fields were made with `hpcinfer.config.option`.
        title: heading in the help.
        given_only: leave out of the namespace what the user did not give, so that other sources of defaults apply.
    """
    group = parser.add_argument_group(title)
    hints = get_type_hints(config)
    for field in dataclasses.fields(config):
        if "help" in field.metadata:
            default = argparse.SUPPRESS if given_only else [] if field.default == () else field.default
            group.add_argument(*_names(field), dest=field.name, default=default, **_kind(field, hints[field.name]))


def read_options(args: argparse.Namespace, config: type[C]) -> C:
    """Build the config dataclass out of parsed flags."""
    names = [field.name for field in dataclasses.fields(config) if "help" in field.metadata]  # type: ignore[arg-type]
    return config(**{name: _value(getattr(args, name)) for name in names})


def given_options(args: argparse.Namespace, config: type) -> dict[str, Any]:
    """The options of a config dataclass that the user gave, by field name."""
    names = [field.name for field in dataclasses.fields(config) if "help" in field.metadata]
    return {name: _value(getattr(args, name)) for name in names if hasattr(args, name)}


def _names(field: "dataclasses.Field[Any]") -> list[str]:
    prefix = "--no-" if field.default is True and not field.metadata["both"] else "--"
    return [prefix + field.name.replace("_", "-"), *field.metadata["flags"]]


def _kind(field: "dataclasses.Field[Any]", hint: Any) -> dict[str, Any]:
    help_text = field.metadata["help"].replace("%", "%%")
    if field.metadata["both"]:
        return {"action": argparse.BooleanOptionalAction, "help": help_text}
    if hint is bool:
        return {"action": "store_false" if field.default is True else "store_true", "help": help_text}
    default = field.default
    if default not in (None, "", ()):
        help_text += f" (default: {default})"
    kind: dict[str, Any] = {"help": help_text, "type": _reader(field) or _plain_type(hint)}
    if default == ():
        kind["action"] = "append"
    if field.metadata["choices"]:
        kind["choices"] = field.metadata["choices"]
    else:
        kind["metavar"] = field.metadata["metavar"] or _METAVARS.get(kind["type"], "TEXT")
    return kind


def _reader(field: "dataclasses.Field[Any]") -> Callable[[str], Any] | None:
    """The field's own parser, whose ValueError becomes the message of a usage error."""
    parse = field.metadata["parse"]
    if parse is None:
        return None

    def read(text: str) -> Any:
        try:
            return parse(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(f"{text!r}: {error}") from None

    return read


_METAVARS: dict[Any, str] = {int: "N", float: "X"}


def _plain_type(hint: Any) -> Callable[[str], Any]:
    if isinstance(hint, types.UnionType):
        hint = next(kind for kind in get_args(hint) if kind is not type(None))
    return hint if hint in (int, float) else _text


def _text(text: str) -> str:
    """Refuse bytes that are no UTF-8: they could not be written into a manifest."""
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise argparse.ArgumentTypeError(f"{text!r} is not UTF-8")
    return text


def _value(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value
