"""Chat templates render as transformers renders them, on a fixed day, and cannot leave their sandbox."""

import datetime
import json
from pathlib import Path
from typing import Any

import pytest

from hpcinfer.data.chat import ChatTemplate
from hpcinfer.data.tokenizer import Tokenizer
from hpcinfer.errors import RequestError

DAY = datetime.date(2026, 1, 31)
MESSAGES = [{"role": "system", "content": " be <brief> "}, {"role": "user", "content": "Größe?"},
            {"role": "assistant", "content": "  12 "}]  # fmt: skip
LOOPS = """{% for m in messages %}
    {%- if loop.first %}
{{ bos_token }}
    {% endif %}
    {% if m.role == 'system' %}{% continue %}{% endif %}
  [{{ m['role'] | upper }}] {{ m.content | trim }}{{ eos_token }}
{% endfor %}
{{ messages | tojson(indent=2) }}{% if add_generation_prompt %} GO{% endif %}"""
GENERATION = """{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{{ ns.n }}
{% if m.role == 'assistant' %}{% generation %}{{ m.content }}{% endgeneration %}{% else %}{{ m.content }}{% endif %}
{% endfor %}{{ tools is none }}{% if enable_thinking is defined and enable_thinking %}<think>{% endif %}"""
HF_ONLY = "{{ messages[0].content }}|{{ '\\n'.join(['a', 'b']) }}|{{ messages[-1]['content'][2:] }}|{{ 'x' if tools }}"
NOT_PLAIN = "chat template: a value that is no text, number, list or dict would be written"


def template(source: Any) -> ChatTemplate:
    return ChatTemplate(source, "<|begin|>", "<|end|>", DAY)


def refusal(source: Any, **options: Any) -> RequestError:
    with pytest.raises(RequestError) as caught:
        template(source).render(MESSAGES, **options)
    return caught.value


@pytest.mark.parametrize("options", [{"add_generation_prompt": True}, {"add_generation_prompt": False},
                                     {"add_generation_prompt": False, "continue_final_message": True}])  # fmt: skip
@pytest.mark.parametrize("source", [None, LOOPS, GENERATION, HF_ONLY])
def test_text_equals_transformers(
    tmp_path: Path, byte_level_files: dict[str, bytes], source: str | None, options: dict[str, bool]
) -> None:
    transformers = pytest.importorskip("transformers")
    for name, content in byte_level_files.items():
        (tmp_path / name).write_bytes(content)
    source = source or Tokenizer(byte_level_files).chat_template
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    try:
        expected = theirs.apply_chat_template(MESSAGES, chat_template=source, tokenize=False, **options)
    except ValueError:  # the final message is not in the text
        expected = "CONTINUE_FINAL_MESSAGE_TAG"
    if "CONTINUE_FINAL_MESSAGE_TAG" in expected:  # or it is there twice, and transformers leaves its mark in the prompt
        assert refusal(source, **options).code == "template_error"
        return
    assert template(source).render(MESSAGES, **options) == expected
    assert MESSAGES[-1]["content"] == "  12 "


def test_continued_message_ends_the_prompt() -> None:
    source = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{{ eos_token }}{% endfor %}"
    text = template(source).render(MESSAGES, add_generation_prompt=False, continue_final_message=True)
    assert text.endswith("[assistant]  12 ")
    text = template(source.replace("m.content", "m.content | trim")).render(MESSAGES, continue_final_message=True)
    assert text.endswith("[assistant]12")


def test_date_is_pinned() -> None:
    assert template("{{ strftime_now('%d %B %Y %H:%M') }}").render(MESSAGES) == "31 January 2026 00:00"


def test_extra_variables_reach_the_template_or_are_refused() -> None:
    assert template(GENERATION).render(MESSAGES, enable_thinking=True).endswith("<think>")
    error = refusal(GENERATION, enable_thinkng=True)
    assert (error.code, error.param) == ("unknown_field", "chat_template_kwargs.enable_thinkng")
    assert template("{{ self_ }}{{ args }}").render(MESSAGES, self_=1, args=2) == "12"


@pytest.mark.parametrize(
    "attack",
    ["{{ ''.__class__ }}", "{{ ''.__class__.__mro__[1].__subclasses__() }}", "{{ ''['__class__'].__base__ }}",
     "{{ messages.append(1) }}", "{{ messages[0].update({'a': 1}) }}", "{{ strftime_now.__self__ }}",
     "{{ raise_exception.__globals__ }}", "{{ cycler.__init__.__globals__ }}", "{{ '{0.__class__}'.format(1) }}",
     "{% for i in range(10**12) %}{% endfor %}", "{% include '/etc/hostname' %}", "{% import 'os' as os %}",
     "{{ x | attr('__class__') }}{{ ''|attr('__class__') }}", "{{ lipsum() }}", "{{ [1, 2] | random }}"],
)  # fmt: skip
def test_template_cannot_reach_outside(attack: str) -> None:
    try:
        text = template(attack).render(MESSAGES)
    except RequestError as error:
        assert error.code in ("template_error", "no_template")
    else:
        assert text == "", "an unsafe attribute is undefined, and prints nothing"


@pytest.mark.parametrize(
    ("source", "code", "message"),
    [(None, "no_template", "the model has no chat template"),
     ("a\n{% if %}", "no_template", "the model's chat template does not compile: line 2"),
     ("{{ 1 | nothing }}", "no_template", "the model's chat template does not compile: line 1"),
     ("{{ " + "[" * 10000, "no_template", "the model's chat template does not compile"),
     ("{% for i in [1] %}" * 40 + "{% endfor %}" * 40, "no_template", "the model's chat template does not compile"),
     ("\udcff", "no_template", "the model's chat template is no text in UTF-8"),
     (["a"], "no_template", "the model's chat template is no text in UTF-8"),
     ("{{ raise_exception('roles must alternate') }}", "template_error", "chat template: roles must alternate"),
     ("{{ raise_exception('\\ud800') }}", "template_error", "chat template: ?"),
     ("{{ raise_exception(raise_exception) }}", "template_error", NOT_PLAIN),
     ("{{ nothing.there }}", "template_error", "chat template: it uses a value that is not defined"),
     ("{{ messages.append(1) }}", "template_error", "chat template: it does what its sandbox forbids"),
     ("{{ 1 / 0 }}", "template_error", "chat template: it fails while it runs"),
     ("{{ messages[0] + 1 }}", "template_error", "chat template: it fails while it runs"),
     ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "template_error", "chat template: it fails while it runs"),
     ("{{ '\\ud800' }}", "template_error", "chat template: it writes half a character")],
)  # fmt: skip
def test_failing_template_is_an_error_of_the_row_in_fixed_words(source: Any, code: str, message: str) -> None:
    error = refusal(source)
    assert (error.code, error.found) == (code, message)


@pytest.mark.parametrize(
    "value",
    ["strftime_now", "raise_exception", "cycler(1)", "joiner()", "loop.cycle", "messages.index", "messages[0].items",
     "messages | map('upper')", "messages | reverse", "cycler(1).next", "range", "[[messages.index]]",
     "{'a': strftime_now}", "self.block", "(messages | map(attribute='items') | list)", "namespace(x=cycler)"],
)  # fmt: skip
@pytest.mark.parametrize(
    "use",
    ["{{ X }}", "{{ X | string }}", "{{ 'a' ~ X }}", "{{ 'a' ~ ('b' ~ (X)) }}", "{{ '%s' % X }}",
     "{{ '%s' % [X] }}", "{{ '%s' | format(X) }}", "{{ '{}'.format(X) }}", "{{ '{x}'.format(x=X) }}",
     "{{ '{x}'.format_map({'x': X}) }}", "{{ [X] | join }}", "{{ 'ab' | join(X) }}", "{{ X | upper }}",
     "{{ [X] | map('string') | list }}", "{{ 'abc' | replace('b', X) }}", "{{ X | pprint }}", "{{ X | trim }}",
     "{% set f = 'a{}'.format %}{{ f(X) }}", "{% filter replace('b', X) %}b{% endfilter %}", "{{ raise_exception(X) }}",
     "{{ X | tojson }}", "{{ {'a': X} | xmlattr }}", "{% set x %}{{ X }}{% endset %}{{ x }}",
     "{{ (''|safe).join([X]) }}", "{{ '%s'|safe % X }}", "{{ ('{}'|attr('format'))(X) }}", "{{ 1 | int(X) }}",
     "{% autoescape true %}{{ X }}{{ 'a' ~ X }}{% endautoescape %}", "{{ ['%s'] | map('format', X) | list }}"],
)  # fmt: skip
def test_no_object_is_written_with_its_address(use: str, value: str) -> None:
    source = "{% block block %}{% endblock %}{% for i in [1] %}" + use.replace("X", value) + "{% endfor %}"
    try:
        text = template(source).render(MESSAGES)
    except RequestError as error:
        assert " at 0x" not in error.found
    else:
        assert " at 0x" not in text


@pytest.mark.parametrize(
    "source",
    ["{{ '{0.items}'.format(messages[0]) }}", "{{ '{0[items]}'.format(messages[0]) }}", "{{ strftime_now('%s') }}",
     "{{ strftime_now('%Y %-10s') }}"],
)  # fmt: skip
def test_other_ways_to_what_differs_between_processes_are_refused(source: str) -> None:
    assert refusal(source).code == "template_error"


@pytest.mark.parametrize(
    ("source", "expected"),
    [("{{ '%s-%d' % ('a', 1) }}{{ '%s' | format(2) }}{{ '{:.1f}{x}'.format(1.25, x=none) }}", "a-121.2None"),
     ("{{ 1 ~ 'a' ~ nothing ~ none ~ 1.5 ~ [1, {'a': true}] }}", "1aNone1.5[1, {'a': True}]"),
     ("{{ messages | map(attribute='role') | join(', ') }}", "system, user, assistant"),
     ("{{ messages | join('', attribute='role') }}{{ messages[0].keys() | join('+') }}",
      "systemuserassistantrole+content"),
     ("{% macro m(f) %}{{ f('%d%%s') }}{{ caller() }}{% endmacro %}{% call m(strftime_now) %}!{% endcall %}", "31%s!"),
     ("{{ messages[0] }}{{ nothing }}{{ [nothing] | upper }}",
      "{'role': 'system', 'content': ' be <brief> '}[UNDEFINED]")],
)  # fmt: skip
def test_plain_data_is_written_as_jinja_writes_it(source: str, expected: str) -> None:
    assert template(source).render(MESSAGES) == expected


def test_json_filter_does_not_escape_html() -> None:
    text = template("{{ messages[0] | tojson }}").render(MESSAGES)
    assert text == json.dumps(MESSAGES[0], ensure_ascii=False)
