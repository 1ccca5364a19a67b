"""Follow-ups that would take over the hindsight context instead of reacting to the response.

The hindsight context shows the follow-up, as it is, to the model that judges the response. A
follow-up that closes or imitates the template, fakes a turn or gives the model orders would be
learned from as if it were feedback.

Marks of the templates and chat-control tokens are caught anywhere: to a tokenizer a quotation is
the real thing, so a question about such tokens is caught too. Lines that begin like a turn are
caught, and plain words only where they read as an order to the model.
`python -m benchmarks.guardrails` measures how well this works.
"""

import re
import unicodedata
from functools import cache

from ...hindsight import TEMPLATES

INJECTION_REASONS = ("template mark", "control token", "fake turn", "order to the model")

_INVISIBLE = re.compile("[\u00ad\u034f\u180e\u200b-\u200f\u202a-\u202e\u2060-\u2064\ufeff]")
# Cyrillic and Greek letters that look Latin
_LOOKALIKES = str.maketrans("аеорсухіјѕԁԛԝһοανρτυ", "aeopcyxijsdqwhoavptu")

_TOKEN = re.compile(
    # ChatML, Llama 3, Phi, GPT-OSS, Command R; DeepSeek, whose wide bar NFKC makes an ordinary one
    r"<\|[a-z][a-z0-9_▁]{0,40}\|>"
    # Llama 2, Mistral
    r"|\[/?inst\]|<</?sys>>|\[/?(?:system_prompt|available_tools|tool_calls|tool_results)\]"
    # Gemma, SentencePiece
    r"|</?(?:start_of_turn|end_of_turn|bos|s)>"
    # reasoning, tools, turns as tags
    r"|</?(?:think|thinking|tool_call|tool_response|system|assistant|user|human)>"
)
_TURN = re.compile(
    r"\n[ \t>]*(?:#{1,6}[ \t]*)?\*{0,2}"
    r"(?:system(?: prompt| message| override)?|assistant|(?<!\A\n)(?:human|user|ai))"
    r"\*{0,2}[ \t]*:\*{0,2}\s*\S"
    r"|\n[ \t]*#{1,6}[ \t]*(?:system|assistant|human|user|instruction)[ \t]*[:\n#]"
    r"|\{\s*\"role\"\s*:\s*\"[a-z]+\"\s*,\s*\"content\""
)

_RULES = (
    r"(?:instructions?|(?:system )?prompts?|guidelines?|guardrails?|rules|restrictions?"
    r"|polic(?:y|ies)|filters?|directives?)"
)
_WHOSE = (
    r"(?:(?:all|any|every|of|the|these|those|your|ur|my|previous|prior|earlier|preceding|above"
    r"|initial|original|existing|current|system|safety|content|ethical|usage) )"
)
_IGNORE = (
    r"(?:ignore|disregard|forget|override|bypass|drop|violate|do not follow|don't follow"
    r"|do not obey|stop (?:following|obeying))"
)
# where an order begins: not in the middle of a sentence, and not quoted
_ORDER = (
    r"(?:^[\"'(\[ ]*|[.!?;:,)\]*] ?"
    r"|\b(?:please|pls|plz|and|then|now|just|so|but|must|should|you to) )"
)
_ANSWER = r"(?:answer|response|reply|output|completion)"
_SAY = r"(?:respond|reply|answer|output|say|print|write|return)"

# (words of which a text must hold one, the wording): the words alone are quick to look for
_WORDINGS = (
    # drop what you were told
    (
        "instruction prompt guideline guardrail rule restriction polic filter directive",
        rf"{_ORDER}{_IGNORE} {_WHOSE}{{1,6}}{_RULES}\b",
    ),
    (
        "ignore disregard forget",
        rf"{_ORDER}(?:ignore|disregard|forget) (?:all (?:of )?)?(?:the above"
        r"|what (?:you were told|i said)|everything"
        r" (?:above|before|you (?:know|were told)|(?:that )?(?:i|we|was) (?:have )?"
        r"(?:said|told|wrote)))(?: before| earlier| so far)?(?=$|[.,!;:]| and| but| then)",
    ),
    (
        "pretend act imagine behave",
        r"\b(?:pretend|act as if|act like|imagine|behave as if) (?:[a-z]+ ){1,5}?"
        rf"(?:no|without(?: any)?|free of(?: all)?) (?:[a-z]+ ){{0,2}}{_RULES}\b(?! of\b)",
    ),
    (
        "apply void lifted",
        rf"\b(?:your|all|previous|prior|earlier) (?:[a-z]+ ){{0,2}}?{_RULES} "
        r"(?:no longer apply|do not apply|don't apply|are (?:now )?(?:void|lifted|suspended))",
    ),
    # be someone else
    (
        "you_are_now",
        r"\byou are now (?:called |named |dan\b|in [a-z]+ mode\b|[a-z]+(?:bot|gpt)\b"
        r"|an? (?:[a-z]+ ){0,3}(?:model|ai|assistant|bot|persona)\b"
        r"|(?:free|unrestricted|uncensored|unfiltered|jailbroken)\b)",
    ),
    (
        "no_longer anything_now act_as",
        r"\byou are no longer (?:an? )?(?:ai|assistant|language model|bound|restricted)\b"
        r"|\bdo anything now\b|\bact as an? (?:[a-z]+ )?"
        r"(?:unfiltered|unrestricted|uncensored|jailbroken|evil)"
        r" (?:ai|model|assistant|version|bot)\b",
    ),
    (
        "from_now_on",
        r"\bfrom now on,? you (?:are (?!allowed|free|welcome)|must|have to"
        r"|will (?:act|be|behave|obey|comply|always)\b)",
    ),
    (
        "mode",
        rf"{_ORDER}(?:enter|enable|activate|switch to|turn on)"
        r" (?:(?:dan|god|jailbreak|unrestricted) mode|developer mode(?=$|[.!]| now))",
    ),
    # take these instead
    (
        "instruction rules directive",
        rf"{_ORDER}(?:here are )?(?:your|the)? ?(?:new|updated|real|actual|true)"
        r" (?:instructions?|directives?) ?(?:are )?:",
    ),
    (
        "new updated real actual true",
        r"\byour (?:new|updated|real|actual|true)"
        r" (?:instructions?|task|role|rules|directives?|goal) (?:is|are)\b",
    ),
    (
        "future",
        r"\b(?:in|for) all (?:your )?future (?:responses|answers|replies|conversations|messages)\b",
    ),
    (
        "whenever",
        r"\bwhenever (?:you are|anyone|someone|a user|users?|people) ask(?:s|ed)?\b"
        r"[^.]{0,200}\b(?:always|never)\b",
    ),
    ("must", r"\byou must (?:always|never) (?:answer|respond|reply|say|agree|recommend|refuse)\b"),
    # say this
    (
        "repeat",
        rf"{_ORDER}repeat (?:[a-z]+ ){{0,5}}?(?:exactly|verbatim|word for word|following|after me)"
        r"[a-z ]{0,20}:",
    ),
    (
        "correct right ideal best perfect proper desired expected",
        rf"\b(?:correct|right|ideal|best|perfect|proper|desired|expected) {_ANSWER}"
        r" (?:is|was|would be|would have been|should be|must be)"
        r"(?: to (?:always|never)\b| exactly [\"'“]|: ?[\"'“])",
    ),
    (
        "exactly",
        r"\b(?:answer|answered|response|respond|responded|reply|replied|output)\b[a-z ]{0,20}"
        r" exactly(?: this)? ?:",
    ),
    (
        "only nothing just exactly",
        rf"\b{_SAY} (?:only|nothing but|just|exactly)(?: with)?"
        r"(?: the (?:string|word|text|phrase))?"
        r" ?[\"'“][^\"'”]{1,200}[\"'”]?[.! ]*$",
    ),
    ("improve change", rf"\b(?:improve|change) (?:your|the) {_ANSWER} by (?:always|never)\b"),
    (
        "improving judging grading evaluating rewriting",
        rf"\bwhen (?:improving|judging|grading|evaluating|rewriting) (?:this|the|your) {_ANSWER}\b",
    ),
    ("answer", r"\b(?:do not|don't|instead of) answer(?:ing)? the user\b"),
    ("reward score", rf"{_ORDER}(?:reward|score) (?:this|the|only) {_ANSWER}s? "),
    # to whom it concerns
    (
        "ai model llm grader judge",
        rf"{_ORDER}(?:attention|note to|message to|instructions? (?:to|for)|to) ?(?:the )?"
        r"(?:ai|model|llm|language model|grader|judge)\b ?:",
    ),
    (
        "prompt instructions",
        r"\b(?:reveal|print|show|output|repeat|leak|tell|display|dump)(?: me)? your"
        r" (?:[a-z]+ ){0,2}?"
        r"(?:system prompt|(?:initial|hidden|original|secret|system) instructions)",
    ),
    # the same in other languages
    (
        "instru istru consignes regole reglas regras règles",
        r"\b(?:ignor[ae]|ignorez|olvida|oubliez?|esqueça|dimentica|desconsidere) (?:\w+ ){0,3}"
        r"(?:instru\w+|istru\w+|consignes|reg(?:ole|las|ras)|règles)"
        r" (?:anterior|previ|precedent|précédent|de arriba|ci-dessus)",
    ),
    (
        "anweisung instruktion regel",
        r"\b(?:ignorier\w*|vergiss|vergessen sie|missachte\w*) (?:\w+ ){0,3}"
        r"(?:vorherig|bisherig|obig|früher)\w* (?:anweisung|instruktion|regel)",
    ),
    ("игнорируй забудь", r"(?:игнорируй|забудь)\w* (?:\w+ ){0,3}(?:инструкци|указани|правил)"),
    (
        "忽略 无视 無視 忘记 忽視 遵守",
        r"(?:忽略|无视|無視|忘记|忽視|不要遵守|不用遵守)[^。\n]{0,8}(?:指令|指示|提示|规则|規則)"
        r"|(?:指示|命令|ルール|プロンプト)[をは]?(?:すべて|全て|全部)?無視",
    ),
    ("무시 잊", r"(?:지시|명령|규칙)\S{0,3} ?(?:모두 |전부 )?(?:무시|잊)"),
)
_WORDING = [
    (tuple(word.replace("_", " ") for word in words.split()), re.compile(pattern))
    for words, pattern in _WORDINGS
]


def injection(followup: str) -> str | None:
    """Why a follow-up counts as an injection, one of INJECTION_REASONS; None if it does not.

    Read after NFKC and casefolding, without invisible characters, and once more with Cyrillic and
    Greek letters that look Latin made so.
    """
    plain = _INVISIBLE.sub("", unicodedata.normalize("NFKC", followup).casefold())
    latin = plain.translate(_LOOKALIKES)
    for text in [plain] if latin == plain else [plain, latin]:
        if reason := _reason(text):
            return reason
    return None


def _reason(text: str) -> str | None:
    patterns = _template_mark(), _TOKEN, _TURN
    for reason, pattern in zip(INJECTION_REASONS, patterns, strict=False):
        if pattern.search(f"\n{text}"):
            return reason
    words = " ".join(text.split()).replace("’", "'")
    return INJECTION_REASONS[-1] if _is_order(words) else None


def _is_order(text: str) -> bool:
    for words, pattern in _WORDING:
        for word in words:
            if word in text:
                if pattern.search(text):
                    return True
                break
    return False


@cache
def _template_mark() -> re.Pattern[str]:
    """Any sentence or heading of a template, whatever stands between and around its words."""
    sentences = {
        tuple(words)
        for template in TEMPLATES.values()
        for sentence in re.split(r"\n|(?<=[.:\]]) ", template.replace("{followup}", "\n"))
        if len(words := re.findall(r"\w+", sentence.casefold())) > 1
    }
    marks = (r"\W+".join(words) for words in sorted(sentences))
    return re.compile(rf"\b(?:{'|'.join(marks)})\b")
