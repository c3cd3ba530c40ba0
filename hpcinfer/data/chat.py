"""Chat templates: Jinja programs from a model, run in a sandbox with plain data and a pinned date."""

import datetime
import logging
from collections.abc import Sequence
from typing import Any

import jinja2
from jinja2 import meta
from jinja2.exceptions import SecurityError

from hpcinfer.data.sandbox import Sandbox, TemplateRefusal
from hpcinfer.errors import RequestError

log = logging.getLogger(__name__)

_OWN_VARIABLES = frozenset({"messages", "tools", "documents", "add_generation_prompt", "bos_token", "eos_token"})
_END_TAG = "HPCINFER_END_OF_FINAL_MESSAGE "  # the space tells whether a template strips its messages


class ChatTemplate:
    """Turns messages into the text of a prompt, as Hugging Face's apply_chat_template does."""

    def __init__(self, source: Any, bos_token: str | None, eos_token: str | None, date: datetime.date) -> None:
        """Compile a template; what is wrong with it is the error of the rows that need it.

        Args:
            source: as the model has it; None if it has none.
            date: the day that the template sees as today.
        """
        self._tokens = {"bos_token": bos_token or "", "eos_token": eos_token or ""}
        self._template: jinja2.Template | None = None
        self._problem = "the model has no chat template"
        self._variables: frozenset[str] = frozenset()
        if source is not None:
            self._compile(source, Sandbox(date))

    def _compile(self, source: Any, sandbox: Sandbox) -> None:
        if not isinstance(source, str) or not _is_unicode(source):
            self._problem = "the model's chat template is no text in UTF-8"
            return
        try:
            tree = sandbox.parse_source(source)
            self._variables = frozenset(meta.find_undeclared_variables(tree))
            self._template = sandbox.from_string(tree)
        except jinja2.TemplateSyntaxError as error:
            self._problem = f"the model's chat template does not compile: line {error.lineno}"
        except Exception as error:  # Jinja compiles to Python, which has limits of its own
            log.debug("chat template: %s", error)
            self._problem = "the model's chat template does not compile"

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
            text = self._template.render({**extra, **own})
        except Exception as error:  # a template is a program: anything may go wrong inside it
            log.debug("chat template: %s: %s", type(error).__name__, error)
            raise RequestError("template_error", f"chat template: {_explain(error)}", param="messages") from None
        if not _is_unicode(text):
            raise RequestError("template_error", "chat template: it writes half a character", param="messages")
        return text


def _explain(error: Exception) -> str:
    """Say what went wrong in words that no version of Jinja or Python changes."""
    if isinstance(error, TemplateRefusal):
        return str(error).encode("utf-8", "replace").decode()
    if isinstance(error, jinja2.UndefinedError):
        return "it uses a value that is not defined"
    if isinstance(error, SecurityError):
        return "it does what its sandbox forbids"
    return "it fails while it runs"


def _is_unicode(text: str) -> bool:
    """Whether a string has no half characters."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
