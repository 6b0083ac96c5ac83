"""Chat templates: rendered as their authors meant them, in a sandbox."""

import re
import time
from dataclasses import replace

import pytest
import tokenizers
from tokenizers.processors import TemplateProcessing

import twinfer
from twinfer.chat import encode, prompt_ids, render_chats
from twinfer.checkpoint import Tokenizer
from twinfer.memory import peak_memory_bytes
from twinfer.spec.errors import CheckpointError, RequestError


def render_chat(template, messages, special_tokens, **how):
    return render_chats(template, [messages], special_tokens, **how)[0]


HELLO = [{"role": "user", "content": "Hello <&>"}]


@pytest.mark.parametrize(
    ("template", "text"),
    [
        ("{{ bos_token }}{{ messages[0]['content'] }}", "<s>Hello <&>"),
        ("{% for m in messages %}\n  {% if true %}\n{{ m.role }}\n{% endif %}\n{% endfor %}", "user\n"),
        ("{% if add_generation_prompt %}answer:{% endif %}", "answer:"),
        ("{{ messages | tojson }}", '[{"role": "user", "content": "Hello <&>"}]'),
        ("{% for n in range(9) %}{% if n == 2 %}{% break %}{% endif %}{{ n }}{% endfor %}", "01"),
        ("{{ strftime_now('%d %B %Y, %H:%M') }}", "01 January 2025, 00:00"),
        ("{% if tools is not none %}T{% endif %}{% if documents is none %}D{% endif %}{{ tools }}", "DNone"),
        ("{% if x is defined %}x{% endif %}{% generation %}a{{ messages[0].role }}{% endgeneration %}b", "auserb"),
        ("{{ 'é' | tojson(ensure_ascii=True) }}{{ 'é' | tojson }}", '"\\u00e9""é"'),
        ("{{ {'b': 1, 'a': [2]} | tojson(separators=(',', ':'), sort_keys=True) }}", '{"a":[2],"b":1}'),
        ("{{ {'b': 1} | tojson(indent=2) }}", '{\n  "b": 1\n}'),
        ("{{ '%s' % eos_token }}|{{ unknown }}", "</s>|"),
        ("{{ raise_exception.__globals__ }}", ""),
    ],
)
def test_templates_render_as_the_field_does(template, text):
    assert render_chat(template, HELLO, {"bos_token": "<s>", "eos_token": "</s>"}) == text


def test_the_date_is_an_option(tiny):
    """Templates see the same day every day, unless another is asked for; what is no day is refused."""
    dated = replace(tiny, chat_template="{{ strftime_now('%Y-%m-%d') }}")
    assert tiny.tokenizer.decode(encode(dated, "hi", chat=True)) == "2025-01-01"
    assert tiny.tokenizer.decode(encode(dated, "hi", chat=True, date="2031-12-24")) == "2031-12-24"
    for wrong in ("today", "2025-02-30", "", None):
        with pytest.raises(RequestError, match=f"date is {wrong!r}; it must be a day such as 2025-01-01"):
            encode(dated, "hi", chat=True, date=wrong)


@pytest.mark.parametrize(
    ("template", "says"),
    [
        ("{{ 'a' * 10**10 }}", "MemoryError"),
        ("{{ 'a' * 10**7 }}b", "it writes 10000001 characters; it may write 10000000"),
        ("{% for i in range(9999) %}{{ 'a' * 9999 }}{% endfor %}", "it writes 99980001 characters"),
        ("{{ '%9999999999d' % 1 }}", "MemoryError|OverflowError"),
        ("{{ 'a' | center(10**10) }}", "MemoryError"),
        ("{{ [0] * 10**10 }}", "MemoryError"),
        ("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", "it takes more than 1 s"),
        ("{{ 9 ** (9 ** 9) }}", "it takes more than 1 s|MemoryError"),
        ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "RecursionError"),
        ("{{ " + "(" * 9999 + "1" + ")" * 9999 + " }}", "chat template fails"),
    ],
)
def test_templates_have_bounded_time_and_memory(template, says, monkeypatch):
    monkeypatch.setattr("twinfer.chat.MOST_SECONDS", 1)
    before, start = peak_memory_bytes(), time.perf_counter()
    with pytest.raises(CheckpointError, match="chat template fails") as caught:
        render_chat(template, HELLO, {})
    assert re.search(says, str(caught.value))
    assert time.perf_counter() - start < 20
    assert peak_memory_bytes() - before < 2**28


def test_many_conversations_are_rendered_at_once(tiny):
    """A thousand prompts take no longer than starting one subprocess, and each is rendered by itself."""
    texts = [f"prompt {index}" for index in range(1000)]
    ids = prompt_ids(tiny, texts, chat=True)
    assert [tiny.tokenizer.decode(each) for each in ids] == [f"<turn>user:{text}<end>\n<turn>" for text in texts]


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
