"""Log-probabilities of every response token, with and without the follow-up.

A `Reader` holds a model and its tokenizer. It takes interactions chunk by chunk, encodes them,
shares them over the data-parallel ranks and gives every rank a `Reading` of each; memory does not
grow with their number. `read_into` keeps what is made of the readings in a `Journal`, so that a
killed command goes on where it was.
"""

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, replace
from itertools import chain, islice
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from sdpo_kernels import linear_logprob
from sdpo_parallel.build import build_inference
from sdpo_parallel.fingerprints import fingerprints
from sdpo_parallel.huggingface import load_tokenizer, resolve_model
from sdpo_parallel.inference import Inference, InferenceConfig
from sdpo_parallel.rows import Sharing

from ..batching import BatchConfig, Example, assign, pack_passes, pairs_of
from ..chat import chat_format, today
from ..errors import DataError
from ..hindsight import Encoded, encode, hindsight_ids
from ..interactions import Interaction
from ..io.progress import progress
from ..step import two_passes
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
        self.sharing: Sharing = "keys" if inference.model.reads_tries else "none"
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

        def encoded() -> list[Encoded]:
            return [self._encoded(*each) for each in islice(asked, size)]

        with ThreadPoolExecutor(1) as ahead:  # tokenizes while the devices compute
            chunk = encoded()
            while chunk:
                coming = ahead.submit(encoded)
                yield self._chunk(chunk, tell)
                chunk = coming.result()

    def _encoded(self, interaction: Interaction, followups: Sequence[str]) -> Encoded:
        """With the hindsight prompts of further follow-ups, cut as `encode` cuts its own."""
        own = encode(interaction, self.tokenizer, self.config)
        chat = chat_format(self.tokenizer, self.config.date)
        prompts = (
            hindsight_ids(chat, interaction.prompt, followup, self.config, thought=own.thought)
            for followup in followups
        )
        return replace(own, further=tuple(prompt.ids for prompt in prompts))

    def _chunk(self, chunk: Sequence[Encoded], tell: Callable[[int], object]) -> list[Reading]:
        examples = [(e, 1.0) for e in chunk]
        place = {id(e): n for n, e in enumerate(chunk)}
        ranks, passes = self.inference.ranks, 2 + len(chunk[0].further)
        layout = self.row_multiple, self.sharing
        assigned = assign(examples, ranks.dp_degree, self.packing, *layout)
        found: dict[int, NDArray[np.float32]] = {}
        for groups in zip(*map(assigned.of, range(ranks.dp_degree)), strict=True):
            members = groups[ranks.dp_rank]
            with self.inference.context():
                for m, logps in self._log_probs(members, passes):
                    found[place[id(members[m][0])]] = logps
            tell(sum(map(len, groups)))
        whole = {n: logps for part in self.inference.gather(found) for n, logps in part.items()}
        return [_reading(e, whole[n]) for n, e in enumerate(chunk)]

    @torch.no_grad()
    def _log_probs(
        self, members: Sequence[Example], passes: int
    ) -> list[tuple[int, NDArray[np.float32]]]:
        """Read one micro-batch without a follow-up, with each member's own, and with the further
        ones. All ranks take part, also those without a member.

        Returns:
            Those of the members that are this rank's: index, and the response's log-probabilities,
            (passes, response tokens).
        """
        model, device = self.inference.model, self.inference.device
        layout = self.packing.row_tokens, self.row_multiple, self.sharing
        rows, _ = pack_passes(*pairs_of(members), *layout)
        rows, hindsight = (part.to(device) for part in rows)
        hidden_ND, hindsight_ND = two_passes(model, rows, hindsight, model, self.sharing)
        lengths = [len(e.response) for e, _ in members]
        mine = model.own_responses(lengths)
        own = range(len(members)) if mine is None else mine
        starts = np.cumsum([0, *lengths])
        parts = [np.arange(starts[m], starts[m + 1]) for m in own]
        kept_N = torch.from_numpy(np.concatenate([np.empty(0, int), *parts])).to(device)
        targets = [token for m in own for token in members[m][0].response]
        targets_N = torch.tensor(targets, dtype=torch.long, device=device)
        states = hidden_ND, *hindsight_ND.view(passes - 1, *hidden_ND.shape)
        head, logps = model.lm_head(), []
        for state_ND in states:
            out = linear_logprob(state_ND[kept_N], head.weight, targets_N, **head.options)
            logps.append(out.logp.float())
        split = torch.stack(logps).cpu().split([lengths[m] for m in own], dim=1)
        return [(m, part.numpy()) for m, part in zip(own, split, strict=True)]


def _reading(encoded: Encoded, logps: NDArray[np.float32]) -> Reading:
    """From the log-probabilities, (passes, response tokens)."""
    if not np.isfinite(logps).all():
        raise DataError(
            f"interaction {encoded.id}: its log-probabilities are not finite, as the model "
            "overflows in this dtype",
            hint="Try --dtype float32",
        )
    policy, *hindsight = torch.from_numpy(logps).double()
    return Reading(encoded=encoded, policy=policy, hindsight=tuple(hindsight))


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
    with progress(says, total, done=done, shown=place.ranks.is_main) as tell:
        for readings in reader.chunks(islice(asked, done, None), tell):
            place.on_main(lambda readings=readings: journal.append(map(row, readings)))
