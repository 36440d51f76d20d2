"""Chat templates in a process of their own: the text is Hugging Face's, and time and memory are bounded."""

import gc
import signal

import pytest
from transformers import PreTrainedTokenizerFast

from jpaged.engine import template_process
from jpaged.engine.template_process import TemplateProcess
from tests.support.byte_tokenizer import save_tokenizer

MESSAGES = [{"role": "user", "content": "go on"}, {"role": "assistant", "content": "é\U0001f600"}]
TEMPLATE = """\
{{ bos_token }}{% for message in messages %}
{% if message.content == "go on" %}{{ message.role }}: {{ message.content | tojson }}
{% elif mode == "endless" %}{% for i in range(90000) %}{% for j in range(90000) %}{% endfor %}{% endfor %}
{% elif mode == "memory" %}{% set all = namespace(text="x" * 90000) %}
{% for i in range(60) %}{% set all.text = all.text + all.text %}{% endfor %}
{% elif mode == "refuses" %}{{ raise_exception("no such role") }}
{% elif mode == "range" %}{% for i in range(10**9) %}{% endfor %}
{% elif mode == "class" %}{{ "".__class__.__mro__ }}
{% elif mode == "long" %}{{ "x" * 5000 }}
{% else %}{{ message.content }}
{% endif %}{% endfor %}{% if add_generation_prompt %}>{% endif %}"""
MOST = 4096


def render(process: TemplateProcess, mode: str = "", **arguments) -> str:
    arguments = {"bos_token": "<s>", "add_generation_prompt": True, "continue_final_message": False} | arguments
    return process.render(MESSAGES, {"mode": mode, "tools": None} | arguments, MOST)


@pytest.fixture(scope="module")
def process():
    """Renders the template, without haste."""
    made = TemplateProcess(TEMPLATE, timeout_s=60)
    yield made
    made.close()


@pytest.mark.parametrize("options", [{}, {"add_generation_prompt": False, "continue_final_message": True}])
def test_the_text_is_that_of_the_tokenizer(process, options, tmp_path):
    save_tokenizer(tmp_path, TEMPLATE)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(tmp_path, bos_token="<s>")
    options = {"add_generation_prompt": True} | options
    assert render(process, **options) == tokenizer.apply_chat_template(MESSAGES, tokenize=False, mode="", **options)


@pytest.mark.parametrize(
    ("mode", "message"),
    [
        ("refuses", "no such role"),
        ("range", "Range too big"),
        ("class", "unsafe"),
        ("long", "more than 4096 characters"),
        ("memory", "more memory than it may"),
    ],
)
def test_what_a_template_cannot_render_is_refused_and_the_process_goes_on(process, mode, message):
    with pytest.raises(ValueError, match=message):
        render(process, mode)
    assert "go on" in render(process)


def test_an_endless_template_is_ended_and_the_next_conversation_is_rendered(process, monkeypatch):
    text, child = render(process), process._child
    with monkeypatch.context() as patch:
        patch.setattr(process, "_timeout_s", 0.1)
        with pytest.raises(ValueError, match=r"it takes more than 0\.1 s"):
            render(process, "endless")
    assert child._process.poll() == -signal.SIGKILL
    assert render(process) == text


def test_a_process_that_does_not_start_is_a_failure_of_the_server(monkeypatch):
    monkeypatch.setattr(template_process.sys, "executable", "/bin/false")
    with pytest.raises(RuntimeError, match="does not start"):
        render(TemplateProcess(TEMPLATE))


def test_a_process_ends_with_its_owner():
    made = TemplateProcess(TEMPLATE)
    made.start()
    process = made._child._process
    del made
    gc.collect()
    assert process.poll() == -signal.SIGKILL
