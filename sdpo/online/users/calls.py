"""The book of a run's calls to a server: what was asked and answered, and what it cost.

A call is written down before it is sent, at the most that it may cost, and again when its answer
is there. So the budget holds whatever is in flight, and a kill loses nothing: what was sent then
stays at its highest price. A run that goes on finds its book in its folder.
"""

import sqlite3
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from ...errors import SdpoError

FILE = "user_calls.sqlite"
_LONGEST_KEPT = 20_000
_TABLES = """
CREATE TABLE IF NOT EXISTS calls (
    number INTEGER PRIMARY KEY, key TEXT NOT NULL, exchange TEXT NOT NULL, persona TEXT NOT NULL,
    server TEXT NOT NULL, model TEXT NOT NULL, attempt INTEGER NOT NULL, sent_at REAL NOT NULL,
    seconds REAL, status TEXT NOT NULL, tokens INTEGER NOT NULL, prompt_tokens INTEGER,
    completion_tokens INTEGER, request TEXT NOT NULL, response TEXT, reply TEXT
);
CREATE INDEX IF NOT EXISTS calls_by_key ON calls (key, status);
CREATE INDEX IF NOT EXISTS calls_by_cost ON calls (tokens);
CREATE INDEX IF NOT EXISTS calls_by_status ON calls (status);
"""


class Spent(NamedTuple):
    """Calls sent, those that failed included, and tokens that they read and wrote at most."""

    calls: int
    tokens: int


class Call(NamedTuple):
    """A call to be sent. ``tokens``: what it may cost at most."""

    key: str
    exchange: str
    persona: str
    server: str
    model: str
    attempt: int
    tokens: int
    request: str


class Outcome(NamedTuple):
    """How a call ended.

    Args:
        status: "said" and "silent" are the user's; a fault's name; or what went wrong.
        tokens: what it is counted at; None: as it was booked.
    """

    status: str
    tokens: int | None = None
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    response: str | None = None
    reply: str | None = None


class Calls:
    """The book, in a file of SQLite; several of them may have it open.

    Raises:
        SdpoError: the file cannot be used.
    """

    def __init__(self, folder: Path):
        self.path = folder / FILE
        folder.mkdir(parents=True, exist_ok=True)
        self._sent: dict[int, float] = {}
        try:
            self._db = sqlite3.connect(self.path, timeout=60, isolation_level=None)
            self._db.execute("PRAGMA synchronous = NORMAL")
            self._db.executescript(_TABLES)
        except sqlite3.Error as error:
            raise SdpoError(
                f"{self.path}: cannot be used ({error}); it holds what users said and what was "
                "spent: restore it, or move it away to begin anew"
            ) from None

    def found(self, key: str) -> tuple[str | None] | None:
        """What was said to the same content before, in a tuple; None: nothing is known."""
        ask = "SELECT reply FROM calls WHERE key = ? AND status IN ('said', 'silent') LIMIT 1"
        return self._db.execute(ask, (key,)).fetchone()

    def send(self, call: Call, *, calls: int | None, tokens: int | None) -> int | None:
        """Book a call, and return its number; None: it does not fit into the budget.

        Args:
            calls, tokens: the budget; None: no limit.
        """
        columns = ", ".join((*Call._fields, "sent_at", "status"))
        values = ", ".join("?" * (len(Call._fields) + 2))
        with self._alone():
            spent = self.spent()
            if calls is not None and spent.calls + 1 > calls:
                return None
            if tokens is not None and spent.tokens + call.tokens > tokens:
                return None
            row = (*call, time.time(), "sent")
            added = self._db.execute(f"INSERT INTO calls ({columns}) VALUES ({values})", row)
        assert added.lastrowid is not None
        self._sent[added.lastrowid] = time.monotonic()
        return added.lastrowid

    def end(self, number: int, outcome: Outcome) -> None:
        """Write down how a call ended."""
        seconds = time.monotonic() - self._sent.pop(number)
        response = outcome.response and outcome.response[:_LONGEST_KEPT]
        self._db.execute(
            "UPDATE calls SET status = ?, tokens = coalesce(?, tokens), prompt_tokens = ?, "
            "completion_tokens = ?, response = ?, reply = ?, seconds = ? WHERE number = ?",
            (*outcome._replace(response=response), seconds, number),
        )

    def spent(self) -> Spent:
        """What all calls in the book cost."""
        ask = "SELECT count(*), coalesce(sum(tokens), 0) FROM calls"
        return Spent(*self._db.execute(ask).fetchone())

    def counts(self) -> dict[str, int]:
        """How many calls ended how; "sent": not yet, or a kill came before."""
        return dict(self._db.execute("SELECT status, count(*) FROM calls GROUP BY status"))

    def close(self) -> None:
        """Close the file."""
        self._db.close()

    @contextmanager
    def _alone(self) -> Iterator[None]:
        self._db.execute("BEGIN IMMEDIATE")
        try:
            yield
        finally:
            self._db.execute("COMMIT")
