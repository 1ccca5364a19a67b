"""A user on a server that is slow, wrong, rate-limiting, truncating, and down."""

import json
import re
import sqlite3
import threading
import time
from dataclasses import replace
from email.utils import formatdate

import pytest

pytest.importorskip("openai", reason="needs the online extra")

from helpers.openai_server import Answer, serving
from sdpo.conversations import Message
from sdpo.errors import SdpoError
from sdpo.online.users.base import Exchange
from sdpo.online.users.calls import FILE, Spent
from sdpo.online.users.config import BudgetConfig, RetryConfig, ServerUser, build_user
from sdpo.online.users.personas import load_persona
from sdpo.online.users.playing import SILENCE

QUICK = RetryConfig(tries=4, timeout=5.0, first_wait=0.01, longest_wait=2.0)
POETIC = load_persona("poetic")


@pytest.fixture(autouse=True)
def key(monkeypatch):
    monkeypatch.setenv("TEST_KEY", "secret")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


def exchange(i, answer=None):
    prompt = (Message("system", "Be brief."), Message("user", f"Question {i}?"))
    return Exchange(id=f"e{i}", prompt=prompt, answer=answer or f"Answer {i}.", finished=True)


def user(server, folder, persona=POETIC, **settings):
    defaults = {"url": server.url, "model": "m", "key_variable": "TEST_KEY", "retry": QUICK}
    return build_user(ServerUser(**defaults | settings), persona, folder=folder)


def test_replies_come_in_order_whatever_the_server_does_first(tmp_path):
    def behaviour(number, body):
        asked = body["messages"][1]["content"].partition("Answer ")[2].partition(".")[0]
        return Answer(text=f"About {asked}.", delay=0.05 if int(asked) % 2 else 0.0)

    with serving(behaviour) as server:
        replies = user(server, tmp_path).reply([exchange(i) for i in range(12)], seed=0)
    assert [r.text for r in replies] == [f"About {i}." for i in range(12)]
    assert {r.source for r in replies} == {"server"}


def test_a_request_says_all_that_decides_the_reply(tmp_path):
    extra = '{"chat_template_kwargs": {"enable_thinking": false}, "top_p": null}'
    with serving(Answer()) as server:
        user(server, tmp_path, temperature=0.3, extra=extra).reply([exchange(1)], seed=0)
    ((_, body, headers),) = server.requests
    system, asked = body.pop("messages")
    assert body == {
        "model": "m",
        "temperature": 0.3,
        "max_tokens": 128,
        "chat_template_kwargs": {"enable_thinking": False},
    }
    assert headers["authorization"] == "Bearer secret"
    assert system["role"] == "system" and POETIC.wants in system["content"]
    assert asked["role"] == "user" and "Answer 1." in asked["content"]


def test_a_model_without_system_messages_gets_one_message(tmp_path):
    with serving(Answer()) as server:
        user(server, tmp_path, system=False).reply([exchange(1)], seed=0)
    ((_, body, _),) = server.requests
    (asked,) = body["messages"]
    assert asked["role"] == "user"
    assert POETIC.wants in asked["content"] and "Answer 1." in asked["content"]


def test_requests_are_bounded(tmp_path):
    with serving(Answer(delay=0.05)) as server:
        user(server, tmp_path, concurrency=3).reply([exchange(i) for i in range(12)], seed=0)
    assert server.most_at_once == 3


def test_what_was_said_is_not_asked_again(tmp_path):
    exchanges = [exchange(i) for i in range(5)]
    with serving(lambda n, _: Answer(text=f"Reply {n}.")) as server:
        mine = user(server, tmp_path)
        first = mine.reply(exchanges, seed=0)
        mine.close()
        resumed = user(server, tmp_path)
        again = resumed.reply([*reversed(exchanges), exchange(5)], seed=1)
        assert resumed.calls.spent() == Spent(calls=6, tokens=660)
    assert len(server.requests) == 6
    assert [r.text for r in again[:5]] == [r.text for r in reversed(first)]
    assert [r.source for r in again] == ["cache"] * 5 + ["server"]


def test_the_same_content_is_asked_once_whatever_the_server_is_called(tmp_path):
    twins = [exchange(1), replace(exchange(1), id="twin")]
    with serving(lambda n, _: Answer(text=f"Reply {n}.")) as server:
        replies = user(server, tmp_path).reply(twins, seed=0)
    assert [(r.text, r.source) for r in replies] == [("Reply 0.", "server"), ("Reply 0.", "cache")]
    with serving(lambda n, _: Answer(text="Another.")) as other:
        (reply,) = user(other, tmp_path).reply([exchange(1)], seed=0)
        assert (reply.text, reply.source) == ("Reply 0.", "cache")
        for change in ({"temperature": 0.1}, {"model": "n"}, {"persona": load_persona("concise")}):
            (reply,) = user(other, tmp_path, **change).reply([exchange(1)], seed=0)
            assert (reply.text, reply.source) == ("Another.", "server")
    assert (len(server.requests), len(other.requests)) == (1, 3)


def test_silence_is_a_reply_and_is_remembered(tmp_path):
    with serving(Answer(text=f" {SILENCE}\n")) as server:
        mine = user(server, tmp_path, on_failure="stop")
        sources = [mine.reply([exchange(1)], seed=0)[0] for _ in range(2)]
    assert [(r.text, r.source) for r in sources] == [(None, "server"), (None, "cache")]
    assert len(server.requests) == 1


FAULTS = {
    "empty": Answer(text="  \n"),
    "truncated": Answer(text="I wish it had", finish="length"),
    "refused": Answer(text=None, refusal="No."),
    "long": Answer(text="no " * 40_000),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_faulty_reply_is_counted_as_silence_and_asked_again(tmp_path, fault):
    with serving(FAULTS[fault], Answer(text="Better.")) as server:
        mine = user(server, tmp_path)
        (reply,) = mine.reply([exchange(1)], seed=0)
        assert (reply.text, reply.source) == (None, f"server:{fault}")
        assert mine.calls.counts() == {fault: 1}
        (reply,) = mine.reply([exchange(1)], seed=0)
        assert (reply.text, reply.source) == ("Better.", "server")
        assert mine.calls.counts() == {fault: 1, "said": 1}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_faulty_reply_stops_the_run_where_configured(tmp_path, fault):
    with serving(FAULTS[fault]) as server:
        mine = user(server, tmp_path, on_failure="stop")
        with pytest.raises(SdpoError) as caught:
            mine.reply([exchange(1)], seed=0)
    message = str(caught.value)
    assert server.url in message and "exchange e1" in message
    assert f"the reply is {fault}" in message and "on_failure" in message


@pytest.mark.parametrize(
    ("wrong", "status"),
    [
        (Answer(status=500), "status 500"),
        (Answer(status=503, raw=b"<html>busy</html>"), "status 503"),
        (Answer(raw=b'{"choices": [{"mess'), "unreadable"),
        (Answer(raw=b"<html>hello</html>", headers={"Content-Type": "text/html"}), "unreadable"),
        (Answer(raw=b"\xff\xfe\x00"), "unreadable"),
        (Answer(raw=b"[1, 2]"), "unreadable"),
        (Answer(raw=b'{"choices": []}'), "unreadable"),
        (Answer(raw=b'{"choices": [{"message": null}]}'), "unreadable"),
        (Answer(raw=b'{"choices": [{"message": {"content": 5}}]}'), "unreadable"),
        (Answer(raw=b"[" * 100_000), "unreadable"),
        (Answer(text="half an ans", finish="abort"), "aborted"),
        (Answer(drop=True), "connection"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_passing_fault_of_the_server_is_waited_out(tmp_path, wrong, status):
    with serving(wrong, wrong, Answer(text="Here.")) as server:
        mine = user(server, tmp_path)
        (reply,) = mine.reply([exchange(1)], seed=0)
        assert (reply.text, reply.source) == ("Here.", "server")
        assert mine.calls.counts() == {status: 2, "said": 1}
        assert mine.calls.spent().calls == len(server.requests) == 3


@pytest.mark.parametrize("wrong", [Answer(status=500), Answer(raw=b"{"), Answer(drop=True)])
def test_a_lasting_fault_stops_with_server_exchange_and_remedy(tmp_path, wrong):
    with serving(wrong) as server:
        mine = user(server, tmp_path)
        with pytest.raises(SdpoError) as caught:
            mine.reply([exchange(1)], seed=0)
        assert len(server.requests) == QUICK.tries
    message = str(caught.value)
    assert message.startswith(f"{server.url}, model m, exchange e1: no reply in 4 tries")
    assert "resume the run" in message and FILE in message


def test_a_server_that_goes_down_and_returns_is_waited_for(tmp_path):
    patient = RetryConfig(tries=8, timeout=5.0, first_wait=0.05, longest_wait=2.0)
    with serving(Answer(text="Back.")) as server:
        mine = user(server, tmp_path, retry=patient)
        mine.reply([exchange(0)], seed=0)
        server.stop()
        returning = threading.Timer(0.4, server.start)
        returning.start()
        replies = mine.reply([exchange(i) for i in range(4)], seed=0)
        returning.join()
    assert [r.source for r in replies] == ["cache", "server", "server", "server"]
    assert mine.calls.counts()["connection"] >= 3
    assert mine.calls.spent().tokens == 4 * 110, "nothing was read by a server that is down"


def test_a_server_that_stays_down_stops_the_run_and_loses_nothing(tmp_path):
    with serving(lambda n, _: Answer(text=f"Reply {n}.", delay=0.05)) as server:
        mine = user(server, tmp_path, concurrency=2)
        first = mine.reply([exchange(0), exchange(1)], seed=0)
        server.stop()
        with pytest.raises(SdpoError, match="no reply in 4 tries, the last: cannot be reached"):
            mine.reply([exchange(i) for i in range(20)], seed=0)
        server.start()
        again = mine.reply([exchange(i) for i in range(20)], seed=0)
    assert [r.text for r in again[:2]] == [r.text for r in first]
    assert len(server.requests) == 20
    counts = mine.calls.counts()
    assert counts.keys() == {"connection", "said"} and counts["said"] == 20
    # the two at a time gave up, the second when the first did, and nobody else began
    assert QUICK.tries < counts["connection"] <= 2 * QUICK.tries


def test_a_slow_server_is_not_waited_for_longer_than_configured(tmp_path):
    impatient = RetryConfig(tries=2, timeout=0.2, first_wait=0.01, longest_wait=1.0)
    with serving(Answer(delay=1.0), Answer(text="Quick.")) as server:
        mine = user(server, tmp_path, retry=impatient)
        began = time.monotonic()
        (reply,) = mine.reply([exchange(1)], seed=0)
        assert time.monotonic() - began < 0.9
        assert reply.text == "Quick."
        assert mine.calls.counts() == {"timeout": 1, "said": 1}
        # what the server did meanwhile is unknown, and counted at the most it may have been
        assert mine.calls.spent().tokens > 2 * 110
    lasting = pytest.raises(SdpoError, match=r"no reply in 2 tries, the last: no answer within 0.2")
    with serving(Answer(delay=1.0)) as server, lasting:
        user(server, tmp_path, retry=impatient).reply([exchange(2)], seed=0)


def test_a_server_that_drips_is_slow(tmp_path):
    """It is the whole answer that must come in time, not its next byte."""
    impatient = RetryConfig(tries=2, timeout=0.3, first_wait=0.01, longest_wait=1.0)
    with serving(Answer(drip=0.05), Answer(text="At once.")) as server:
        mine = user(server, tmp_path, retry=impatient)
        (reply,) = mine.reply([exchange(1)], seed=0)
        assert reply.text == "At once."
        assert mine.calls.counts() == {"timeout": 1, "said": 1}


def test_a_rate_limit_is_waited_out_by_all(tmp_path):
    """None is sent before the time that the server named, though one alone heard of it."""
    limit = Answer(status=429, headers={"Retry-After": "0.6"})
    with serving(lambda number, _: Answer(delay=0.1) if number else limit) as server:
        mine = user(server, tmp_path, concurrency=3)
        replies = mine.reply([exchange(i) for i in range(9)], seed=0)
    assert {r.source for r in replies} == {"server"}
    times = [when for when, _, _ in server.requests]
    assert times[2] - times[0] < 0.5 <= 0.6 <= times[3] - times[0]
    assert mine.calls.counts() == {"status 429": 1, "said": 9}
    assert mine.calls.spent() == Spent(calls=10, tokens=9 * 110)


def test_a_rate_limit_may_be_a_date(tmp_path):
    date = formatdate(time.time() + 2, usegmt=True)  # of whole seconds
    with serving(Answer(status=429, headers={"Retry-After": date}), Answer()) as server:
        user(server, tmp_path).reply([exchange(1)], seed=0)
    (first, _, _), (second, _, _) = server.requests
    assert 0.8 <= second - first <= 3


def test_too_long_a_rate_limit_stops_the_run(tmp_path):
    stops = pytest.raises(SdpoError, match=r"asks to wait 3600 s, more than 2 .*longest_wait")
    with serving(Answer(status=429, headers={"Retry-After": "3600"})) as server, stops:
        user(server, tmp_path).reply([exchange(1)], seed=0)
    assert len(server.requests) == 1


@pytest.mark.parametrize(
    ("answer", "remedy"),
    [
        (Answer(status=401), "status 401.*environment variable TEST_KEY"),
        (Answer(status=403), "status 403.*environment variable TEST_KEY"),
        (Answer(status=404), "status 404.*check the model's name and the address"),
        (Answer(status=400), "status 400.*check the settings"),
        (
            Answer(status=429, raw=b'{"error": {"message": "m", "code": "insufficient_quota"}}'),
            "no credit left",
        ),
    ],
)
def test_what_no_waiting_mends_stops_at_once(tmp_path, answer, remedy):
    stops = pytest.raises(SdpoError, match=f"model m, exchange e1: .*{remedy}")
    with serving(answer) as server, stops:
        user(server, tmp_path, concurrency=1).reply([exchange(1), exchange(2)], seed=0)
    assert len(server.requests) == 1


def test_a_filtered_request_is_a_refusal(tmp_path):
    body = b'{"error": {"message": "filtered", "code": "content_filter"}}'
    with serving(Answer(status=400, raw=body)) as server:
        (reply,) = user(server, tmp_path).reply([exchange(1)], seed=0)
    assert (reply.text, reply.source) == (None, "server:refused")


def test_the_budget_of_calls_holds(tmp_path):
    """With many requests at once, with failures among them, and over a resumed run."""
    budget = BudgetConfig(calls=10)
    behaviour = [Answer(status=500, delay=0.02)] * 4 + [Answer(delay=0.02)]
    with serving(*behaviour) as server:
        for _ in range(2):
            mine = user(server, tmp_path, budget=budget, concurrency=8)
            with pytest.raises(
                SdpoError, match=r"exchange e\d+: the budget is spent: 10 of 10 call"
            ):
                mine.reply([exchange(i) for i in range(30)], seed=0)
            assert mine.calls.spent() == Spent(calls=10, tokens=6 * 110)
            mine.close()
        assert len(server.requests) == 10
        richer = user(server, tmp_path, budget=BudgetConfig(calls=34), concurrency=8)
        replies = richer.reply([exchange(i) for i in range(30)], seed=0)
    assert len(server.requests) == 34
    assert sum(r.source == "cache" for r in replies) == 6


@pytest.mark.parametrize("concurrency", [1, 16])
def test_the_budget_of_tokens_holds(tmp_path, concurrency):
    """A call is sent only where the most that it may take is left; less may come of it."""
    with serving(Answer(usage=(900, 100), delay=0.01)) as server:
        mine = user(server, tmp_path, budget=BudgetConfig(tokens=20_000), concurrency=concurrency)
        most = mine.asker.request(mine.ask(exchange(0))).most_tokens
        assert 1_000 < most < 4_000
        with pytest.raises(SdpoError, match="the budget is spent: .* of 20000 tokens") as caught:
            mine.reply([exchange(i) for i in range(40)], seed=0)
        spent = mine.calls.spent()
    assert re.search(rf"the next call may take ({most}|{most + 2})\b", str(caught.value))
    assert spent.tokens == 1_000 * len(server.requests) <= 20_000
    assert spent.tokens + most + 10 > 20_000, "it is used up"


def test_what_a_server_does_not_count_is_counted_at_the_most(tmp_path):
    with serving(Answer(usage=None)) as server:
        mine = user(server, tmp_path)
        mine.reply([exchange(1)], seed=0)
        assert mine.calls.spent() == Spent(
            calls=1, tokens=mine.asker.request(mine.ask(exchange(1))).most_tokens
        )


def test_what_was_in_flight_at_a_kill_stays_counted(tmp_path):
    with serving(Answer()) as server:
        mine = user(server, tmp_path)
        mine.reply([exchange(1)], seed=0)
        mine.close()
        with sqlite3.connect(tmp_path / FILE) as book:  # as before the answer came
            book.execute("UPDATE calls SET status = 'sent', tokens = 2000, reply = NULL")
        book.close()
        resumed = user(server, tmp_path, budget=BudgetConfig(calls=2))
        assert resumed.calls.spent() == Spent(calls=1, tokens=2000)
        (reply,) = resumed.reply([exchange(1)], seed=0)
        assert reply.source == "server"
        assert resumed.calls.spent().calls == 2


def test_every_call_is_recorded(tmp_path):
    with serving(Answer(status=500), Answer(text="Thanks.")) as server:
        mine = user(server, tmp_path)
        mine.reply([exchange(1)], seed=0)
        mine.close()
    book = sqlite3.connect(tmp_path / FILE)
    book.row_factory = sqlite3.Row
    failed, answered = book.execute("SELECT * FROM calls ORDER BY number").fetchall()
    book.close()
    assert (failed["status"], failed["attempt"], failed["tokens"]) == ("status 500", 1, 0)
    assert "status 500" in failed["response"] and failed["reply"] is None
    expected = {"exchange": "e1", "persona": "poetic", "server": server.url, "model": "m"}
    expected |= {"status": "said", "attempt": 2, "tokens": 110, "reply": "Thanks."}
    assert {name: answered[name] for name in expected} == expected
    assert json.loads(answered["request"]) == server.requests[1][1]
    assert json.loads(answered["response"])["choices"][0]["message"]["content"] == "Thanks."
    assert answered["seconds"] > 0 and "secret" not in str(tuple(answered))


def test_an_error_of_our_own_ends_the_run_and_no_request_waits_for_it(tmp_path, monkeypatch):
    """Others may wait for what it had booked."""
    with serving(Answer(delay=0.05)) as server:
        mine = user(server, tmp_path)
        most = mine.asker.request(mine.ask(exchange(0))).most_tokens
        mine = user(server, tmp_path, budget=BudgetConfig(tokens=most + 10))

        def broken(content):
            raise ZeroDivisionError

        monkeypatch.setattr(mine.asker, "_heard", broken)
        with pytest.raises(SdpoError, match="the budget is spent"):
            mine.reply([exchange(i) for i in range(3)], seed=0)
        with pytest.raises(ZeroDivisionError):
            user_without_limit = user(server, tmp_path)
            monkeypatch.setattr(user_without_limit.asker, "_heard", broken)
            user_without_limit.reply([exchange(i) for i in range(3)], seed=0)


def test_a_missing_key_is_named(tmp_path, monkeypatch):
    monkeypatch.delenv("TEST_KEY")
    with serving(Answer()) as server:
        with pytest.raises(SdpoError, match="needs a key in the environment variable TEST_KEY"):
            user(server, tmp_path)
        (reply,) = user(server, tmp_path, key_variable="").reply([exchange(1)], seed=0)
    assert reply.text == "Shorter, please."


def test_a_broken_book_is_named(tmp_path):
    (tmp_path / FILE).write_text("no data base, but a text that is long enough" * 10)
    with serving(Answer()) as server, pytest.raises(SdpoError, match=f"{FILE}: cannot be used"):
        user(server, tmp_path)


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"url": "127.0.0.1:8000"}, "url must begin with http"),
        ({"model": ""}, "model must name a model"),
        ({"temperature": -1}, "temperature must not be negative"),
        ({"top_p": 0}, "top_p must lie in"),
        ({"concurrency": 0}, "concurrency must be positive"),
        ({"extra": "{"}, "extra is not valid JSON"),
        ({"extra": "[]"}, "extra must be a JSON object"),
        ({"extra": '{"n": 2}'}, "extra must not hold n"),
        ({"extra": '{"max_tokens": null}'}, "extra must leave a limit"),
        ({"extra": '{"max_completion_tokens": "5"}'}, "extra must leave a limit"),
    ],
)
def test_settings_are_checked(settings, problem):
    with pytest.raises(SdpoError, match=problem):
        ServerUser(**{"url": "http://x/v1", "model": "m"} | settings)


def test_another_limit_may_take_the_place_of_max_tokens():
    extra = '{"max_tokens": null, "max_completion_tokens": 500, "temperature": null}'
    request = ServerUser(url="http://x/v1", model="m", extra=extra).request([])
    assert request == {"model": "m", "messages": [], "top_p": 1.0, "max_completion_tokens": 500}
