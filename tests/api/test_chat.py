"""Chat templates: rendered as their authors meant them, in a sandbox."""

from dataclasses import replace

import pytest
import tokenizers
from tokenizers.processors import TemplateProcessing

import twinfer
from twinfer.chat import encode, render_chat
from twinfer.checkpoint import Tokenizer
from twinfer.spec.errors import CheckpointError, RequestError

HELLO = [{"role": "user", "content": "Hello <&>"}]


@pytest.mark.parametrize(
    ("template", "text"),
    [
        ("{{ bos_token }}{{ messages[0]['content'] }}", "<s>Hello <&>"),
        ("{% for m in messages %}\n  {% if true %}\n{{ m.role }}\n{% endif %}\n{% endfor %}", "user\n"),
        ("{% if add_generation_prompt %}answer:{% endif %}", "answer:"),
        ("{{ messages | tojson }}", '[{"role": "user", "content": "Hello <&>"}]'),
        ("{% for n in range(9) %}{% if n == 2 %}{% break %}{% endif %}{{ n }}{% endfor %}", "01"),
        ("{% if strftime_now is defined %}today{% else %}no date{% endif %}", "no date"),
        ("{{ '%s' % eos_token }}|{{ unknown }}", "</s>|"),
        ("{{ raise_exception.__globals__ }}", ""),
    ],
)
def test_templates_render_as_the_field_does(template, text):
    assert render_chat(template, HELLO, {"bos_token": "<s>", "eos_token": "</s>"}) == text


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{% for x in range(10 ** 9) %}{% endfor %}",
        "{% if %}",
        "{{ 1 / 0 }}",
        "{{ messages[0]['content'] + 1 }}",
        "{% include 'secret' %}",
    ],
)
def test_broken_and_escaping_templates_are_refused(template):
    """A template can neither reach Python's internals nor change the messages, and its failure is a clean error."""
    messages = [dict(HELLO[0])]
    with pytest.raises(CheckpointError, match="chat template fails"):
        render_chat(template, messages, {})
    assert messages == HELLO


def test_a_template_can_refuse_messages():
    with pytest.raises(RequestError, match="refuses these messages: roles must alternate"):
        render_chat("{{ raise_exception('roles must alternate') }}", HELLO, {})


@pytest.mark.parametrize("text", ["Hi!", b"Hi!"])
def test_one_text_is_not_taken_for_many(tiny, text):
    """Neither generating nor embedding takes a text letter by letter, or one token id for a sequence of them."""
    model = twinfer.load(tiny, path="reference")
    with pytest.raises(RequestError, match=r"prompts is the string b?'Hi!'; it must be a sequence of prompts"):
        model.generate(text)
    with pytest.raises(RequestError, match=r"texts is the string b?'Hi!'; it must be a sequence of texts"):
        model.embed(text, pooling="mean", normalize=False)
    with pytest.raises(RequestError, match="prompt 1 is 7; it must be token ids, a sequence of integers"):
        model.generate(["Hi!", 7])
    with pytest.raises(RequestError, match="text 0 is 7; it must be token ids, a sequence of integers"):
        model.embed([7], pooling="mean", normalize=False)


def test_begin_tokens_are_not_added_twice(tiny):
    """A tokenizer that begins every text with a special token does so for plain prompts, not for rendered chats."""
    inner = tokenizers.Tokenizer.from_str(tiny.tokenizer.inner.to_str())
    inner.post_processor = TemplateProcessing(single="<turn> $A", special_tokens=[("<turn>", 257)])
    begins = replace(tiny, tokenizer=Tokenizer(inner), chat_template="<turn>{{ messages[0]['content'] }}")
    assert encode(begins, "hi", chat=True) == encode(begins, "hi") == [257, *tiny.tokenizer.encode("hi")]
