"""Personas: what a user wants, what they say, and how to tell whether they got it.

A persona is a TOML file; those in the folder beside this module go by their names, and one of your
own by its path:

    wants = "You are in a hurry and want answers of one short sentence."
    complaints = ["Too long. One short sentence, please."]
    praise = ["Perfect, thanks."]
    opposite = "detailed"          # may be left out

    [[rules]]                      # none, one or several, of which all must hold
    kind = "at_most_words"
    words = 25
"""

import tomllib
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

from ...errors import DataError, SdpoError
from ...io.fields import as_list, as_object, as_text, bad, kind, listed
from .rules import RULES, All, Rule

_FOLDER = Path(__file__).with_name("personas")
_PUBLISHED = {"answer_direclty_reduce_formatting": "answer_directly_reduce_formatting"}
"""A key of the paper's code that is misspelt there."""
_FIELDS = ("wants", "complaints", "praise", "opposite", "rules")
_THANKS = ("Thanks, that's just what I needed.", "Great, thank you.", "Perfect.")


@dataclass(frozen=True, kw_only=True)
class Persona:
    """One user.

    Args:
        name: the file's, without its ending.
        wants: what somebody who plays the user is told, addressed as "you".
        complaints: what the user says of an answer that is not as they want it; each says what
            was wrong.
        praise: what the user says of one that is.
        rule: tells the two apart; None: that takes a judge.
        opposite: name of a persona that wants the reverse.
    """

    name: str
    wants: str
    complaints: tuple[str, ...]
    praise: tuple[str, ...] = _THANKS
    rule: Rule | None = None
    opposite: str | None = None

    def satisfied(self, answer: str, finished: bool) -> bool:
        """Whether the answer is as the user wants it; ``finished``: it was not cut at a limit.

        Raises:
            SdpoError: the persona has no rule.
        """
        return self._known_rule().satisfied(answer, finished)

    def score(self, answer: str, finished: bool) -> float:
        """How well the answer does, from 0 to 1, where `satisfied` begins.

        Raises:
            SdpoError: the persona has no rule.
        """
        return self._known_rule().score(answer, finished)

    def _known_rule(self) -> Rule:
        if self.rule is None:
            raise SdpoError(
                f"persona {self.name} has no rule, so that only a judge could tell whether an "
                "answer pleases it: give its file [[rules]], or have a model play it and judge it"
            )
        return self.rule


@cache
def personas() -> list[str]:
    """Names of the personas that come with the package, sorted."""
    return sorted(file.stem for file in _FOLDER.glob("*.toml"))


def load_persona(name_or_path: str | Path) -> Persona:
    """A persona that comes with the package, by its name, or one of your own, by its file's path.

    Raises:
        DataError: there is no such persona, or its file is not one; names the file and the field.
    """
    name = _PUBLISHED.get(str(name_or_path), str(name_or_path))
    path = _FOLDER / f"{name}.toml" if name in personas() else Path(name_or_path)
    if path.suffix != ".toml":
        problem = f"no persona is called {name}"
        hint = f"Give the path of a .toml file, or one of {', '.join(personas())}"
        raise DataError(problem, hint=hint)
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        problem = f"the persona cannot be read ({error.strerror})"
        raise DataError(problem, file=str(path), hint="Check the path") from None
    except UnicodeDecodeError as error:
        problem = f"not valid UTF-8 at byte {error.start + 1}"
        raise DataError(problem, file=str(path), hint="Save the file as UTF-8") from None
    return parse_persona(path.stem, text, str(path))


def parse_persona(name: str, text: str, file: str) -> Persona:
    """The persona that a file's text describes.

    Raises:
        DataError: the text is not TOML, or a field is missing, unknown or not what it must be.
    """
    try:
        said = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        hint = "See docs/personas.md for a whole example"
        raise DataError(f"not valid TOML ({error})", file=file, hint=hint) from None
    try:
        return _persona(name, said)
    except DataError as error:
        raise error.at(file=file) from None


def _persona(name: str, said: Mapping[str, Any]) -> Persona:
    if unknown := [field for field in said if field not in _FIELDS]:
        raise bad(unknown[0], "no such field of a persona", f"Its fields are {listed(_FIELDS)}")
    more: dict[str, Any] = {}
    if "praise" in said:
        more["praise"] = _texts(said["praise"], "praise")
    if "opposite" in said:
        more["opposite"] = _sentence(said["opposite"], "opposite")
    return Persona(
        name=name,
        wants=_sentence(said.get("wants"), "wants"),
        complaints=_texts(said.get("complaints"), "complaints"),
        rule=_rules(said.get("rules", [])),
        **more,
    )


def _sentence(value: object, field: str) -> str:
    text = as_text(value, field).strip()
    if not text:
        raise bad(field, "the text is blank", "Write what the user would say or want")
    return text


def _texts(value: object, field: str) -> tuple[str, ...]:
    texts = tuple(_sentence(v, f"{field}[{i}]") for i, v in enumerate(as_list(value, field)))
    if not texts:
        raise bad(field, "the list is empty", "Write at least one thing that the user says")
    return texts


def _rules(value: object) -> Rule | None:
    rules = [_rule(entry, f"rules[{i}]") for i, entry in enumerate(as_list(value, "rules"))]
    if len(rules) > 1:
        return All(rules=tuple(rules))
    return rules[0] if rules else None


def _rule(value: object, field: str) -> Rule:
    settings = dict(as_object(value, field))
    name = as_text(settings.pop("kind", None), f"{field}.kind")
    if name not in RULES:
        hint = f"The rules are {listed(RULES)}"
        raise bad(f"{field}.kind", f"no rule is called {name}", hint)
    rule, types = RULES[name], get_type_hints(RULES[name])
    known = {f.name: f for f in fields(rule)}
    if unknown := [key for key in settings if key not in known]:
        hint = f"{name} has {listed(known)}"
        raise bad(f"{field}.{unknown[0]}", f"no such setting of {name}", hint)
    for key, setting in known.items():
        if key not in settings and setting.default is MISSING:
            raise bad(f"{field}.{key}", f"{name} needs this setting", f"Give it as {types[key]}")
    try:
        return rule(**{k: _setting(v, types[k], f"{field}.{k}") for k, v in settings.items()})
    except DataError:
        raise
    except SdpoError as error:
        raise bad(field, str(error), "Change the setting") from None


def _setting(value: object, wanted: Any, field: str) -> Any:
    """A rule's setting as its type: a number, true or false, or a list of texts."""
    if get_origin(wanted) is tuple:
        inner = get_args(wanted)[0]
        return tuple(
            _setting(v, inner, f"{field}[{i}]") for i, v in enumerate(as_list(value, field))
        )
    if get_origin(wanted) is Literal:
        if value not in get_args(wanted):
            raise bad(field, f"{value!r} is unknown", f"Choose of {listed(get_args(wanted))}")
        return value
    if wanted is str:
        return as_text(value, field)
    if type(value) is not wanted:
        raise bad(field, f"found {kind(value)} where {wanted.__name__} is needed", "Change it")
    return value
