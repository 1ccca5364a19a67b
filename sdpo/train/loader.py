"""From a file of interactions and a place in it to this rank's micro-batches.

    loader = Loader(interactions, tokenizer, config.hindsight, config.batch)
    loader.assign_to(engine)
    for step in loader:
        ...  # step.micro_batches: this rank's, ready to be moved to its device

Every rank reads and tokenizes all interactions of a step and keeps its share (`batching.assign`),
one step ahead while the devices compute. The cursor counts over all ranks, so that a run resumes on
any layout.
"""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from transformers import PreTrainedTokenizerBase

from sdpo_parallel.config import Frozen
from sdpo_parallel.engine import ROW_MULTIPLE, Engine
from sdpo_parallel.fingerprints import fingerprints
from sdpo_parallel.huggingface import read_config
from sdpo_parallel.rows import Sharing

from ..batching import (
    Batch,
    BatchConfig,
    Cursor,
    Example,
    Stream,
    assign,
    collate,
    unit_of,
)
from ..chat import chat_format
from ..errors import DataError
from ..hindsight import (
    ALONE,
    KEEP_THOUGHTS,
    ONLY_A_THOUGHT,
    Encoded,
    HindsightConfig,
    Reading,
    as_read,
    encode,
    has_answer,
    resolve_template,
)
from ..interactions import Interaction, iter_interactions
from ..io.files import sha256
from ..objective import SampledToken
from .config import RunConfig, TrainConfig
from .selection import Selection, choose, selection_sha256


@dataclass(frozen=True)
class Step:
    """One optimizer step's data, as one rank sees it."""

    micro_batches: list[Batch]
    """This rank's; as many on every rank, some perhaps without a token."""
    tokens: list[int]
    """Tokens of both passes by data-parallel rank, padding not included."""
    idle: float
    """Share of the step that the average rank waits for the busiest, estimated."""
    metrics: Mapping[str, float] = field(default_factory=dict)
    """What else there is to log of it."""


class Packer:
    """Interactions of a step -> this rank's micro-batches.

    Args:
        reading, sampled_thought: as `encode` takes them.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        hindsight: HindsightConfig,
        batch: BatchConfig,
        reading: Reading = "hindsight",
        sampled_thought: bool | None = None,
    ):
        self.reading: Reading = reading
        self.sampled_thought = sampled_thought
        self.tokenizer, self.hindsight, self.batch = tokenizer, hindsight, batch
        self.dp_rank, self.dp_degree, self.row_multiple = 0, 1, ROW_MULTIPLE
        self.sharing: Sharing = "none"

    def assign_to(self, engine: Engine, *, fixed_width: bool = False) -> None:
        """Hand out the share of an engine's rank, in rows of a width that its layout can split.

        Args:
            fixed_width: pad every row to ``batch.row_tokens``, so that compiled blocks see one
                width.
        """
        self.dp_rank, self.dp_degree = engine.ranks.dp_rank, engine.ranks.dp_degree
        self.row_multiple, self.sharing = engine.row_multiple, engine.sharing
        if self.sharing == "keys" and self.reading in ALONE:
            self.sharing = "tries"  # no pass reads on them
        if fixed_width:
            self.row_multiple *= -(-self.batch.row_tokens // engine.row_multiple)

    def pack(self, interactions: Sequence[Interaction]) -> Step:
        """All of them as one step; weights are normalised over it."""
        total = sum(i.weight for i in interactions) or 1.0
        examples: list[Example] = [(self._encoded(i), i.weight / total) for i in interactions]
        layout = self.row_multiple, self.sharing
        assigned = assign(examples, self.dp_degree, self.batch, *layout)
        return Step(
            micro_batches=[
                collate(mine, self.batch.row_tokens, *layout, reading=self.reading)
                for mine in assigned.of(self.dp_rank)
            ],
            tokens=assigned.tokens,
            idle=assigned.idle,
        )

    def _encoded(self, interaction: Interaction) -> Encoded:
        thought, reading = self.sampled_thought, self.reading
        options = self.tokenizer, self.hindsight
        return encode(interaction, *options, sampled_thought=thought, reading=reading)


class Loader(Packer):
    """This rank's micro-batches, step by step, from the cursor's place to the end of the run.

    ``cursor`` is what a checkpoint keeps; it begins at the start.
    """

    def __init__(
        self,
        interactions: Sequence[Interaction],
        tokenizer: PreTrainedTokenizerBase,
        hindsight: HindsightConfig,
        batch: BatchConfig,
        reading: Reading = "hindsight",
    ):
        super().__init__(tokenizer, hindsight, batch, reading)
        self.interactions = interactions
        self.stream = Stream((unit_of(i, batch) for i in interactions), batch)
        self.steps = self.stream.steps
        self.cursor = Cursor(self.stream.n, batch.seed)
        self._pool = ThreadPoolExecutor(1)

    def __iter__(self) -> Iterator[Step]:
        """The cursor moves on as a step is handed out."""
        places = self.stream.step(self.cursor.consumed)
        ahead = None
        while places:
            step = self.step(places) if ahead is None else ahead.result()
            self.cursor.consumed += len(places)
            if places := self.stream.step(self.cursor.consumed):
                ahead = self._pool.submit(self.step, places)
            yield step

    def step(self, places: Sequence[int]) -> Step:
        """The interactions at these places in the data as one step."""
        return self.pack([self.interactions[i] for i in places])


def load_interactions(
    config: TrainConfig, tokenizer: PreTrainedTokenizerBase | None = None
) -> Selection:
    """The run's interactions, checked against what its objective and its model need.

    Args:
        tokenizer: also checks that there is an answer behind each response's thought.

    Raises:
        DataError: a row is not what training needs; file, row and field are named.
    """
    selection = choose(iter_interactions(config.data), config.select)
    if not selection.interactions:
        raise DataError(
            "no interactions", file=config.data, hint="Did `sdpo data prepare` keep any?"
        )
    clips = isinstance(config.objective, SampledToken) and config.objective.needs_old_logprobs
    vocabulary, reading = read_config(config.model)["vocab_size"], config.objective.reading
    read: list[Interaction] = []
    for i in selection.interactions:
        try:
            read += as_read(i, reading)
        except DataError as error:
            raise error.at(file=config.data) from None
        place = {"file": config.data, "row": f"interaction {i.id}"}
        if clips and i.response_logprobs is None:
            problem = "missing, but ppo_clip and importance_clip need them"
            hint = "Unset the clip, or log the log-probabilities with the responses"
            raise DataError(problem, field="completion_logprobs", hint=hint, **place)
        if (largest := max(i.response_token_ids or (0,))) >= vocabulary:
            problem = f"an id of {largest} is beyond the vocabulary of {config.model}, {vocabulary}"
            hint = "Were the rollouts sampled from another model?"
            raise DataError(problem, field="completion_token_ids", hint=hint, **place)
    if tokenizer is not None:
        chat, thinking = chat_format(tokenizer, config.hindsight.date), config.hindsight.thinking
        empty = [i for i in read if not has_answer(i, chat, thinking)]
        if empty:
            problem = f"{ONLY_A_THOUGHT} (so in {len(empty):,} rows)"
            place = {"file": config.data, "row": f"interaction {empty[0].id}"}
            raise DataError(problem, field="completion", hint=KEEP_THOUGHTS, **place)
    return selection


def fingerprint(config: TrainConfig) -> str:
    """SHA-256 of the interactions file; with a selection, "+" and that of settings and scores."""
    data = sha256(config.data)
    return f"{data}+{selection_sha256(config.select)}" if config.select.selects else data


def run_inputs(config: RunConfig) -> dict[str, str]:
    """What decides how a run computes, beside its settings and data -> a digest of it: the model's
    files, those of another teacher, the text of the hindsight template.

    Args:
        config: with models as local folders.
    """
    template = hashlib.sha256(resolve_template(config.hindsight.template).encode()).hexdigest()
    found = {"hindsight.template": template}
    found |= {f"{name} of model": digest for name, digest in fingerprints(config.model).items()}
    if isinstance(config.teacher, Frozen) and config.teacher.folder is not None:
        theirs = fingerprints(config.teacher.folder).items()
        found |= {f"{name} of teacher": digest for name, digest in theirs}
    return found
