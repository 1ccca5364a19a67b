"""`sdpo online`: wiring only.

prompts, users, sampler -> talk -> the trainer's steps -> evaluations, snapshots, export
"""

import sys
from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import torch

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
from .snapshots import GOOD, Snapshot, find_snapshot, go_back
from .talk import Brake, Talk
from .users.base import User
from .users.config import build_user
from .users.personas import load_persona


def online(config: OnlineConfig, *, resume: bool = False) -> Path | None:
    """Run to the end; returns the exported Hugging Face folder, ``out/export``, or None where a
    signal asked for an early, resumable end.

    Raises:
        SdpoError: the config, model or prompts cannot be used; raised before the first update.
            Later: what `sdpo.train.trainer.train` raises; a user who cannot answer any more; a
            brake, after which the export is the last good snapshot's.
    """
    with RunFolder(config.out, config, resume=resume) as run:
        trainer, talk = _prepare(run)
        engine, export = trainer.engine, Path(config.out) / "export"
        try:
            with closing(talk):  # before what it may still write is put aside
                finished = take_steps(trainer)
        except Brake as brake:
            raise _gone_back(engine, talk, export, brake) from None
        if finished:
            engine.export(str(export))
        engine.close()
    return export if finished else None


def _gone_back(engine: Engine, talk: Talk, export: Path, brake: Brake) -> SdpoError:
    """Go back to the last good snapshot, export it, and say so."""
    snapshot = find_snapshot(talk.folder, GOOD)
    engine.checkpoints.finish()
    engine.checkpoints.load(snapshot.step)
    engine.gather(None)  # nobody reads any more
    if engine.ranks.is_main:
        go_back(talk.folder, snapshot)
    engine.export(str(export))
    engine.close()
    return SdpoError(
        f"{brake}: back at update {snapshot.step}, the last good snapshot, which {export} holds. "
        "Go on from there with --resume, which draws other answers; or start another run from the "
        "export, with a lower learning rate, or another teacher or template"
    )


def _prepare(run: RunFolder[OnlineConfig]) -> tuple[Trainer, Talk]:
    """Load prompts, users and weights, look at the policy for the first time, and go to where the
    newest checkpoint is."""
    local = local_models(run.config)  # the run's files keep the names as given
    prompts, held_out = split(read_prompts(local.prompts, local.system), local)
    data = sha256(local.prompts)
    inputs = run_inputs(local) | {"prompts": data}
    run.use(local.hindsight.date or today(), inputs)
    tokenizer = load_tokenizer(local.model)
    thought = local.hindsight.thinking == "keep"
    packer = Packer(tokenizer, run.config.hindsight, local.batch, sampled_thought=thought)
    state = RunState(Cursor(len(prompts), local.batch.seed), data)
    engine = build_engine(local.engine, engine_config(local, local.updates), state)
    packer.assign_to(engine, fixed_width=local.parallel.compile != "none")
    for name, digest in inputs.items():
        engine.check_agreement(name, digest)
    run.use(engine.gather(run.config.hindsight.date)[0], inputs)
    packer.hindsight = run.config.hindsight
    engine.load()
    chat = chat_format(tokenizer, run.config.hindsight.date)
    folder = Path(local.out)
    if engine.ranks.is_main:
        run.path.mkdir(parents=True, exist_ok=True)
    personas = [load_persona(phase.persona) for phase in local.schedule]
    sampler: Sampler | None = None
    users: list[User] = []
    if local.replay is None:
        if engine.ranks.is_main:
            users = [build_user(local.user, persona, folder=folder) for persona in personas]
        sampler = build_sampler(local, engine, chat)
    talk = Talk(
        replace(local, hindsight=run.config.hindsight),
        folder,
        engine,
        state,
        packer,
        tokenizer,
        chat,
        sampler,
        personas,
        users,
        prompts,
        held_out if sampler is not None else [],
    )
    drift = _drift(engine, packer, talk) if talk.held_out else None
    engine.resume()
    if engine.ranks.is_main:
        run.open(state.step)
    talk.resumed()
    trainer = Trainer(run.config, engine, talk, state, drift, run, talk.look)
    if state.step == 0 and 0 not in engine.gather(engine.checkpoints.steps())[0]:
        first = Snapshot(name="phase-1", step=0, phase=1, persona=local.schedule[0].persona)
        good = replace(first, name=GOOD)
        talk.remember([first, good])
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
