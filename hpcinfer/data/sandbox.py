"""Jinja for chat templates: nothing in it leads outside, and nothing of this process or day shows in what it writes.

Values become text in five ways: printed, by a filter, by `~`, by `%` and by str.format. Each lets plain data through
only, since Python would write any other object with its address in memory.
"""

import datetime
import functools
import json
import re
from collections.abc import Callable, Iterable
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.environment import Environment
from jinja2.ext import Extension, loopcontrols
from jinja2.filters import make_attrgetter
from jinja2.nodes import EvalContext
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import pass_environment
from markupsafe import Markup

_PLAIN = (str, int, float, type(None), jinja2.Undefined)
_TEXT_FILTERS = (
    "capitalize", "center", "e", "escape", "forceescape", "format", "indent", "lower", "pprint", "replace", "safe",
    "string", "striptags", "title", "trim", "truncate", "upper", "urlencode", "urlize", "wordcount", "wordwrap",
    "xmlattr",
)  # fmt: skip
_REPLACEMENT_WITH_LOOKUP = re.compile(r"\{\w*[.\[]")  # "{0.name}": may find a method, and write its address
_SECONDS_OF_EPOCH = re.compile(r"%[-_0^#\d]*s")


class TemplateRefusal(jinja2.TemplateRuntimeError):
    """Ends a template for a reason in words of its author or of ours, the same in every version of Jinja."""


class Sandbox(ImmutableSandboxedEnvironment):
    """Environment of a chat template: ranges end at 100,000, nothing is random, time stands still."""

    intercepted_binops = frozenset({"%"})

    def __init__(self, date: datetime.date) -> None:
        """Make the environment.

        Args:
            date: the day that templates see as today.
        """
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols], finalize=_plain)
        del self.filters["random"], self.globals["lipsum"]
        self.filters.update({name: _on_plain(self.filters[name]) for name in _TEXT_FILTERS})
        self.filters.update({"tojson": _to_json, "join": _join, "plain": _plain})
        self.globals.update({"raise_exception": _raise, "strftime_now": _strftime(date)})

    def parse_source(self, source: str) -> nodes.Template:
        """Parse a template whose `~` joins plain data only."""
        tree = self.parse(source)
        for concat in list(tree.find_all(nodes.Concat)):
            concat.nodes = [_filtered(part) for part in concat.nodes]
        tree.set_environment(self)
        return tree

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """Compute `left % right`."""
        return super().call_binop(context, operator, left, _plain(right))

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N805
        """Call what a template calls; str.format gets plain data."""
        is_format = getattr(__obj, "__name__", "") in ("format", "format_map")
        owner = getattr(getattr(__obj, "__wrapped__", __obj), "__self__", None)
        if is_format and _REPLACEMENT_WITH_LOOKUP.search(str(owner)):
            raise TemplateRefusal("str.format with a lookup in a replacement field")
        if is_format or isinstance(owner, Markup):  # whose methods write what they are given, as format does
            _plain([*args, kwargs])
        return super().call(__context, __obj, *args, **kwargs)


class _Generation(Extension):
    """The {% generation %} block of training templates: its body, as it is."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _filtered(node: nodes.Expr) -> nodes.Expr:
    return nodes.Filter(node, "plain", [], [], None, None, lineno=node.lineno)


def _plain(value: Any) -> Any:
    """Pass on a value that is text, a number, none, or a list or dict of such."""
    if isinstance(value, dict):
        _plain([*value, *value.values()])
    elif isinstance(value, list | tuple):
        for item in value:
            _plain(item)
    elif not isinstance(value, _PLAIN):
        raise TemplateRefusal("a value that is no text, number, list or dict would be written")
    return value


def _on_plain(function: Callable[..., Any]) -> Callable[..., Any]:
    """Make a filter that takes plain data only."""

    @functools.wraps(function)
    def checked(*args: Any, **kwargs: Any) -> Any:
        _plain([arg for arg in args if not isinstance(arg, Environment | EvalContext)])
        _plain(kwargs)
        return function(*args, **kwargs)

    return checked


@pass_environment
def _join(environment: Environment, value: Iterable[Any], d: str = "", attribute: str | int | None = None) -> str:
    """Join items, which may come from a generator, or an attribute of each."""
    items = list(value if attribute is None else map(make_attrgetter(environment, attribute), value))
    return str(_plain(d)).join(map(str, _plain(items)))


def _to_json(value: Any, ensure_ascii: bool = False, indent: int | None = None,
             separators: tuple[str, str] | None = None, sort_keys: bool = False) -> str:  # fmt: skip
    """Write JSON without Jinja's HTML escapes."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise(message: Any) -> None:
    raise TemplateRefusal(str(_plain(message)))


def _strftime(date: datetime.date) -> Callable[[str], str]:
    """Make a clock that stands still at midnight of a day."""
    midnight = datetime.datetime.combine(date, datetime.time())

    def strftime_now(format: str) -> str:
        if _SECONDS_OF_EPOCH.search(format.replace("%%", "")):
            raise TemplateRefusal("strftime_now: %s depends on the time zone of the machine")
        return midnight.strftime(format)

    return strftime_now
