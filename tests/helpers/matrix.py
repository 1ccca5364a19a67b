"""The layouts that fit four ranks, and what is trained on each of them."""

import itertools

KINDS = ("qwen3", "qwen3-tied", "llama")
OBJECTIVES = {
    "sampled-token": {"kind": "SampledToken", "ignore_first": 2},
    "reverse-kl": {"kind": "ReverseKL"},
}
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

LORA = {"lora": {"rank": 4}, "optimizer": {"lr": 1e-3}}
LONG = {"hindsight": {"max_prompt_tokens": 250}}
"""Without a hindsight prompt, as long as the sequences by which exports are compared."""
DPO = {**LONG, "objective": {"kind": "DPO", "beta": 0.5}, "teacher": "frozen"}
OPTIONS: dict[str, dict] = {
    "accumulation": {"batch": {"micro_batch_tokens": 256}},
    "not shared": {"batch": {"share_prefix": "none"}},
    "AC none": {"parallel": {"activation_checkpoint": "none"}},
    "AC full": {"parallel": {"activation_checkpoint": "full"}},
    "compile": {"parallel": {"compile": "aot_eager"}},
    "offload": {"parallel": {"cpu_offload": True}},
    "bfloat16": {"parallel": {"compute_dtype": "bfloat16"}},
    "frozen": {"teacher": "frozen"},
    "trust region": {"teacher": "trust-region:0.3"},
    "LoRA": LORA,
    "LoRA, frozen": {**LORA, "teacher": "frozen"},
    "LoRA, trust region": {**LORA, "teacher": "trust-region:0.3"},
    "LoRA, ema": {**LORA, "teacher": "ema:0.5"},
    "top K": {"objective": {"kind": "TopKReverseKL", "k": 5}},
    "DPO": DPO,
    "SFT": {**LONG, "objective": {"kind": "SFT"}},
    "LoRA, DPO": {**LORA, **DPO},
    "SFT, next": {**LONG, "objective": {"kind": "SFT", "target": "next"}},
}
"""Tried on some layouts, with one model and objective."""


def case(
    ranks: int, layout: str, kind: str, objective: str, teacher: str, option: str = ""
) -> dict:
    """One run: its name, layout, model, and the settings that differ from the worker's, as JSON."""
    name = " / ".join(filter(None, (layout, kind, objective, teacher, option)))
    settings = {"objective": OBJECTIVES[objective], "teacher": teacher, **OPTIONS.get(option, {})}
    settings["parallel"] = LAYOUTS[ranks][layout] | settings.get("parallel", {})
    return {"name": name, "layout": layout, "kind": kind, "settings": settings}


def compute_dtype(c: dict) -> str:
    return c["settings"]["parallel"].get("compute_dtype", "float32")


def alone(c: dict) -> dict:
    """The one-process run with the same losses: what must not change them is left out, and every
    sequence is read whole."""
    settings = {**c["settings"], "parallel": {"compute_dtype": compute_dtype(c)}}
    settings["batch"] = {"share_prefix": "none"}
    return {**c, "name": f"{c['kind']} {settings}", "layout": "alone", "settings": settings}


def tolerance(c: dict) -> float:
    """Tolerance of losses and gradient norms: bfloat16 rounds every sum of a layer differently."""
    return 1e-2 if compute_dtype(c) == "bfloat16" else 1e-5


def everything(ranks: int) -> list[dict]:
    """On every layout each model with each objective and teacher, in pairs; all options on most."""
    out = []
    for layout in LAYOUTS[ranks]:
        for i, kind in enumerate(KINDS):
            for j, objective in enumerate(OBJECTIVES):
                out.append(case(ranks, layout, kind, objective, TEACHERS[(i + j) % len(TEACHERS)]))
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
