"""How good a model is on code it has not seen: bits per byte, gaps filled in, problems solved.

Everything that is measured on held-out files needs no code to be run (`bpb`, `gaps`, `editor`); problems with
tests are run in the sandbox (`problems`, `pass_at_k`). What costs minutes is off unless asked for.
docs/evaluate.md explains each figure.
"""

import sys
from dataclasses import dataclass, replace
from itertools import chain, islice
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
import tyro
from annotated_types import Ge

from smelter.base import CheckpointError, Progress, UserError, parse, table
from smelter.decoding import FimOrder
from smelter.evaluation.bpb import bits_of, by_language, compressor_baselines, document_cases, document_nats
from smelter.evaluation.compare import Measured, comparison
from smelter.evaluation.editor import choose_questions, model_rows, server_rows, word_rows
from smelter.evaluation.gaps import InfillKind, choose_cases, exact_match, fill_in, filled, judged, sample_of
from smelter.evaluation.held_out import HeldOut
from smelter.evaluation.pass_at_k import attempt, problem_cases, solved
from smelter.evaluation.places import CONTEXT_CHARACTERS
from smelter.evaluation.problems import OWN_PROBLEMS, Problem, line_variants, load_problems
from smelter.evaluation.servers import Server, ServerKind
from smelter.evaluation.tables import EDITOR_NOTE, editor_table, summary
from smelter.model import Model
from smelter.run import (
    RESULTS_FILE,
    Checkpoint,
    DocumentCase,
    Editor,
    GapCase,
    GapsFilled,
    ProblemCase,
    Results,
    Sample,
    Solved,
    check_results_file,
    load_model,
    pick_device,
    read_results,
    run_folder,
    trit_counts,
    write_editor,
    write_results,
)
from smelter.tokens import Tokenizer

OWN, OWN_LINES = "smelter_problems", "smelter_lines"
FULL_GAPS = 1_000


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
    max_infill: Annotated[int, Ge(0)] = 200
    """Most lines to fill in; 0 leaves all infilling of held-out files out."""
    max_spans: Annotated[int, Ge(0)] = 24
    """Most blocks of 2 to 8 lines to fill in, and most spans of characters."""
    pass_at_k: bool = False
    """Solve our own small problems too, and fill in every line of their solutions; programs run in the sandbox."""
    full: bool = False
    """1,000 gaps of each kind, and --pass-at-k."""
    problems: tyro.conf.UseAppendAction[tuple[Path, ...]] = ()
    """File of problems with tests, as HumanEval or MBPP have them, to solve in the sandbox; repeat for more."""
    infill_file: tyro.conf.UseAppendAction[tuple[Path, ...]] = ()
    """File of gaps to fill in, as HumanEval-Infilling or SAFIM have them; repeat for more."""
    editor: bool = False
    """What arrives at the cursor while held-out code is typed, and how many keystrokes it saves."""
    url: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """[NAME=]http://HOST:PORT[#MODEL] of a server to ask in --editor, too; repeat for more. It needs no checkpoint."""
    url_kind: ServerKind | Literal["auto"] = "auto"
    """How servers are asked: /infill, /v1/completions with suffix, or without; auto takes the first that they have."""
    editor_places: Annotated[int, Ge(1)] = 200
    """Most places of each kind: at a line's start, at a word's, inside a word."""
    editor_lines: Annotated[int, Ge(1)] = 40
    """Most lines to type."""
    editor_characters: Annotated[int, Ge(100)] = CONTEXT_CHARACTERS
    """Characters around the cursor that are shown, three quarters of them before it."""
    num_completions: Annotated[int, Ge(1)] = 1
    """Completions of every problem."""
    k: str = "1"
    """For which k to estimate pass@k, such as 1,10; none above --num-completions."""
    temperature: float | None = None
    """Of the sampling of problems' completions: 0, the likeliest, for one completion, else 0.8."""
    max_tokens: Annotated[int, Ge(1)] = 256
    """Most tokens of a problem's completion."""
    stride: int = 0
    """Tokens between overlapping windows, 1 to the context's length; 0 is half the context."""
    batch_size: Annotated[int, Ge(1)] = 8
    """Windows per forward pass; changes memory and speed only."""
    num_samples: Annotated[int, Ge(0)] = 8
    """Filled-in lines to keep in results.json."""
    seed: int = 0
    """Seed that chooses the gaps, and of the sampling."""
    out: Path | None = None
    """Result file; by default results.json in the run folder. Every case lies beside it, in results_cases.jsonl."""
    device: str = "auto"
    """auto, cpu, cuda, or cuda:N."""

    def __post_init__(self) -> None:
        if self.compare is not None and self.checkpoint is not None:
            raise UserError(f"{self.checkpoint}: --compare takes two and nothing beside them")
        if self.compare is None and self.checkpoint is None and not self.url:
            raise UserError("give a run or a checkpoint, or --compare with two of them")
        if self.url and not self.editor:
            raise UserError("--url: a server is asked at the cursor alone: add --editor")
        if self.url and self.checkpoint is None and self.shards is None:
            raise UserError("--url without a run: give --shards, whose held-out files are typed")
        names = [server.name for server in self.servers]
        if len(set(names)) < len(names):
            raise UserError(f"--url: two servers are called {max(names, key=names.count)}: give names, as in one=URL")
        if self.num_completions > 1 and self.temperature == 0:
            raise UserError("--temperature 0 writes the same completion each time: give a temperature above 0")
        _ = self.ks

    @property
    def servers(self) -> list[Server]:
        """Of --url. Raises UserError."""
        return [Server.parse(url) for url in self.url]

    @property
    def ks(self) -> tuple[int, ...]:
        """`k` as numbers. Raises UserError for one that is none, or that the completions do not suffice for."""
        try:
            ks = tuple(sorted({int(part) for part in self.k.split(",")}))
        except ValueError:
            raise UserError(f"--k {self.k}: give numbers with commas between them, such as 1,10") from None
        if ks[0] < 1 or ks[-1] > self.num_completions:
            raise UserError(f"--k {self.k}: must lie between 1 and --num-completions, which is {self.num_completions}")
        return ks


def problem_sets(options: EvaluateOptions) -> tuple[dict[str, list[Problem]], dict[str, list[Problem]]]:
    """({name: problems to solve}, {name: gaps to fill in}). Raises DataError or UserError."""
    problems = {OWN: load_problems(OWN_PROBLEMS)} if options.pass_at_k else {}
    gaps = {OWN_LINES: line_variants(OWN_PROBLEMS)} if options.pass_at_k else {}
    for paths, sets in ((options.problems, problems), (options.infill_file, gaps)):
        for path in paths:
            name = path.name.split(".")[0]
            if name in problems or name in gaps:
                raise UserError(f"{path}: another file is called {name} too: rename one, results are kept by name")
            sets[name] = load_problems(path)
            is_gap = sets is gaps
            if any(problem.is_infill != is_gap for problem in sets[name]):
                option, other = ("--infill-file", "--problems") if is_gap else ("--problems", "--infill-file")
                raise UserError(f"{path}: {option} takes {'gaps' if is_gap else 'problems'}: give it as {other}")
    return problems, gaps


@dataclass(frozen=True)
class Subject:
    """The model that is measured, and its held-out documents."""

    model: Model
    tokenizer: Tokenizer
    checkpoint: Checkpoint
    held_out: HeldOut
    stride: int


def open_subject(path: Path, options: EvaluateOptions) -> Subject:
    """Load a model and its held-out documents. Raises UserError for what cannot be used."""
    model, tokenizer, checkpoint = load_model(path, device=pick_device(options.device), with_state=True)
    context = model.config.max_seq_len
    stride = options.stride or max(1, context // 2)
    if not 1 <= stride <= context:
        raise UserError(f"--stride {options.stride}: must lie between 1 and the model's context of {context}")
    held_out = HeldOut.open(options.shards or Path(checkpoint.config.data.shards), tokenizer)
    return Subject(model, tokenizer, checkpoint, held_out, stride)


def measure_bits(subject: Subject, batch_size: int) -> list[DocumentCase]:
    """How much each document surprises the model. Raises CheckpointError where that is not finite."""
    split = subject.held_out.split
    say = Progress("evaluate: bits per byte", "tokens", split.num_tokens)
    nats = document_nats(subject.model, split, stride=subject.stride, batch_size=batch_size, progress=say)
    if not np.isfinite(nats).all():
        raise CheckpointError(
            f"{subject.checkpoint.path}: the loss on held-out data is {nats.sum()}: evaluate an earlier checkpoint"
        )
    return document_cases(nats, split)


@dataclass(frozen=True)
class Gaps:
    """Gaps as the model filled them in, by kind; of the lines also other shares that are exact, and samples."""

    seed: int
    """Of their choice."""
    cases: dict[InfillKind, list[GapCase]]
    exact_psm: float | None
    """By the same model, with the prefix first in the prompt."""
    exact_untrained: float | None
    """By a model with the initial weights."""
    samples: tuple[Sample, ...]


def fill_gaps(subject: Subject, names: list[str], options: EvaluateOptions) -> Gaps:
    """Choose gaps of each kind in the documents, which are called `names`, and let the model fill them in."""
    num_spans = min(options.max_spans, options.max_infill)
    most: dict[InfillKind, int] = {
        "single_line": options.max_infill,
        "multi_line": num_spans,
        "random_span": num_spans,
    }

    gaps = {kind: choose_cases(len(names), subject.held_out.code, most[kind], options.seed, kind) for kind in most}

    def fill(model: Model, kind: InfillKind, what: str, order: FimOrder = "spm") -> list[str]:
        say = Progress(f"evaluate: {what}", "gaps", len(gaps[kind]))
        return fill_in(model, subject.tokenizer, gaps[kind], kind, order=order, progress=say)

    written = {kind: fill(subject.model, kind, f"{kind.replace('_', ' ')}s filled in") for kind in gaps}
    psm = fill(subject.model, "single_line", "lines filled in, prefix first", order="psm")
    fresh = untrained(subject.model, subject.checkpoint.config.training.seed)
    by_fresh = fill(fresh, "single_line", "lines filled in by the untrained model")
    lines = gaps["single_line"]
    cases = {
        kind: [judged(kind, names[gap.doc], gap, text) for gap, text in zip(gaps[kind], written[kind], strict=True)]
        for kind in gaps
    }
    samples = tuple(islice(map(sample_of, lines, written["single_line"]), options.num_samples))
    return Gaps(options.seed, cases, exact_match(psm, lines), exact_match(by_fresh, lines), samples)


def at_cursor(options: EvaluateOptions, held_out: HeldOut, subject: Subject | None) -> Editor:
    """Servers, the model if there is one, and the buffer's words. Raises UserError."""
    questions = choose_questions(
        len(held_out.documents),
        held_out.code,
        options.editor_places,
        options.editor_lines,
        characters=options.editor_characters,
        seed=options.seed,
    )
    rows = server_rows(options.servers, options.url_kind, questions)  # first: what they refuse is known at once
    if subject is not None:
        fresh = untrained(subject.model, subject.checkpoint.config.training.seed)
        rows = model_rows(subject.model, subject.tokenizer, questions, fresh) | rows
    return Editor(rows | word_rows(questions), options.seed, options.editor_characters)


def solve(
    subject: Subject, measure: str, sets: dict[str, list[Problem]], options: EvaluateOptions
) -> tuple[dict[str, Solved], list[ProblemCase]]:
    """The figures of each set of problems, and the cases of all."""
    figures: dict[str, Solved] = {}
    cases: list[ProblemCase] = []
    usual = 0.8 if options.num_completions > 1 else 0.0
    temperature = usual if options.temperature is None else options.temperature
    for name, problems in sets.items():
        attempts = attempt(
            subject.model,
            subject.tokenizer,
            problems,
            num_completions=options.num_completions,
            temperature=temperature,
            max_tokens=options.max_tokens,
            seed=options.seed,
            progress=Progress(f"evaluate: {name}", "completions", options.num_completions * len(problems)),
        )
        figures[name] = solved(attempts, options.ks, temperature=temperature, max_tokens=options.max_tokens)
        cases += problem_cases(f"{measure}/{name}", attempts)
    return figures, cases


def collect(
    subject: Subject,
    documents: list[DocumentCase],
    gaps: Gaps,
    solutions: dict[str, Solved],
    answers: dict[str, Solved],
    editor: Editor | None,
) -> Results:
    """All that was measured, as the result file has it; `solutions` are of problems, `answers` of gaps with tests."""
    model, checkpoint, state = subject.model, subject.checkpoint, subject.checkpoint.state or {}
    bits, compressed = bits_of(documents), compressor_baselines(subject.held_out.documents)
    infill: dict[str, GapsFilled] = {kind: filled(kind, cases) for kind, cases in gaps.cases.items() if cases}
    lines = infill.get("single_line")
    return Results(
        checkpoint=str(checkpoint.path),
        step=checkpoint.step,
        num_params=sum(parameter.numel() for parameter in model.parameters()),
        train_seconds=state.get("elapsed_seconds"),
        train_tokens=state.get("tokens"),
        val_bpb=bits.bpb,
        gzip_bpb=compressed.gzip,
        xz_bpb=compressed.xz,
        xz_joined_bpb=compressed.xz_joined,
        val_bytes=bits.num_bytes,
        val_files=bits.num_files,
        bpb_by_language=by_language(documents),
        context=model.config.max_seq_len,
        stride=subject.stride,
        infill_exact_match=lines.exact_match if lines else None,
        infill_exact_match_psm=gaps.exact_psm,
        infill_exact_match_untrained=gaps.exact_untrained,
        infill_cases=lines.cases if lines else 0,
        infill_seed=gaps.seed,
        infill=infill,
        activation_quant=model.config.activation_quant if model.config.use_ternary else "none",
        trits=trit_counts(model),
        samples=gaps.samples,
        pass_at_k=solutions,
        infill_files=answers,
        editor=editor,
    )


def evaluate(path: Path, options: EvaluateOptions) -> tuple[Results, Path]:
    """Measure everything asked for; returns the results and the file they were written to."""
    if options.full:
        options = replace(options, pass_at_k=True, max_infill=FULL_GAPS, max_spans=FULL_GAPS)
    problems, gap_files = problem_sets(options)
    subject = open_subject(path, options)
    out = options.out or run_folder(subject.checkpoint.path) / RESULTS_FILE
    if options.out is None:
        check_results_file(out)
    editor = at_cursor(options, subject.held_out, subject) if options.editor else None
    documents = measure_bits(subject, options.batch_size)
    gaps = fill_gaps(subject, [document.case for document in documents], options)
    solutions, solution_cases = solve(subject, "pass_at_k", problems, options)
    likeliest = replace(options, num_completions=1, k="1", temperature=0.0)
    answers, answer_cases = solve(subject, "infill_files", gap_files, likeliest)
    results = collect(subject, documents, gaps, solutions, answers, editor)
    try:
        write_results(out, results, [*documents, *chain(*gaps.cases.values()), *solution_cases, *answer_cases])
    except OSError:
        print(summary(results), flush=True)  # what took so long is not lost with the file
        raise
    return results, out


def measured(path: Path, options: EvaluateOptions) -> Measured:
    """What is known of a run, checkpoint or results.json; a model without results is evaluated now.

    The results of a checkpoint that is not the one results.json speaks of lie beside it, as results_STEP.json.
    """
    if path.suffix == ".json":
        return Measured.read(str(path), path)
    folder = run_folder(path)
    file = folder / RESULTS_FILE
    is_checkpoint = folder != path.resolve()
    if is_checkpoint and not (file.is_file() and path.resolve().name == f"step_{read_results(file).step:07d}"):
        file = folder / f"results_{path.resolve().name}.json"
    if not file.is_file():
        print(f"evaluate: {path} has no results yet: measuring it", file=sys.stderr)
        evaluate(path, replace(options, out=file))
    return Measured.read(str(path), file)


def main(argv: list[str]) -> int:
    """`smelter evaluate`."""
    options = parse(EvaluateOptions, argv, "smelter evaluate")
    if options.compare is not None:
        first, second = (measured(path, options) for path in options.compare)
        print(comparison(first, second))
    elif options.checkpoint is not None:
        results, out = evaluate(options.checkpoint, options)
        print(summary(results))
        print(f"written to {out}")
    elif options.shards is not None:
        editor = at_cursor(options, HeldOut.open(options.shards, Tokenizer.load(options.shards)), None)
        print(f"{table(editor_table(editor))}\n\n{EDITOR_NOTE}")
        if options.out is not None:
            write_editor(options.out, editor)
            print(f"written to {options.out}")
    return 0
