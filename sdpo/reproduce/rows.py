"""The paper's experiments, row by row (arXiv:2603.12273): what each takes, and what was published.

Numbers are those of its tables and, read off to a tenth or two, of its figures. A miniature goes
through the same commands with SmolLM2-135M-Instruct, users by rule and a few updates: it shows that
the way is whole, and its numbers are of another model, other users and another judge.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..errors import SdpoError
from ..online.recipes import TLDR
from .results import Target, bench, curve, fell_below, reached, rose_above, signal_ratio, won
from .steps import Cost, Step, answering, training

GIVEN = "GIVEN"
"""Stands in a dry run for what the user has not named."""
MODELS = {
    "qwen3-4b": ("Qwen/Qwen3-4B", 4.0e9),
    "qwen3-8b": ("Qwen/Qwen3-8B", 8.2e9),
    "olmo-3-7b-sft": ("allenai/Olmo-3-7B-Instruct-SFT", 7.3e9),
    "olmo-3-7b-dpo": ("allenai/Olmo-3-7B-Instruct-DPO", 7.3e9),
}
"""Short name -> name on the hub, and parameters."""
INTERACTIONS, TOKENS = 50_000, 1_400
"""Of WildFeedback, and of an interaction as one pass reads it, in the mean."""
POINTS = (3, 6, 9, 12, 15)
"""Updates after which the paper looks at its online runs."""
HELD_OUT = 256
"""Prompts of an evaluation."""
PROFILES = (
    "concise_casual_beginner",
    "detailed_professional_expert",
    "concise_professional_expert",
    "detailed_casual_beginner",
    "concise_casual_expert",
    "detailed_professional_beginner",
    "detailed_casual_expert",
)
"""Of the paper's figures 5 and 9."""
CONTINUAL = ("no_emojis", "less_filler_praise_sycophancy", "answer_directly_reduce_formatting")
"""Of its figure 6."""


@dataclass(frozen=True, kw_only=True)
class Setup:
    """What a row is made of.

    Attributes:
        small: the model of a miniature; None: at full size.
        log: conversations, for rows that train on a log.
        prompts, held_out: files of prompts, to train on and to evaluate with.
        user, judge: URL#MODEL of who plays the users, and of who judges.
        data: TASK=FILE of benchmarks, where the hub cannot be reached.
    """

    out: Path
    small: str | None = None
    log: str = GIVEN
    prompts: str = GIVEN
    held_out: str = GIVEN
    user: str = ""
    judge: str = ""
    gpus: int = 1
    data: tuple[str, ...] = ()

    def model(self, short: str) -> str:
        """A model by its short name."""
        return self.small or MODELS[short][0]

    def parameters(self, short: str) -> float:
        """Of that model."""
        return 135e6 if self.small else MODELS[short][1]


@dataclass(frozen=True, kw_only=True)
class Row:
    """One experiment of the paper.

    Attributes:
        needs: what the user must name: of "log", "prompts", "held_out", "user", "judge".
        steps, targets: of a setup.
    """

    says: str
    needs: tuple[str, ...]
    steps: Callable[[Setup], list[Step]]
    targets: Callable[[Setup], list[Target]]


# Offline: logs


def prepare(setup: Setup, preset: str = "paper-wildfeedback") -> Step:
    """Interactions of the log."""
    out = setup.out / "interactions.jsonl"
    argv = ["data", "prepare", setup.log, "--out", str(out)]
    if not setup.small:
        argv += ["--preset", preset]
    return Step(name="prepare", argv=tuple(argv), makes=out)


def train(setup: Setup, short: str, recipe: str, batch: int) -> Step:
    """A run on the log."""
    run, gpus = setup.out / f"{short}-{recipe}-{batch}", setup.gpus
    if short.startswith("olmo-3-7b"):  # which torchtitan has not: on one device of 180 GB
        recipe, gpus = "olmo-3-7b", 1
    argv = ["train", recipe, "--model", setup.model(short), "--out", str(run)]
    argv += ["--data", str(setup.out / "interactions.jsonl")]
    epochs = 2
    if setup.small:
        epochs = 1
        argv += ["--engine", "transformers", "--batch.epochs", "1", "--batch.row-tokens", "512"]
        argv += ["--hindsight.max-prompt-tokens", "256", "--hindsight.max-response-tokens", "128"]
        argv += ["--hindsight.max-hindsight-prompt-tokens", "384"]
    argv += ["--batch.interactions-per-step", str(4 if setup.small else batch)]
    return Step(
        name=run.name,
        argv=tuple(argv),
        makes=run / "export",
        gpus=1 if setup.small else gpus,
        cost=training(setup.parameters(short), INTERACTIONS * TOKENS * epochs, checkpoints=3),
    )


def benchmarks(
    setup: Setup, name: str, models: Iterable[str], tasks: Sequence[str], *flags: str
) -> Step:
    """The harness on models, the first of them the base."""
    models, out = list(models), setup.out / name
    argv = ["evaluate", "benchmarks", *models, "--out", str(out), "--tasks", *tasks, *flags]
    if setup.small:
        argv += ["--limit", "4", "--max-new-tokens", "64"]
    if setup.data:
        argv += ["--data", *setup.data]
    prompts = {"ifeval": 541, "mmlu_pro": 12_032}
    cost = Cost()
    for task in tasks:
        if task in prompts:
            cost += answering(len(models) * prompts[task], 1280)
    return Step(name=name, argv=tuple(argv), makes=out / "benchmarks.json", cost=cost)


def offline_steps(
    setup: Setup, shorts: Sequence[str], recipe: str, preset: str = "paper-wildfeedback"
) -> list[Step]:
    """Prepare, train each model with batches of 32 and 128, and run the benchmarks."""
    steps = [prepare(setup, preset)]
    tasks = ("ifeval",) if setup.small else ("ifeval", "mmlu_pro")
    for short in shorts:
        runs = [train(setup, short, recipe, batch) for batch in _batches(setup)]
        models = [f"base={setup.model(short)}", *(f"{r.name}={r.makes}" for r in runs)]
        steps += [*runs, benchmarks(setup, f"{short}-benchmarks", models, tasks)]
    return steps


def _batches(setup: Setup) -> tuple[int, ...]:
    return (32,) if setup.small else (32, 128)


def _shorts(setup: Setup, *shorts: str) -> tuple[str, ...]:
    return shorts[:1] if setup.small else shorts


def r1(setup: Setup) -> list[Step]:
    return offline_steps(setup, _shorts(setup, *MODELS), "paper-offline")


def r2(setup: Setup) -> list[Step]:
    return offline_steps(setup, ("qwen3-8b",), "paper-offline", "paper-wildchat")


def r3(setup: Setup) -> list[Step]:
    runs = [train(setup, "qwen3-4b", recipe, 32) for recipe in ("paper-offline", "paper-sft")]
    models = [f"base={setup.model('qwen3-4b')}", *(f"{run.name}={run.makes}" for run in runs)]
    tasks = ("ifeval",) if setup.small else ("ifeval", "mmlu_pro")
    return [prepare(setup), *runs, benchmarks(setup, "qwen3-4b-benchmarks", models, tasks)]


def r4(setup: Setup) -> list[Step]:
    tasks = ("ifeval",) if setup.small else ("truthfulqa_mc1", "hellaswag", "commonsense_qa")
    run = train(setup, "qwen3-8b", "paper-offline", 32)
    models = [f"base={setup.model('qwen3-8b')}", f"{run.name}={run.makes}"]
    return [prepare(setup), run, benchmarks(setup, "qwen3-8b-choices", models, tasks)]


IFEVAL, MMLU = ("ifeval", "prompt_level_loose_acc"), ("mmlu_pro", "exact_match")
TABLE_2 = {
    "qwen3-4b": {IFEVAL: (81.9, 83.2), MMLU: (58.1, 58.0)},
    "qwen3-8b": {IFEVAL: (83.9, 85.0), MMLU: (62.5, 63.3)},
    "olmo-3-7b-sft": {IFEVAL: (80.2, 80.6), MMLU: (23.7, 24.0)},
    "olmo-3-7b-dpo": {IFEVAL: (80.2, 80.4), MMLU: (28.4, 28.7)},
}
"""Before and after, of the paper's table 2."""


def _offline_targets(
    setup: Setup, short: str, recipe: str, published: dict[tuple[str, str], tuple[float, float]]
) -> list[Target]:
    targets = list[Target]()
    out = setup.out / f"{short}-benchmarks"
    for (task, metric), (before, after) in published.items():
        says = f"{short}, {task}"
        targets.append(Target(f"{says}, base", before, bench(out, task, metric, "base")))
        for batch in _batches(setup):
            run = f"{short}-{recipe}-{batch}"
            read = bench(out, task, metric, run)
            targets.append(Target(f"{says}, {recipe}, batch {batch}", after, read))
    return targets


def r1_targets(setup: Setup) -> list[Target]:
    return [
        target
        for short in _shorts(setup, *MODELS)
        for target in _offline_targets(setup, short, "paper-offline", TABLE_2[short])
    ]


def r2_targets(setup: Setup) -> list[Target]:
    published = {IFEVAL: (83.9, 84.5), MMLU: (62.5, 62.4)}
    return _offline_targets(setup, "qwen3-8b", "paper-offline", published)


def r3_targets(setup: Setup) -> list[Target]:
    out = setup.out / "qwen3-4b-benchmarks"
    published = {
        "base": (81.9, 58.1),
        "qwen3-4b-paper-offline-32": (83.2, 58.0),
        "qwen3-4b-paper-sft-32": (73.2, 51.2),
    }
    return [
        Target(f"{task}, {model}", value, bench(out, task, metric, model))
        for model, values in published.items()
        for (task, metric), value in zip((IFEVAL, MMLU), values, strict=True)
    ]


def r4_targets(setup: Setup) -> list[Target]:
    published = {
        "truthfulqa_mc1": (36.60, 36.47),
        "hellaswag": (57.17, 57.10),
        "commonsense_qa": (78.46, 78.71),
    }
    out, run = setup.out / "qwen3-8b-choices", "qwen3-8b-paper-offline-32"
    return [
        Target(f"{task}, {name}", value, bench(out, task, "acc", model))
        for task, pair in published.items()
        for name, model, value in (("base", "base", pair[0]), ("trained", run, pair[1]))
    ]


# Online: users


def online(
    setup: Setup,
    name: str,
    short: str,
    recipe: str,
    phases: Sequence[tuple[str, int]],
    *flags: str,
) -> Step:
    """A run that talks with users."""
    run, updates = setup.out / name, sum(n for _, n in phases)
    argv = ["online", recipe, "--model", setup.model(short), "--prompts", setup.prompts]
    argv += ["--out", str(run), "--phases", *(f"{persona}:{n}" for persona, n in phases)]
    argv += ["--checkpoint.keep", "2" if setup.small else "0", *flags]
    batch, config = (16 if recipe.endswith("tldr") else 32), None
    if setup.small:
        argv += ["--evaluate.every", "1", "--evaluate.prompts", "24"]
        # where phases begin, the end and the one before it stay; with the teacher, in float32
        cost = Cost(disk=(len(phases) + 2) * 16 * setup.parameters(short) / 2**30)
    else:
        answers = updates * batch
        cost = training(setup.parameters(short), answers * TOKENS, checkpoints=updates // 3 + 1)
        cost += answering(answers, 1024, batch) + Cost(calls=answers)
        if setup.user:
            url, _, model = setup.user.partition("#")
            config = {"user": {"kind": "ServerUser", "url": url, "model": model}}
            config["user"]["key_variable"] = ""
    return Step(
        name=name,
        argv=tuple(argv),
        makes=run / "export",
        gpus=setup.gpus,
        cost=cost,
        config=config,
    )


def preference(
    setup: Setup,
    name: str,
    short: str,
    model: str,
    base: str,
    personas: Sequence[str],
    *flags: str,
) -> Step:
    """A model against another, before personas. Snapshots are exported in float32 for it."""
    out = setup.out / name
    argv = ["evaluate", "preference", model, base, "--out", str(out), "--personas", *personas]
    argv += ["--prompts", setup.held_out, *flags]
    calls = 0
    if setup.small:
        argv += ["--first", "24", "--talk.max-new-tokens", "64"]
    else:
        system = TLDR if short == BASE_4B else ""  # as in the runs' recipes
        argv += ["--system", system]
        argv += ["--first", str(HELD_OUT), "--talk.max-new-tokens", "1024"]
        argv += ["--judges", f"judge={setup.judge or GIVEN}"]
        calls = 2 * HELD_OUT * len(personas)
    exported = sum("@" in one for one in (model, base)) * 4 * setup.parameters(short)
    cost = answering(2 * HELD_OUT, 1024) + Cost(calls=calls, disk=exported / 2**30)
    return Step(name=name, argv=tuple(argv), makes=out / "preference.json", cost=cost)


BASE_4B = "qwen3-4b"


def r5(setup: Setup) -> list[Step]:
    steps = list[Step]()
    profiles = ("concise",) if setup.small else PROFILES
    for profile in profiles:
        updates = 3 if setup.small else 16
        run = online(setup, profile, BASE_4B, _online(setup, "tldr"), [(profile, updates)])
        steps.append(run)
        base = f"base={setup.model(BASE_4B)}"
        for point in (updates,) if setup.small else POINTS:
            model = f"trained={setup.out / profile}@step-{point}"
            last = ("--oracle",) if point == (updates if setup.small else POINTS[-1]) else ()
            name = f"{profile}-after-{point}"
            steps.append(preference(setup, name, BASE_4B, model, base, [profile], *last))
    return steps


def r5_targets(setup: Setup) -> list[Target]:
    published = {
        "concise_casual_beginner": (87.2, 94.0, 93.6, 95.2, 95.2),
        "detailed_professional_expert": (89.1, 98.5, 98.6, 98.6, 98.7),
        "concise_professional_expert": (75.2, 89.6, 93.2, 92.2, 92.7),
        "detailed_casual_beginner": (85.7, 93.8, 97.2, 97.9, 98.6),
        "concise_casual_expert": (82.6, 86.9, 89.9, 87.9, 91.2),
        "detailed_professional_beginner": (58.6, 85.7, 86.1, 83.8, 85.3),
        "detailed_casual_expert": (82.9, 90.3, 90.4, 91.0, 91.6),
    }
    if setup.small:
        says = "concise, wins against the base after 3 updates (the paper's first profile)"
        return [Target(says, 87.2, won(setup.out / "concise-after-3", "concise"))]
    return [
        Target(f"{name}, after {point} updates", value, won(_after(setup, name, point), name))
        for name, values in published.items()
        for point, value in zip(POINTS, values, strict=True)
    ]


def _after(setup: Setup, profile: str, point: int) -> Path:
    return setup.out / f"{profile}-after-{point}"


def flip(setup: Setup) -> tuple[list[tuple[str, int]], int]:
    """Phases of a change of mind, and answers of an update."""
    if setup.small:
        return [("concise", 5), ("detailed", 5)], 12
    return [(PROFILES[0], 16), (PROFILES[1], 32)], 16


def r6(setup: Setup) -> list[Step]:
    phases, _ = flip(setup)
    run = online(setup, "flip", BASE_4B, _online(setup, "tldr"), phases)
    base = f"base={setup.model(BASE_4B)}"
    personas = [persona for persona, _ in phases]
    points = _ends(setup) if setup.small else range(3, sum(n for _, n in phases) + 1, 3)
    flipped = f"trained={setup.out / 'flip'}"
    looks = [
        preference(setup, f"after-{p}", BASE_4B, f"{flipped}@step-{p}", base, personas)
        for p in points
    ]
    return [run, *looks, report(setup, "flip", [str(look.makes.parent) for look in looks])]


def _ends(setup: Setup) -> tuple[int, int]:
    """Updates at the last looks of either phase."""
    (_, first), (_, second) = flip(setup)[0]
    return (first, first + second) if setup.small else (15, 48)


def r6_targets(setup: Setup) -> list[Target]:
    phases, per_update = flip(setup)
    (old, first), (new, second) = phases
    turned, end = (setup.out / f"after-{point}" for point in _ends(setup))
    run = setup.out / "flip"
    targets = [
        Target(f"wins for {old} at its phase's end", 95.2, won(turned, old)),
        Target(f"wins for {new} there", 1.8, won(turned, new)),
        Target(f"wins for {new} at the end", 99.5, won(end, new)),
        Target(f"wins for {old} at the end", 12.2, won(end, old)),
    ]
    if setup.small:
        crossing = rose_above(run, new, 0.5, after=first, per_update=per_update)
        falling = fell_below(run, old, 0.5, after=first, per_update=per_update)
        targets += [
            Target(f"interactions until {new} is met half of the time (wins there)", 100, crossing),
            Target(f"interactions until {old} is met less than that (wins there)", 150, falling),
            Target(
                f"interactions until {old} is met nine times of ten (wins there)",
                100,
                reached(run, old, 0.9, per_update=per_update),
            ),
            Target(f"answers still {old} at the end, %", None, curve(run, old, first + second)),
        ]
    return targets


def r7(setup: Setup) -> list[Step]:
    names = ("concise", "high_initiative") if setup.small else CONTINUAL
    updates = 3 if setup.small else 16
    recipe = _online(setup, "helpsteer")
    run = online(setup, "chain", "qwen3-8b", recipe, [(name, updates) for name in names])
    chain, steps = setup.out / "chain", [run]
    for at, name in enumerate(names):
        begins = f"introduced={chain}@phase-{at + 1}"
        for point in range(at + 1, len(names) + 1):
            model = f"after-phase-{point}={chain}@step-{point * updates}"
            step = preference(setup, f"{name}-after-{point}", "qwen3-8b", model, begins, [name])
            steps.append(step)
    folders = [str(step.makes.parent) for step in steps[1:]]
    return [*steps, report(setup, "chain", folders)]


def r7_targets(setup: Setup) -> list[Target]:
    published = {
        CONTINUAL[0]: (89.5, 93.1, 92.6),
        CONTINUAL[1]: (91.1, 88.2),
        CONTINUAL[2]: (84.7,),
    }
    small = {"concise": (89.5, 93.1), "high_initiative": (91.1,)}
    return [
        Target(f"{name}, after phase {phase}", value, won(_after(setup, name, phase), name))
        for begins, (name, values) in enumerate((small if setup.small else published).items(), 1)
        for phase, value in enumerate(values, begins)
    ]


def report(setup: Setup, run: str, folders: Sequence[str]) -> Step:
    """One page of the run and its evaluations."""
    out = setup.out / "report"
    argv = ("evaluate", "report", *folders, str(setup.out / run), "--out", str(out))
    return Step(name="report", argv=argv, makes=out / "report.html")


def _online(setup: Setup, set_of_prompts: str) -> str:
    return "demo" if setup.small else f"paper-online-{set_of_prompts}"


# The signal


def r8(setup: Setup) -> list[Step]:
    cases, signal = setup.out / "cases.jsonl", setup.out / "signal.jsonl"
    model = ["--model", setup.model("qwen3-8b")]
    size = ["--max-new-tokens", "96"] if setup.small else ["--rows", "24", "--temperature", "1.0"]
    answers = ("signal-cases", *model, "--out", str(cases), *size)
    read = ("signal", *model, "--interactions", str(cases), "--out", str(signal))
    read += ("--figure", str(setup.out / "signal.svg"), "--json", str(setup.out / "effects.json"))
    read += ("--show", "1") if setup.small else ("--scale", "paper")
    return [
        Step(name="cases", argv=answers, makes=cases, cost=answering(24, 256)),
        Step(name="signal", argv=read, makes=signal),
    ]


def r8_targets(setup: Setup) -> list[Target]:
    says = "mean |advantage| of irrelevant follow-ups over that of relevant ones ('close to zero')"
    return [Target(says, None, signal_ratio(setup.out / "effects.json"))]


# Beyond the paper


def r9(setup: Setup) -> list[Step]:
    phases, _ = flip(setup)
    if setup.small:
        phases = [(persona, 2) for persona, _ in phases]
    recipe = _online(setup, "tldr")
    variants = {"frozen-teacher": (recipe, ()), "ema-teacher": (recipe, ("--teacher", "ema:0.95"))}
    if not setup.small:
        variants["frozen-teacher"] = ("online", ())  # forward KL to a teacher a little surer
        variants["per-interaction"] = ("paper-online-lora", ())  # reverse KL on the likeliest 20
    steps = [
        online(setup, name, BASE_4B, recipe, phases, *flags)
        for name, (recipe, flags) in variants.items()
    ]
    models = [f"base={setup.model(BASE_4B)}", *(f"{s.name}={s.makes}" for s in steps)]
    tasks = ("ifeval",) if setup.small else ("ifeval", "mmlu_pro")
    return [*steps, benchmarks(setup, "kept", models, tasks)]


def r9_targets(setup: Setup) -> list[Target]:
    names = ["base", *(step.name for step in r9(setup)[:-1])]
    out = setup.out / "kept"
    return [Target(f"ifeval, {name}", None, bench(out, *IFEVAL, name)) for name in names]


ROWS: dict[str, Row] = {
    "R1": Row(
        says="table 2, figure 3: four models on WildFeedback",
        needs=("log",),
        steps=r1,
        targets=r1_targets,
    ),
    "R2": Row(says="table 3: Qwen3-8B on WildChat", needs=("log",), steps=r2, targets=r2_targets),
    "R3": Row(
        says="table 4: Qwen3-4B, SDPO and SFT on the same responses",
        needs=("log",),
        steps=r3,
        targets=r3_targets,
    ),
    "R4": Row(
        says="table 6: what Qwen3-8B knows, before and after R1",
        needs=("log",),
        steps=r4,
        targets=r4_targets,
    ),
    "R5": Row(
        says="figures 5 and 9: seven users, one at a time",
        needs=("prompts", "held_out", "user", "judge"),
        steps=r5,
        targets=r5_targets,
    ),
    "R6": Row(
        says="figure 4: a user who changes their mind",
        needs=("prompts", "held_out", "user", "judge"),
        steps=r6,
        targets=r6_targets,
    ),
    "R7": Row(
        says="figure 6: three wishes, one after the other",
        needs=("prompts", "held_out", "user", "judge"),
        steps=r7,
        targets=r7_targets,
    ),
    "R8": Row(
        says="figures 7 and 8: what follow-ups say about tokens",
        needs=(),
        steps=r8,
        targets=r8_targets,
    ),
    "R9": Row(
        says="beyond the paper: other objectives and teachers on R6's users",
        needs=("prompts", "user"),
        steps=r9,
        targets=r9_targets,
    ),
}
"""Rows by name."""


def find_row(name: str) -> Row:
    """A row by its name.

    Raises:
        SdpoError: there is none of that name; those that there are are named.
    """
    if name.upper() not in ROWS:
        known = "; ".join(f"{key}: {row.says}" for key, row in ROWS.items())
        raise SdpoError(f"no row is called {name}; there are {known}")
    return ROWS[name.upper()]
