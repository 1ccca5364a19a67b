"""`sdpo online`: wiring only.

prompts, users, sampler -> talk -> the trainer's steps -> evaluations, snapshots, export
"""

import sys
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from sdpo_parallel.build import build_engine
from sdpo_parallel.engine import Engine
from sdpo_parallel.huggingface import load_tokenizer

from ..batching import Cursor
from ..chat import ChatFormat, chat_format, today
from ..errors import SdpoError
from ..interactions import Interaction
from ..io.files import sha256
from ..train.config import local_models
from ..train.drift import DriftMonitor, drift_places
from ..train.loader import Packer, run_inputs
from ..train.run_folder import RunFolder
from ..train.trainer import RunState, Trainer, checkpoint_manifest, engine_config, take_steps
from .config import OnlineConfig
from .evaluate import Answer
from .prompts import Prompt, read_prompts
from .sampler import InProcessSampler, Sampler
from .serving.config import InProcess
from .serving.sampler import VLLMSampler
from .snapshots import GOOD, Snapshot, find_snapshot, go_back, remember
from .talk import Brake, Talk
from .tasks import MakeTasks, Tasks, build_tasks, data_files
from .users.base import User
from .users.config import build_user
from .users.personas import load_persona


def online(
    config: OnlineConfig, *, resume: bool = False, tasks: MakeTasks | None = None
) -> Path | None:
    """Run to the end; returns the exported Hugging Face folder, ``out/export``, or None where a
    signal asked for an early, resumable end.

    Args:
        tasks: what asks the config's tasks: `sdpo.evaluate.tasks.Tasks`.

    Raises:
        SdpoError: the config, model or prompts cannot be used; raised before the first update.
            Later: what `sdpo.train.trainer.train` raises; a user who cannot answer any more; a
            brake, after which the export is the last good snapshot's.
    """
    if config.users:
        from .together import together  # which takes turns at what is here

        return together(config, resume=resume, tasks=tasks)
    with RunFolder(config.out, config, resume=resume) as run:
        local = local_models(run.config)  # the run's files keep the names as given
        own = build_tasks(local, tasks)
        trainer, talk = join(build_base(local), run, local, tasks=own)
        engine, export = trainer.engine, Path(config.out) / "export"
        try:
            with closing(talk):  # before what it may still write is put aside
                finished = take_steps(trainer)
        except Brake as brake:
            error = gone_back(engine, talk.folder, export, brake)
            engine.close()
            raise error from None
        if finished:
            engine.export(str(export))
        engine.close()
    return export if finished else None


def gone_back(
    engine: Engine,
    folder: Path,
    export: Path,
    brake: Brake,
    *,
    adapters: bool = False,
    resuming: str = "--resume, which draws other answers",
) -> SdpoError:
    """Go back to the last good snapshot, export it, and say so.

    Args:
        folder: the run's.
        resuming: how to go on from there.
    """
    snapshot = find_snapshot(folder, GOOD)
    engine.checkpoints.finish()
    engine.checkpoints.load(snapshot.step)
    engine.gather(None)  # nobody reads any more
    if engine.ranks.is_main:
        go_back(folder, snapshot)
    engine.export(str(export), adapters=adapters)
    return SdpoError(
        f"{brake}: back at update {snapshot.step}, the last good snapshot, which {export} holds. "
        f"Go on from there with {resuming}; or start another run from the export, with a lower "
        "learning rate, or another teacher or template"
    )


@dataclass
class Base:
    """What the runs of one model share.

    Args:
        inputs: as `run_inputs` has them.
        data: digest of the prompts.
    """

    engine: Engine
    tokenizer: PreTrainedTokenizerBase
    inputs: dict[str, str]
    data: str
    prompts: list[Prompt]
    held_out: list[Prompt]

    def new_state(self, config: OnlineConfig) -> RunState:
        """Of a run that begins."""
        return RunState(Cursor(len(self.prompts), config.batch.seed), self.data)


def build_base(config: OnlineConfig) -> Base:
    """Load prompts, tokenizer and weights.

    Args:
        config: with models as local folders.

    Raises:
        SdpoError: as `online` does.
    """
    prompts, held_out = split(read_prompts(config.prompts, config.system), config)
    data = sha256(config.prompts)
    inputs = run_inputs(config) | {"prompts": data}
    files = data_files(config.evaluate.data if config.replay is None else ())
    inputs |= {f"evaluate.data of {task}": sha256(file) for task, file in files.items()}
    tokenizer = load_tokenizer(config.model)
    state = RunState(Cursor(len(prompts), config.batch.seed), data)
    engine = build_engine(config.engine, engine_config(config, config.updates), state)
    for name, digest in inputs.items():
        engine.check_agreement(name, digest)
    engine.load()
    return Base(engine, tokenizer, inputs, data, prompts, held_out)


def join(
    base: Base,
    run: RunFolder[OnlineConfig],
    local: OnlineConfig,
    sampler: Sampler | None = None,
    tasks: Tasks | None = None,
) -> tuple[Trainer, Talk]:
    """A run of the engine's model: its users, a first look at the policy, and on to where its
    newest checkpoint is.

    Args:
        local: the run's config with models as local folders.
        sampler: what it samples from; None: what its config names.
        tasks: what else it is evaluated on.
    """
    engine = base.engine
    state = base.new_state(local)
    engine.turn_to(local.out, local.updates, state)
    run.use(engine.gather(local.hindsight.date or today())[0], base.inputs)
    hindsight = run.config.hindsight
    thought = local.hindsight.thinking == "keep"
    packer = Packer(base.tokenizer, hindsight, local.batch, sampled_thought=thought)
    packer.assign_to(engine, fixed_width=local.parallel.compile != "none")
    chat = chat_format(base.tokenizer, hindsight.date)
    folder = Path(local.out)
    if engine.ranks.is_main:
        run.path.mkdir(parents=True, exist_ok=True)
    personas = [load_persona(phase.persona) for phase in local.schedule]
    users: list[User] = []
    if local.replay is None:
        if engine.ranks.is_main:
            users = [build_user(local.user, persona, folder=folder) for persona in personas]
        sampler = sampler or build_sampler(local, engine, chat)
    talk = Talk(
        replace(local, hindsight=hindsight),
        folder,
        engine,
        state,
        packer,
        base.tokenizer,
        chat,
        sampler,
        personas,
        users,
        base.prompts,
        base.held_out if sampler is not None else [],
        tasks,
    )
    drift = _drift(engine, packer, talk) if talk.held_out else None
    talk.first_scores()
    engine.resume()
    if engine.ranks.is_main:
        run.open(state.step)
    talk.resumed()
    trainer = Trainer(run.config, engine, talk, state, drift, run, talk.look)
    if state.step == 0 and 0 not in engine.gather(engine.checkpoints.steps())[0]:
        first = Snapshot(name="phase-1", step=0, phase=1, persona=local.schedule[0].persona)
        good = replace(first, name=GOOD)
        remember(folder, engine, [first, good])
        engine.save(0, checkpoint_manifest(trainer, {}), wait=True)
    return trainer, talk


def build_sampler(config: OnlineConfig, engine: Engine, chat: ChatFormat) -> Sampler:
    """The sampler of a run's config, with the engine's weights.

    Raises:
        SdpoError: a server that it names is not there or lacks something.
    """
    if isinstance(config.sampler, InProcess):
        return InProcessSampler(config.sampling, engine, config.model, chat, config.parallel)
    return VLLMSampler(config, config.sampler, engine, chat)


def split(prompts: Sequence[Prompt], config: OnlineConfig) -> tuple[list[Prompt], list[Prompt]]:
    """Prompts to train on and held-out ones.

    Raises:
        SdpoError: too few for one update.
    """
    generator = torch.Generator().manual_seed(config.batch.seed)
    held = torch.randperm(len(prompts), generator=generator)[: config.evaluate.prompts].tolist()
    chosen = set(held)
    rest = [p for i, p in enumerate(prompts) if i not in chosen]
    if not rest:
        raise SdpoError(
            f"{config.prompts}: {len(prompts)} prompts, of which {config.evaluate.prompts} are "
            "held out: none is left to train on; give more, or lower evaluate.prompts"
        )
    wanted = config.updates * config.batch.interactions_per_step
    if wanted > len(rest) and config.phase_prompts == "fresh":
        print(
            f"sdpo: {len(rest)} prompts for {wanted} answers: they come again after "
            f"{len(rest) / config.batch.interactions_per_step:.0f} updates",
            file=sys.stderr,
        )
    return rest, [prompts[i] for i in held]


def _drift(engine: Engine, packer: Packer, talk: Talk) -> DriftMonitor | None:
    """On the first answers to some of the held-out prompts."""
    answers: list[Answer] = [a for a in talk.first_answers() if a.answer]
    by_id = {p.id: p for p in talk.held_out}
    places = drift_places(len(answers), talk.config.safeguard.probe_interactions)
    probes = [
        Interaction(
            id=answers[i].prompt_id,
            prompt=by_id[answers[i].prompt_id].messages,
            response=answers[i].answer,
            followup="-",  # drift reads the policy's pass alone
        )
        for i in places
    ]
    return DriftMonitor(engine, packer.pack(probes).micro_batches) if probes else None
