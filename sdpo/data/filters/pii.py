"""Personal data and secrets in text: found by pattern, replaced by typed placeholders.

Five kinds: e-mail addresses, phone numbers, payment cards, IP addresses and key-like secrets. Names
and places need a model; `presidio_finder` adds them where presidio is installed. How much is found,
and how much is found wrongly, is measured by `python -m benchmarks.guardrails`.

Two passes make it fast: `suspects` sorts out, vectorised, the messages that cannot hold any, and
`find_pii` reads the others closely.
"""

import ipaddress
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from ...errors import SdpoError
from ..arrow import pc

PII_KINDS = ("email", "phone", "card", "ip", "key")

PLACEHOLDER = re.compile(r"<([A-Z][A-Z_]*)_([0-9]{1,6})>")


@dataclass(frozen=True, slots=True)
class Span:
    """`text[start:end]` is a value of this kind; positions count characters."""

    kind: str
    start: int
    end: int


Finder = Callable[[str], list[Span]]


def find_pii(text: str) -> list[Span]:
    """Every value found in `text`, in order, none overlapping another.

    Where two kinds claim the same characters, the first of key, email, card, ip, phone has them.
    """
    return _first_come(text, _claims(text))


def _claims(text: str) -> Iterator[Span]:
    for kind, pattern, is_value in _DETECTORS:
        if kind != "email" or _AT.search(text):
            for match in pattern.finditer(text):
                if is_value is None or is_value(match):
                    yield Span(kind, *match.span(match.lastindex or 0))


def _first_come(text: str, spans: Iterable[Span]) -> list[Span]:
    """The spans that overlap none before them in `spans`, in the order of the text."""
    taken = bytearray(len(text))
    kept = []
    for span in spans:
        if taken.find(1, span.start, span.end) < 0:
            taken[span.start : span.end] = b"\1" * (span.end - span.start)
            kept.append(span)
    return sorted(kept, key=lambda span: span.start)


# E-mail

_LATIN = r"A-Za-z0-9\u00c0-\u024f"
_LOCAL = rf"(?<![{_LATIN}._%+-])[{_LATIN}][{_LATIN}._%+'-]{{0,63}}"
_EMAILS = (
    # not logo@2x.png, and not git@host:folder/repository
    rf"(?!git@[^\s:]+:){_LOCAL}@(?![0-9]x\.)(?:[{_LATIN}][{_LATIN}-]{{0,62}}\.){{1,8}}"
    rf"[A-Za-z]{{2,24}}(?![{_LATIN}@-])",
    # jane [at] example (dot) com
    rf"{_LOCAL} ?[\[(](?i:at)[\])] ?[{_LATIN}-]{{1,63}}(?: ?[\[(](?i:dot)[\])] ?[{_LATIN}-]{{2,63}}"
    rf"){{1,4}}",
    # jane AT example DOT com
    rf"{_LOCAL} AT [{_LATIN}-]{{1,63}}(?: DOT [{_LATIN}-]{{2,63}}){{1,4}}",
)
_EMAIL = re.compile("|".join(_EMAILS))
_AT = re.compile(r"@|[\[(](?i:at)[\])]| AT ")  # without one, _EMAIL would look in vain, and slowly


# Phone numbers

_GAP = r"[ .\-/\u00a0]"
_PHONE_STARTS = r"(?<![A-Za-z0-9_.+\-/])(?<![0-9][ ,:])"
_PHONE_ENDS = r"(?![A-Za-z0-9_])(?![.,\-/: ][0-9])"
_INTERNATIONAL = re.compile(
    r"(?<![A-Za-z0-9_.+)])(?<![0-9] )(?:\+|00(?=[1-9]{2}[0-9]?[ ]))"
    r"[1-9](?:[ .\-/()\u00a0]{0,3}[0-9]){7,14}(?![A-Za-z0-9_])"
)
_NATIONAL_SHAPES = (
    # North America: (212) 555-0123, 1-800-555-0199, 202.555.0176
    r"(?:1[ .-])?(?:\([2-9][0-9]{2}\)[ .-]{0,2}|[2-9][0-9]{2}[ .-])[2-9][0-9]{2}[ .-][0-9]{4}",
    # area code in parentheses: (02) 5550 1234, (0161) 496 0000, (11) 91234-5678
    r"\(0[1-9][0-9]{0,3}\)[ -]?[0-9]{3,4}[ -]?[0-9]{3,4}",
    r"\([1-9][0-9]\) ?9?[0-9]{4}-[0-9]{4}",
    # France: 01 23 45 67 89
    r"0[1-9](?:[ .-][0-9]{2}){4}",
    # trunk 0: 020 7946 0958, 0171 1234567, 030/1234567, 03-1234-5678, 06-12345678
    r"0[1-9][0-9]{0,3}(?:(?: / |[ \-/])[0-9]{3,8}|[ -][0-9]{2}){1,4}",
    # Russia: 8 (912) 345-67-89
    r"8[ -]?\(?9[0-9]{2}\)?[ -][0-9]{3}[ -][0-9]{2}[ -][0-9]{2}",
    # Chinese mobiles: 138 0013 8000
    r"1[3-9][0-9][ -][0-9]{4}[ -][0-9]{4}",
)
_NATIONAL = re.compile(f"{_PHONE_STARTS}(?:{'|'.join(_NATIONAL_SHAPES)}){_PHONE_ENDS}")
_LABELLED = re.compile(rf"{_PHONE_STARTS}\(?[0-9](?:{_GAP}?[()]?{_GAP}?[0-9]){{6,11}}{_PHONE_ENDS}")
_PHONE_LABEL = re.compile(
    r"(?:(?i:\b(?:(?:tele|smart)?phone|tel|tlf|mobile|cell|fax|whats ?app|handy|telefon\w{0,2}"
    r"|portable|t[eé]l[eé]fono?|tel[eé]fon[eo]s?|m[oó]vil|celular|cellulare)\b)"
    r"|(?i:\b(?:call|text|ring|phone|ll[aá]mame|bel)(?: (?:me|us|him|her|them|al|op))?\b)"
    r"|\bmy #|电话|手机|電話|携帯|微信|전화|휴대폰|[Тт]ел(?:ефон)?|هاتف|โทร)"
    r"(?:[ _-]?(?i:numbers?|no|nr|num|号码?|番号))?[ \t.:：=\"'*()-]{0,6}"
    r"(?:(?i:is|at|on|est|ist|es|é|è|是|は)[ :\"']{1,3}|是|は、?)?\Z"
)
_OTHER_NUMBER = re.compile(
    r"\b(?:ref|reference|order|booking|invoice|ticket|serial|account|acct|isbn|iban|id)"
    r"(?: (?:no|number|nr|id)\b)?[.:# ]{0,3}\Z",
    re.IGNORECASE | re.ASCII,
)
_ZIP = re.compile(r"[0-9]{5}-[0-9]{4}\Z")
_DATE = re.compile(r"(?:19|20)[0-9]{2}[-./ ]?[01][0-9][-./ ]?[0-3][0-9]")


def _is_national(match: re.Match[str]) -> bool:
    another = _OTHER_NUMBER.search(_before(match, 16)) or _ZIP.match(match[0])
    return 9 <= len(_digits(match[0])) <= 12 and not another


def _is_labelled(match: re.Match[str]) -> bool:
    return bool(_PHONE_LABEL.search(_before(match, 40))) and not _DATE.match(match[0])


def _digits(text: str) -> str:
    return re.sub("[^0-9]", "", text)


def _before(match: re.Match[str], characters: int) -> str:
    return match.string[max(0, match.start() - characters) : match.start()]


# Payment cards

_CARD = re.compile(
    r"(?<![A-Za-z0-9_.+])(?<![0-9]-)(?:[0-9]{13,19}"
    r"|(?<![0-9] )(?:[0-9]{4}(?:[ -][0-9]{4}){3}(?:[ -]?[0-9]{1,3})?"
    r"|[0-9]{4}[ -][0-9]{6}[ -][0-9]{4,5})(?! [0-9]))"
    r"(?![A-Za-z0-9_])(?![.-][0-9])"
)
# (first and last prefix, lengths): ISO/IEC 7812 ranges of the networks
_NETWORKS = (
    ("4", "4", (13, 16, 19)),  # Visa
    ("51", "55", (16,)),  # Mastercard
    ("2221", "2720", (16,)),
    ("34", "34", (15,)),  # American Express
    ("37", "37", (15,)),
    ("6011", "6011", (16, 19)),  # Discover
    ("644", "659", (16, 19)),
    ("3528", "3589", (16, 19)),  # JCB
    ("300", "305", (14,)),  # Diners
    ("36", "36", (14,)),
    ("38", "39", (14,)),
    ("62", "62", (16, 17, 18, 19)),  # UnionPay
)


def _is_card(match: re.Match[str]) -> bool:
    digits = _digits(match[0])
    known = any(
        first <= digits[: len(first)] <= last and len(digits) in lengths
        for first, last, lengths in _NETWORKS
    )
    return known and _luhn(digits)


def _luhn(digits: str) -> bool:
    total = 0
    for i, digit in enumerate(reversed(digits)):
        doubled = int(digit) << (i % 2)
        total += doubled - 9 * (doubled > 9)
    return total % 10 == 0


# IP addresses

_QUAD = r"[0-9]{1,3}(?:\.[0-9]{1,3}){3}"
_IPV4 = re.compile(
    rf"(?:(?<![A-Za-z0-9_.:=-])(?:::(?i:ffff):)?|(?<=[A-Za-z0-9_][=:])){_QUAD}"
    r"(?![A-Za-z0-9_-])(?!\.[0-9A-Za-z])"
)
_IPV6 = re.compile(
    r"(?<![A-Za-z0-9_:.])(?:[23][0-9a-f]{3}|[fF][c-e][0-9a-f]{2})(?::[0-9a-f]{0,4}){2,7}"
    r"(?![A-Za-z0-9_:])",
    re.IGNORECASE | re.ASCII,
)
_NUMBERING = re.compile(
    r"\b(?:v|ver|versions?|release|build|revision|section|chapter|figure|fig|table|clause|article"
    r"|driver|firmware|package)[\"'.:= ]{0,3}\Z",
    re.IGNORECASE | re.ASCII,
)


def _is_no_version(match: re.Match[str]) -> bool:
    """Neither called a version or a section, nor four single digits (1.2.3.4), which may be one."""
    numbering = _NUMBERING.search(_before(match, 16))
    return len(match[0]) > 7 and _is_someones(match[0]) and not numbering


def _is_someones(address: str) -> bool:
    """A valid address that may tell one machine from another.

    Private, link-local and documentation ranges count: the first two describe somebody's network,
    the last is what careful people write instead.
    """
    try:
        ip = ipaddress.ip_address(address)
    except ValueError:
        return False
    if isinstance(ip, ipaddress.IPv6Address) and ip.ipv4_mapped:
        ip = ip.ipv4_mapped
    nobody = ip.is_loopback or ip.is_unspecified or ip.is_multicast
    return not nobody and not (ip.version == 4 and int(ip) >> 24 in (0, 255))


# Key-like secrets

_PREFIXED = re.compile(
    r"(?<![A-Za-z0-9])(?:"
    r"(?:AKIA|ASIA)[A-Z0-9]{16}"
    r"|sk-[A-Za-z0-9_-]{20,200}"
    r"|[srp]k_(?:live|test)_[A-Za-z0-9]{16,200}"
    r"|gh[pousr]_[A-Za-z0-9]{30,255}|github_pat_[A-Za-z0-9_]{22,255}|glpat-[A-Za-z0-9_-]{20,64}"
    r"|xox[abeprs]-[A-Za-z0-9-]{10,255}"
    r"|AIza[A-Za-z0-9_-]{35}"
    r"|hf_[A-Za-z0-9]{30,64}|npm_[A-Za-z0-9]{36}"
    r"|eyJ[A-Za-z0-9_-]{8,}\.eyJ[A-Za-z0-9_-]{8,}\.[A-Za-z0-9_-]{8,}"
    r")(?![A-Za-z0-9])"
)
_PEM = re.compile(
    r"-----BEGIN [A-Z ]{0,20}PRIVATE KEY-----"
    # not possessive, which Python 3.11.2 gets wrong here; nothing is tried twice all the same
    r"(?:(?:[^-]|-(?!----)){0,20000}-----END [A-Z ]{0,20}PRIVATE KEY-----"
    r"|(?:\s{1,4}[A-Za-z0-9+/=]{40,100})+)"  # cut off before its end
)
_IN_URL = re.compile(r"://[^\s/:@\"'<>]{0,64}:([^\s/@\"'<>]{3,128})@")
_BEARER = re.compile(r"(?i:bearer) {1,3}([A-Za-z0-9._~+/=-]{16,4096})")
_SECRET_NAMES = (
    r"(?i:password|passwort|passwd|passphrase|\bpass(?:code)?|pwd|token"
    r"|secret|secret[_-]?(?:access[_-]?)?key|(?:api|access|auth|private|account)[_-]?key"
    r"|contraseña|senha|mot de passe)"
    r"|密码|密碼|[Пп]ароль|パスワード|비밀번호"
)
_NAMED = re.compile(rf"(?:{_SECRET_NAMES})[\\\"'\]]{{0,3}}[ \t]{{0,8}}\Z", re.ASCII)
_ASSIGNED = re.compile(
    r"(?::=|=>|=(?!=)|:|：)(?=[ \t]{0,8}(?:"
    r"\\?([\"'`])([^\s\"'`\\]{6,256})\\?\1"
    r"|([^\s\"'`,;()<>\[\]{}，。；、]{6,256}+)(?![(\[{<])))"
)
_SAID = re.compile(
    r" (?:is|lautet|ist|es|est|was) (?=[\"'`]?([^\s\"'`,;<>]{7,128}[^\s\"'`,;<>.?!)]))"
)
_OPTION = re.compile(r"--(?:token|password|api-key)[ =]([^\s\"'`,;<>]{8,128})")
_STAND_IN = re.compile(
    r"\A[$%]|\$[{(]|[<{]|your|change_?me|placeholder|xxx|\*\*\*|\.\.\.|insert", re.I | re.A
)
_PATH = re.compile(r"[./~\\]|[A-Za-z]:[\\/]|https?:")


def _is_named(match: re.Match[str]) -> bool:
    value = match[match.lastindex or 0]
    return _is_password(value) and bool(_NAMED.search(_before(match, 40)))


def _is_random(key: str) -> bool:
    """Digits, and at least 3 bits a character: no stand-in such as sk-xxxx or sk-your-key-here."""
    counts = Counter(key).values()
    bits = -sum(n / len(key) * math.log2(n / len(key)) for n in counts)
    return bits >= 3 and _has_digit(key)


def _is_password(value: str) -> bool:
    """Letters and digits of five kinds at least, and neither a stand-in nor a path."""
    if _STAND_IN.search(value) or _PATH.match(value):
        return False
    return len(set(value)) >= 5 and _has_digit(value) and bool(re.search("[A-Za-z]", value))


def _has_digit(text: str) -> bool:
    return re.search("[0-9]", text) is not None


# the span of a value is that of the pattern's last group, or of the whole match
_DETECTORS: tuple[tuple[str, re.Pattern[str], Callable[[re.Match[str]], bool] | None], ...] = (
    ("key", _PEM, None),
    ("key", _PREFIXED, lambda match: _is_random(match[0])),
    ("key", _BEARER, lambda match: _is_random(match[1])),
    ("key", _IN_URL, lambda match: not _STAND_IN.search(match[1]) and _has_digit(match[1])),
    ("key", _ASSIGNED, _is_named),
    ("key", _SAID, lambda match: _is_named(match) and bool(re.search("[A-Z]", match[1]))),
    ("key", _OPTION, lambda match: _is_password(match[1])),
    ("email", _EMAIL, None),
    ("card", _CARD, _is_card),
    ("ip", _IPV6, lambda match: _is_someones(match[0])),
    ("ip", _IPV4, _is_no_version),
    ("phone", _INTERNATIONAL, None),
    ("phone", _NATIONAL, _is_national),
    ("phone", _LABELLED, _is_labelled),
)


# The first pass. Every alternative is what the patterns above cannot do without, in RE2's syntax.

_SUSPECT = "|".join(
    (
        # phone numbers and cards: seven digits with little between them
        r"[0-9](?:[ .\-/()\x{a0}]{0,3}[0-9]){6}",
        r"[0-9]\.[0-9]{1,3}\.[0-9]{1,3}\.[0-9]",
        r"(?i:[23][0-9a-f]{3}|f[c-e][0-9a-f]{2}):[0-9A-Fa-f]{0,4}:",
        r"@[A-Za-z0-9\x{c0}-\x{24f}.-]+\.[A-Za-z]{2}",
        r"[\[(](?i:at)[\])]| AT [A-Za-z0-9\x{c0}-\x{24f}-]+ DOT ",
        r"(?:AKIA|ASIA)[A-Z0-9]{4}|AIza|eyJ[A-Za-z0-9_-]{8}|PRIVATE KEY-----",
        r"sk-[A-Za-z0-9_-]{12}|[srp]k_(?:live|test)_|gh[pousr]_|github_pat_|glpat-",
        r"xox[abeprs]-|hf_[A-Za-z0-9]{8}|npm_[A-Za-z0-9]{8}",
        r"://[^\s/:@]*:[^\s/@]+@",
        r"(?i:bearer) {1,3}[A-Za-z0-9._~+/=-]{16}",
        rf"(?:{_SECRET_NAMES})[\\\"'\]]{{0,3}}[ \t]*[=:：]",
        rf"(?:{_SECRET_NAMES})[\\\"'\]]{{0,3}}[ \t]* (?:is|lautet|ist|es|est|was) ",
        r"--(?:token|password|api-key)[ =]",
    )
)


def suspects(texts: pa.Array | pa.ChunkedArray) -> np.ndarray:
    """bool (N,): which texts `find_pii` has to read; it finds nothing in the others.

    Args:
        texts: N strings; a null is no suspect.
    """
    found = pc.match_substring_regex(texts, _SUSPECT)
    return found.fill_null(False).to_numpy(zero_copy_only=False)


# Redaction


class Redactor:
    """Replaces values by <EMAIL_1>, <PHONE_2>, ...: one value, one placeholder, per conversation.

    Values are compared after normalisation (the case of e-mails, the separators of phone numbers
    and cards, the spelling of IP addresses) and numbered by first appearance. A placeholder that
    the conversation already holds, redacted before or literally written so, is never given anew.
    """

    def __init__(self, find: Finder = find_pii):
        self._find = find

    def redact(self, texts: Sequence[str]) -> tuple[list[str], Counter[str]]:
        """The messages of one conversation, redacted, and how many values of each kind were.

        A text without any is returned itself, not a copy. Redacting the result changes nothing.
        """
        names = _Names(texts)
        counts: Counter[str] = Counter()
        return [self._redact_one(text, names, counts) for text in texts], counts

    def _redact_one(self, text: str, names: "_Names", counts: Counter[str]) -> str:
        # again until nothing is left: a value may hide behind its neighbour until that is gone
        while spans := self._new(text):
            pieces, at = [], 0
            for span in spans:
                pieces += text[at : span.start], names.of(span.kind, text[span.start : span.end])
                at = span.end
                counts[span.kind] += 1
            text = "".join([*pieces, text[at:]])
        return text

    def _new(self, text: str) -> list[Span]:
        """Values that hold no part of a placeholder."""
        spans = self._find(text)
        if not spans or "<" not in text:
            return spans
        placeholders = [Span("", *match.span()) for match in PLACEHOLDER.finditer(text)]
        return [span for span in _first_come(text, [*placeholders, *spans]) if span.kind]


class _Names:
    """The placeholders of one conversation."""

    def __init__(self, texts: Sequence[str]):
        held = (match for text in texts if "<" in text for match in PLACEHOLDER.finditer(text))
        self._taken = {(match[1], int(match[2])) for match in held}
        self._numbers: Counter[str] = Counter()
        self._given: dict[tuple[str, str], str] = {}

    def of(self, kind: str, value: str) -> str:
        key = kind, _normal(kind, value)
        if key not in self._given:
            self._given[key] = self._next(kind.upper())
        return self._given[key]

    def _next(self, name: str) -> str:
        self._numbers[name] += 1
        while (name, self._numbers[name]) in self._taken:
            self._numbers[name] += 1
        return f"<{name}_{self._numbers[name]}>"


def _normal(kind: str, value: str) -> str:
    """What two spellings of one value have in common."""
    match kind:
        case "phone" | "card":
            return _digits(value)
        case "ip":
            with suppress(ValueError):  # presidio's may be a network
                return str(ipaddress.ip_address(value))
        case "email":
            plain = re.sub(r" ?[\[(]at[\])] ?| at ", "@", value.casefold())
            return re.sub(r" ?[\[(]dot[\])] ?| dot ", ".", plain)
    return value


# presidio

_PRESIDIO_KINDS = {
    "EMAIL_ADDRESS": "email",
    "PHONE_NUMBER": "phone",
    "CREDIT_CARD": "card",
    "IP_ADDRESS": "ip",
}
# neither addresses of pages nor dates, which presidio finds too, are anyone's
_PRESIDIO_OTHERS = ("PERSON", "LOCATION", "US_SSN", "IBAN_CODE", "CRYPTO", "MEDICAL_LICENSE")


def presidio_finder() -> Finder:
    """`find_pii`'s values, and what presidio finds beside them: "person", "location", "us_ssn", ...

    Names and places need a spaCy model of English; the largest installed one is taken. With none,
    presidio's patterns work alone: no name and no place is found, and nothing is downloaded.
    `suspects` knows nothing of names: have every message read, not only the suspects. presidio may
    look for a newer list of top-level domains in the network, and goes on with its own without one.

    Raises:
        SdpoError: presidio-analyzer is not installed.
    """
    try:
        from presidio_analyzer import AnalyzerEngine  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise SdpoError(
            "presidio-analyzer is not installed; run pip install 'sdpo[presidio]', or go without: "
            "e-mails, phones, cards, IP addresses and keys are found by pattern"
        ) from error
    analyzer = AnalyzerEngine(nlp_engine=_nlp_engine(), supported_languages=["en"])
    supported = set(analyzer.get_supported_entities("en"))
    kinds = _PRESIDIO_KINDS | {name: name.lower() for name in _PRESIDIO_OTHERS}
    entities = [name for name in kinds if name in supported]

    def find(text: str) -> list[Span]:
        results = analyzer.analyze(text, "en", entities=entities, score_threshold=0.4)
        results.sort(key=lambda r: (-r.score, r.start, r.end))
        theirs = [Span(kinds[r.entity_type], r.start, r.end) for r in results]
        return _first_come(text, [*find_pii(text), *theirs])

    return find


def _nlp_engine() -> Any:
    """spaCy for presidio, which would download a model by itself if it were left to it."""
    import spacy  # pyright: ignore[reportMissingImports]
    from presidio_analyzer.nlp_engine import (  # pyright: ignore[reportMissingImports]
        SpacyNlpEngine,
    )

    sizes = ("trf", "lg", "md", "sm")
    models = [m for m in spacy.util.get_installed_models() if m.startswith("en_core_")]
    models.sort(key=lambda m: sizes.index(m[-3:].strip("_")))
    name = models[0] if models else "blank:en"
    engine = SpacyNlpEngine(models=[{"lang_code": "en", "model_name": name}])
    engine.nlp = {"en": spacy.load(name) if models else spacy.blank("en")}
    return engine
