"""Users who share a model: each has adapters, an optimizer, a history, and a run's folder.

    OUT/users.json      names, and the phases that each goes through
    OUT/users/alice/    what `sdpo online` leaves: rollouts, metrics, checkpoints, snapshots, export
    OUT/users/bob/

They take turns at one engine, an update each. Where answers come from servers, one user's are given
while others' updates are made: no weights that they need are changing.
"""

import json
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sdpo_parallel.engine import Engine, Seat

from ..chat import chat_format
from ..errors import SdpoError
from ..io.files import write_text
from ..train.config import local_models
from ..train.run_folder import RunFolder
from ..train.trainer import Trainer, steps, watched
from .config import OnlineConfig, parse_user
from .run import Base, build_base, gone_back, join
from .sampler import InProcessSampler, Rollout
from .serving.config import InProcess
from .talk import Brake, Talk
from .tasks import MakeTasks, Tasks, build_tasks

NAME = "users.json"


def read_users(store: str | Path) -> dict[str, tuple[str, ...]]:
    """Name -> phases of a folder's users.

    Raises:
        SdpoError: the list cannot be read.
    """
    path = Path(store) / NAME
    if not path.is_file():
        return {}
    try:
        listed = json.loads(path.read_text(encoding="utf-8"))
        return {name: tuple(phases) for name, phases in listed.items()}
    except (ValueError, AttributeError, TypeError) as error:
        raise SdpoError(f"{path}: not a list of users ({error})") from None


def write_users(store: str | Path, users: Mapping[str, Sequence[str]]) -> None:
    """Name -> phases, in place of what the folder has."""
    write_text(Path(store) / NAME, json.dumps(users, indent=2) + "\n")


@dataclass
class Member:
    """One of the users.

    Args:
        seat: where the last turn left the weights.
        pinned: steps whose checkpoints stay.
    """

    name: str
    trainer: Trainer
    talk: Talk
    seat: Seat
    pinned: set[int]

    @property
    def done(self) -> bool:
        """The schedule has come to its end."""
        return self.trainer.state.step == self.talk.steps

    def sit(self) -> None:
        """Begin a turn."""
        engine, state = self.trainer.engine, self.trainer.state
        engine.turn_to(str(self.talk.folder), self.talk.steps, state)
        engine.checkpoints.pinned = self.pinned
        engine.take(self.seat)

    def rise(self) -> None:
        """End it."""
        engine = self.trainer.engine
        self.seat, self.pinned = engine.seat(), engine.checkpoints.pinned


@dataclass
class Shared:
    """A sampler in this process, and whose weights it has."""

    sampler: InProcessSampler
    holder: "Turns | None" = None


class Turns:
    """One user's view of a sampler that all share."""

    def __init__(self, shared: Shared):
        self.shared, self._version = shared, -1

    @property
    def version(self) -> int:
        """Of this user's weights; -1: it has another's."""
        return self._version if self.shared.holder is self else -1

    @property
    def model(self) -> Any:
        """With this user's weights."""
        assert self.shared.holder is self
        return self.shared.sampler.model

    def update(self, engine: Engine, version: int) -> None:
        self.shared.sampler.update(engine, version)
        self.shared.holder, self._version = self, version

    def sample(
        self, prompts: Sequence[Sequence[int]], seeds: Sequence[int], *, greedy: bool = False
    ) -> list[Rollout]:
        assert self.shared.holder is self
        return self.shared.sampler.sample(prompts, seeds, greedy=greedy)

    def close(self) -> None:
        pass


def together(config: OnlineConfig, *, resume: bool, tasks: MakeTasks | None = None) -> Path | None:
    """Run all users' schedules to their ends; returns the folder that theirs are in, or None where
    a signal asked for an early, resumable end. Each user's adapters are exported as a PEFT folder.

    Raises:
        SdpoError: as `sdpo.online.run.online` does; users' brakes when all others have come to
            their ends.
    """
    with ExitStack() as stack:
        runs = []
        for text in config.users:
            own = config.of_user(text)
            kept = resume and (Path(own.out) / "config.json").is_file()
            runs.append(stack.enter_context(RunFolder(own.out, own, resume=kept)))
        own = [build_tasks(run.config, tasks) for run in runs]
        base = build_base(local_models(config.of_user(config.users[0])))
        engine, start = base.engine, base.engine.seat()
        if engine.ranks.is_main:
            write_users(config.out, read_users(config.out) | dict(map(parse_user, config.users)))
        shared = _shared_sampler(config, base)
        members = [_member(base, *each, start, shared) for each in zip(runs, own, strict=True)]
        for member in members:
            stack.callback(member.talk.close)
        finished, problems = _take_turns(config, engine, members)
    engine.close()
    if problems:
        raise SdpoError("; ".join(problems))
    return Path(config.out) / "users" if finished else None


def _shared_sampler(config: OnlineConfig, base: Base) -> Shared | None:
    """One for all, where answers do not come from servers: it holds a copy of the model."""
    if not isinstance(config.sampler, InProcess):
        return None
    local = local_models(config)
    chat = chat_format(base.tokenizer, local.hindsight.date)
    parts = local.sampling, base.engine, local.model, chat, local.parallel
    return Shared(InProcessSampler(*parts))


def _member(
    base: Base,
    run: RunFolder[OnlineConfig],
    tasks: Tasks | None,
    start: Seat,
    shared: Shared | None,
) -> Member:
    engine, local = base.engine, local_models(run.config)
    engine.take(start)
    own = Turns(shared) if shared is not None else None
    if own is not None:
        own.update(engine, 0)
    trainer, talk = join(base, run, local, own, tasks)
    seat, pinned = engine.seat(), engine.checkpoints.pinned
    return Member(Path(run.config.out).name, trainer, talk, seat, pinned)


def _take_turns(
    config: OnlineConfig, engine: Engine, members: list[Member]
) -> tuple[bool, list[str]]:
    """Whether all went on to their ends, and what stopped some of them."""
    problems = []
    with watched(config, engine) as watch, ExitStack() as stack:
        going = [(m, steps(m.trainer, watch)) for m in members]
        for _, turns in going:
            stack.callback(turns.close)  # pyright: ignore
        while going:
            for member, turns in list(going):
                member.sit()
                export = member.talk.folder / "export"
                try:
                    stopped = next(turns, None) is None
                except Brake as brake:
                    member.talk.close()
                    error = gone_back(engine, member.talk.folder, export, brake, adapters=True)
                    problems.append(f"{member.name}: {error}")
                    going.remove((member, turns))
                    continue
                if stopped and not member.done:
                    return False, problems
                if stopped:
                    engine.export(str(export), adapters=True)
                    going.remove((member, turns))
                else:
                    member.talk.ask()
                member.rise()
                if engine.ranks.is_main:
                    state = member.trainer.state
                    print(
                        f"sdpo: {member.name}: {state.step} of {member.talk.steps}", file=sys.stderr
                    )
    return not problems, problems
