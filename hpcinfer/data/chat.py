"""Chat templates: Jinja programs from a model, run in a sandbox with plain data and a pinned date."""

import datetime
import json
from collections.abc import Callable, Sequence
from typing import Any

import jinja2
from jinja2 import meta, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from hpcinfer.errors import RequestError

_OWN_VARIABLES = frozenset({"messages", "tools", "documents", "add_generation_prompt", "bos_token", "eos_token"})
_END_TAG = "HPCINFER_END_OF_FINAL_MESSAGE "  # the space tells whether a template strips its messages


class ChatTemplate:
    """Turns messages into the text of a prompt, as Hugging Face's apply_chat_template does."""

    def __init__(self, source: str | None, bos_token: str | None, eos_token: str | None, date: datetime.date) -> None:
        """Compile a template; what is wrong with it is the error of the rows that need it.

        Args:
            date: the day that the template sees as today.
        """
        self._tokens = {"bos_token": bos_token or "", "eos_token": eos_token or ""}
        environment = _environment(date)
        self._template: jinja2.Template | None = None
        self._problem = "the model has no chat template"
        self._variables: frozenset[str] = frozenset()
        if source is not None:
            try:
                self._variables = frozenset(meta.find_undeclared_variables(environment.parse(source)))
                self._template = environment.from_string(source)
            except (jinja2.TemplateError, RecursionError) as error:
                self._problem = f"the model's chat template does not compile: {error}"

    def render(self, messages: Sequence[dict[str, str]], /, *, add_generation_prompt: bool = True,
               continue_final_message: bool = False, **extra: Any) -> str:  # fmt: skip
        """Write messages as a prompt.

        Args:
            continue_final_message: end inside the last message, so that the model goes on with it.
            extra: further variables of the template (chat_template_kwargs).

        Raises:
            RequestError: no template, one that fails, or a variable that it does not use.
        """
        self._refuse_unused(extra)
        if not continue_final_message:
            return self._run(messages, add_generation_prompt, extra)
        last = {**messages[-1], "content": messages[-1]["content"] + _END_TAG}
        text = self._run([*messages[:-1], last], add_generation_prompt, extra)
        head, tag, tail = text.rpartition(_END_TAG.strip())
        if not tag or tag in head:
            message = "the chat template does not write the final message exactly once: it cannot be continued"
            raise RequestError("template_error", message, param="continue_final_message")
        return head if tail.startswith(" ") else head.rstrip()

    def _refuse_unused(self, extra: dict[str, Any]) -> None:
        for name in extra:
            if self._template is not None and name not in self._variables - _OWN_VARIABLES:
                where = f"chat_template_kwargs.{name}"
                raise RequestError("unknown_field", f"{where}: the model's chat template does not use it", param=where)

    def _run(self, messages: Sequence[dict[str, str]], add_generation_prompt: bool, extra: dict[str, Any]) -> str:
        if self._template is None:
            raise RequestError("no_template", self._problem, param="messages")
        own = {"messages": [dict(message) for message in messages], "tools": None, "documents": None,
               "add_generation_prompt": add_generation_prompt, **self._tokens}  # fmt: skip
        try:
            return self._template.render({**extra, **own})
        except Exception as error:  # a template is a program: anything may go wrong inside it
            raise RequestError("template_error", f"chat template: {error}", param="messages") from None


class _Generation(Extension):
    """The {% generation %} block of training templates: its body, as it is."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _environment(date: datetime.date) -> ImmutableSandboxedEnvironment:
    """Make Jinja's sandbox: nothing in it leads outside, ranges end at 100,000, and nothing is random."""
    extensions: list[type[Extension]] = [_Generation, loopcontrols]
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=extensions)
    del environment.filters["random"], environment.globals["lipsum"]
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise
    environment.globals["strftime_now"] = _strftime(date)
    return environment


def _to_json(value: Any, ensure_ascii: bool = False, indent: int | None = None,
             separators: tuple[str, str] | None = None, sort_keys: bool = False) -> str:  # fmt: skip
    """Write JSON without Jinja's HTML escapes."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise(message: str) -> None:
    raise jinja2.TemplateError(message)


def _strftime(date: datetime.date) -> Callable[[str], str]:
    """Make a clock that stands still at midnight of a day."""
    return datetime.datetime.combine(date, datetime.time()).strftime
