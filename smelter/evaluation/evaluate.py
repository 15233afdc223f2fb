"""How good a model is on code it has not seen: bits per byte, gaps filled in, problems solved.

Everything that is measured on held-out files needs no code to be run (`bpb`, `gaps`); problems with
tests are run in the sandbox (`problems`, `pass_at_k`). What costs minutes is off unless asked for.
docs/evaluate.md explains each figure.
"""

import math
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro

from smelter.base import CheckpointError, Progress, UserError, parse
from smelter.bitnet import bit_linears
from smelter.decoding import Prompt, complete_many
from smelter.evaluation.bpb import (
    UNKNOWN,
    bits_per_byte,
    by_language,
    compressor_baselines,
    document_nats,
    validation_loss,
)
from smelter.evaluation.compare import Measured, comparison
from smelter.evaluation.gaps import (
    InfillCase,
    InfillKind,
    choose_cases,
    edit_similarity,
    exact_match,
    infill_lines,
    is_exact,
)
from smelter.evaluation.pass_at_k import Attempt, attempt, summary
from smelter.evaluation.problems import OWN_PROBLEMS, Problem, line_variants, load_problems
from smelter.evaluation.results import Case, Results, read_results, write_results
from smelter.evaluation.results import summary as text_summary
from smelter.model import Model
from smelter.run import load_model, pick_device, run_folder
from smelter.tokens import Split, Tokenizer, open_shards

__all__ = ["bits_per_byte", "evaluate", "validation_loss"]

GAP_TOKENS = {"single_line": 64, "multi_line": 128, "random_span": 48}
"""Most tokens that a gap is filled with."""
OWN, OWN_LINES = "smelter_problems", "smelter_lines"
FULL_GAPS = 1_000


def trit_counts(model: Model) -> dict[str, dict[str, int]]:
    """How many weights are -1, 0 and 1, by kind of layer (q_proj, ..., down_proj)."""
    counts: dict[str, Counter[str]] = {}
    for name, layer in bit_linears(model):
        kind = counts.setdefault(name.rsplit(".", 1)[-1], Counter())
        for trit in (-1, 0, 1):
            kind[str(trit)] += int((layer.trits == trit).sum())
    return {kind: {trit: count[trit] for trit in ("-1", "0", "1")} for kind, count in counts.items()}


def untrained(model: Model, seed: int) -> Model:
    """The same model with the initial weights of `seed`: what exact match is worth without training."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        fresh = Model(model.config, model.compute_dtype)
    fresh = fresh.to(model.embed_tokens.weight.device).eval()
    fresh.quantize_weights()
    return fresh


@dataclass(frozen=True)
class EvaluateOptions:
    """Measure a trained model on held-out documents and on problems with tests; writes results.json into the run."""

    checkpoint: tyro.conf.Positional[Annotated[Path | None, tyro.conf.arg(metavar="RUN_OR_CKPT")]] = None
    """Run folder (its newest checkpoint) or checkpoint."""
    compare: tuple[Path, Path] | None = None
    """Two runs, checkpoints or results.json files to show beside each other; what is not measured yet is measured."""
    shards: Path | None = None
    """Folder that `smelter tokenize` wrote; by default the one the run was trained on."""
    max_infill: int = 200
    """Most lines to fill in; 0 leaves all infilling of held-out files out."""
    max_spans: int = 24
    """Most blocks of 2 to 8 lines to fill in, and most spans of characters."""
    pass_at_k: bool = False
    """Solve our own small problems too, and fill in every line of their solutions; programs run in the sandbox."""
    full: bool = False
    """1,000 gaps of each kind, and --pass-at-k."""
    problems: tyro.conf.UseAppendAction[tuple[Path, ...]] = ()
    """File of problems with tests, as HumanEval or MBPP have them, to solve in the sandbox; repeat for more."""
    infill_file: tyro.conf.UseAppendAction[tuple[Path, ...]] = ()
    """File of gaps to fill in, as HumanEval-Infilling or SAFIM have them; repeat for more."""
    num_completions: int = 1
    """Completions of every problem."""
    k: str = "1"
    """For which k to estimate pass@k, such as 1,10; none above --num-completions."""
    temperature: float | None = None
    """Of the sampling of problems' completions: 0, the likeliest, for one completion, else 0.8."""
    max_tokens: int = 256
    """Most tokens of a problem's completion."""
    stride: int = 0
    """Tokens between overlapping windows, 1 to the context's length; 0 is half the context."""
    batch_size: int = 8
    """Windows per forward pass; changes memory and speed only."""
    num_samples: int = 8
    """Filled-in lines to keep in results.json."""
    seed: int = 0
    """Seed that chooses the gaps, and of the sampling."""
    out: Path | None = None
    """Result file; by default results.json in the run folder. Every case lies beside it, in results_cases.jsonl."""
    device: str = "auto"
    """auto, cpu, cuda, or cuda:N."""

    @property
    def ks(self) -> tuple[int, ...]:
        """`k` as numbers. Raises UserError for one that is none, or that the completions do not suffice for."""
        try:
            found = tuple(sorted({int(part) for part in self.k.split(",")}))
        except ValueError:
            raise UserError(f"--k {self.k}: give numbers with commas between them, such as 1,10") from None
        if found[0] < 1 or found[-1] > self.num_completions:
            raise UserError(f"--k {self.k}: must lie between 1 and --num-completions, which is {self.num_completions}")
        return found


@dataclass(frozen=True)
class Subject:
    """The model that is measured, and its held-out documents."""

    model: Model
    tokenizer: Tokenizer
    split: Split
    documents: list[bytes]

    def fill(self, kind: InfillKind, num_cases: int, seed: int) -> tuple[list[InfillCase], list[str]]:
        """The gaps of a kind, and what the model writes into them."""

        def text(i: int) -> str:  # conversations have no gaps: the model never saw one rearranged
            return "" if self.split.is_chat(i) else self.documents[i].decode(errors="replace")

        cases = choose_cases(len(self.documents), text, num_cases, seed, kind)
        say = Progress(f"evaluate: {kind.replace('_', ' ')}s filled in", "gaps", len(cases))
        if kind == "single_line":
            return cases, infill_lines(self.model, self.tokenizer, cases, progress=say)
        prompts = [Prompt(case.prefix, case.suffix) for case in cases]
        return cases, complete_many(self.model, self.tokenizer, prompts, max_tokens=GAP_TOKENS[kind], progress=say)


def _gap_case(kind: str, case: InfillCase, written: str, document: str) -> Case:
    return {
        "measure": f"infill/{kind}",
        "case": f"{case.doc}/{document}/{len(case.prefix)}+{len(case.middle)}",
        "exact": is_exact(written, case.middle),
        "edit_similarity": edit_similarity(written, case.middle),
        "completion": written,
        "expected": case.middle,
    }


def _attempt_cases(measure: str, attempts: Sequence[Attempt]) -> list[Case]:
    by_task: dict[str, list[Attempt]] = {}
    for item in attempts:
        by_task.setdefault(item.problem.task_id, []).append(item)
    return [
        {
            "measure": measure,
            "case": task,
            "num_completions": len(items),
            "num_passed": sum(item.passed for item in items),
            "verdicts": [item.verdict for item in items],
            "completions": [item.completion for item in items],
        }
        for task, items in by_task.items()
    ]


def _problem_sets(options: EvaluateOptions) -> tuple[dict[str, list[Problem]], dict[str, list[Problem]]]:
    """({name: problems to solve}, {name: gaps to fill in}). Raises DataError or UserError before anything is run."""
    problems = {OWN: load_problems(OWN_PROBLEMS)} if options.pass_at_k or options.full else {}
    gaps = {OWN_LINES: line_variants(OWN_PROBLEMS)} if options.pass_at_k or options.full else {}
    for paths, found in ((options.problems, problems), (options.infill_file, gaps)):
        for path in paths:
            name = path.name.split(".")[0]
            if name in problems or name in gaps:
                raise UserError(f"{path}: another file is called {name} too: rename one, results are kept by name")
            found[name] = load_problems(path)
            is_gap = found is gaps
            if any(problem.is_infill != is_gap for problem in found[name]):
                option, other = ("--infill-file", "--problems") if is_gap else ("--problems", "--infill-file")
                raise UserError(f"{path}: {option} takes {'gaps' if is_gap else 'problems'}: give it as {other}")
    return problems, gaps


def _solve(subject: Subject, options: EvaluateOptions, results: Results, cases: list[Case]) -> None:
    """Problems and gaps with tests, into `results` and `cases`."""
    problems, gaps = _problem_sets(options)
    sampled = 0.8 if options.num_completions > 1 else 0.0
    temperature = sampled if options.temperature is None else options.temperature
    for key, sets in (("pass_at_k", problems), ("infill_files", gaps)):
        found = {}
        for name, chosen in sets.items():
            number = options.num_completions if key == "pass_at_k" else 1
            attempts = attempt(
                subject.model,
                subject.tokenizer,
                chosen,
                num_completions=number,
                temperature=temperature if key == "pass_at_k" else 0.0,
                max_tokens=options.max_tokens,
                seed=options.seed,
                progress=Progress(f"evaluate: {name}", "completions", number * len(chosen)),
            )
            found[name] = {
                **summary(attempts, options.ks if key == "pass_at_k" else [1]),
                "temperature": temperature if key == "pass_at_k" else 0.0,
                "max_tokens": options.max_tokens,
            }
            cases += _attempt_cases(f"{key}/{name}", attempts)
        if found:
            results[key] = found


def _check(options: EvaluateOptions) -> None:
    if options.batch_size < 1 or min(options.max_infill, options.max_spans, options.num_samples) < 0:
        raise UserError("--batch-size must be at least 1, --max-infill, --max-spans and --num-samples at least 0")
    if options.num_completions < 1 or options.max_tokens < 1:
        raise UserError("--num-completions and --max-tokens must be at least 1")
    if options.num_completions > 1 and options.temperature == 0:
        raise UserError("--temperature 0 writes the same completion each time: give a temperature above 0")
    _ = options.ks
    _problem_sets(options)


def evaluate(options: EvaluateOptions) -> tuple[Results, Path]:
    """Measure everything asked for; returns the results and the file they were written to."""
    if options.checkpoint is None:
        raise UserError("give a run or a checkpoint, or --compare with two of them")
    path = options.checkpoint
    if options.full:
        options = replace(options, max_infill=FULL_GAPS, max_spans=FULL_GAPS)
    _check(options)
    model, tokenizer, checkpoint = load_model(path, device=pick_device(options.device), with_state=True)
    config = checkpoint.config
    context = config.model.max_seq_len
    stride = options.stride or max(1, context // 2)
    if not 1 <= stride <= context:
        raise UserError(f"--stride {options.stride}: must lie between 1 and the model's context of {context}")
    split = open_shards(options.shards or Path(config.data.shards), tokenizer).split("val")
    say = Progress("evaluate: bits per byte", "tokens", split.num_tokens)
    nats = document_nats(model, split, stride=stride, batch_size=options.batch_size, progress=say)
    val_bpb = float(nats.sum()) / math.log(2) / split.num_bytes
    if not math.isfinite(val_bpb):
        raise CheckpointError(
            f"{checkpoint.path}: the loss on held-out data is {val_bpb}: evaluate an earlier checkpoint"
        )
    places = zip(*split.written, strict=True)
    documents = [tokenizer.decode_bytes(split.doc(i)[begin:end]) for i, (begin, end) in enumerate(places)]
    subject = Subject(model, tokenizer, split, documents)
    hashes = [split.doc_hash(i)[:16] for i in range(split.num_docs)]
    all_cases: list[Case] = [
        {
            "measure": "bits_per_byte",
            "case": f"{i}/{hashes[i]}",
            "language": split.languages[i] or UNKNOWN,
            "nats": float(nats[i]),
            "num_bytes": int(split.doc_num_bytes[i]),
        }
        for i in range(split.num_docs)
    ]
    lines_cases, lines = subject.fill("single_line", options.max_infill, options.seed)
    say = Progress("evaluate: lines filled in, prefix first", "gaps", len(lines_cases))
    psm_lines = infill_lines(model, tokenizer, lines_cases, order="psm", progress=say)
    fresh = untrained(model, config.training.seed)
    say = Progress("evaluate: lines filled in by the untrained model", "gaps", len(lines_cases))
    fresh_lines = infill_lines(fresh, tokenizer, lines_cases, progress=say)
    infill: dict[str, Any] = {}
    num_spans = min(options.max_spans, options.max_infill)
    filled = {"single_line": (lines_cases, lines)}
    filled |= {kind: subject.fill(kind, num_spans, options.seed) for kind in ("multi_line", "random_span")}
    for kind, (cases, written) in filled.items():
        rows = [_gap_case(kind, case, text, hashes[case.doc]) for case, text in zip(cases, written, strict=True)]
        all_cases += rows
        if rows:
            similarity = sum(row["edit_similarity"] for row in rows) / len(rows)
            infill[kind] = {"exact_match": exact_match(written, cases), "edit_similarity": similarity}
            infill[kind] |= {"cases": len(rows), "max_tokens": GAP_TOKENS[kind]}
    state = checkpoint.state or {}
    results: Results = {
        "checkpoint": str(checkpoint.path),
        "step": checkpoint.step,
        "num_params": sum(parameter.numel() for parameter in model.parameters()),
        "train_seconds": state.get("elapsed_seconds"),
        "train_tokens": state.get("tokens"),
        "val_bpb": val_bpb,
        **compressor_baselines(documents),
        "val_bytes": split.num_bytes,
        "val_files": split.num_docs,
        "bpb_by_language": by_language(nats, split),
        "context": context,
        "stride": stride,
        "infill_exact_match": exact_match(lines, lines_cases),
        "infill_exact_match_psm": exact_match(psm_lines, lines_cases),
        "infill_exact_match_untrained": exact_match(fresh_lines, lines_cases),
        "infill_cases": len(lines_cases),
        "infill_seed": options.seed,
        "infill": infill,
        "activation_quant": config.model.activation_quant if config.model.use_ternary else "none",
        "trits": trit_counts(model),
        "samples": [
            {
                "prefix": case.prefix[-400:],
                "suffix": case.suffix[:400],
                "completion": line,
                "expected": case.middle,
            }
            for case, line in islice(zip(lines_cases, lines, strict=True), options.num_samples)
        ],
    }
    _solve(subject, options, results, all_cases)
    out = options.out or run_folder(checkpoint.path) / "results.json"
    write_results(out, results, all_cases)
    return results, out


def measured(path: Path, options: EvaluateOptions) -> Measured:
    """What is known of a run, checkpoint or results.json; a model without results is evaluated now.

    The results of a checkpoint that is not the one results.json speaks of lie beside it, as results_STEP.json.
    """
    if path.suffix == ".json":
        return Measured(str(path), *read_results(path))
    folder = run_folder(path)
    file = folder / "results.json"
    is_checkpoint = folder != path.resolve()
    if is_checkpoint and not (file.is_file() and read_results(file)[0].get("step") == _step(path)):
        file = folder / f"results_{path.resolve().name}.json"
    if not file.is_file():
        print(f"evaluate: {path} has no results yet: measuring it", file=sys.stderr)
        evaluate(replace(options, checkpoint=path, compare=None, out=file))
    return Measured(str(path), *read_results(file))


def _step(checkpoint: Path) -> int | None:
    """The step in a checkpoint's name."""
    number = checkpoint.resolve().name.removeprefix("step_")
    return int(number) if number.isdigit() else None


def main(argv: list[str]) -> int:
    """`smelter evaluate`."""
    options = parse(EvaluateOptions, argv, "smelter evaluate")
    if options.compare is not None:
        if options.checkpoint is not None:
            raise UserError(f"{options.checkpoint}: --compare takes two and nothing beside them")
        _check(options)
        first, second = (measured(path, options) for path in options.compare)
        print(comparison(first, second))
        return 0
    results, out = evaluate(options)
    print(text_summary(results))
    print(f"written to {out}")
    return 0
