"""Files of AlpacaEval and Arena-Hard: published ones, and others in their formats about them."""

import gzip
import json
from pathlib import Path

from sdpo.evaluate import arena
from sdpo.evaluate.arena import Answer, Pair

PUBLISHED = Path(__file__).parents[1] / "evaluate" / "published"
ARENA_QUESTIONS = PUBLISHED / "arena_questions.json.gz"
ARENA_O3 = PUBLISHED / "arena_answers.json.gz"
_TEXT = "My final verdict is tie: [[A=B]]. No, after all it is: [[{}]]."


def alpaca_verdicts() -> list[dict]:
    """The published verdicts on gemma-7b-it."""
    return json.loads(gzip.decompress((PUBLISHED / "alpaca_annotations.json.gz").read_bytes()))


def side(rows: list[dict], number: int) -> list[dict]:
    """The outputs of the reference (1) or of the model (2)."""
    names = {"output": f"output_{number}", "generator": f"generator_{number}"}
    return [
        {"dataset": row["dataset"], "instruction": row["instruction"]}
        | {name: row[field] for name, field in names.items()}
        for row in rows
    ]


def write_json(path: Path, rows: list[dict]) -> str:
    text = json.dumps(rows)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return str(path)


def alpaca_arguments(folder: Path, rows: list[dict], verdicts: list[dict]) -> list[str]:
    return [
        *("evaluate", "alpaca", "--reference", write_json(folder / "r.json.gz", side(rows, 1))),
        *("--outputs", write_json(folder / "m.json", side(rows, 2))),
        *("--annotations", write_json(folder / "a.json", verdicts)),
    ]


def game(prompt: str, a: str, b: str, verdict: str | None) -> dict:
    """As gen_judgment.py writes it."""
    given = (
        f"<|User Prompt|>\n{prompt}\n\n<|The Start of Assistant A's Answer|>\n{a}\n"
        "<|The End of Assistant A's Answer|>\n\n<|The Start of Assistant B's Answer|>\n"
        f"{b}\n<|The End of Assistant B's Answer|>"
    )
    said = "I cannot tell." if verdict is None else _TEXT.format(verdict)
    messages = [{"role": "system", "content": "Judge."}, {"role": "user", "content": given}]
    return {"score": verdict, "judgment": {"answer": said}, "prompt": messages}


class ArenaFiles:
    """A model's answers, those of the baselines, and judgments; the first game of a question says
    `first`, the second `second`."""

    def __init__(self, folder: Path, model: str = "ours"):
        self.folder, self.model = folder, model
        self.questions = arena.read_questions(ARENA_QUESTIONS)
        self.asked = list(self.questions.by_uid.values())
        self.ours = {q.uid: f"**Short** answer {i}." for i, q in enumerate(self.asked)}
        self.answers = self.write_answers(model, self.ours)
        writing = {q.uid: f"A poem, {i}." for i, q in enumerate(self.asked)}
        self.gemini = self.write_answers("gemini-2.0-flash-001", writing)
        rows = json.loads(gzip.decompress(ARENA_O3.read_bytes()))
        o3 = {row["uid"]: row["messages"][-1]["content"]["answer"] for row in rows}
        self.theirs = {"hard_prompt": o3, "creative_writing": writing}

    def write_answers(self, model: str, texts: dict[str, str]) -> str:
        path = self.folder / f"{model}.jsonl"
        rows = [Answer(uid=uid, text=text, finished=True) for uid, text in texts.items()]
        arena.write_answers(path, model, self.questions, rows)
        return str(path)

    def judgment(self, uid: str, first: str | None, second: str | None) -> dict:
        question = self.questions.by_uid[uid]
        ours, theirs = self.ours[uid], self.theirs[question.category][uid]
        baseline = arena.BASELINES[question.category]
        row = {"uid": uid, "category": question.category, "judge": "gpt-4.1", "model": self.model}
        games = [
            game(question.prompt, theirs, ours, first),
            game(question.prompt, ours, theirs, second),
        ]
        return row | {"baseline": baseline, "games": games}

    def judgments(self, first: str | None = "B>A", second: str | None = "A>B") -> list[dict]:
        return [self.judgment(q.uid, first, second) for q in self.asked]

    def write(self, rows: list[dict], name: str = "judged.jsonl") -> str:
        path = self.folder / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(path)

    def arguments(self, *judgments: str) -> list[str]:
        return [
            *("evaluate", "arena", "--questions", str(ARENA_QUESTIONS), "--answers", self.answers),
            *("--hard-prompt", str(ARENA_O3), "--creative-writing", self.gemini),
            *("--judgments", *judgments),
        ]

    def read(self, rows: list[dict]) -> dict[str, Pair]:
        uids = [q.uid for q in self.asked]
        model = arena.read_answers(self.answers, self.questions, uids)
        baselines = {
            "hard_prompt": arena.read_answers(ARENA_O3, self.questions, uids),
            "creative_writing": arena.read_answers(self.gemini, self.questions, uids),
        }
        _, found = arena.read_judgments(self.write(rows), self.questions, uids, model, baselines)
        return found
