"""Log-probabilities of every response token, with and without the follow-up.

A `Reader` holds a model and its tokenizer. It takes interactions chunk by chunk, encodes them,
shares them over the data-parallel ranks and gives every rank a `Reading` of each; memory does not
grow with their number. `read_into` keeps what is made of the readings in a `Journal`, so that a
killed command goes on where it was.
"""

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, replace
from itertools import chain, islice
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from sdpo_kernels import linear_logprob
from sdpo_parallel.build import build_inference
from sdpo_parallel.fingerprints import fingerprints
from sdpo_parallel.huggingface import load_tokenizer, resolve_model
from sdpo_parallel.inference import Inference, InferenceConfig

from ..batching import Batch, BatchConfig, Rows, assign, collate, pack
from ..chat import chat_format, today
from ..errors import DataError
from ..hindsight import Encoded, encode, hindsight_ids
from ..interactions import Interaction
from ..step import own_share
from .journal import Journal
from .options import ReaderOptions

CHUNK = 64
"""Interactions per data-parallel rank that are shared out, read and kept together."""

Asked = tuple[Interaction, Sequence[str]]
"""An interaction, and further follow-ups to read its response under."""


@dataclass(frozen=True, kw_only=True)
class Reading:
    """One response's log-probabilities in nats: (response tokens,) float64 tensors on the CPU."""

    encoded: Encoded
    policy: Tensor
    """Without a follow-up."""
    hindsight: tuple[Tensor, ...]
    """With its own follow-up, then with each of the others."""

    @property
    def advantages(self) -> list[Tensor]:
        """log q(y_t) - log p(y_t) under each follow-up."""
        return [logp - self.policy for logp in self.hindsight]


class Reader(AbstractContextManager):
    """A model and its tokenizer, loaded once, on all ranks. Left as a context without an error, it
    leaves their process group.

    Args:
        decides: what of the model decides the readings, by name, as JSON values.
    """

    def __init__(
        self,
        inference: Inference,
        tokenizer: PreTrainedTokenizerBase,
        options: ReaderOptions,
        decides: Mapping[str, Any],
    ):
        self.inference, self.tokenizer, self.decides = inference, tokenizer, dict(decides)
        self.config = options.hindsight
        tokens = options.batch_tokens
        self.packing = BatchConfig(row_tokens=tokens // 8 or 1, micro_batch_tokens=tokens)
        self.row_multiple = inference.row_multiple
        if options.parallel.compile != "none":  # compiled blocks see one width
            self.row_multiple *= -(-self.packing.row_tokens // self.row_multiple)

    @classmethod
    def load(cls, model: str, options: ReaderOptions) -> "Reader":
        """Read with a model on the first GPU or else the CPU, or with its part of it on each rank.

        Args:
            model: Hugging Face folder, or name on the hub.

        Raises:
            SdpoError: the engine cannot be had, or does not fit the model or the ranks; or these
                have other files of the model.
        """
        folder = resolve_model(model)
        config = InferenceConfig(
            model=folder,
            max_tokens=options.hindsight.max_tokens,
            dtype=options.dtype,
            parallel=options.parallel,
        )
        inference = build_inference(options.engine, config)
        decides = {f"{name} of model": digest for name, digest in fingerprints(folder).items()}
        inference.check_agreement("the list of the model's files", ", ".join(decides))
        for name, digest in decides.items():
            inference.check_agreement(name, digest)
        inference.load()
        decides["dtype"] = " and ".join(config.dtypes(inference.device.type))
        return cls(inference, load_tokenizer(folder), options, decides)

    def __exit__(self, kind: type[BaseException] | None, *exc: object) -> None:
        if kind is None:
            self.inference.close()

    def read(self, asked: Iterable[Asked]) -> Iterator[Reading]:
        """Readings in the order of ``asked``, on every rank.

        Args:
            asked: the same on every rank; all interactions have as many further follow-ups.

        Raises:
            DataError: a response's log-probabilities are not finite.
        """
        return chain.from_iterable(self.chunks(asked))

    def chunks(
        self, asked: Iterable[Asked], tell: Callable[[int], object] = lambda count: None
    ) -> Iterator[list[Reading]]:
        """`read`, by the chunks that are read together.

        Args:
            tell: told of every micro-batch how many interactions all ranks have read in it.
        """
        asked = iter(asked)
        size = CHUNK * self.inference.ranks.dp_degree
        while chunk := list(islice(asked, size)):
            yield self._chunk(chunk, tell)

    def _chunk(self, chunk: Sequence[Asked], tell: Callable[[int], object]) -> list[Reading]:
        encoded = [encode(i, self.tokenizer, self.config) for i, _ in chunk]
        place = {id(e): n for n, e in enumerate(encoded)}
        ranks = self.inference.ranks
        assigned = assign(
            [(e, 1.0) for e in encoded], ranks.dp_degree, self.packing, self.row_multiple
        )
        mine: dict[int, NDArray[np.float32]] = {}
        for groups in assigned.micro_batches:
            places = [place[id(e)] for e, _ in groups[ranks.dp_rank]]
            mine |= self._micro_batch(places, encoded, chunk)
            tell(sum(map(len, groups)))
        found = {n: logps for part in self.inference.gather(mine) for n, logps in part.items()}
        return [self._reading(e, found[n]) for n, e in enumerate(encoded)]

    def _reading(self, encoded: Encoded, logps: NDArray[np.float32]) -> Reading:
        """From the log-probabilities, (passes, response tokens)."""
        if not np.isfinite(logps).all():
            raise DataError(
                f"interaction {encoded.id}: its log-probabilities are not finite, as the model "
                "overflows in this dtype",
                hint="Try --dtype float32",
            )
        policy, *hindsight = torch.from_numpy(logps).double()
        return Reading(encoded=encoded, policy=policy, hindsight=tuple(hindsight))

    def _micro_batch(
        self, places: Sequence[int], encoded: Sequence[Encoded], chunk: Sequence[Asked]
    ) -> dict[int, NDArray[np.float32]]:
        """Place in the chunk -> log-probabilities, (passes, response tokens), of the responses that
        are this rank's among those of a micro-batch."""
        members = [encoded[n] for n in places]
        row_tokens, multiple = self.packing.row_tokens, self.row_multiple
        batch = collate([(e, 1.0) for e in members], row_tokens, multiple)
        others: list[Rows] = []
        for k in range(len(chunk[0][1])):
            prompts = [self._hindsight(chunk[n][0], encoded[n], chunk[n][1][k]) for n in places]
            pairs = [(p, e.response) for p, e in zip(prompts, members, strict=True)]
            others.append(pack(pairs, row_tokens, multiple))
        with self.inference.context():
            logps = self._log_probs(batch.to(self.inference.device), others)
        mine = self.inference.model.own_responses(batch.lengths)
        own = places if mine is None else [places[m] for m in mine]
        if not own:
            return {}
        split = np.cumsum([len(encoded[n].response) for n in own])[:-1]
        return dict(zip(own, np.split(logps.cpu().numpy(), split, axis=1), strict=True))

    @torch.no_grad()
    def _log_probs(self, batch: Batch, others: Sequence[Rows]) -> Tensor:
        """(passes, N) float32 of this rank's response tokens: policy, hindsight, then others."""
        model, kept_N = self.inference.model, slice(None)
        own = own_share(model, batch)
        passes = [batch.policy, batch.hindsight, *others]
        if own is not None:
            batch, kept_N = own
        logps = []
        for rows in passes:
            at = (t.to(self.inference.device) for t in vars(rows).values())
            hidden_ND, head = model.hidden_states(*at)[kept_N], model.lm_head()
            out = linear_logprob(hidden_ND, head.weight, batch.targets_N, **head.options)
            logps.append(out.logp)
        return torch.stack(logps).float()

    def _hindsight(self, interaction: Interaction, own: Encoded, followup: str) -> tuple[int, ...]:
        """The hindsight prompt with another follow-up, cut as `encode` cuts it."""
        chat = chat_format(self.tokenizer, self.config.date)
        prompt = hindsight_ids(chat, interaction.prompt, followup, self.config, thought=own.thought)
        return prompt.ids


def read_into(
    journal: Journal,
    reader: Reader,
    asked: Iterable[Asked],
    row: Callable[[Reading], Any],
    *,
    header: Mapping[str, Any],
    total: int,
    says: str,
) -> None:
    """Read what the journal lacks, with a progress bar; the main rank alone keeps and shows.

    Args:
        asked: all interactions of the command, the same on every rank.
        row: what is kept of a reading, as JSON values.
        header: what decides the rows, beside the model and how it reads.
        total: number of interactions.
        says: what the progress bar says.

    Raises:
        SdpoError: the ranks were started with different things, or see `Journal`.
    """
    place = reader.inference
    for name, value in header.items():
        place.check_agreement(name, value)

    def start() -> tuple[int, str]:
        asked_for = reader.config.date
        decides = asdict(replace(reader.config, date=asked_for or today())) | reader.decides
        keeps = () if asked_for else ("date",)  # where it is already tomorrow
        holds = journal.open({**header, **decides}, keeps=keeps)
        if journal.count:
            told = f"{journal.count:,} of {total:,} interactions have been read already"
            print(f"sdpo: {journal.path}: {told}", file=sys.stderr)
        return journal.count, holds["date"]

    done, date = place.on_main(start)
    reader.config = replace(reader.config, date=date)
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()
    with Progress(*columns, TimeRemainingColumn(), disable=not place.ranks.is_main) as bar:
        task = bar.add_task(says, total=total, completed=done)
        todo = islice(asked, done, None)
        for readings in reader.chunks(todo, lambda count: bar.advance(task, count)):
            place.on_main(lambda readings=readings: journal.append(map(row, readings)))
