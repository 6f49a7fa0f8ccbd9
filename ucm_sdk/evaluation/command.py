# SPDX-License-Identifier: MIT
"""``ucm eval``: judge methods with a real model, without an engine."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Final

import numpy as np
import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from ucm_sdk.blend import Chooser, make_chooser
from ucm_sdk.errors import ConfigError
from ucm_sdk.evaluation import blend, needles, report, texts, window
from ucm_sdk.evaluation.copying import CopyTask
from ucm_sdk.evaluation.hashing import train_model
from ucm_sdk.evaluation.llama import Llama
from ucm_sdk.evaluation.sparse import CONTROLS, Point
from ucm_sdk.position import make_position
from ucm_sdk.sparse.kvcomp import write_projections

app = typer.Typer(no_args_is_help=True, help="Judge methods with a real model.")

_DEFAULT: Final = (
    *CONTROLS, "window", "esa", "gsa", "kvstar", "kvcomp", "quest", "rotated", "transform",
)  # fmt: skip
_NEEDLES: Final = ("1:0.15", "1:0.5", "1:0.85", "5:0.5")
"""Keys hidden in each prompt of one length and text, and at what depth."""

Model = Annotated[Path, typer.Argument(help="A Llama-type model with its tokenizer.")]


def _options(method: str) -> tuple[str, list[tuple[str, Any]]]:
    """Return the name and the options of ``NAME:key=value,key=value``."""
    name, _, rest = method.partition(":")
    options = []
    for pair in rest.split(",") if rest else ():
        key, _, text = pair.partition("=")
        try:
            options.append((key, json.loads(text)))
        except ValueError:
            options.append((key, text))
    return name, options


def _points(
    methods: Sequence[str], blocks: Sequence[int], budgets: Sequence[float], shares: Sequence[str]
) -> list[Point]:
    """Return every setting."""
    points = []
    for block, budget, share, method in itertools.product(blocks, budgets, shares, methods):
        name, options = _options(method)
        points.append(Point(name, block, budget, share, tuple(options)))
    return points


def _hidden(needle: str) -> tuple[int, float]:
    """Return the number of keys and the depth of ``KEYS:DEPTH``."""
    try:
        keys, depth = needle.split(":")
        found = int(keys), float(depth)
    except ValueError:
        found = 0, 0.0
    if not (1 <= found[0] <= needles.MOST_KEYS and 0 < found[1] < 1):
        msg = (
            f"--needle={needle}: give KEYS:DEPTH, such as 1:0.5, with 1 to {needles.MOST_KEYS} "
            "keys and a depth between 0 and 1"
        )
        raise ConfigError(msg)
    return found


class _Journal:
    """Results so far, one JSON value a line: an interrupted run goes on where it stopped."""

    def __init__(self, path: Path, setting: Mapping[str, Any]) -> None:
        self._path = path
        self.rows: list[dict[str, Any]] = []
        lines = path.read_text().splitlines() if path.is_file() else []
        if lines and json.loads(lines[0]) != setting:
            msg = f"{path} holds results of another setting: remove it or name another output"
            raise ConfigError(msg)
        if not lines:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(setting) + "\n")
        for line in lines[1:]:
            try:
                self.rows.append(json.loads(line))
            except ValueError:  # the line that an interruption cut off
                path.write_text("".join(f"{whole}\n" for whole in lines[: 1 + len(self.rows)]))
                break

    def add(self, row: dict[str, Any]) -> None:
        self.rows.append(row)
        with self._path.open("a") as file:
            file.write(json.dumps(row) + "\n")


def _tokenizer(model: Path) -> needles.Encode:
    from tokenizers import Tokenizer  # the extra [eval]

    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))

    def encode(text: str) -> list[int]:
        ids: list[int] = tokenizer.encode(text).ids
        return ids

    return encode


def _documents(directory: Path | None) -> list[texts.Document]:
    return texts.reported() if directory is None else texts.from_directory(directory)


def _print(rows: Iterable[Mapping[str, str]]) -> None:
    rows = list(rows)
    shown = Table(box=None)
    for name in rows[0]:
        shown.add_column(name)
    for row in rows:
        shown.add_row(*row.values())
    Console(width=None if Console().is_terminal else 160).print(shown)


@app.command("sparse")
def evaluate_sparse(
    model: Model,
    *,
    output: Annotated[Path, typer.Option(help="JSON; table and plot beside it.")] = Path(
        "build/eval-sparse.json"
    ),
    tokens: Annotated[int, typer.Option(min=256, help="Tokens of the prompt.")] = 7168,
    scored: Annotated[int, typer.Option(min=1, help="Scored tokens of a document.")] = 128,
    depth: Annotated[list[float], typer.Option(help="Where to copy from.")] = [0.5],
    method: Annotated[list[str], typer.Option(help="NAME or NAME:key=value,...")] = list(_DEFAULT),
    block: Annotated[list[int], typer.Option(help="Tokens of a block.")] = [32, 128],
    budget: Annotated[list[float], typer.Option(help="Share of the middle.")] = [0.1, 0.3],
    share: Annotated[list[str], typer.Option(help="kv_head or layer.")] = ["kv_head", "layer"],
    documents: Annotated[Path | None, typer.Option(help="A directory of .txt files.")] = None,
) -> None:
    """Copy passages from depth under every method, and compare with dense attention."""
    points = _points(method, block, budget, share)
    setting = {"model": model.name, "tokens": tokens, "scored": scored, "depths": depth}
    journal = _Journal(output.with_suffix(".jsonl"), setting)
    done = {
        (row["document"], row["method"], row["block_tokens"], row["budget"], row["share"])
        for row in journal.rows
    }
    encode = _tokenizer(model)
    llama: Llama | None = None
    with Progress(console=Console(stderr=True)) as progress:
        bar = progress.add_task("judging", total=len(points) * len(_documents(documents)))
        for document in _documents(documents):
            left = [
                p
                for p in points
                if (document.name, p.label, p.block_tokens, p.ratio, p.share) not in done
            ]
            progress.advance(bar, len(points) - len(left))
            if not left:
                continue
            progress.update(bar, description=document.name)
            llama = llama or Llama(model)
            prompt = np.array(encode(document.text)[:tokens])
            task = CopyTask(llama, document.name, prompt, scored_tokens=scored, depths=depth)
            for result in task.judge(left):
                journal.add(result.row())
                progress.advance(bar)
    rows = report.summarise(journal.rows)
    output.write_text(json.dumps(rows, indent=1) + "\n")
    report.plot(rows, output.with_suffix(".svg"))
    _print(report.table(rows))


@app.command("needles")
def evaluate_needles(
    model: Model,
    *,
    output: Annotated[Path, typer.Option(help="JSON.")] = Path("build/eval-needles.json"),
    length: Annotated[list[int], typer.Option(help="Tokens of a prompt.")] = [1024, 2048, 4096],
    needle: Annotated[list[str], typer.Option(help="KEYS:DEPTH of each text.")] = list(_NEEDLES),
    method: Annotated[list[str], typer.Option(help="NAME or NAME:key=value,...")] = list(_DEFAULT),
    block: Annotated[list[int], typer.Option(help="Tokens of a block.")] = [32],
    budget: Annotated[list[float], typer.Option(help="Share of the middle.")] = [0.1],
    share: Annotated[list[str], typer.Option(help="kv_head or layer.")] = ["kv_head"],
    documents: Annotated[Path | None, typer.Option(help="A directory of .txt files.")] = None,
) -> None:
    """Ask for pass keys hidden in long texts, and count the answers that are right."""
    points = _points(method, block, budget, share)
    hidden = [_hidden(one) for one in needle]
    # Rows are told apart by their places only.
    setting = {
        "model": model.name,
        "points": [str(point) for point in points],
        "lengths": length,
        "needles": needle,
        "documents": [document.name for document in _documents(documents)],
    }
    journal = _Journal(output.with_suffix(".jsonl"), setting)
    encode = _tokenizer(model)
    prompts = [
        (document.text, tokens, keys, depth)
        for tokens in length
        for document in _documents(documents)
        for keys, depth in hidden
    ]
    with Progress(console=Console(stderr=True)) as progress:
        bar = progress.add_task("judging", total=len(prompts), completed=len(journal.rows))
        begin = len(journal.rows)
        judged = needles.judge(Llama(model), encode, points, prompts, begin=begin)
        for prompt, (asked, counted, right) in zip(prompts[begin:], judged, strict=True):
            _, tokens, keys, depth = prompt
            answered = {str(point): found for point, found in right.items()}
            row = {"tokens": tokens, "keys": keys, "depth": depth, "asked": asked}
            row["counted"] = counted
            journal.add({**row, "right": answered})
            progress.advance(bar)
    items = sum(row["counted"] for row in journal.rows)
    rows = []
    for point in points:
        right = sum(row["right"][str(point)] for row in journal.rows)
        low, high = needles.wilson(right, items)
        rows.append(
            {
                "method": point.label,
                "block_tokens": point.block_tokens,
                "budget": point.ratio,
                "share": point.share,
                "items": items,
                "right": right,
                "interval": [low, high],
            }
        )
    output.write_text(json.dumps(rows, indent=1) + "\n")
    _print({name: str(value) for name, value in row.items()} for row in rows)


@app.command("window")
def evaluate_window(
    model: Model,
    *,
    output: Annotated[Path, typer.Option(help="JSON.")] = Path("build/eval-window.json"),
    length: Annotated[list[int], typer.Option(help="Tokens of context before what is scored.")] = [
        8192,
        12288,
        16384,
    ],
    keys: Annotated[list[int], typer.Option(help="Tokens of texts with pass keys.")] = [
        4096,
        16384,
    ],
    method: Annotated[list[str], typer.Option(help="NAME or NAME:key=value,...")] = [
        "plain",
        "dynamic_ntk",
        "yarn",
        "rerope",
        "leaky_rerope",
        "self_extend",
        "dual_chunk",
    ],
    documents: Annotated[Path | None, typer.Option(help="A directory of .txt files.")] = None,
) -> None:
    """Score the same tokens after ever longer contexts, and ask for pass keys in long texts."""
    setting = {"model": model.name, "longest": max(length)}
    journal = _Journal(output.with_suffix(".jsonl"), setting)
    done = {(row["method"], row["document"], row["what"], row["tokens"]) for row in journal.rows}
    read = texts.long() if documents is None else texts.from_directory(documents)
    todo = list(window.tasks([(one.name, one.text) for one in read], length, keys=keys))
    encode, llama = _tokenizer(model), Llama(model)
    with Progress(console=Console(stderr=True)) as progress:
        bar = progress.add_task("judging", total=len(todo) * len(method))
        for task, label in itertools.product(todo, method):
            progress.update(bar, description=f"{label} {task.document} {task.tokens} {task.what}")
            if (label, task.document, task.what, task.tokens) not in done:
                name, options = _options(label)
                position = make_position(name, llama.rope, options=dict(options))
                found = window.measure(llama, encode, position, task, longest=max(length))
                row = {"method": label, "document": task.document, "what": task.what}
                journal.add({**row, "tokens": task.tokens, **found})
            progress.advance(bar)
    rows = report.summarise_window(journal.rows)
    output.write_text(json.dumps(rows, indent=1) + "\n")
    _print({name: str(value) for name, value in row.items()} for row in rows)


@app.command("blend")
def evaluate_blend(
    model: Model,
    *,
    output: Annotated[Path, typer.Option(help="JSON.")] = Path("build/eval-blend.json"),
    prompts: Annotated[int, typer.Option(min=1, help="Prompts of four to six chunks.")] = 20,
    chunk: Annotated[int, typer.Option(min=32, help="Tokens of a chunk.")] = 160,
    ratio: Annotated[float, typer.Option(min=0, max=1, help="Of tokens computed again.")] = 0.15,
    chooser: Annotated[list[str], typer.Option(help="NAME or NAME:key=value,...")] = [
        "random",
        "first_tokens",
        "kv_deviation:of=keys",
        "kv_deviation",
        "query",
    ],
    documents: Annotated[Path | None, typer.Option(help="A directory of .txt files.")] = None,
) -> None:
    """Answer questions from reused chunks, mended in part, and compare with full computation."""
    setting = {"model": model.name, "chunk": chunk, "ratio": ratio, "choosers": chooser}
    journal = _Journal(output.with_suffix(".jsonl"), setting)
    rules: dict[str, Chooser | None] = {"reuse": None}
    for label in chooser:
        name, options = _options(label)
        rules[label] = make_chooser(name, options=dict(options))
    read = [document.text for document in _documents(documents)]
    encode, llama = _tokenizer(model), Llama(model)
    with Progress(console=Console(stderr=True)) as progress:
        bar = progress.add_task("judging", total=prompts, completed=len(journal.rows))
        for seed in range(len(journal.rows), prompts):
            prompt = blend.build(encode, read, chunk_tokens=chunk, seed=seed)
            journal.add(dict(blend.judge(llama, prompt, rules, ratio)))
            progress.advance(bar)
    rows = []
    for label in rules:
        found = np.array([row[label] for row in journal.rows])
        low, high = report.bootstrap(found[:, 0])
        reused = np.mean([row["reuse"][0] for row in journal.rows])
        row = {"chooser": label, "kl": round(float(found[:, 0].mean()), 4)}
        row |= {"interval": [round(low, 4), round(high, 4)]}
        row |= {"of_reuse": round(float(found[:, 0].mean() / reused), 3)}
        rows.append(row | {"work": round(float(found[:, 1].mean()), 3), "prompts": len(found)})
    output.write_text(json.dumps(rows, indent=1) + "\n")
    _print({name: str(value) for name, value in row.items()} for row in rows)


@app.command("train-hash")
def train_hash(
    model: Model,
    output: Annotated[Path, typer.Argument(help="A file for the option `weights` of kvcomp.")],
    *,
    tokens: Annotated[int, typer.Option(min=512, help="Tokens of a text.")] = 4096,
    bits: Annotated[int, typer.Option(help="Bits of a code.")] = 64,
    steps: Annotated[int, typer.Option(min=1, help="Steps of descent per layer and head.")] = 300,
    documents: Annotated[Path | None, typer.Option(help="A directory of .txt files.")] = None,
) -> None:
    """Train the projections of hash codes on texts that no result is reported on."""
    encode, llama = _tokenizer(model), Llama(model)
    read = texts.tuning() if documents is None else texts.from_directory(documents)
    prompts = [np.array(encode(document.text)[:tokens]) for document in read]
    layers = []
    with Progress(console=Console(stderr=True)) as progress:
        bar = progress.add_task("training", total=llama.layers)
        for projections in train_model(llama, prompts, bits=bits, steps=steps):
            layers.append(projections)
            progress.advance(bar)
    write_projections(output, np.stack(layers))
