"""Rules that tell without a judge whether an answer is as a user likes it.

A rule gives a score in [0, 1], and is satisfied where the score is 1. A blank answer satisfies no
rule. Code, in fences or backticks, is not prose: what is said about punctuation, first person,
formatting and closings looks past it. Words and phrases are those of English; counts of words,
emojis, punctuation and formatting are of any language.
"""

from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import regex

from ...errors import SdpoError

Mark = Literal["item", "nested", "header", "bold", "table"]
"""Formatting: a list's item, an item inside another's, a header, a bold stretch, a table's row."""

_FENCED = regex.compile(
    r"^ {0,3}(`{3,}|~{3,})[^\n]*(?:\n.*?(?:^ {0,3}\1[`~]*[ \t]*$|\Z)|\Z)", regex.M | regex.S
)
_IN_LINE = regex.compile(r"(?<!`)(`+)(?!`)(?:.|\n(?!\n))+?(?<!`)\1(?!`)")
_EMOJI = regex.compile(
    # in colour by default; made so by a selector; a key; but not made black and white
    r"\p{Emoji_Presentation}(?!\N{VARIATION SELECTOR-15})"
    r"|\p{Emoji}\N{VARIATION SELECTOR-16}"
    r"|[0-9#*]\N{VARIATION SELECTOR-16}?\N{COMBINING ENCLOSING KEYCAP}"
)
# miscellaneous symbols and dingbats, but not notes
_EMOJI_OR_ICON = regex.compile(rf"{_EMOJI.pattern}|(?![♩-♯])[\u2600-\u27BF]")
_SPACELESS = regex.compile(r"[\p{Han}\p{Hiragana}\p{Katakana}]")
_WORD = regex.compile(r"[\p{L}\p{N}]")
_PUNCTUATION = regex.compile(r"(?!(?<=\p{L})['’‐‑-](?=\p{L})|(?<=\p{N})[.,:](?=\p{N}))\p{P}")
_RULER = regex.compile(r"\s*(?:[-*_]\s*){3,}")
_ITEM = regex.compile(r"([ \t]*)(?:[-*+•‣◦▪●]|\d{1,3}[.)])[ \t]+\S")
_HEADER = regex.compile(r" {0,3}#{1,6}[ \t]+\S")
_BOLD = regex.compile(r"\*\*(?!\s)[^*\n]+\*\*|(?<!\w)__(?!\s)[^_\n]+__(?!\w)")
_TABLE_ROW = regex.compile(r"\s*\|.*\|\s*")
_SAID_BY_OTHERS = regex.compile(r"[\"“][^\"“”\n]*[\"”]")
_NUMERAL_BEFORE = (
    r"(?<!\b(?:War|Type|Part|Phase|Class|Act|Volume|Book|Level|Stage|Grade|Chapter|Section|King"
    r"|Queen|Elizabeth|Charles|James|Nicholas|Francis|Napoleon|and|or) )"
)
_FIRST_PERSON = regex.compile(
    rf"{_NUMERAL_BEFORE}\bI(?=\s+[a-z])|\bI['’](?:m|ve|d|ll)\b|\b(?:and|or) I(?=\s+[a-z])"
    r"|\b(?:me|my|mine|myself|we|us|ours?|ourselves|let['’]s)\b"
    # in the middle of a sentence it is a name's: Google My Business
    r"|(?<![\p{L},] )\b(?:My|Mine|Myself|We|Ours?|Let['’]s|Me)\b"
)
_EXCLAMATION = regex.compile(r"[!！¡‼⁉](?![=\[])")
_QUESTION = regex.compile(r"[?？؟]")
_SENTENCE_ENDS = regex.compile(r"(?<=[.!?…。！？])[\"”’)*_]*\s+")
_OFFER = regex.compile(
    r"\b(?:let me know|feel free|happy to (?:help|assist|explain|provide)|glad to (?:help|assist)"
    r"|here to (?:help|assist)|hope (?:this|that|it|these)(?: \w+){0,4} helps?|would you like"
    r"|want me to"
    r"|do(?:n['’]t| not) hesitate to (?:ask|contact me|reach out)|just (?:ask|let me know)"
    r"|anything else"
    r"|if you(?:['’]d| would) like|if you (?:want|need|have|wish)\b.{0,60}\b(?:me|I)\b)",
    regex.I,
)
_PRAISE = regex.compile(
    r"\W*(?:(?:(?:that|this)(?:['’]s| is) |what )?(?:(?:an?|such an?|really|very|truly) )*"
    r"(?P<good>great|good|excellent|fantastic|wonderful|brilliant|amazing|awesome|insightful"
    r"|interesting|fascinating|thoughtful|lovely|terrific|superb|fabulous|smart|clever)"
    r" (?:\w+ )?(?:question|point|choice|idea|thinking|observation|request|topic|job|work)\b"
    r"|(?:that|this)(?:['’]s| is) (?:(?:really|very|so|just) )*(?&good)[!.,]"
    r"|(?:absolutely|certainly|of course|sure|sure thing|definitely|great|excellent|wonderful"
    r"|fantastic|awesome|perfect|amazing|no problem|gladly|you(?:['’]re| are) (?:absolutely |so )?"
    r"right)[!.,]"
    r"|(?:thank you|thanks) for (?:asking|your|the|reaching|sharing)"
    r"|I(?:['’]d| would) (?:be (?:happy|glad|delighted)|love) to"
    r"|I(?:['’]m| am) (?:(?:so|very|really|always|more than) )*(?:happy|glad|delighted|pleased)\b"
    r"|(?:happy|glad) to help|you(?:['’]re| are) (?:very |most )?welcome\b"
    r"|(?:that|this)(?:['’]s| is) (?:really |so )?(?:great|good|wonderful) to hear)",
    regex.I,
)


def prose(text: str) -> str:
    """A text without its code: neither fenced blocks nor what stands in backticks."""
    return _IN_LINE.sub(" ", _FENCED.sub("", text))


def count_words(text: str) -> int:
    """Stretches between spaces that hold a letter or a digit, so that "-" and "##" are none. Where
    a script has no spaces between words, as Chinese and Japanese, each character is one."""
    words = 0
    for stretch in text.split():
        rest, characters = _SPACELESS.subn(" ", stretch)
        words += characters
        words += sum(map(bool, map(_WORD.search, rest.split()))) if characters else 0
        words += 0 if characters or not _WORD.search(stretch) else 1
    return words


def count_emojis(text: str, *, icons: bool = True) -> int:
    """Emojis as a reader sees them: a family, a flag, a key and a tinted hand are one each.

    Args:
        icons: count black and white signs as well, such as a check mark or a star.
    """
    found = _EMOJI_OR_ICON if icons else _EMOJI
    if not found.search(text):
        return 0
    return sum(1 for seen in regex.findall(r"\X", text) if found.search(seen))


def count_marks(text: str) -> Counter[Mark]:
    """How much formatting of each kind a Markdown text has outside its code."""
    marks, in_list = Counter[Mark](), False
    for line in prose(text).splitlines():
        if _RULER.fullmatch(line):
            in_list = False
        elif item := _ITEM.match(line):
            indented = len(item[1].expandtabs(4)) >= 2
            marks["item"] += 1
            marks["nested"] += indented and in_list
            in_list = True
        elif _HEADER.match(line):
            marks["header"] += 1
            in_list = False
        elif _TABLE_ROW.fullmatch(line):
            marks["table"] += bool(_WORD.search(line))
        marks["bold"] += len(_BOLD.findall(line))
    return marks


def closing(text: str) -> list[str]:
    """The last two sentences of the last line, if it is neither code nor a list's item, without
    what it quotes."""
    text = text.rstrip()
    if text.endswith(("```", "~~~")):
        return []
    own = _SAID_BY_OTHERS.sub(" ", prose(text))
    lines = [line for line in own.splitlines() if line.strip()]
    if not lines or _ITEM.match(lines[-1]):
        return []
    return [s for s in _SENTENCE_ENDS.split(lines[-1].strip()) if _WORD.search(s)][-2:]


def ends_with_question(text: str) -> bool:
    """Whether the closing's last sentence is a question, whatever emoji or mark stands behind."""
    return any(regex.search(r"[?？؟][^\p{L}\p{N}]*$", sentence) for sentence in closing(text)[-1:])


@dataclass(frozen=True, kw_only=True)
class Rule:
    """Base of the rules: what `judged` says, and 0 for a blank answer."""

    def score(self, answer: str, finished: bool) -> float:
        """How well an answer does, from 0 to 1.

        Args:
            finished: it ended by itself and was not cut at a limit.
        """
        return self.judged(answer, finished) if answer.strip() else 0.0

    def satisfied(self, answer: str, finished: bool) -> bool:
        """Whether the answer is all that the rule asks for."""
        return self.score(answer, finished) >= 1.0

    def judged(self, answer: str, finished: bool) -> float:
        """The score of an answer that is not blank."""
        raise NotImplementedError


def _fewer(count: int, at_most: int = 0) -> float:
    """1 for no more than ``at_most``, 1/2 for one more, 1/3 for two more."""
    return 1 / (1 + max(0, count - at_most))


def _at_least(name: str, value: int, least: int) -> None:
    if value < least:
        raise SdpoError(f"{name} must be at least {least}, got {value}")


@dataclass(frozen=True, kw_only=True)
class All(Rule):
    """Every one of several rules; the score is their mean."""

    rules: tuple[Rule, ...]

    def judged(self, answer: str, finished: bool) -> float:
        return sum(rule.judged(answer, finished) for rule in self.rules) / len(self.rules)


@dataclass(frozen=True, kw_only=True)
class AtMostWords(Rule):
    """At most so many words, and finished."""

    words: int

    def __post_init__(self):
        _at_least("words", self.words, 1)

    def judged(self, answer: str, finished: bool) -> float:
        fits = min(1.0, self.words / max(1, count_words(answer)))
        return fits if finished else fits / 2


@dataclass(frozen=True, kw_only=True)
class AtLeastWords(Rule):
    """At least so many words. One that was cut would have had even more."""

    words: int

    def __post_init__(self):
        _at_least("words", self.words, 1)

    def judged(self, answer: str, finished: bool) -> float:
        return min(1.0, count_words(answer) / self.words)


@dataclass(frozen=True, kw_only=True)
class NoEmojis(Rule):
    """No emoji, and no icon such as a check mark or a star either."""

    icons: bool = True
    """Whether signs count that are black and white."""

    def judged(self, answer: str, finished: bool) -> float:
        return _fewer(count_emojis(answer, icons=self.icons))


@dataclass(frozen=True, kw_only=True)
class AtMostMarks(Rule):
    """No more than so many marks of formatting."""

    of: tuple[Mark, ...] = ("item", "header")
    marks: int = 0

    def __post_init__(self):
        _at_least("marks", self.marks, 0)

    def judged(self, answer: str, finished: bool) -> float:
        found = count_marks(answer)
        return _fewer(sum(found[mark] for mark in self.of), self.marks)


@dataclass(frozen=True, kw_only=True)
class AtLeastMarks(Rule):
    """At least so many marks of formatting."""

    of: tuple[Mark, ...] = ("item",)
    marks: int = 3

    def __post_init__(self):
        _at_least("marks", self.marks, 1)

    def judged(self, answer: str, finished: bool) -> float:
        found = count_marks(answer)
        return min(1.0, sum(found[mark] for mark in self.of) / self.marks)


@dataclass(frozen=True, kw_only=True)
class NoClosingOffer(Rule):
    """Neither a question nor an offer of more help at the end."""

    def judged(self, answer: str, finished: bool) -> float:
        offers = any(map(_OFFER.search, closing(answer)))
        return 0.0 if offers or ends_with_question(answer) else 1.0


@dataclass(frozen=True, kw_only=True)
class ClosingQuestion(Rule):
    """A question at the end; an offer that is no question is half of it."""

    def judged(self, answer: str, finished: bool) -> float:
        if not finished:
            return 0.0
        if ends_with_question(answer):
            return 1.0
        return 0.5 if any(map(_OFFER.search, closing(answer))) else 0.0


@dataclass(frozen=True, kw_only=True)
class OpeningQuestion(Rule):
    """A question among the first sentences."""

    sentences: int = 2

    def __post_init__(self):
        _at_least("sentences", self.sentences, 1)

    def judged(self, answer: str, finished: bool) -> float:
        said = _SENTENCE_ENDS.split(prose(answer).strip())[: self.sentences]
        return float(any(map(_QUESTION.search, said)))


@dataclass(frozen=True, kw_only=True)
class NoPraiseOpening(Rule):
    """No praise for the question, and no "Certainly!", at the beginning."""

    def judged(self, answer: str, finished: bool) -> float:
        return 0.0 if _PRAISE.match(answer) else 1.0


@dataclass(frozen=True, kw_only=True)
class NoFirstPerson(Rule):
    """No word of the first person, singular or plural, but in what is quoted."""

    def judged(self, answer: str, finished: bool) -> float:
        return _fewer(len(_FIRST_PERSON.findall(_SAID_BY_OTHERS.sub(" ", prose(answer)))))


@dataclass(frozen=True, kw_only=True)
class NoPunctuation(Rule):
    """No punctuation marks but those of spelling: in don't, well-known, 3.5 and 12:30."""

    def judged(self, answer: str, finished: bool) -> float:
        return _fewer(len(_PUNCTUATION.findall(prose(answer))))


@dataclass(frozen=True, kw_only=True)
class NoExclamations(Rule):
    """No exclamation marks; that of an image's link and of "!=" is none."""

    def judged(self, answer: str, finished: bool) -> float:
        return _fewer(len(_EXCLAMATION.findall(prose(answer))))


@dataclass(frozen=True, kw_only=True)
class ShortFirst(Rule):
    """A first paragraph of few words, and at least one more paragraph."""

    words: int = 25

    def __post_init__(self):
        _at_least("words", self.words, 1)

    def judged(self, answer: str, finished: bool) -> float:
        first, *more = regex.split(r"\n\s*\n", answer.strip(), maxsplit=1)
        return (min(1.0, self.words / max(1, count_words(first))) + bool(more)) / 2


@dataclass(frozen=True, kw_only=True)
class NoWords(Rule):
    """None of some words and phrases, in small or capital letters."""

    words: tuple[str, ...]

    def __post_init__(self):
        if not self.words or not all(word.strip() for word in self.words):
            raise SdpoError("words must name at least one word, and none that is blank")

    @cached_property
    def _any(self) -> regex.Pattern[str]:
        words = "|".join(r"\s+".join(map(regex.escape, word.split())) for word in self.words)
        return regex.compile(rf"(?<!\w)(?:{words})(?!\w)", regex.I)

    def judged(self, answer: str, finished: bool) -> float:
        return _fewer(len(self._any.findall(prose(answer))))


RULES: dict[str, type[Rule]] = {
    "at_most_words": AtMostWords,
    "at_least_words": AtLeastWords,
    "no_emojis": NoEmojis,
    "at_most_marks": AtMostMarks,
    "at_least_marks": AtLeastMarks,
    "no_closing_offer": NoClosingOffer,
    "closing_question": ClosingQuestion,
    "opening_question": OpeningQuestion,
    "no_praise_opening": NoPraiseOpening,
    "no_first_person": NoFirstPerson,
    "no_punctuation": NoPunctuation,
    "no_exclamations": NoExclamations,
    "short_first": ShortFirst,
    "no_words": NoWords,
}
"""What a persona's file calls a rule."""
