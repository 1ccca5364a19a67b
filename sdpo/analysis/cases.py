"""`sdpo signal-cases`: a model's answers to requests of ours, each with follow-ups that are about
it and follow-ups that are not.

The requests are in cases.toml. Each makes two interactions: its own follow-up praises the answer
and asks to keep it so, or complains and asks for a rewrite; under ``irrelevant`` stands one that
has nothing to do with the answer. `sdpo signal` reads the file under all of them.
"""

import random
import tomllib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple

import tyro

from ..conversations import Message
from ..errors import SdpoError
from ..interactions import Interaction
from .conditions import Case, write_cases

if TYPE_CHECKING:
    from ..chat import ChatFormat

FILE = Path(__file__).with_name("cases.toml")
KINDS = ("praise", "complaint")


class Request(NamedTuple):
    """A case without its answer; all but ``prompt`` as in `Case`."""

    id: str
    prompt: str
    followup: str
    irrelevant: str
    kind: str


@dataclass(frozen=True, kw_only=True)
class AnswerOptions:
    """How the model answers. What its own generation config says does not count."""

    temperature: float = 0.0
    """Logits are divided by it before a token is drawn from all of them; 0: the likeliest token."""
    max_new_tokens: int = 256
    """Longer answers are cut."""
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    """Precision of the weights; auto is bfloat16 on a GPU and float32 on a CPU."""
    batch: int = 8
    """Answers that are written at a time."""

    def __post_init__(self):
        if self.temperature < 0 or self.max_new_tokens < 1 or self.batch < 1:
            raise SdpoError(
                "temperature must be at least 0, max_new_tokens and batch at least 1: got "
                f"{self.temperature}, {self.max_new_tokens} and {self.batch}"
            )


@cache
def requests() -> tuple[Request, ...]:
    """Every request with either kind of follow-up, in the file's order."""
    return tuple(
        Request(f"{case['name']}_{k}", case["prompt"], case[kind], case["irrelevant"][k], kind)
        for case in _file()["case"]
        for k, kind in enumerate(KINDS)
    )


def draw(count: int, seed: int) -> list[Request]:
    """Requests to which a wish for a length was added, none drawn twice.

    Raises:
        SdpoError: there are not so many.
    """
    lengths = _file()["lengths"]
    pairs = [(request, n) for request in requests() for n in range(len(lengths))]
    if not 1 <= count <= len(pairs):
        raise SdpoError(f"rows must be 1 to {len(pairs)}, got {count}")
    return [
        request._replace(id=f"{request.id}~{n}", prompt=f"{request.prompt} {lengths[n]}")
        for request, n in random.Random(seed).sample(pairs, count)
    ]


@cache
def _file() -> dict[str, Any]:
    return tomllib.loads(FILE.read_text(encoding="utf-8"))


def signal_cases(
    model: str,
    out: str | Path,
    options: AnswerOptions,
    *,
    rows: int | None = None,
    seed: int = 0,
) -> None:
    """Let a model answer the requests and write the interactions; see `command`."""
    from sdpo_parallel.huggingface import load_tokenizer, resolve_model  # torch: seconds

    from ..chat import chat_format

    asked = requests() if rows is None else draw(rows, seed)
    folder = resolve_model(model)
    tokenizer: Any = load_tokenizer(folder)
    chat = chat_format(tokenizer)
    prompts = list(dict.fromkeys(request.prompt for request in asked))  # answered once each
    answers = dict(zip(prompts, _answers(folder, chat, prompts, options, seed), strict=True))
    cases = []
    for request in asked:
        ids = answers[request.prompt]
        interaction = Interaction(
            id=request.id,
            prompt=(Message("user", request.prompt),),
            response=tokenizer.decode(ids, skip_special_tokens=True),
            followup=request.followup,
            response_token_ids=tuple(ids),
        )
        others = {"irrelevant": request.irrelevant}
        cases.append(Case(interaction=interaction, followups=others, kind=request.kind))
    write_cases(out, cases)


def _answers(
    folder: str, chat: "ChatFormat", prompts: Sequence[str], options: AnswerOptions, seed: int
) -> Iterator[list[int]]:
    """Ids of an answer to each prompt, with the token that ends it unless it was cut."""
    import torch
    from transformers import AutoModelForCausalLM, GenerationConfig
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    device, auto = ("cuda", "bfloat16") if torch.cuda.is_available() else ("cpu", "float32")
    dtype = getattr(torch, auto if options.dtype == "auto" else options.dtype)
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    model = model.to(device).eval()
    drawn = {"do_sample": True, "temperature": options.temperature, "top_k": 0}
    model.generation_config = GenerationConfig(  # whole, as generate fills gaps from the model's
        max_new_tokens=options.max_new_tokens,
        eos_token_id=sorted(chat.end_ids),
        pad_token_id=min(chat.end_ids),
        **(drawn if options.temperature else {"do_sample": False}),
    )
    torch.manual_seed(seed)
    ids = [chat.prompt_ids([Message("user", prompt)]) for prompt in prompts]
    for start in range(0, len(ids), options.batch):
        part = ids[start : start + options.batch]
        longest = max(map(len, part))
        tokens = [[0] * (longest - len(prompt)) + prompt for prompt in part]
        seen = [[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in part]
        with torch.inference_mode():
            written = model.generate(
                torch.tensor(tokens, device=device),
                attention_mask=torch.tensor(seen, device=device),
            )
        yield from (chat.sampled_ids(row)[0] for row in written[:, longest:].tolist())


def command(
    *,
    model: str,
    out: str,
    options: Annotated[AnswerOptions, tyro.conf.arg(name="")],
    rows: int | None = None,
    seed: int = 0,
) -> None:
    """Let a model answer requests of ours, to look at its signal in, with `sdpo signal`.

    Args:
        model: any causal LM: a local Hugging Face folder, or a name on the hub.
        out: JSONL file of interactions to write.
        rows: number of requests to draw, each with a wish for a length added to it; None: every
            request with either kind of follow-up, as it is.
        seed: decides which requests are drawn, and what is sampled at a temperature above 0.
    """
    signal_cases(model, out, options, rows=rows, seed=seed)
