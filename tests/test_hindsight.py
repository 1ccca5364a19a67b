"""Templates, the tokens of both passes, limits."""

import pytest

from helpers import tiny
from sdpo.chat import chat_format
from sdpo.conversations import Message
from sdpo.errors import SdpoError
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


def test_a_cut_response_does_not_teach_to_stop():
    tokenizer = tiny.make_tokenizer()
    whole = encode(interaction(), tokenizer, HindsightConfig())
    cut = encode(interaction(), tokenizer, HindsightConfig(max_response_tokens=2))
    assert cut.response == whole.response[:2] and not cut.ends
    assert cut.truncated == Truncated(response=True)


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
