"""The layouts that fit four ranks, and what is trained on each of them."""

import itertools

KINDS = ("qwen3", "qwen3-tied", "llama")
OBJECTIVES = ("sampled-token", "reverse-kl")
TEACHERS = ("live", "ema:0.5")

LAYOUTS: dict[int, dict[str, dict]] = {
    1: {"one process": {}},
    2: {
        "FSDP2": {},
        "replicated": {"replicate": 2},
        "TP": {"tensor": 2},
        "TP, no sequence parallelism": {"tensor": 2, "sequence_parallel": False},
        "CP": {"context": 2},
    },
    4: {
        "FSDP4": {},
        "HSDP 2x2": {"replicate": 2},
        "FSDP2 x TP": {"tensor": 2},
        "HSDP x TP": {"replicate": 2, "tensor": 2},
        "FSDP2 x CP": {"context": 2},
        "CP x TP": {"context": 2, "tensor": 2},
        "CP4": {"context": 4},
    },
}

OPTIONS: dict[str, dict] = {
    "accumulation": {"micro_batch_tokens": 256},
    "AC none": {"activation_checkpoint": "none"},
    "AC full": {"activation_checkpoint": "full"},
    "compile": {"compile": "aot_eager"},
    "offload": {"cpu_offload": True},
    "bfloat16": {"compute_dtype": "bfloat16"},
    "frozen": {"teacher": "frozen"},
    "trust region": {"teacher": "trust-region:0.3"},
    "LoRA": {"lora": 4},
    "LoRA, frozen": {"lora": 4, "teacher": "frozen"},
    "LoRA, trust region": {"lora": 4, "teacher": "trust-region:0.3"},
    "LoRA, ema": {"lora": 4, "teacher": "ema:0.5"},
}
"""Tried on some layouts, with one model and objective."""


def case(
    ranks: int, layout: str, kind: str, objective: str, teacher: str, option: str = ""
) -> dict:
    """Everything about one run, as JSON."""
    out = dict(kind=kind, objective=objective, teacher=teacher, parallel=LAYOUTS[ranks][layout])
    name = " / ".join(filter(None, (layout, kind, objective, teacher, option)))
    options = dict(OPTIONS.get(option, {}))
    for field in ("teacher", "lora", "micro_batch_tokens", "compute_dtype"):
        if field in options:
            out[field] = options.pop(field)
    return {"name": name, "layout": layout, **out, "parallel": out["parallel"] | options}


def reference(c: dict) -> str:
    """What must not change the losses left out: the name of the run to compare with."""
    kept = [c["kind"], c["objective"], c["teacher"], f"lora {c.get('lora', 0)}"]
    return " / ".join([*kept, c.get("compute_dtype", "float32")])


def tolerance(c: dict) -> float:
    """Tolerance of losses and gradient norms: bfloat16 rounds every sum of a layer differently."""
    return 1e-2 if c.get("compute_dtype") == "bfloat16" else 1e-5


def everything(ranks: int) -> list[dict]:
    """Every model, objective and teacher on every layout, and every option on most."""
    combinations = itertools.product(LAYOUTS[ranks], KINDS, OBJECTIVES, TEACHERS)
    out = [case(ranks, *c) for c in combinations]
    optional = {1: ("one process",), 2: ("FSDP2", "TP", "CP"), 4: ("FSDP2 x TP", "CP x TP")}[ranks]
    for layout, option in itertools.product(optional, OPTIONS):
        out.append(case(ranks, layout, "qwen3-tied", "reverse-kl", "live", option))
    return sorted(out, key=lambda c: c["layout"])


def representative(ranks: int) -> list[dict]:
    """Each layout, model, objective and teacher at least once; on two ranks, each option."""
    corner = itertools.cycle(
        [
            ("qwen3-tied", "sampled-token", "ema:0.5"),
            ("llama", "reverse-kl", "live"),
            ("qwen3", "sampled-token", "ema:0.5"),
            ("qwen3-tied", "reverse-kl", "live"),
        ]
    )
    out = [case(ranks, layout, *next(corner)) for layout in LAYOUTS[ranks]]
    some = ("FSDP2", "TP", "CP") if ranks == 2 else ()
    for option, layout in zip(OPTIONS, itertools.cycle(some), strict=False):
        out.append(case(ranks, layout, "qwen3-tied", "reverse-kl", "live", option))
    return sorted(out, key=lambda c: c["layout"])
