"""Which choices of a recipe help, when each side has its own best learning rate and chance has been measured?

A study (recipes/ablations/*.toml; `study.py` explains the file) names a recipe, and *arms*: what each changes, and
which values it sweeps. Every arm is swept on the first seed and repeated over the other seeds at its best; the table
gives mean and standard deviation of the held-out loss at the end of decay, and the difference to the first arm seed by
seed (same order of the data, same initial weights where shapes agree). Runs are `smelter train` in processes of their
own, kept under a hash of configuration, sources and data: what was interrupted goes on, what is done is not done again,
and studies share runs. Other code or other shards are other runs.

    python benchmarks/recipes.py [STUDY.toml] [--jobs 2] [--threads 1] [--only ARM ...] [--quick] [--json]
"""

import argparse
import hashlib
import itertools
import json
import math
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from study import ROOT, Arm, Study, as_tables, load_study, merge, prepare, quick_form

from smelter.base.errors import UserError, nearest
from smelter.base.files import file_sha256
from smelter.config import Config, config_from_dict, config_to_dict, config_to_toml
from smelter.decoding.prompts import make_prompt
from smelter.evaluation.bpb import validation_loss
from smelter.evaluation.gaps import InfillCase, choose_cases, exact_match, fill_in
from smelter.model import Model
from smelter.run.load import load_model
from smelter.tokens.shards import open_shards
from smelter.tokens.tokenizer import Tokenizer

EVAL_TOKENS = 65_536


@dataclass(frozen=True)
class Run:
    """A finished run: its folder, the values it was swept to, and what was measured."""

    folder: Path
    choice: dict[str, Any]
    seed: int
    measured: dict[str, Any]

    @property
    def loss(self) -> float:
        """Held-out nats per token at the end; infinite for a run that diverged."""
        return float("inf") if self.measured["val_loss"] is None else float(self.measured["val_loss"])


class Runner:
    """Carries out a study in `out`, `jobs` runs at a time with `threads` threads each."""

    def __init__(self, study: Study, out: Path, *, jobs: int, threads: int, say: Callable[[str], None]) -> None:
        self.study, self.out, self.say = study, out, say
        self.environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "PYTHONPATH": str(ROOT)}
        self.pool = ThreadPoolExecutor(jobs)
        self.best: dict[str, dict[str, Any]] = {}
        """Per arm: its tables with the swept values at their best."""
        self.runs: dict[str, list[Run]] = {}
        """Per arm: the runs at the best values, by seed."""
        self.swept: dict[str, list[Run]] = {}

    def carry_out(self, arm: Arm) -> None:
        """Sweep on seed 0, repeat at the best."""
        tables = merge(self.best[arm.like], arm.values) if arm.like else arm.values
        tables = json.loads(re.sub(r"\{([^{}\"]+)\}", self._folder_of, json.dumps(tables)))
        choices = [dict(zip(arm.sweep, each, strict=True)) for each in itertools.product(*arm.sweep.values())]
        seeds = arm.seeds or self.study.seeds
        first = list(self.pool.map(lambda choice: self.run(arm, tables, choice, 0), choices))
        self.swept[arm.name] = first
        best = min(first, key=lambda run: run.loss)
        self.best[arm.name] = merge(tables, as_tables(best.choice))
        rest = self.pool.map(lambda seed: self.run(arm, tables, best.choice, seed), range(1, seeds))
        self.runs[arm.name] = [best, *rest]

    def _folder_of(self, match: re.Match[str]) -> str:
        name = match[1]
        if name not in self.runs:
            raise UserError(f"{{{name}}}: no arm before this one has that name: {nearest(name, list(self.runs))}")
        return str(self.runs[name][0].folder)

    def run(self, arm: Arm, tables: dict[str, Any], choice: dict[str, Any], seed: int) -> Run:
        """One training run and its measurement, or what is left of it from an earlier time."""
        config = config_from_dict(merge(tables, as_tables(choice)), arm.name, self.study.base)
        steps = max(1, round(config.training.num_steps * arm.scale_steps))
        training = replace(config.training, num_steps=steps, seed=seed, run_dir="")
        config = replace(config, training=training)
        if arm.teach:
            config = self._taught(arm, config)
        digest = hashlib.sha256(identity(config, sources(ROOT)).encode()).hexdigest()[:10]
        folder = self.out / "runs" / digest
        label = ", ".join([arm.name, *(f"{key.rpartition('.')[2]} {value:g}" for key, value in choice.items())])
        recipe = self.out / "recipes" / f"{digest}.toml"
        recipe.parent.mkdir(parents=True, exist_ok=True)
        recipe.write_text(config_to_toml(replace(config, training=replace(training, run_dir=str(folder)))))
        result = folder / "measured.json"
        measured: dict[str, Any] = json.loads(result.read_text()) if result.is_file() else {}
        if not measured:
            start = time.monotonic()
            code = self._train(recipe)
            measured = self._measure(folder, config, diverged=code != 0)
            measured["wall_seconds"] = time.monotonic() - start
        if measured["val_loss"] is not None:  # another study may have measured less
            for name in self.study.held_out.keys() - measured["held_out"].keys():
                measured["held_out"][name] = self._loss(folder, self.study.held_out[name])[0]
        if measured["val_loss"] is not None and arm.infill and "line_bpb" not in measured:
            measured |= self._infill(folder, config, arm.infill)
        folder.mkdir(parents=True, exist_ok=True)
        result.write_text(json.dumps(measured, indent=1) + "\n")
        value = measured["val_loss"]
        self.say(f"{label}, seed {seed}: {'diverged' if value is None else f'{value:.4f} nats a token'} ({digest})")
        return Run(folder, choice, seed, measured)

    def _train(self, recipe: Path) -> int:
        """Exit code of the training: 0, or 2 where the run diverged. Raises UserError for any other."""
        command = [sys.executable, "-m", "smelter", "train", str(recipe)]
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True, check=False)
        if done.returncode and "not finite" not in done.stderr:
            raise UserError(f"{' '.join(command)}: exit code {done.returncode}: {done.stderr.strip()[-400:]}")
        return done.returncode

    def _taught(self, arm: Arm, config: Config) -> Config:
        """The configuration with a cache of the teacher's probabilities, which is made if it is not there."""
        teacher = re.sub(r"\{([^{}\"]+)\}", self._folder_of, arm.teach["teacher"])
        options = [str(option) for option in arm.teach["options"]]
        arrangement = {"data": config_to_dict(config.data), "seed": config.training.seed}
        steps = round(config.training.num_steps / arm.scale_steps)  # a shorter run reads the beginning of the same rows
        name = json.dumps([teacher, options, arrangement, steps, sources(ROOT), shards_of(config)])
        cache = self.out / "teachers" / hashlib.sha256(name.encode()).hexdigest()[:10]
        rows = math.ceil(steps * config.training.total_batch_size / config.model.max_seq_len)
        recipe = cache.with_suffix(".toml")
        recipe.parent.mkdir(parents=True, exist_ok=True)
        recipe.write_text(config_to_toml(config))
        command = [sys.executable, "-m", "smelter", "teach", "--teacher", teacher, "--shards", config.data.shards]
        command += ["--recipe", str(recipe), "--rows", str(rows), "--seed", str(config.training.seed)]
        command += ["--out", str(cache), *options]
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True, check=False)
        if done.returncode:
            raise UserError(f"{' '.join(command)}: exit code {done.returncode}: {done.stderr.strip()[-400:]}")
        return replace(config, distillation=replace(config.distillation, cached=(str(cache),)))

    def _measure(self, folder: Path, config: Config, *, diverged: bool) -> dict[str, Any]:
        """Held-out loss of the final checkpoint, and what the training took."""
        if diverged:
            return {"val_loss": None, "val_bpb": None, "held_out": {}}
        state = load_model(folder, with_state=True)[2].state or {}
        val_loss, val_bpb = self._loss(folder, Path(config.data.shards))
        return {
            "val_loss": val_loss,
            "val_bpb": val_bpb,
            "held_out": {},
            "train_tokens": state.get("tokens"),
            "train_seconds": state.get("elapsed_seconds"),
        }

    def _loss(self, folder: Path, shards: Path) -> tuple[float, float]:
        """Held-out nats per token and bits per byte of the final checkpoint."""
        model, tokenizer, _ = load_model(folder)
        split = open_shards(shards, tokenizer).split("val")
        return validation_loss(model, split, EVAL_TOKENS, tokenizer=tokenizer, batch_size=16)

    def _infill(self, folder: Path, config: Config, num_cases: int) -> dict[str, Any]:
        """Share of held-out lines filled in exactly, and their bits per byte after the prefix and between both."""
        model, tokenizer, _ = load_model(folder)
        split = open_shards(Path(config.data.shards), tokenizer).split("val")
        cases = choose_cases(split.num_docs, lambda i: tokenizer.decode(split.doc(i).tolist()), num_cases)
        return {
            "infill": exact_match(fill_in(model, tokenizer, cases), cases),
            "prefix_bpb": line_bpb(model, tokenizer, cases, show_suffix=False),
            "line_bpb": line_bpb(model, tokenizer, cases, show_suffix=True),
        }


@torch.inference_mode()
def line_bpb(model: Model, tokenizer: Tokenizer, cases: Sequence[InfillCase], *, show_suffix: bool) -> float:
    """Bits per byte of the lines taken out, asked for as an editor would; what healing takes back is part of a line."""
    bits, num_bytes = 0.0, 0
    for case in cases:
        suffix = case.suffix if show_suffix else None
        context = model.config.max_seq_len
        asked = make_prompt(tokenizer, context, case.prefix, suffix, max_tokens=64)
        line = asked.pending.decode("utf-8", "replace") + case.middle
        ids = tokenizer.encode(line)[: context - len(asked.ids)]
        logits = model.logits(model(torch.tensor([asked.ids + ids]))[0, len(asked.ids) - 1 : -1]).float()
        bits += torch.nn.functional.cross_entropy(logits, torch.tensor(ids), reduction="sum").item() / math.log(2)
        num_bytes += len(tokenizer.decode_bytes(ids))
    return bits / num_bytes


def identity(config: Config, code: str) -> str:
    """What sets a run apart: every value that is not the default, the shards, and the `code` that trained on them."""
    values, default = config_to_dict(config), config_to_dict(Config())
    chosen = {key: {n: value for n, value in values[key].items() if value != default[key][n]} for key in values}
    return json.dumps([chosen, shards_of(config), code], sort_keys=True)


def shards_of(config: Config) -> str:
    """SHA-256 of the shards' index, which holds that of all their files."""
    return file_sha256(Path(config.data.shards) / "index.json")


def sources(root: Path) -> str:
    """SHA-256 of all that trains and measures: Smelter but for what comes after it, and the benchmark's own files."""
    files = [path for path in (root / "smelter").rglob("*") if path.suffix in (".py", ".cpp", ".h")]
    files = [path for path in files if path.relative_to(root).parts[1] not in ("serving", "export")]
    files += [root / "benchmarks" / name for name in ("recipes.py", "study.py")]
    digest = hashlib.sha256()
    for path in sorted(files):
        digest.update(f"{path.relative_to(root).as_posix()} {file_sha256(path)}\n".encode())
    return digest.hexdigest()


def spread(values: list[float]) -> tuple[float, float | None]:
    """Mean and standard deviation of the sample (None for a single value)."""
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None


def steps_to_reach(shares: list[float], losses: list[float], goal: float) -> float | None:
    """The share of the steps at which `goal` is reached: log-linear between the lengths that were run, None outside."""
    points = sorted(zip(shares, losses, strict=True))
    for (share, loss), (next_share, next_loss) in itertools.pairwise(points):
        if next_loss <= goal <= loss:
            part = (loss - goal) / (loss - next_loss) if loss > next_loss else 0.0
            return math.exp(math.log(share) + part * (math.log(next_share) - math.log(share)))
    return None


def summarise(runner: Runner) -> dict[str, Any]:
    """Per arm: best values, mean and deviation of loss and bits per byte, difference to the first arm by seed."""
    arms: dict[str, Any] = {}
    study = runner.study
    finished = [arm for arm in study.arms if arm.name in runner.runs]
    base = {run.seed: run.loss for run in runner.runs[finished[0].name]}
    for arm in finished:
        runs = runner.runs[arm.name]
        sweep = runner.swept[arm.name]
        edges = [
            key for key, choices in arm.sweep.items()
            if len(choices) > 1 and runs[0].choice[key] in (min(choices), max(choices))
        ]  # fmt: skip
        differences = [run.loss - base[run.seed] for run in runs if run.seed in base]
        arms[arm.name] = {
            "best": runs[0].choice,
            "best_at_edge": edges,
            "sweep": [{**run.choice, "val_loss": run.measured["val_loss"]} for run in sweep],
            "seeds": len(runs),
            "steps": runs[0].measured.get("train_tokens"),
            "val_loss": spread([run.loss for run in runs]),
            "val_bpb": spread([run.measured["val_bpb"] or math.inf for run in runs]),
            "difference": spread(differences),
            "held_out": {name: spread([run.measured["held_out"][name] for run in runs]) for name in study.held_out},
            **{
                name: spread([run.measured[name] for run in runs]) if arm.infill else None
                for name in ("infill", "prefix_bpb", "line_bpb")
            },
            "train_seconds": statistics.fmean([run.measured.get("train_seconds") or 0.0 for run in runs]),
        }
    reach: dict[str, float | None] = {}
    for name, other in study.reach:
        family = [arm for arm in finished if arm.name == name or (arm.like == name and arm.scale_steps != 1)]
        if other in arms and family:
            losses = [arms[arm.name]["val_loss"][0] for arm in family]
            reach[f"{name} / {other}"] = steps_to_reach(
                [arm.scale_steps for arm in family], losses, arms[other]["val_loss"][0]
            )
    return {"arms": arms, "reach": reach}


def table(summary: dict[str, Any]) -> Iterator[str]:
    """The result as aligned lines of Markdown."""
    names = list(next(iter(summary["arms"].values()))["held_out"])
    head = ["arm", "best", "seeds", "Mtok", "nats/token", "bits/byte", "to the first", *names]
    infill = {"infill": "lines filled in", "prefix_bpb": "bits/byte of lines", "line_bpb": "the same, suffix seen"}
    has_infill = any(arm["infill"] for arm in summary["arms"].values())
    head += infill.values() if has_infill else []
    rows = [head]
    for name, arm in summary["arms"].items():
        best = ", ".join(
            f"{key.rpartition('.')[2]} {value:g}{' (edge)' if key in arm['best_at_edge'] else ''}"
            for key, value in arm["best"].items()
        )
        rows.append([
            name, best or "-", str(arm["seeds"]), f"{(arm['steps'] or math.nan) / 1e6:.2f}", both(arm["val_loss"]),
            both(arm["val_bpb"]), both(arm["difference"], sign="+"),
            *(both(arm["held_out"][each]) for each in names),
            *((both(arm[each], digits=3) if arm[each] else "-" for each in infill) if has_infill else ()),
        ])  # fmt: skip
    widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
    for number, row in enumerate(rows):
        yield "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |"
        if number == 0:
            yield "|" + "|".join("-" * (width + 2) for width in widths) + "|"
    for pair, share in summary["reach"].items():
        first, _, second = pair.partition(" / ")
        text = "outside the lengths that were run" if share is None else f"{share:.2f} of the steps"
        yield f"{first} has the final loss of {second} after: {text}"


def both(values: tuple[float, float | None], *, digits: int = 4, sign: str = "") -> str:
    """mean ± deviation."""
    mean, deviation = values
    return f"{mean:{sign}.{digits}f}" + ("" if deviation is None else f" ± {deviation:.{digits}f}")


def main() -> None:
    """Carry out the study, print its table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", type=Path, nargs="?", default=ROOT / "recipes" / "ablations" / "optimizers.toml")
    parser.add_argument("--out", type=Path, default=Path("runs/ablations"), help="where runs are kept, and found again")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time")
    parser.add_argument("--threads", type=int, default=1, help="threads of each")
    parser.add_argument("--only", nargs="+", default=[], metavar="ARM", help="these arms, and what they build on")
    parser.add_argument("--seeds", type=int, default=0, help="instead of the study's number")
    parser.add_argument("--quick", action="store_true", help="a few steps of two arms on the standard library alone")
    parser.add_argument("--json", action="store_true", help="the last line is one JSON object")
    options = parser.parse_args()

    def say(text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    temporary = tempfile.TemporaryDirectory()  # of the quick form, which is to do all of it each time
    try:
        study = load_study(options.study)
        if options.quick:
            options.out = Path(temporary.name)
            study = quick_form(study, options.out)
        if options.seeds:
            study = replace(study, seeds=options.seeds)
        prepare(study.base, quick=options.quick, say=say)
        runner = Runner(study, options.out.resolve(), jobs=options.jobs, threads=options.threads, say=say)
        needed = set(options.only) or {arm.name for arm in study.arms}
        for arm in study.arms:
            if arm.name in needed:
                runner.carry_out(arm)
    except UserError as error:
        sys.exit(f"recipes: error: {error}")
    summary = summarise(runner)
    print(study.question, *table(summary), sep="\n")
    if options.json:
        print(json.dumps({"benchmark": "recipes", "study": options.study.stem, "quick": options.quick, **summary}))


if __name__ == "__main__":
    main()
