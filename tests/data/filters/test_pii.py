"""Personal data: what is found, that nothing is skipped, and how it is replaced."""

import re
import sys

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks import guardrails
from sdpo.data.filters.pii import PII_KINDS, Redactor, find_pii, presidio_finder, suspects

ROWS = guardrails.labelled("pii", "tune") + guardrails.labelled("pii", "test")

# a bit below what python -m benchmarks.guardrails prints: (recall, precision)
FLOORS = {
    "email": (0.95, 0.95),
    "phone": (0.88, 0.95),
    "card": (0.95, 0.95),
    "ip": (0.95, 0.85),
    "key": (0.8, 0.9),
}


def found(text: str) -> list[tuple[str, str]]:
    return [(span.kind, text[span.start : span.end]) for span in find_pii(text)]


# pieces that make and unmake values, so that random texts hold many near misses
PIECES = st.sampled_from(
    ["jane@example.com", "jane [at] example", " [dot] com", "4111 1111", "-1111", " 11111111"]
    + ["+1 ", "(212) ", "555-0123", "0171 ", "1234567", "203.0.113.9", "2001:db8::1", "::ffff:"]
    + ["v 1.2", "Authorization: ", "Bearer ", "password", " = ", "token:", "secret is "]
    + ["Tr0ub4dor&3", "sk-EXAMPLE1example2EXAMPLE3", "hf_", "eyJ", "AKIA", "://", "user:"]
    + ["<EMAIL_1>", "<KEY_2>", "手机号", "电话: ", "İ", "ı", "ſ", "\u212a", "é", "\u00a0"]
    + ["\u2028", "00", "8 (912) 345-67-89", " AT ", " DOT ", "pass: ", "\n"]
    + list("@.-/()[]:='\"<>")
)
TEXTS = st.lists(
    st.one_of(PIECES, st.sampled_from(["", " ", "\n", "\t"]), st.text(max_size=3)), max_size=14
).map("".join)
LABELLED = st.sampled_from([row["text"] for row in ROWS])


@st.composite
def spoilt(draw: st.DrawFn) -> str:
    """A labelled text with a piece of another, or of anything, put in."""
    text = draw(LABELLED)
    at = draw(st.integers(0, len(text)))
    return text[:at] + draw(st.one_of(TEXTS, LABELLED)) + text[at + draw(st.integers(0, 3)) :]


ANY_TEXT = st.one_of(TEXTS, spoilt()).filter(lambda t: not re.search("[\ud800-\udfff]", t))


@pytest.mark.parametrize("kind", PII_KINDS)
def test_rates_on_the_half_that_was_not_tuned_on(kind):
    rate = guardrails.pii_rates("test")[kind]
    recall, precision = FLOORS[kind]
    assert rate["found"] / rate["values"] >= recall
    assert rate["right"] / rate["claims"] >= precision


def test_little_is_found_where_nothing_is():
    texts, flagged = guardrails.flagged_negatives("test")
    assert texts >= 75 and flagged <= 0.03 * texts


def test_labelled_spans_lie_in_their_texts_and_apart():
    assert len(ROWS) >= 300
    assert len({row["text"] for row in ROWS}) == len(ROWS)
    for row in ROWS:
        ends = 0
        for _, start, end in row["spans"]:
            assert ends <= start < end <= len(row["text"])
            ends = end
    assert {kind for row in ROWS for kind, *_ in row["spans"]} == set(PII_KINDS)
    assert {span.kind for row in ROWS for span in find_pii(row["text"])} == set(PII_KINDS)


@given(ANY_TEXT)
def test_no_value_is_outside_the_suspects(text):
    spans = find_pii(text)
    assert [span for span in spans if not suspects(pa.array([text]))[0]] == []
    assert all(a.end <= b.start for a, b in zip(spans, spans[1:], strict=False))


def test_every_labelled_text_with_a_value_is_a_suspect_and_prose_is_not():
    texts = [row["text"] for row in ROWS if find_pii(row["text"])]
    assert suspects(pa.array(texts)).all()
    odd = ["+12 (34) (56) (78)", "3fff:1::A:1", "token = a1b2c3"]
    assert all(map(find_pii, odd)) and suspects(pa.array(odd)).all()
    prose = ["It was a bright cold day in April, and the clocks were striking thirteen.", "", None]
    assert not suspects(pa.array(prose)).any()
    assert suspects(pa.chunked_array([["a"], ["b@example.com"]])).tolist() == [False, True]


@given(st.lists(ANY_TEXT, max_size=4))
def test_nothing_is_left_after_redaction_and_a_second_one_changes_nothing(texts):
    redactor = Redactor()
    once, counts = redactor.redact(texts)
    again, none = redactor.redact(once)
    assert again == once and not none
    assert all(new is old for new, old in zip(once, texts, strict=True) if not find_pii(old))
    changed = any(new != old for new, old in zip(once, texts, strict=True))
    assert changed == (counts.total() > 0)


def test_one_value_has_one_placeholder_in_all_its_spellings():
    texts = [
        "Jane@Example.com or +1 212-555-0123, from 2001:db8:0::1",
        "jane@example.com, bob@example.com, +1 (212) 555 0123 and 2001:DB8::1",
        "4111 1111 1111 1111 is 4111111111111111",
    ]
    redacted, counts = Redactor().redact(texts)
    assert redacted == [
        "<EMAIL_1> or <PHONE_1>, from <IP_1>",
        "<EMAIL_1>, <EMAIL_2>, <PHONE_1> and <IP_1>",
        "<CARD_1> is <CARD_1>",
    ]
    assert counts == {"email": 3, "phone": 2, "ip": 2, "card": 2}


def test_placeholders_already_there_are_not_given_to_others():
    redactor = Redactor()
    redacted, counts = redactor.redact(["<EMAIL_1> wrote to a@example.com", "<EMAIL_2> too"])
    assert redacted == ["<EMAIL_1> wrote to <EMAIL_3>", "<EMAIL_2> too"]
    assert counts == {"email": 1}
    assert redactor.redact(["b@example.com"])[0] == ["<EMAIL_1>"], "in another conversation"


def test_a_value_that_shows_once_its_neighbour_is_gone_is_redacted_too():
    text = "4111111111111111 212-555-0123"
    redacted, counts = Redactor().redact([text])
    assert redacted == ["<CARD_1> <PHONE_1>"] and counts == {"card": 1, "phone": 1}


def test_cards_need_a_network_a_length_and_a_checksum():
    assert found("4111 1111 1111 1111") == [("card", "4111 1111 1111 1111")]
    assert found("4111 1111 1111 1112") == []  # checksum
    assert found("9111 1111 1111 1110 0") == []  # network
    assert found("378282246310005") == [("card", "378282246310005")]
    assert found("3782822463100050") == []  # length


def test_addresses_of_no_one_are_left_alone():
    for text in ("127.0.0.1", "0.0.0.0", "255.255.255.0", "224.0.0.251", "::1", "300.1.2.30"):
        assert found(f"host {text} up") == []
    for text in ("10.1.20.3", "192.0.2.44", "fd00::12:1", "::ffff:192.0.2.1"):
        assert found(f"host {text} up") == [("ip", text)]
    assert found("version 10.1.20.3") == found("v10.1.20.3") == []


def test_stand_ins_for_secrets_are_left_alone():
    values = ("your_password1", "<password1>", "${PASSWORD1}", "xxxxxxxx1", "abcdefgh", "12345678")
    for value in values:
        assert found(f'password = "{value}"') == []
    assert found("password = 'Tr0ub4dor&3'") == [("key", "Tr0ub4dor&3")]


def test_private_keys_are_found_whole_and_talk_about_them_is_not():
    head, end = "-----BEGIN RSA PRIVATE KEY-----", "-----END RSA PRIVATE KEY-----"
    body = "\nProc-Type: 4,ENCRYPTED\nDEK-Info: AES-128-CBC,00\n\n" + "RVhBTVBMRQ" * 6 + "\n"
    assert found(f"see {head}{body}{end} there") == [("key", f"{head}{body}{end}")]
    cut = f"{head}\n" + "RVhBTVBMRQ" * 6
    assert found(f"{cut}\nwhat now?") == [("key", cut)]
    assert found(f"where does {head} have to stand?") == []


def test_long_texts_take_time_in_proportion():
    for unit in ("a", "1", "1 ", "a.", "a@", "(", "::", "password=", "-----BEGIN PRIVATE KEY-----"):
        find_pii(unit * 20_000)  # a quadratic pattern would take minutes


def test_presidio_asks_to_be_installed(monkeypatch):
    monkeypatch.setitem(sys.modules, "presidio_analyzer", None)
    with pytest.raises(ValueError, match=r"pip install 'sdpo\[presidio\]'"):
        presidio_finder()


def test_presidio_adds_its_kinds_to_ours():
    pytest.importorskip("presidio_analyzer")
    find = presidio_finder()
    text = "jane@example.com, SSN 536-90-4399, password=Tr0ub4dor&3"
    spans = [(span.kind, text[span.start : span.end]) for span in find(text)]
    expected = {"email": "jane@example.com", "us_ssn": "536-90-4399", "key": "Tr0ub4dor&3"}
    assert spans == list(expected.items())
    redacted, _ = Redactor(find).redact([text])
    assert redacted == ["<EMAIL_1>, SSN <US_SSN_1>, password=<KEY_1>"]
    assert Redactor(find).redact(redacted)[0] == redacted
