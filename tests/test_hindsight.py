"""Templates, the tokens of both passes, limits."""

from dataclasses import replace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from helpers import tiny
from sdpo.chat import chat_format
from sdpo.conversations import Message
from sdpo.errors import DataError, SdpoError
from sdpo.hindsight import HindsightConfig, Truncated, encode, hindsight_prompt
from sdpo.interactions import Interaction
from sdpo_parallel.huggingface import load_tokenizer

PROMPT = (
    Message("user", "tell me a story"),
    Message("assistant", "once"),
    Message("user", "a longer one"),
)


def interaction(**changes) -> Interaction:
    fields = dict(id="c1", prompt=PROMPT, response="the red fox", followup="  no, shorter \n")
    return Interaction(**{**fields, **changes})


@pytest.mark.parametrize(
    ("template", "followup", "context"),
    [
        (
            "paper-offline",
            "  no, shorter \n",
            "\n\n[HINDSIGHT CONTEXT]\nThe following is a user response to your previous, "
            "insufficient attempt. Improve your response to the user prompt.\n"
            "Future User Message: no, shorter",
        ),
        (
            "paper-online",
            "no",
            "\n\n=== HINDSIGHT CONTEXT ===\n[The following is a future user message. Use this to "
            "guide your answer to the user prompt.]\nno",
        ),
        ("wish", " Shorter, please. ", "\n\n(How I like answers: Shorter, please.)"),
        (" <{followup}> {keep}", "use {x} and {followup}", " <use {x} and {followup}> {keep}"),
    ],
)
def test_templates_word_for_word(template, followup, context):
    *history, last = hindsight_prompt(PROMPT, followup, template)
    assert history == list(PROMPT[:-1])
    assert last == Message("user", "a longer one" + context)


@pytest.mark.parametrize("template", ["paper-offlin", "no field", "{followup} {followup}"])
def test_a_template_without_one_field_is_refused(template):
    with pytest.raises(ValueError, match="followup"):
        HindsightConfig(template=template)


@pytest.mark.parametrize("pad_is_eos", [False, True])
def test_both_passes_end_in_the_same_ids_with_eos_trained(pad_is_eos):
    tokenizer = tiny.make_tokenizer(pad_is_eos)
    e = encode(interaction(response="the red fox  \n"), tokenizer, HindsightConfig())
    assert e.response == tuple(chat_format(tokenizer).response_ids("the red fox")[0])
    assert e.response[-1] == tokenizer.eos_token_id and e.ends
    assert tokenizer.decode(e.response) == "the red fox<|im_end|>"
    policy, hindsight = tokenizer.decode(e.policy), tokenizer.decode(e.hindsight)
    opening = "<|im_start|>assistant\n<think>\n\n</think>\n\n"
    assert policy.endswith("a longer one<|im_end|>\n" + opening)
    assert hindsight.endswith("Future User Message: no, shorter<|im_end|>\n" + opening)
    assert e.truncated == Truncated()


def test_the_papers_prompts_lose_their_left_end_each_by_its_own_limit():
    tokenizer = tiny.make_tokenizer()
    whole = encode(interaction(), tokenizer, HindsightConfig())
    limits = HindsightConfig(
        max_prompt_tokens=len(whole.policy),
        max_hindsight_prompt_tokens=10,
        max_response_tokens=99,
        truncation="paper",
    )
    cut = encode(interaction(), tokenizer, limits)
    assert cut.policy == whole.policy
    assert cut.hindsight == whole.hindsight[-10:]
    assert cut.truncated == Truncated(hindsight=True)


BOS = "{{ bos_token }}" + tiny.CHAT_TEMPLATE
OPENING = "<|im_start|>assistant\n<think>\n\n</think>\n\n"


def with_bos(template: str = BOS, **options):
    tokenizer = tiny.make_tokenizer(
        chat_template=template, special=[*tiny.SPECIAL, "<bos>"], **options
    )
    tokenizer.bos_token = "<bos>"
    return tokenizer


def spelt(tokenizer, ids) -> str:
    return tokenizer.decode(ids, skip_special_tokens=False)


def test_an_endless_followup_leaves_bos_question_and_the_contexts_first_line():
    tokenizer = with_bos()
    words = ["THE QUESTION"]
    while len(tokenizer(" ".join(words))["input_ids"]) < 60:
        words.append("fox")
    question = " ".join(words)
    asked = interaction(prompt=(Message("user", question),), followup="F " * 3000)
    template = "\n\n[NOTE]\nThe user said:\n{followup}"  # words of the context are many bytes here
    limits = HindsightConfig(
        template=template, max_prompt_tokens=64, max_hindsight_prompt_tokens=256
    )
    e = encode(asked, tokenizer, limits)
    hindsight, policy = spelt(tokenizer, e.hindsight), spelt(tokenizer, e.policy)
    start = f"<bos><|im_start|>user\n{question}\n\n[NOTE]\nThe user said:\nF F F"
    assert hindsight.startswith(start) and hindsight.endswith(f" …<|im_end|>\n{OPENING}")
    assert 250 <= len(e.hindsight) <= 256
    assert policy.startswith("<bos><|im_start|>user\nTHE QUEST") and " … " in policy
    assert policy.endswith(f" fox<|im_end|>\n{OPENING}") and 60 <= len(e.policy) <= 64
    assert e.truncated == Truncated(policy=True, hindsight=True, followup=True, question=True)
    paper = encode(asked, tokenizer, replace(limits, truncation="paper"))
    assert len(paper.hindsight) == 256 and tokenizer.bos_token_id not in paper.hindsight
    assert paper.truncated == Truncated(policy=True, hindsight=True)


def history(n: int, *, system: bool = False) -> tuple[Message, ...]:
    turns = [
        Message(("user", "assistant")[i % 2], f"number {i} " + "fox " * 20) for i in range(2 * n)
    ]
    first = [Message("system", "be short")] if system else []
    return (*first, *turns, Message("user", "the question"))


@pytest.mark.parametrize("system", [False, True])
def test_the_history_goes_first_whole_and_oldest_first(system):
    tokenizer = with_bos()
    long = interaction(prompt=history(6, system=system))
    whole = encode(long, tokenizer, HindsightConfig())
    assert whole.truncated == Truncated()
    for limit in range(60, len(whole.policy), 37):
        config = HindsightConfig(max_prompt_tokens=limit)
        e = encode(long, tokenizer, config)
        policy = spelt(tokenizer, e.policy)
        assert e.truncated == Truncated(policy=True, history=True)
        assert len(e.policy) <= limit and policy.startswith("<bos><|im_start|>")
        assert ("be short" in policy) == system
        kept = [i for i in range(12) if f"number {i} " in policy]
        assert kept == list(range(12 - len(kept), 12)) and len(kept) % 2 == 0
        assert policy.endswith(f"the question<|im_end|>\n{OPENING}") and "…" not in policy
        more = long.prompt[int(system) + 12 - len(kept) - 2 :]
        first = long.prompt[: int(system)]
        with_one_more = encode(
            replace(long, prompt=(*first, *more)), tokenizer, HindsightConfig()
        ).policy
        assert len(with_one_more) > limit, "no more was dropped than needed"


def test_a_template_that_wants_turns_to_alternate_takes_what_is_left():
    alternate = (
        "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
        "{{ raise_exception('alternate') }}{% endif %}{% endfor %}" + BOS
    )
    tokenizer = with_bos(alternate)
    e = encode(interaction(prompt=history(4)), tokenizer, HindsightConfig(max_prompt_tokens=100))
    assert e.truncated.history and len(e.policy) <= 100


def test_a_long_system_prompt_or_tool_result_is_shortened_before_the_followup():
    tokenizer = with_bos()
    prompt = (
        Message("system", "SYSTEM " + "apples " * 500 + "THE END"),
        Message("user", "the question"),
    )
    limits = HindsightConfig(
        template=" ({followup})", max_prompt_tokens=120, max_hindsight_prompt_tokens=120
    )
    e = encode(interaction(prompt=prompt), tokenizer, limits)
    hindsight = spelt(tokenizer, e.hindsight)
    assert len(e.hindsight) <= 120 and e.truncated == Truncated(
        policy=True, hindsight=True, history=True
    )
    assert "SYSTEM" in hindsight and "… " in hindsight and "THE END<|im_end|>" in hindsight
    assert "the question (no, shorter)<|im_end|>" in hindsight


def test_a_question_keeps_both_its_ends_and_the_followup_a_quarter_of_the_limit():
    tokenizer = with_bos()
    long = interaction(
        prompt=(Message("user", "BEGIN " + "apples " * 900 + "END"),), followup="no " * 500
    )
    limits = HindsightConfig(template=" ({followup})", max_hindsight_prompt_tokens=400)
    e = encode(long, tokenizer, limits)
    hindsight = spelt(tokenizer, e.hindsight)
    assert hindsight.startswith("<bos><|im_start|>user\nBEGIN") and "END (no no" in hindsight
    followup = hindsight.partition("END (")[2].partition("…")[0]
    assert 95 <= len(tokenizer(followup)["input_ids"]) <= 101 and len(e.hindsight) <= 400


def test_limits_that_hold_no_prompt_are_refused_with_the_row():
    with pytest.raises(SdpoError, match=r"interaction c1: \d+ tokens where the limit is 10, even"):
        encode(interaction(), with_bos(), HindsightConfig(max_prompt_tokens=10))


@settings(max_examples=80, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_shortened_prompts_keep_to_their_limits_and_their_structure(data):
    tokenizer = BOS_TOKENIZER
    word = st.sampled_from(["fox ", "é日", "<|im_end|>", " ", "\n", "…", "apples "])
    text = st.lists(word, min_size=1, max_size=60).map("".join)
    turns = data.draw(st.integers(0, 3))
    said = [data.draw(text) + "x" for _ in range(2 * turns + 1)]
    prompt = tuple(Message(("user", "assistant")[i % 2], t) for i, t in enumerate(said))
    limits = HindsightConfig(
        template=" ({followup})",
        max_prompt_tokens=data.draw(st.integers(50, 200)),
        max_hindsight_prompt_tokens=data.draw(st.integers(50, 200)),
    )
    e = encode(interaction(prompt=prompt, followup=data.draw(text) + "x"), tokenizer, limits)
    whole = encode(interaction(prompt=prompt), tokenizer, HindsightConfig())
    ends = tokenizer("<|im_end|>\n" + OPENING, add_special_tokens=False)["input_ids"]
    for ids, limit in (
        (e.policy, limits.max_prompt_tokens),
        (e.hindsight, limits.max_hindsight_prompt_tokens),
    ):
        assert len(ids) <= limit and list(ids[-len(ends) :]) == ends
        assert ids.count(tokenizer.bos_token_id) == 1 and ids[0] == tokenizer.bos_token_id
    assert e.truncated.policy == (len(whole.policy) > limits.max_prompt_tokens)
    assert e.truncated.policy or e.policy == whole.policy


BOS_TOKENIZER = with_bos()


@pytest.mark.parametrize("thinking", ["strip", "keep"])
def test_k4_one_thinking_block_the_same_in_both_passes(thinking):
    tokenizer = tiny.make_tokenizer()
    k4 = interaction(prompt=(Message("user", "2+2?"),), response="<think>\nsum\n</think>\n\n4")
    e = encode(k4, tokenizer, HindsightConfig(thinking=thinking))
    assert e.thought == (thinking == "keep")
    thought = "\nsum\n" if e.thought else "\n\n"
    for prompt in (e.policy, e.hindsight):
        read = spelt(tokenizer, prompt + e.response)
        assert read.endswith(f"assistant\n<think>{thought}</think>\n\n4<|im_end|>")
        assert read.count("<think>") == 1


@pytest.mark.parametrize("response", ["<think>sum</think>", "<think>cut", " <think>\n</think> \n"])
def test_a_response_without_an_answer_is_named_or_its_thought_kept(response):
    tokenizer, only_thought = tiny.make_tokenizer(), interaction(response=response)
    with pytest.raises(DataError, match="interaction c1, field `completion`: no answer behind"):
        encode(only_thought, tokenizer, HindsightConfig())
    e = encode(only_thought, tokenizer, HindsightConfig(thinking="keep"))
    assert e.ends == ("</think>" in response), "a thought that was cut does not teach to stop"
    assert spelt(tokenizer, e.policy).endswith("assistant\n")


def test_the_context_is_for_the_user_where_a_tool_spoke_last():
    prompt = (*PROMPT, Message("assistant", "calls"), Message("tool", "21 C"))
    *_, asked, _, result = hindsight_prompt(prompt, "no", " ({followup})")
    assert (asked.content, result.content) == ("a longer one (no)", "21 C")


@pytest.mark.parametrize("date", ["tomorrow", "2026-13-01"])
def test_a_date_that_is_none_is_refused(date):
    with pytest.raises(SdpoError, match="YYYY-MM-DD"):
        HindsightConfig(date=date)


def test_two_encodings_of_one_date_are_the_same_at_any_time(monkeypatch):
    clock = "{{ strftime_now('%d %b %Y %H:%M:%S') }}" + tiny.CHAT_TEMPLATE
    tokenizer = tiny.make_tokenizer(chat_template=clock)
    one = encode(interaction(), tokenizer, HindsightConfig(date="2026-02-03"))
    again = encode(interaction(), tokenizer, HindsightConfig(date="2026-02-03"))
    assert one == again and spelt(tokenizer, one.policy).startswith("03 Feb 2026 00:00:00")


def test_a_cut_response_does_not_teach_to_stop():
    tokenizer = tiny.make_tokenizer()
    whole = encode(interaction(), tokenizer, HindsightConfig())
    cut = encode(interaction(), tokenizer, HindsightConfig(max_response_tokens=2))
    assert cut.response == whole.response[:2] and not cut.ends
    assert cut.truncated == Truncated(response=True)


def test_sampled_ids_stop_at_their_first_end_and_keep_their_logprobs():
    tokenizer = tiny.make_tokenizer()
    end = tokenizer.eos_token_id
    online = interaction(response_token_ids=(7, end, 9, 9), response_logprobs=(-1.0, -2.0, -3, -4))
    e = encode(online, tokenizer, HindsightConfig())
    assert e.response == (7, end) and e.old_logprobs == (-1.0, -2.0) and e.ends
    assert not e.truncated.response
    cut = encode(interaction(response_token_ids=(7, 8)), tokenizer, HindsightConfig())
    assert not cut.ends


def test_sampled_ids_are_used_as_sampled():
    online = interaction(response_token_ids=(7, 8, 2), response_logprobs=(-1.0, -2.0, -0.5))
    e = encode(online, tiny.make_tokenizer(), HindsightConfig(max_response_tokens=2))
    assert e.response == (7, 8) and e.old_logprobs == (-1.0, -2.0)


def test_a_tokenizer_without_chat_template_is_named(tmp_path):
    tokenizer = tiny.make_tokenizer()
    tokenizer.chat_template = None
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(SdpoError, match="no chat template"):
        load_tokenizer(str(tmp_path))
