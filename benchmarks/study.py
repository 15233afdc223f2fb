"""Studies of recipes: the file, the corpus, the short form.

A study:

    question = "Does Muon beat AdamW where weights are ternary?"
    base = "base.toml"                     # a recipe, beside the study
    seeds = 3
    [held_out]                             # other shards whose held-out side is measured besides
    library = "data/ablations/library"
    [[arms]]
    name = "muon"
    training = { optimizer = "muon" }      # tables of a recipe, laid over the base
    sweep = { "training.muon_lr" = [0.01, 0.02, 0.04] }
    [[arms]]
    name = "muon, 0.7 of the steps"
    like = "muon"                          # begins from that arm at its best
    scale_steps = 0.7
    [[arms]]
    name = "student of muon"
    distillation = { teachers = ["{muon}"] }   # "{ARM}" is the run folder of that arm's best, first seed
    infill = 200                           # also fill in as many held-out lines
    [[arms]]
    name = "student of muon, from sampled logits"
    teach = { teacher = "{muon}", options = ["--method", "sampled", "--draws", "50"] }

`reach = [["muon", "adamw"]]` asks at which share of the steps the first arm, whose shorter runs are arms of their own
`like` it, has the final loss of the second.
"""

import os
import subprocess
import sys
import sysconfig
import tomllib
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from smelter.base.errors import UserError, nearest
from smelter.config import Config, config_from_dict, load_config

ROOT = Path(__file__).resolve().parent.parent
TABLES = ("model", "data", "distillation", "training")
PACKAGES = ("numpy", "sympy", "networkx", "torch", "transformers")
"""Installed packages whose source is the corpus besides the standard library, as far as they are there."""


@dataclass(frozen=True)
class Arm:
    """One side of a comparison: values laid over the base, and what is swept."""

    name: str
    values: dict[str, dict[str, Any]]
    sweep: dict[str, list[Any]] = field(default_factory=dict)
    like: str = ""
    scale_steps: float = 1.0
    teach: dict[str, Any] = field(default_factory=dict)
    infill: int = 0
    seeds: int = 0
    """0: as many as the study says."""


@dataclass(frozen=True)
class Study:
    """A question, the base recipe, and the arms in the order in which they run."""

    question: str
    base: Config
    arms: list[Arm]
    seeds: int
    held_out: dict[str, Path]
    reach: list[tuple[str, str]]


def load_study(path: Path) -> Study:
    """Read a study strictly. Raises UserError that names the file, the arm and the key."""
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, tomllib.TOMLDecodeError) as error:
        raise UserError(f"{path}: {error}") from None
    known = ["question", "base", "seeds", "held_out", "arms", "reach"]
    if unknown := [key for key in values if key not in known]:
        raise UserError(f"{path}: unknown key {unknown[0]!r}: {nearest(unknown[0], known)}")
    base = load_config(path.parent / values["base"])
    arms: list[Arm] = []
    keys = [*TABLES, "name", "sweep", "like", "scale_steps", "teach", "infill", "seeds"]
    for entry in values["arms"]:
        where = f"{path}: arm {entry.get('name')!r}"
        if unknown := [key for key in entry if key not in keys]:
            raise UserError(f"{where}: unknown key {unknown[0]!r}: {nearest(unknown[0], keys)}")
        tables = {key: entry.pop(key) for key in TABLES if key in entry}
        arm = Arm(values=tables, **entry)
        names = [each.name for each in arms]
        if arm.name in names or (arm.like and arm.like not in names):
            raise UserError(f"{where}: names must differ, and `like` names an earlier arm ({', '.join(names)})")
        swept: dict[str, dict[str, Any]] = {}
        for key, choices in arm.sweep.items():
            table, _, name = key.partition(".")
            swept.setdefault(table, {})[name] = choices[0]
        config_from_dict(swept, where, config_from_dict(tables, where, base))
        arms.append(arm)
    return Study(
        question=values["question"],
        base=base,
        arms=arms,
        seeds=values.get("seeds", 3),
        held_out={name: Path(folder) for name, folder in values.get("held_out", {}).items()},
        reach=[(first, second) for first, second in values.get("reach", [])],
    )


def merge(first: dict[str, Any], second: dict[str, Any]) -> dict[str, Any]:
    """Two sets of tables, the second laid over the first."""
    return {key: {**first.get(key, {}), **second.get(key, {})} for key in {**first, **second}}


def as_tables(choice: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """{"training.muon_lr": x} as {"training": {"muon_lr": x}}."""
    tables: dict[str, dict[str, Any]] = {}
    for key, value in choice.items():
        table, _, name = key.partition(".")
        tables.setdefault(table, {})[name] = value
    return tables


def prepare(base: Config, *, quick: bool, say: Callable[[str], None]) -> None:
    """The corpus where it is not there: the standard library and installed packages, in three sets of shards.

    `all` trains the tokenizer; `library` (standard library, numpy, sympy, networkx) and `frameworks` (torch,
    transformers) are its two parts, each under the same tokenizer.
    """
    shards = Path(base.data.shards)
    if (shards / "index.json").is_file():
        return
    folder = shards.parent
    folder.mkdir(parents=True, exist_ok=True)
    packages, stdlib = Path(sysconfig.get_path("purelib")), Path(sysconfig.get_path("stdlib"))
    here = [name for name in PACKAGES if (packages / name).is_dir() and not quick]
    parts = {"library": [name for name in here if name not in ("torch", "transformers")], "frameworks": []}
    parts["frameworks"] = [name for name in here if name not in parts["library"]]
    vocab, partial = str(base.model.vocab_size), shards.with_name(".tmp_all")

    environment = {**os.environ, "PYTHONPATH": str(ROOT)}

    def call(module: str, *arguments: str) -> None:
        say(f"{module} {' '.join(arguments)}")
        command = [sys.executable, "-m", module, *arguments]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if done.returncode:
            raise UserError(f"{' '.join(command)}: exit code {done.returncode}: {done.stderr.strip()[-400:]}")

    for part, names in parts.items():
        library = [f"{name}={stdlib / name}" for name in ("asyncio", "email", "json")] if quick else ["stdlib"]
        sources = [word for name in library for word in ("--source", name)] if part == "library" else []
        sources += [word for name in names for word in ("--source", f"{name}={packages / name}")]
        if sources:
            options = ["--language", "python", "--license", "unknown"]
            call("foundry", "corpus", *sources, *options, "--out", str(folder / f"{part}.jsonl"))
    files = [str(folder / f"{part}.jsonl") for part in parts if (folder / f"{part}.jsonl").is_file()]
    # Two packages may hold the same file.
    call(
        "smelter",
        "tokenize",
        *files,
        "--skip-invalid",
        "--vocab-size",
        vocab,
        "--tokenizer-mb",
        "32",
        "--out",
        str(partial),
    )
    for file in files if len(files) > 1 else []:
        tokenizer = str(partial / "tokenizer.json")
        call("smelter", "tokenize", file, "--tokenizer", tokenizer, "--out", str(Path(file).with_suffix("")))
    partial.replace(shards)  # last: with it, all is there


def quick_form(study: Study, folder: Path) -> Study:
    """Two arms, two values each, two seeds, six short steps, in `folder`: shows that all works, and nothing else."""
    training = replace(
        study.base.training, num_steps=6, device_batch_size=2, total_batch_size=512, use_torch_compile=False,
        warmup_steps=1, eval_tokens=512,
    )  # fmt: skip
    base = replace(
        study.base,
        model=replace(study.base.model, max_seq_len=64, num_layers=1, vocab_size=512),
        data=replace(study.base.data, shards=str(folder / "data" / "all")),
        training=training,
    )
    arms = [replace(arm, sweep={key: values[:2] for key, values in arm.sweep.items()}) for arm in study.arms[:2]]
    return replace(study, base=base, arms=arms, seeds=2, held_out={})
