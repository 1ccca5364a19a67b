"""Recipes hold the published settings, and the layouts that they name fit."""

from dataclasses import replace

import pytest

from helpers import tiny
from sdpo.objective import SFT
from sdpo.train.dry_run import GIB, load_of, memory_per_rank
from sdpo.train.recipes import RECIPES
from sdpo_parallel.memory import USABLE


@pytest.mark.parametrize("recipe, gib", [("qwen3-4b", 55), ("qwen3-8b", 56)])
def test_one_node_of_8_x_80_gb_is_enough(recipe, gib, tmp_path):
    config = RECIPES[recipe](tiny.make_shape(tmp_path, recipe), "d.jsonl")
    parts = memory_per_rank(config, 8, load_of(config))
    assert parts["total"] < USABLE * 80 * GIB
    assert round(parts["total"] / GIB) == gib
    assert f"{gib} GiB per GPU" in (RECIPES[recipe].__doc__ or "")


def test_the_papers_batches():
    online, offline = (RECIPES[n]("m", "d.jsonl") for n in ("paper-online", "paper-offline"))
    assert online.batch.interactions_per_step == 16 and online.optimizer.max_grad_norm == 1.0
    assert offline.batch.interactions_per_step == 128 and offline.optimizer.max_grad_norm == 10.0
    for name in ("paper-online", "paper-offline"):
        assert "--batch.interactions-per-step 32" in (RECIPES[name].__doc__ or "")
    for name in ("qwen3-4b", "qwen3-8b"):
        recipe = RECIPES[name]("m", "d.jsonl")
        assert (recipe.objective, recipe.hindsight) == (offline.objective, offline.hindsight)
        assert recipe.optimizer == offline.optimizer
        assert recipe.batch.interactions_per_step == offline.batch.interactions_per_step


def test_the_papers_baseline_differs_from_its_method_in_the_objective_and_the_batch_alone():
    sft, sdpo = (RECIPES[n]("m", "d.jsonl", "o") for n in ("paper-sft", "paper-offline"))
    assert sft.objective == SFT() and sft.batch.interactions_per_step == 32
    assert (sft.optimizer.lr, sft.batch.epochs, sft.max_tokens) == (2e-6, 2, 4096)
    assert replace(sft, objective=sdpo.objective, batch=sdpo.batch) == sdpo


def test_the_papers_recipes_cut_as_published_and_no_others():
    cuts = {name: recipe("m", "d").hindsight.truncation for name, recipe in RECIPES.items()}
    papers = {"paper-offline", "paper-online", "paper-sft", "qwen3-4b", "qwen3-8b", "olmo-3-7b"}
    assert {name for name, cut in cuts.items() if cut == "paper"} == papers
