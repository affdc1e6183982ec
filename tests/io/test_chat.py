"""Chat templates render as the published ones do, in a sandbox, and fail in one line."""

import json

import pytest

pytest.importorskip("jinja2", reason="chat templates need jinja2")

from ruvjax.errors import InputError
from ruvjax.io.chat import ChatTemplate, read_chat_template

CHATML = (
    "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou help.<|im_end|>\n' }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA2 = (
    "{{ bos_token }}{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}"
    "{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'].strip() + ' [/INST]' }}"
    "{% else %}{{ ' ' + m['content'] + ' ' + eos_token }}{% endif %}{% endfor %}"
)
HELLO = [{"role": "user", "content": "Hi <b>&"}]


def folder_of(tmp_path, **settings):
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    return tmp_path


def test_chatml(tmp_path):
    template = read_chat_template(folder_of(tmp_path, chat_template=CHATML))
    expected = "<|im_start|>system\nYou help.<|im_end|>\n<|im_start|>user\nHi <b>&<|im_end|>\n"
    assert template.render(HELLO, add_generation_prompt=False) == expected
    assert template.render(HELLO) == expected + "<|im_start|>assistant\n"


def test_special_tokens_come_from_either_file_in_either_form(tmp_path):
    (tmp_path / "special_tokens_map.json").write_text('{"bos_token": "<wrong>", "eos_token": {"content": "</s>"}}')
    template = read_chat_template(folder_of(tmp_path, chat_template=LLAMA2, bos_token={"content": "<s>"}))
    messages = [*HELLO, {"role": "assistant", "content": "Yes"}, {"role": "user", "content": " go "}]
    assert template.render(messages) == "<s>[INST] Hi <b>& [/INST] Yes </s>[INST] go [/INST]"
    with pytest.raises(InputError, match="refuses these messages: roles must alternate"):
        template.render(HELLO * 2)


def test_files_in_their_order(tmp_path):
    assert read_chat_template(tmp_path) is None
    assert read_chat_template(folder_of(tmp_path, bos_token="<s>")) is None
    several = [{"name": "default", "template": "one"}, {"name": "tool_use", "template": "two"}]
    folder_of(tmp_path, chat_template=several)
    assert read_chat_template(tmp_path).render([]) == "one"
    assert read_chat_template(tmp_path, "tool_use").render([]) == "two"
    with pytest.raises(InputError, match="has no chat template 'rag'"):
        read_chat_template(tmp_path, "rag")
    (tmp_path / "chat_template.json").write_text('{"chat_template": "three"}')
    assert read_chat_template(tmp_path).render([]) == "three"
    (tmp_path / "chat_template.jinja").write_text("four")
    assert read_chat_template(tmp_path).render([]) == "four"
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff\xfe")
    with pytest.raises(InputError, match="chat_template.jinja: cannot be read"):
        read_chat_template(tmp_path)


def test_blanks_tools_json_loops_and_switches():
    text = (
        "{%- for t in tools or [] %}\n    {{ t | tojson }}\n{% endfor %}\n"
        "  {% for m in messages %}\n{% if loop.index > 1 %}{% break %}{% endif %}\n{{ m.content }}\n  {% endfor %}\n"
        "{{ enable_thinking is defined and enable_thinking is false }} {{ strftime_now('%Y') | length }}"
    )
    template = ChatTemplate(text)
    tools = [{"name": "é<f>", "n": None}]
    answer = template.render(HELLO * 2, tools=tools, variables={"enable_thinking": False})
    assert answer == '    {"name": "é<f>", "n": null}\nHi <b>&\nTrue 4'
    assert "{\n  " in ChatTemplate("{{ messages | tojson(indent=2) }}").render(HELLO)


@pytest.mark.parametrize(
    "text",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.append(1) }}",
        "{{ cycler.__init__.__globals__.os.system('true') }}",
        "{{ (lambda: 1)() }}",
        "{% for i in range(10**9) %}{% endfor %}",
        "{% if %}",
        "{{ 1 / 0 }}",
        "{{ messages[0].content.nothing.more }}",
        "{{ messages | nosuchfilter }}",
        "{{ 'a' + 1 }}",
        "{{ raise_exception('no') }}",
        "{% include 'x' %}",
        "{{" + "(" * 5000 + "1" + ")" * 5000 + "}}",
    ],
)
def test_what_a_template_may_not_do_is_one_clear_line(text):
    with pytest.raises(InputError, match="folder: .*chat template") as caught:
        ChatTemplate(text, source="folder").render(HELLO)
    assert "\n" not in caught.value.line()


@pytest.mark.parametrize("value", [3, {"a": 1}, [{"name": "default", "template": 4}]])
def test_a_template_that_is_no_text_is_refused(value, tmp_path):
    with pytest.raises(InputError, match=r"tokenizer_config.json: chat_template must be a text"):
        read_chat_template(folder_of(tmp_path, chat_template=value))


def test_live_rendering_equals_that_of_transformers(tmp_path):
    pytest.importorskip("transformers", reason="live parity needs transformers: install the extra `parity`")
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    Tokenizer(models.BPE(vocab={"a": 0, "<s>": 1, "</s>": 2}, merges=[])).save(str(tmp_path / "tokenizer.json"))
    for text in (CHATML, LLAMA2):
        theirs = PreTrainedTokenizerFast(
            tokenizer_file=str(tmp_path / "tokenizer.json"), bos_token="<s>", eos_token="</s>"
        )
        theirs.chat_template = text
        theirs.save_pretrained(tmp_path)
        ours = read_chat_template(tmp_path)
        for prompt in (True, False):
            expected = theirs.apply_chat_template(HELLO, tokenize=False, add_generation_prompt=prompt)
            assert ours.render(HELLO, add_generation_prompt=prompt) == expected
