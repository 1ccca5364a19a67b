"""Leaks in answers of SmolLM2-135M-Instruct, labelled by hand; similarity of small embeddings."""

import sys

import pytest
import torch
from transformers import BertConfig, BertModel

from helpers import tiny
from sdpo.online.measures import Similarities, Similarity, leaks

LEAKS = [
    # the model itself, reading the paper's two templates behind a complaint about length
    "I'm sorry for the confusion, but it seems the user isn't able to provide a response to their "
    "query. I'm here to assist you.",
    "One simple explanation: No, I'm sorry for any offense. Laundry is just a method.",
    "The following is a user response to your previous attempt. Improve your response.",
    "[HINDSIGHT CONTEXT]\nThe eye twitch is a common symptom.",
    "Making it more concise: the hardest language is no language.",
    "In my previous attempt, I added too many words but simplifying the message.",
    "The users message is to improve the response.",
    "The next user message is designed to help you understand it.",
    "The future user requested a concise answer with a clear format.",
    "That's too long. One short sentence is enough.",
    "The question's been simplified to a single sentence.",
    "Stale, too.\n\nHere's a revised version:\n\nThe trick to get rid of slugs",
    "To enhance your skills, one short sentence can achieve your goals.\n\nYour request hasn't "
    "been met, so I will make sure to make the battery last longer.",
    "That's a good start, and I'd be glad to provide a sentence or two.",
    "Your preference is just fine. While I can just confirm the specified option",
    # ways of saying so that other models have
    "I apologize for the lengthy reply. Penguins live in the Antarctic.",
    "My apologies! Penguins live in the Antarctic.",
    "Sorry about that. Penguins live in the Antarctic.",
    "I’m so sorry! Penguins live in the Antarctic.",
    "Thank you for your feedback. Penguins live in the Antarctic.",
    "You're right, here is a shorter version: penguins live in the Antarctic.",
    "As you requested: penguins live in the Antarctic.",
    "I understand you prefer short replies. Penguins live in the Antarctic.",
]

NONE = [
    # the same model, asked the question alone
    "Penguins are found in the Antarctic and sub-Antarctic regions. They are found in the southern "
    "hemisphere, specifically in the Antarctic and sub-Antarctic regions.",
    "Zebras are striped because of the way they're designed to blend in with their surroundings.",
    "In Spain, tap water is considered safe to drink, but it's not always the case.",
    "Hey there, I hope you're doing well. I just wanted to talk to you about something that's been "
    "on my mind lately. Losing a job can be really tough.",
    "Sweetie, I'm so sorry to hear about your loss. Losing a loved one can be really moving.",
    "That's a fair question. The Eiffel Tower isn't famous for being the tallest building.",
    "The semicolon is used for separating two independent clauses (i.e., clauses that could stand "
    "alone as separate sentences).",
    'A simple, yet effective way to show gratitude is a note, saying something like, "I apologize '
    'for my last message".',
    "I'm glad you're here, but I'm unable to read your message. Please try again later.",
    "The best season to visit Japan depends on your personal preferences and budget.",
    "It seems you're asking about the differences between a hostel and a hotel.",
    # near what is looked for
    "To say sorry to a friend, choose a quiet moment and be honest about what you did.",
    "A sentence is a group of words; a short one is easy to read.",
    "Short hair dries faster, and long hair needs more care.",
    "The brief war of 1896 lasted 38 minutes, the shortest in history.",
    "Previous owners of a house often leave a shed behind.",
    "",
]


@pytest.mark.parametrize("answer", LEAKS)
def test_an_opening_of_hindsights_leaks(answer):
    assert leaks(answer)


@pytest.mark.parametrize("answer", NONE)
def test_an_answer_to_the_question_does_not(answer):
    assert not leaks(answer)


def test_only_the_opening_counts():
    assert not leaks("Penguins live in the Antarctic. " * 10 + "I apologize for the length.")


@pytest.fixture
def similarity(tmp_path, monkeypatch) -> Similarity:
    """Of a tiny random encoder, installed as the package is."""
    folder = tmp_path / Similarity.PACKAGE / "model"
    sizes = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64)
    tokenizer = tiny.make_tokenizer()
    BertModel(BertConfig(vocab_size=len(tokenizer), **sizes)).eval().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    # what the real package does on import is nobody's business here
    (folder.parent / "__init__.py").write_text("import sentence_transformers_that_nobody_has")
    monkeypatch.syspath_prepend(str(tmp_path))
    found = Similarity.load()
    assert found is not None
    return found


def test_similarity_is_of_means_over_tokens_without_padding(similarity):
    questions = ["red fox", "list five things please no longer"]
    answers = ["the red fox who eats green apples", "paris"]
    both = similarity(questions, answers)
    alone = [similarity([q], [a])[0] for q, a in zip(questions, answers, strict=True)]
    assert both == pytest.approx(alone, abs=1e-5)

    def mean(text: str) -> torch.Tensor:
        ids = similarity._tokenizer(text, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            return similarity._model(input_ids=ids).last_hidden_state[0].mean(0)

    expected = torch.cosine_similarity(mean(questions[0]), mean(answers[0]), dim=0)
    assert both[0] == pytest.approx(expected.item(), abs=1e-5)


def test_a_text_is_most_similar_to_itself(similarity):
    texts = ["red fox", "list five things please", "paris"]
    means = similarity.means(texts, texts)
    assert isinstance(means, Similarities)
    assert means.own == pytest.approx(1, abs=1e-5)
    assert means.shuffled < 0.99


def test_many_texts_are_read_in_batches(similarity):
    texts = [f"story {i} of the fox" + " red" * (i % 7) for i in range(70)]
    assert similarity(texts, texts[::-1])[66] == pytest.approx(
        similarity([texts[66]], [texts[3]])[0], abs=1e-5
    )


def test_no_model_where_the_package_is_not_installed(monkeypatch):
    monkeypatch.setattr(Similarity, "PACKAGE", "a_package_that_nobody_has")
    assert Similarity.load() is None
    assert Similarity.PACKAGE not in sys.modules
