"""What hindsight would answer by itself: how far a frozen teacher can lead.

    python -m benchmarks.obedience MODEL PROMPTS [--personas concise detailed] [--template wish]

Each prompt is answered twice: alone, and behind one of the persona's complaints as hindsight shows
it. A persona whom the model does not obey even then cannot be learned from a frozen teacher,
however long the run. Another wording of the complaints may be all that is missing.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import torch
import tyro
from rich.console import Console
from rich.table import Table

from sdpo.demo.measure import complaints, judge
from sdpo.demo.talk import Talker
from sdpo.hindsight import hindsight_prompt
from sdpo.online.measures import Similarity
from sdpo.online.prompts import read_prompts
from sdpo.online.users.personas import load_persona


def behind(questions: Sequence[str], persona: str, template: str) -> list[str]:
    """Each question with one of the persona's complaints."""
    asked = complaints(questions, persona)
    return [hindsight_prompt(i.prompt, i.followup, template)[-1].content for i in asked]


def main(
    model: Annotated[str, tyro.conf.Positional],
    prompts: Annotated[Path, tyro.conf.Positional],
    /,
    *,
    personas: tuple[str, ...] = ("concise", "detailed"),
    template: str = "wish",
    count: int = 40,
    tokens: int = 64,
    temperatures: tuple[float, ...] = (0.0, 0.7),
    seed: int = 0,
) -> None:
    """Answer and judge.

    Args:
        model: a Hugging Face folder.
        prompts: as `sdpo online --prompts` takes them; the first ones are asked.
        personas: names or files.
        template: of the hindsight prompt.
        count: prompts.
        tokens: of an answer at most.
        temperatures: 0: the likeliest token each time.
        seed: of what is sampled.
    """
    torch.set_num_threads(1)
    for name in personas:
        load_persona(name).satisfied("", True)  # says so if it has no rule, before the work
    questions = [prompt.messages[-1].content for prompt in read_prompts(prompts)[:count]]
    talker, similarity = Talker(model), Similarity.load()
    table = Table(
        "persona", "T", "complaint", "satisfied", "words", "leaks", "similarity", "entropy"
    )
    for name in personas:
        for temperature in temperatures:
            for told in (False, True):
                asked = behind(questions, name, template) if told else questions
                how = {"seed": seed, "max_tokens": tokens, "temperature": temperature}
                found = judge(questions, talker.answer(asked, **how), [name], similarity)
                table.add_row(
                    name,
                    f"{temperature:g}",
                    "read" if told else "",
                    f"{found.preference[name]:.2f}",
                    f"{found.words:.0f}",
                    f"{found.leaks:.2f}",
                    "" if found.similarity is None else f"{found.similarity:.3f}",
                    f"{found.entropy:.2f}",
                )
    Console(width=100).print(table)


if __name__ == "__main__":
    tyro.cli(main)
