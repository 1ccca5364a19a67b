"""A user who says again what was said in a recorded run, to the same answers."""

import hashlib
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ...conversations import Message
from ...errors import DataError, SdpoError
from ...io.fields import as_id, as_list, as_object, as_text, bad
from ...io.paths import resolve_paths
from ...io.rows import read_rows
from .base import Exchange, Reply
from .personas import Persona

if TYPE_CHECKING:
    from .config import ReplayUser


class ReplayedUser:
    """Says what the rollouts say, where their persona is this one or is not told. Of several
    recorded replies to the same content, an exchange gets that of its id or the first.

    Raises:
        DataError: the rollouts cannot be read; names the file, row and field.
        SdpoError: none of them is of this persona.
    """

    def __init__(self, config: "ReplayUser", persona: Persona):
        self.config, self.persona = config, persona
        self._by_id: dict[str, str | None] = {}
        self._by_content: dict[str, str | None] = {}
        self._content_of: dict[str, str] = {}
        for file in resolve_paths(config.rollouts):
            for number, place, row in read_rows(file):
                try:
                    self._add(as_object(_raised(row), "row"), str(number))
                except DataError as error:
                    raise error.at(file=str(file), row=place) from None
        if not self._by_id:
            raise SdpoError(
                f"{config.rollouts} holds no rollout of persona {persona.name}: name the rollouts "
                "of a run with it"
            )

    def _add(self, row: dict[str, Any], default_id: str) -> None:
        if row.get("persona") not in (None, self.persona.name):
            return
        id = as_id(row.get("id"), default_id)
        said = as_list(row.get("messages"), "messages")
        messages = [_message(turn, f"messages[{i}]") for i, turn in enumerate(said)]
        followup = None
        if messages and messages[-1].role == "user":
            followup = messages.pop().content
        if len(messages) < 2 or messages[-1].role != "assistant":
            hint = "Give the prompt, the answer and, if there is one, the follow-up"
            raise bad("messages", "no answer stands where one is needed", hint)
        key = _content(messages[:-1], messages[-1].content)
        self._by_id.setdefault(id, followup)
        self._content_of.setdefault(id, key)
        self._by_content.setdefault(key, followup)

    def reply(self, exchanges: Sequence[Exchange], *, seed: int) -> list[Reply]:
        """What was said to each exchange; source "replay", or "replay:missing" where nothing is
        recorded and ``on_miss`` is "silence".

        Raises:
            SdpoError: an exchange was not recorded, and ``on_miss`` is "stop".
        """
        return [self._reply(exchange) for exchange in exchanges]

    def _reply(self, exchange: Exchange) -> Reply:
        key = _content(exchange.prompt, exchange.answer)
        same_id = exchange.id in self._by_id
        if same_id and (self.config.match == "id" or self._content_of[exchange.id] == key):
            return Reply(text=self._by_id[exchange.id], source="replay")
        if self.config.match == "content" and key in self._by_content:
            return Reply(text=self._by_content[key], source="replay")
        if self.config.on_miss == "silence":
            return Reply(text=None, source="replay:missing")
        what = "its id" if self.config.match == "id" else "its prompt and answer"
        raise SdpoError(
            f"exchange {exchange.id}: {self.config.rollouts} has no rollout of persona "
            f"{self.persona.name} with {what}: replay with the model, prompts, seed and sampling "
            'of the recorded run, or count such exchanges as silence (on_miss = "silence")'
        )

    def close(self) -> None:
        """Nothing to let go of."""


def _raised(row: Any) -> Any:
    if isinstance(row, DataError):
        raise row
    return row


def _message(turn: object, field: str) -> Message:
    turn = as_object(turn, field)
    role = as_text(turn.get("role"), f"{field}.role")
    return Message(role, as_text(turn.get("content"), f"{field}.content"))


def _content(prompt: Sequence[Message], answer: str) -> str:
    said = [[m.role, m.content] for m in prompt]
    return hashlib.sha256(json.dumps([said, answer]).encode()).hexdigest()
