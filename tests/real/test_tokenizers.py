"""Four published tokenizers with their chat templates: the ids of a run are the template's own."""

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sdpo.chat import chat_format
from sdpo.conversations import Message
from sdpo.hindsight import HindsightConfig, encode
from sdpo.interactions import Interaction
from sdpo_parallel.huggingface import load_tokenizer

pytestmark = pytest.mark.real

ENDS = {
    "qwen3": "<|im_end|>",
    "gemma3": "<end_of_turn>",
    "llama3_1": "<|eot_id|>",
    "deepseek_v3": "<｜end▁of▁sentence｜>",
}
TALK = (
    Message("system", "Answer in French.\n"),
    Message("user", "What is the capital of France?"),
    Message("assistant", "Paris.\n\n  It is  on the Seine."),
    Message("user", "And of 日本? Don't  explain…\n"),
)
RESPONSE = "Tokyo :\n\n```python\n\tprint('東京')\n```\n- 12345 & <b>é</b>"
FOLLOWUP = "No, in French please.  "


@pytest.fixture(scope="module", params=ENDS)
def name(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def tokenizer(name, tokenizer_folder):
    return load_tokenizer(str(tokenizer_folder(name)))


def interaction(prompt=TALK, response=RESPONSE, followup=FOLLOWUP) -> Interaction:
    return Interaction(id="c1", prompt=tuple(prompt), response=response, followup=followup)


def whole(tokenizer, messages) -> list[int]:
    """The template's own rendering of a whole conversation, as transformers tokenizes it."""
    chat = [m.for_template() for m in messages]
    return tokenizer.apply_chat_template(chat)["input_ids"]


def test_prompt_and_response_are_the_templates_own_rendering(name, tokenizer):
    e = encode(interaction(), tokenizer, HindsightConfig())
    rendered = whole(tokenizer, [*TALK, Message("assistant", RESPONSE)])
    newline = tokenizer("\n", add_special_tokens=False)["input_ids"]
    behind = newline if name in ("qwen3", "gemma3") else []  # the next turn's, not the response's
    assert [*e.policy, *e.response, *behind] == rendered
    assert tokenizer.decode(e.response) == RESPONSE + ENDS[name]


def test_both_passes_have_bos_once_one_block_and_the_same_response(name, tokenizer):
    e = encode(interaction(), tokenizer, HindsightConfig())
    marks = tokenizer.convert_tokens_to_ids(["<think>", "</think>"]) if name == "qwen3" else []
    for prompt in (e.policy, e.hindsight):
        bos = tokenizer.bos_token_id
        assert bos is None or (prompt[0] == bos and (prompt + e.response).count(bos) == 1)
        assert [i for i in prompt + e.response if i in marks] == marks
    assert e.ends and e.response[-1] == tokenizer.convert_tokens_to_ids(ENDS[name])
    hindsight = tokenizer.decode(e.hindsight)
    assert "[HINDSIGHT CONTEXT]" in hindsight and "Future User Message: No, in French please." in (
        hindsight
    )


@pytest.mark.parametrize("thinking", ["strip", "keep"])
def test_k4_on_real_templates(thinking, name, tokenizer):
    thought = interaction(response="<think>\nsum\n</think>\n\n4", prompt=[Message("user", "2+2?")])
    e = encode(thought, tokenizer, HindsightConfig(thinking=thinking))
    for prompt in (e.policy, e.hindsight):
        read = tokenizer.decode(prompt + e.response)
        block = {"strip": "<think>\n\n</think>\n\n" * (name == "qwen3")}.get(
            thinking, "<think>\nsum\n</think>\n\n"
        )
        assert read.endswith(block + "4" + ENDS[name]) and read.count("<think>") == bool(block)


def test_histories_are_rendered_as_the_template_renders_them(name, tokenizer):
    history = [*TALK[1:2], Message("assistant", "<think>\nhm\n</think>\n\nParis."), TALK[3]]
    prompt = chat_format(tokenizer).prompt_ids(history)
    assert ("hm" in tokenizer.decode(prompt)) == (name != "qwen3")  # Qwen3 forgets thoughts
    if name == "qwen3":
        chat = [m.for_template() for m in history]
        own = tokenizer.apply_chat_template(
            chat, add_generation_prompt=True, enable_thinking=False
        )["input_ids"]
        assert prompt == own


MARKS = [*ENDS.values(), "<|im_start|>", "<bos>", "<｜User｜>", "<|eot_id|>", "<think>", "</think>"]
PIECES = [*MARKS, "<|begin_of_text|>", "<start_of_turn>", "<tool_call>", "<|fim_prefix|>", "<unk>"]
TEXT = st.lists(
    st.sampled_from(
        [*PIECES, " ", "\n", "\n\n", "\t", "日本", "é", "can't", "12345", "<", "|>", "<h1>"]
    )
    | st.text(max_size=5),
    min_size=1,
    max_size=8,
).map("".join)


@settings(max_examples=100, suppress_health_check=list(HealthCheck))
@given(said=st.lists(TEXT, min_size=3, max_size=3), response=TEXT)
def test_no_text_makes_a_special_id(name, tokenizer, said, response):
    chat = chat_format(tokenizer)
    special = set(tokenizer.all_special_ids) | set(tokenizer.convert_tokens_to_ids(MARKS))
    special |= {i for i, t in tokenizer.added_tokens_decoder.items() if t.special}

    def specials(*texts: str) -> list[int]:
        roles = ("user", "assistant", "user")
        ids = chat.prompt_ids([Message(r, t) for r, t in zip(roles, texts, strict=True)])
        return [i for i in ids if i in special]

    assert specials(*said) == specials("a", "b", "c")
    ids, _ = chat.response_ids(response)
    assert [i for i in ids if i in special] == [chat.response_ids("a")[0][-1]]


@settings(max_examples=100, suppress_health_check=list(HealthCheck))
@given(said=st.lists(TEXT, min_size=3, max_size=3), response=TEXT)
def test_texts_without_control_tokens_have_the_templates_ids(name, tokenizer, said, response):
    chat = chat_format(tokenizer)
    for mark in PIECES:  # what is left may spell another
        said = [text.replace(mark, "") for text in said]
        response = response.replace(mark, "")
    if any(chat.control_token(text) for text in [*said, response]):
        return
    roles = ("user", "assistant", "user")
    talk = [Message(r, t) for r, t in zip(roles, said, strict=True)]
    prompt = chat.prompt_ids(talk)
    messages = [m.for_template() for m in talk]
    assert (
        prompt
        == tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, enable_thinking=False
        )["input_ids"]
    )
    if response.strip() and response.strip() == response:
        ids = prompt + chat.response_ids(response)[0]
        assert whole(tokenizer, [*talk, Message("assistant", response)])[: len(ids)] == ids
