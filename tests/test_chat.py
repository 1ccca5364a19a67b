"""What a chat template does, found out by rendering; control tokens in texts stay text."""

from datetime import datetime

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from tokenizers import normalizers
from transformers import ByT5Tokenizer

from helpers import tiny
from sdpo.chat import ChatFormat, chat_format
from sdpo.conversations import Message
from sdpo.errors import SdpoError

GEMMA = (
    "{{ bos_token }}{% for m in messages %}<start_of_turn>"
    "{{ 'model' if m.role == 'assistant' else m.role }}\n{{ m.content | trim }}<end_of_turn>\n"
    "{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
GEMMA_MARKS = ["<pad>", "<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"]
TURNS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
OPEN = TURNS.replace("assistant\n{%", "assistant\n<think>\n{%")
"""As DeepSeek-R1's and Qwen3-Thinking's: every generation prompt opens a thinking block."""
FORGETS = TURNS.replace("m.content }}", "m.content.split('</think>')[-1].lstrip('\\n') }}")
"""As Qwen3's: thoughts of earlier turns go."""
LLAMA_2 = (
    "{% for m in messages %}{% if m.role == 'user' %}<s>[INST] {{ m.content }} [/INST]"
    "{% else %} {{ m.content }} </s>{% endif %}{% endfor %}"
)


def gemma(**options):
    made = dict(chat_template=GEMMA, special=GEMMA_MARKS, eos_token="<eos>") | options
    tokenizer = tiny.make_tokenizer(**made)
    tokenizer.bos_token = "<bos>"
    return tokenizer


def say(*texts: str) -> list[Message]:
    return [Message(("user", "assistant")[i % 2], text) for i, text in enumerate(texts)]


def template_ids(tokenizer, messages, **options) -> list[int]:
    """What transformers makes of them."""
    chat = [m.for_template() for m in messages]
    return tokenizer.apply_chat_template(chat, enable_thinking=False, **options)["input_ids"]


def spelt(tokenizer, ids) -> str:
    return tokenizer.decode(ids, skip_special_tokens=False)


# Where a response ends


def test_a_response_ends_as_the_template_ends_it_not_with_eos_token(tmp_path, capsys):
    gemma().save_pretrained(tmp_path)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [2, 1]}')
    from sdpo_parallel.huggingface import load_tokenizer

    tokenizer = load_tokenizer(str(tmp_path))
    ids, _ = chat_format(tokenizer).response_ids("a story\n")
    assert spelt(tokenizer, ids) == "a story<end_of_turn>"
    assert chat_format(tokenizer).end_ids == {1, 2, 4}
    told = capsys.readouterr().err
    assert "ends a response with '<end_of_turn>', tokenizer.eos_token says '<eos>' (2)" in told
    assert "generation_config.json says '<bos>' (1), '<eos>' (2): the template" in told
    chat_format(tokenizer)
    assert not capsys.readouterr().err, "it is said once"


@pytest.mark.parametrize(
    ("template", "end"),
    [
        (tiny.CHAT_TEMPLATE, "<|im_end|>"),  # a new line after it is the next turn's
        (TURNS + "{% if not add_generation_prompt %}<|pad|>{% endif %}", "<|im_end|>"),  # Phi-3
        (TURNS.replace("<|im_end|>", "{{ '<|im_end|>' if not loop.last }}"), "<|im_end|>"),
        (TURNS.replace("im_end", "pad"), "<|pad|>"),
        (TURNS.replace("<|im_end|>", "<|pad|>{% if loop.last %}<|im_end|>{% endif %}"), "<|pad|>"),
        (TURNS.replace("<|im_end|>", "<|over|>"), "<|over|>"),  # no token of this tokenizer
        ("{% for m in messages %}{{ m.role }}: {{ m.content }}\n\n{% endfor %}", "<|im_end|>"),
        (TURNS.replace("<|im_end|>", "{{ '<|pad|>' if loop.last else '<|im_end|>' }}"), "<|pad|>"),
    ],
)
def test_the_end_is_what_stands_behind_an_assistants_message(template, end):
    assert ChatFormat(tiny.make_tokenizer(chat_template=template)).end == end


def test_a_template_that_ends_nothing_is_told_and_one_without_eos_refused():
    template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    tokenizer = tiny.make_tokenizer(chat_template=template)
    assert ChatFormat(tokenizer).notes == [
        "the chat template puts nothing behind a response: it ends with eos_token, '<|im_end|>'"
    ]
    tokenizer.eos_token = None
    with pytest.raises(SdpoError, match="names no eos_token"):
        ChatFormat(tokenizer)


def test_white_space_around_a_response_is_the_templates():
    special = ["<unk>", "<s>", "</s>"]
    tokenizer = tiny.make_tokenizer(chat_template=LLAMA_2, special=special, eos_token="</s>")
    chat = ChatFormat(tokenizer)
    prompt, (response, _) = chat.prompt_ids(say("hi")), chat.response_ids("a fox")
    assert spelt(tokenizer, prompt) == "<s>[INST] hi [/INST]"
    assert spelt(tokenizer, response) == " a fox </s>"
    assert prompt + response == template_ids(tokenizer, say("hi", "a fox"))


def test_sampled_ids_end_at_the_first_of_several_ends():
    chat = ChatFormat(gemma())
    end, eos = 4, 2
    assert chat.sampled_ids([9, 8, end]) == ([9, 8, end], False)
    assert chat.sampled_ids([9, 8, eos, 7, end]) == ([9, 8, eos], False)
    assert chat.sampled_ids([9, 8]) == ([9, 8], False)


# Thinking blocks

BLOCK = "<think>\nsum\n</think>\n\n4"


def both(tokenizer, response, thinking="strip") -> str:
    """The prompt's end and the response, spelt."""
    chat = ChatFormat(tokenizer)
    ids, thought = chat.response_ids(response, thinking)
    prompt = chat.prompt_ids(say("2+2?"), thought=thought)
    return spelt(tokenizer, prompt + ids).partition("assistant\n")[2]


@pytest.mark.parametrize(
    ("template", "response", "stripped", "kept"),
    [
        (tiny.CHAT_TEMPLATE, BLOCK, "<think>\n\n</think>\n\n4<|im_end|>", BLOCK + "<|im_end|>"),
        (TURNS, BLOCK, "4<|im_end|>", BLOCK + "<|im_end|>"),
        (OPEN, BLOCK, "<think>\n\n</think>\n\n4<|im_end|>", BLOCK + "<|im_end|>"),
        (OPEN, "sum\n</think>\n\n4", "<think>\n\n</think>\n\n4<|im_end|>", BLOCK + "<|im_end|>"),
        (OPEN, "4", "<think>\n\n</think>\n\n4<|im_end|>", "<think>\n\n</think>\n\n4<|im_end|>"),
        (TURNS, "4 </think>", "4 </think><|im_end|>", "4 </think><|im_end|>"),
    ],
)
def test_there_is_one_thinking_block(template, response, stripped, kept):
    tokenizer = tiny.make_tokenizer(chat_template=template)
    assert both(tokenizer, response) == stripped
    assert both(tokenizer, response, "keep") == kept


def test_a_kept_blocks_marks_are_tokens_and_others_text():
    tokenizer = tiny.make_tokenizer()
    opens, closes = tokenizer.convert_tokens_to_ids(["<think>", "</think>"])
    chat = ChatFormat(tokenizer)
    ids, thought = chat.response_ids("<think>a<think>\n</think>\n\nb </think>", "keep")
    assert thought and [i for i in ids if i in (opens, closes)] == [opens, closes]
    ids, thought = chat.response_ids("Sure. <think>a</think> b", "keep")
    assert not thought and not {opens, closes} & set(ids)
    assert chat.sampled_ids([opens, 9, closes, 8]) == ([opens, 9, closes, 8], True)


def test_an_empty_block_is_closed_as_the_template_closes_it():
    closing = OPEN.replace(
        "{{ m.content }}", "{{ '<think>\n</think>\n' if m.role == 'assistant' }}{{ m.content }}"
    )
    tokenizer = tiny.make_tokenizer(chat_template=closing)
    assert both(tokenizer, "4") == "<think>\n</think>\n4<|im_end|>"


def test_thoughts_of_the_history_go_where_the_template_removes_them():
    history = say("2+2?", BLOCK, "and 3+3?")
    tokenizer = tiny.make_tokenizer(chat_template=FORGETS)
    ids = ChatFormat(tokenizer).prompt_ids(history)
    assert ids == template_ids(tokenizer, history, add_generation_prompt=True)
    assert "sum" not in spelt(tokenizer, ids)
    starts = FORGETS.replace(
        "m.content.split", "'' if m.content.startswith('<') else m.content.split"
    )
    tokenizer = tiny.make_tokenizer(chat_template=starts)
    assert ChatFormat(tokenizer).prompt_ids(history) == template_ids(
        tokenizer, history, add_generation_prompt=True
    )


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        (BLOCK, "4"),
        ("<think>a</think> <think>b</think>c", "c"),
        ("<think>cut", ""),
        ("<think>a</think>", ""),
        ("<think>a</think><think>b", ""),
        ("no <think>a</think>", "no <think>a</think>"),
        ("[THINK]a[/THINK]b", "b"),
    ],
)
def test_the_answer_behind_a_thought(response, answer):
    assert ChatFormat(tiny.make_tokenizer()).split_thought(response)[1] == answer


# The clock


def test_a_template_that_reads_the_clock_is_told_one_day():
    clock = "{{ strftime_now('%d %b %Y %H:%M:%S') }}\n" + tiny.CHAT_TEMPLATE
    tokenizer = tiny.make_tokenizer(chat_template=clock)
    ids = chat_format(tokenizer, "2026-02-03").prompt_ids(say("hi"))
    assert spelt(tokenizer, ids).startswith("03 Feb 2026 00:00:00\n<|im_start|>user\nhi")
    begun = datetime.now().strftime("%d %b %Y 00:00:00")
    now = spelt(tokenizer, chat_format(tokenizer).prompt_ids(say("hi")))
    assert now.startswith((begun, datetime.now().strftime("%d %b %Y 00:00:00")))


def test_a_format_may_come_from_a_variable_but_is_not_made_up():
    indirect = "{%- set how = '%Y' -%}\n\n{{ strftime_now(how) }}" + tiny.CHAT_TEMPLATE
    tokenizer = tiny.make_tokenizer(chat_template=indirect)
    prompt = chat_format(tokenizer, "2026-02-03").prompt_ids(say("hi"))
    assert spelt(tokenizer, prompt).startswith("2026<|im_start|>")
    joined = "{{ strftime_now('%' + 'Y') }}" + tiny.CHAT_TEMPLATE
    with pytest.raises(SdpoError, match="not written out"):
        chat_format(tiny.make_tokenizer(chat_template=joined)).prompt_ids(say("hi"))


# Control tokens


def test_k1_a_text_about_control_tokens_is_text():
    tokenizer = tiny.make_tokenizer()
    chat = ChatFormat(tokenizer)
    asked, answered = "What does <|im_end|> mean?", "<|im_end|> closes, <|im_start|>user opens."
    ids, _ = chat.response_ids(answered)
    assert spelt(tokenizer, ids) == answered + "<|im_end|>"
    marks = tokenizer.convert_tokens_to_ids(tiny.SPECIAL)
    assert [i for i in ids if i in marks] == [tokenizer.eos_token_id]
    prompt = chat.prompt_ids(say(asked, answered, "Shorter."))
    plain = chat.prompt_ids(say("a", "b", "c"))
    assert [i for i in prompt if i in marks] == [i for i in plain if i in marks]


PARTS = ["<tool>", "<|im_", "end|>", "<|im_end|", "<|", "<", "|>", " ", "\n", "\n\n", "\t", "fox"]
ODD = ["é", "日本", "\U0010fffd", "\U0010fffc", "\ufffd", "{{ x }}", "a story"]
FRAGMENTS = st.sampled_from([*tiny.SPECIAL, *GEMMA_MARKS, *PARTS, *ODD])
TEXTS = st.lists(FRAGMENTS, min_size=1, max_size=6).map("".join) | st.text(max_size=12)
CONVERSATIONS = st.lists(TEXTS, min_size=1, max_size=5).map(lambda t: t[: len(t) - 1 + len(t) % 2])
MADE = {
    "chatml": tiny.make_tokenizer(plain=["<tool>", "  ", "fo"]),
    "gemma": gemma(plain=["\n\n", "<tool>"]),
    "open": tiny.make_tokenizer(chat_template=OPEN),
    "forgets": tiny.make_tokenizer(chat_template=FORGETS),
    "llama": tiny.make_tokenizer(
        chat_template=LLAMA_2, special=["<unk>", "<s>", "</s>"], eos_token="</s>"
    ),
}
FORMATS = {name: ChatFormat(tokenizer) for name, tokenizer in MADE.items()}


@pytest.mark.parametrize("name", MADE)
@settings(max_examples=60, suppress_health_check=[HealthCheck.too_slow])
@given(said=CONVERSATIONS, response=TEXTS)
def test_no_special_id_but_the_templates_own(name, said, response):
    tokenizer, chat = MADE[name], FORMATS[name]
    marks = set(tokenizer.all_special_ids) | set(chat._control_ids)
    prompt, plain = chat.prompt_ids(say(*said)), chat.prompt_ids(say(*("x" for _ in said)))
    assert [i for i in prompt if i in marks] == [i for i in plain if i in marks]
    ids, _ = chat.response_ids(response)
    ended, _ = chat.response_ids("x")
    assert [i for i in ids if i in marks] == [i for i in ended if i in marks]
    assert ids[-1] == ended[-1]


@pytest.mark.parametrize("name", MADE)
@settings(max_examples=60, suppress_health_check=[HealthCheck.too_slow])
@given(said=CONVERSATIONS, response=TEXTS)
@example(said=["hi"], response="<think>")
@example(said=["hi"], response="<think>fox</think> a story")
def test_texts_without_control_tokens_have_the_templates_ids(name, said, response):
    tokenizer, chat = MADE[name], FORMATS[name]
    said = [text for text in said if not chat.control_token(text)]
    said = said[: len(said) - 1 + len(said) % 2] or ["hi"]
    ordinary = template_ids(tokenizer, say(*said), add_generation_prompt=True)
    prompt = chat.prompt_ids(say(*said))
    assert prompt[: len(ordinary)] == ordinary
    thought, answer = chat.split_thought(response)
    if thought is not None and not chat.control_token(response):
        assert chat.response_ids(response) == chat.response_ids(answer)
    elif not chat.control_token(response) and response.strip() == response and response:
        ids = prompt[: len(ordinary)] + chat.response_ids(response)[0]
        whole = template_ids(tokenizer, say(*said, response))
        if name in ("gemma", "llama"):  # the others' histories have no thinking block
            assert whole[: len(ids)] == ids


def test_the_texts_tokens_are_those_of_a_tokenizer_without_control_tokens():
    tokenizer, chat = MADE["chatml"], FORMATS["chatml"]
    said = "a <|im_end|>  story\n\n<think> fox"
    without = tiny.make_tokenizer(special=["<|pad|>"], eos_token="<|pad|>", plain=["  ", "fo"])
    spelt_out = without.convert_ids_to_tokens(without(said)["input_ids"])
    ids, _ = chat.response_ids(said)
    assert tokenizer.convert_ids_to_tokens(ids[:-1]) == spelt_out


def test_a_normalizer_makes_no_control_token_either():
    tokenizer = tiny.make_tokenizer(special=["<|pad|>", "<|im_start|>"], eos_token="<|pad|>")
    backend = tokenizer.backend_tokenizer
    backend.normalizer = normalizers.NFKC()
    from tokenizers import AddedToken

    backend.add_special_tokens([AddedToken("<|im_end|>", normalized=True, special=True)])
    end = backend.token_to_id("<|im_end|>")
    wide = "＜|im_end|＞ is wide"
    assert end in tokenizer(wide)["input_ids"], "it does, left alone"
    chat = ChatFormat(tokenizer)
    assert chat.end == "<|im_end|>" and chat.response_ids(wide)[0].count(end) == 1
    assert chat.prompt_ids(say(wide)).count(end) == 1


def test_tokenizers_without_a_json_file_keep_control_tokens_apart_too():
    tokenizer = ByT5Tokenizer(chat_template=TURNS.replace("<|im_end|>", "</s>"))
    chat = ChatFormat(tokenizer)
    said = "a </s> b"
    ids, _ = chat.response_ids(said)
    assert ids.count(tokenizer.eos_token_id) == 1 and ids[-1] == tokenizer.eos_token_id
    assert tokenizer.decode(ids) == said + "</s>"
    assert chat.prompt_ids(say(said)).count(tokenizer.eos_token_id) == 1


@pytest.mark.parametrize("ascii", ["", "(ensure_ascii=true)"])
def test_nested_strings_of_a_message_are_text_too(ascii):
    calls = "{% if m.tool_calls %}{{ m.tool_calls | tojson" + ascii + " }}{% endif %}"
    template = TURNS.replace("m.content }}", "m.content }}" + calls)

    class Calls(Message):
        def for_template(self):
            call = {"name": "f", "arguments": {"x": "<|im_end|>"}}
            return {**Message.for_template(self), "tool_calls": [call]}

    tokenizer = tiny.make_tokenizer(chat_template=template)
    ids = ChatFormat(tokenizer).prompt_ids([Calls("user", "hi")])
    assert ids.count(tokenizer.eos_token_id) == 1
    assert '"arguments": {"x": "<|im_end|>"}' in spelt(tokenizer, ids)
