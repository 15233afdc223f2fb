"""A checkpoint in the formats that others read, and the proof that nothing changed on the way.

Every format is written under a temporary name, read back and measured (`smelter.export.check`) before it takes its
place: each trit and scale must be what it was, texts must become the same tokens, and the report says what leaving the
soft-caps out and rounding activations otherwise cost. Export refuses where leaving the caps out would make another
model. `--format all` writes each format into a folder of its own and a model card above them, ready to publish.
"""

import importlib.util
import shutil
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro

from smelter.base import (
    UserError,
    errors_name,
    file_sha256,
    fsync,
    fsync_all,
    make_folder,
    only_writer,
    parse,
    table,
    write_json,
    write_text,
)
from smelter.export.card import check_rows, gguf_file, model_card, modelfile, server_command
from smelter.export.check import (
    Source,
    check_architecture,
    check_gguf_logits,
    check_hf_logits,
    check_llama_cpp_tokenizer,
    check_tokenizer,
    compare,
    infill_prompt,
    logits_of,
    measure_caps,
    probe_texts,
    probe_windows,
)
from smelter.export.cursor import check_cursor, check_llama_server, objection
from smelter.export.earlier import FIRST, REPORT, check_ours, still_there
from smelter.export.gguf import check_gguf, read_gguf, write_gguf
from smelter.export.hf import baked_tensors, check_expressible, compare_trits, read_hf, write_hf
from smelter.run import RESULTS_FILE, load_model, read_results, run_folder, write_packed

MUST_BE_ZERO = (
    *("trits_changed", "weights_changed", "scales_changed", "tokenizer_differences"),
    *("llama_cpp_tokenizer_differences", "llama_cpp_infill_prompt_differs"),
)

MOST = {"kl_architecture": 1e-4, "kl_same_numerics": 1e-2, "kl_as_trained": 0.1}
"""Nats per token that an export may differ by: in float32 from the same tensors; with the embedding rounded; and as its
readers round activations."""
LEAST = {"top1_architecture": 0.99, "top1_same_numerics": 0.9}
"""Share of tokens with the same first choice."""


@dataclass(frozen=True)
class ExportOptions:
    """Write a trained model in the formats that other tools read, and check what was written."""

    checkpoint: tyro.conf.Positional[Annotated[Path, tyro.conf.arg(metavar="RUN_OR_CKPT")]]
    """Run folder (its newest checkpoint) or checkpoint."""
    format: Literal["hf", "gguf", "all"]
    """hf: a folder for Transformers and what reads its files. gguf: a file for llama.cpp and what is built on it,
    with a Modelfile for Ollama. all: both in folders of their own and a model card, ready to publish."""
    out: Path
    """Folder to write into."""
    gguf_type: Literal["TQ2_0", "TQ1_0", "F16"] = "TQ2_0"
    """TQ2_0: 2.06 bits a weight, the fastest. TQ1_0: 1.69 bits, slower. F16: any size of model."""
    gguf_embedding: Literal["Q8_0", "F16", "F32"] = "Q8_0"
    """Type of the embedding (the output head too). F16 and F32 are larger, slower and nearer to the checkpoint."""
    packed: bool = False
    """With --format all, also a folder with two bits a weight that smelter's own commands read."""
    license: str = "other"
    """Licence of the weights, as the model card names it (an identifier of Hugging Face's list)."""
    shards: Path | None = None
    """Held-out text to measure on; by default the run's shards, or Python's own source where they are not here."""
    force: bool = False
    """Export although the caps matter, or over files in the folder that no earlier export wrote."""

    def __post_init__(self) -> None:
        if self.packed and self.format != "all":
            raise UserError(f"--packed goes with --format all, not with --format {self.format}")

    @property
    def parts(self) -> dict[str, Path]:
        """Each format to write, with its folder below `out`."""
        if self.format != "all":
            return {self.format: Path()}
        return {part: Path(part) for part in ("hf", "gguf", *(["packed"] if self.packed else []))}


def _source(options: ExportOptions) -> Source:
    """Load the checkpoint and see whether it can be exported at all. UserError says why not."""
    model, tokenizer, checkpoint = load_model(options.checkpoint, device="cpu", dtype=torch.float32)
    check_expressible(model.config)
    if "gguf" in options.parts:
        check_gguf(model, tokenizer, options.gguf_type)
    _check_out(options)
    run = run_folder(checkpoint.path)
    results = read_results(run / RESULTS_FILE) if (run / RESULTS_FILE).is_file() else None
    shards = options.shards or Path(checkpoint.config.data.shards)
    texts, probe = probe_texts(shards, tokenizer, must_exist=options.shards is not None)
    windows = probe_windows(texts, tokenizer, model.config.max_seq_len)
    caps = measure_caps(model, windows)
    cursor = check_cursor(model, tokenizer, texts)
    return Source(
        run.name, options.license, model, tokenizer, checkpoint, results, shards, texts, probe, windows, caps, cursor
    )


def _write_part(part: str, folder: Path, source: Source, options: ExportOptions) -> dict[str, Any]:
    """Write one format into `folder`, read it back and compare."""
    model, tokenizer, windows = source.model, source.tokenizer, source.windows
    if part == "hf":
        write_hf(folder, model, tokenizer)
        read = read_hf(folder)
        checks: dict[str, Any] = {**compare_trits(model, read), **check_architecture(model, read, windows)}
        if importlib.util.find_spec("transformers"):
            checks |= check_tokenizer(folder, tokenizer, source.texts) | check_hf_logits(folder, model, windows)
    elif part == "gguf":
        file = folder / f"{source.name}-{options.gguf_type}.gguf"
        kinds = {"gguf_type": options.gguf_type, "embedding_type": options.gguf_embedding}
        write_gguf(file, model, tokenizer, name=source.name, **kinds)
        read = read_gguf(file, model.config.num_layers)
        checks = {**compare_trits(model, read), **check_architecture(model, read, windows)}
        checks |= check_gguf_logits(model, read, options.gguf_type, windows)
        checks |= check_llama_cpp_tokenizer(file, tokenizer, source.texts)
        checks |= check_llama_server(server_command(file, source.context), source.texts)
        write_text(folder / "Modelfile", modelfile(source.name, file.name, tokenizer, source.context))
    else:
        write_packed(folder, model, tokenizer, source.checkpoint.config, source.checkpoint.step)
        again, _, _ = load_model(folder, device="cpu", dtype=torch.float32)
        checks = {**compare_trits(model, baked_tensors(again).__getitem__)}
        checks["kl_as_trained"], checks["top1_as_trained"] = compare(logits_of(model), logits_of(again), windows)
    wrong = [f"{key} = {checks[key]}" for key in MUST_BE_ZERO if checks.get(key)]
    where = options.out / options.parts[part]
    if wrong:
        raise UserError(f"{where}: read back, the export differs ({', '.join(wrong)}): check the disk and try again")
    _check_same(where, checks, force=options.force)
    return checks


def _check_same(folder: Path, checks: dict[str, Any], *, force: bool) -> None:
    """UserError where what was written is another model, by what was measured of it."""
    wrong = {
        key: f"{key} = {checks[key]:.2g} > {most:g}"
        for key, most in MOST.items()
        if key in checks and not checks[key] <= most
    }
    wrong |= {
        key: f"{key} = {checks[key]:.2f} < {least:g}"
        for key, least in LEAST.items()
        if key in checks and not checks[key] >= least
    }
    if force:  # that leaving caps out or rounding otherwise changes it was to be accepted; other code was not
        wrong.pop("kl_as_trained", None)
    if wrong:
        fix = "smelter/model.py computes what Qwen3 does not, and no reader of the export would: put it back"
        if wrong.keys() == {"kl_as_trained"}:
            fix = "train with its readers' rounding of activations (docs/deploy.md), or --force"
        raise UserError(f"{folder}: the exported model is another ({', '.join(wrong.values())}): {fix}")


def _report(part: str, folder: Path, source: Source, options: ExportOptions, checks: dict[str, Any]) -> dict[str, Any]:
    """What export.json says of one format."""
    return {
        "format": part,
        "gguf_type": options.gguf_type if part == "gguf" else None,
        "checkpoint": str(source.checkpoint.path),
        "step": source.checkpoint.step,
        "context": source.context,
        "files": {path.name: path.stat().st_size for path in sorted(folder.iterdir()) if path.is_file()},
        "forced": bool(source.caps.objections()),
        "probe": source.probe,
        "probe_tokens": sum(window.numel() for window in source.windows),
        **asdict(source.caps),
        **checks,
        **source.cursor,
        "infill_prompt": infill_prompt(source.tokenizer),
    }


def export(options: ExportOptions) -> dict[str, Any]:
    """Write and check; returns the report that export.json holds. Nothing is changed in `out` if it fails."""
    with only_writer(options.out, "--out"):
        return _export(options)


def _export(options: ExportOptions) -> dict[str, Any]:
    source = _source(options)
    objections = source.caps.objections()
    if objections and not options.force:
        raise UserError(
            f"{source.checkpoint.path}: {options.format} has no soft-caps, and {' and '.join(objections)}: train on "
            f"with the caps at 0 or a larger z_loss, or export another model with --force"
        )
    work = options.out / ".tmp_export"
    shutil.rmtree(work, ignore_errors=True)
    with errors_name(options.out, work), ExitStack() as at_the_end:
        at_the_end.callback(shutil.rmtree, work, ignore_errors=True)
        make_folder(work)
        reports: dict[str, dict[str, Any]] = {}
        for part, below in options.parts.items():
            folder = work / below
            folder.mkdir(exist_ok=True)
            checks = _write_part(part, folder, source, options)
            reports[part] = _report(part, folder, source, options, checks)
            if part == "hf":
                write_text(folder / "README.md", model_card(source, reports, {part: Path()}))
                reports[part]["files"]["README.md"] = (folder / "README.md").stat().st_size
            reports[part]["sha256"] = _digests(folder, options.out / below)
            write_json(folder / REPORT, reports[part])
        if options.format == "all":
            write_text(work / "README.md", model_card(source, reports, options.parts))
            digests = _digests(work, options.out)
            write_json(work / REPORT, {"format": "all", "parts": reports, "sha256": digests})
        if not options.force:  # once more, with every name: it may have taken minutes
            check_ours(options.out / path.relative_to(work) for path in work.rglob("*") if path.is_file())
        fsync_all(work)
        for path in sorted(work.rglob("*")):
            target = options.out / path.relative_to(work)
            if path.is_dir():
                make_folder(target)
            else:
                path.replace(target)
        for below in {Path(), *options.parts.values()}:
            fsync(options.out / below)
    return reports


def _digests(folder: Path, target: Path) -> dict[str, str]:
    """SHA-256 of the files written into `folder`, and of what an earlier export left in the `target` of them."""
    written = {path.name: file_sha256(path) for path in sorted(folder.iterdir()) if path.is_file()}
    return {name: digest for name, digest in (still_there(target) | written).items() if name != REPORT}


def _check_out(options: ExportOptions) -> None:
    """UserError where a folder is none, or a file stands in the way that no export wrote."""
    folders = {part: options.out / below for part, below in options.parts.items()} | {options.format: options.out}
    for part, folder in folders.items():
        if folder.exists() and not folder.is_dir():
            raise UserError(f"{folder}: is a file: give a folder")
        if not options.force:
            check_ours(folder / name for name in FIRST[part])


def main(argv: list[str]) -> int:
    """`smelter export`."""
    options = parse(ExportOptions, argv, "smelter export")
    reports = export(options)
    for report in reports.values():
        print(table(list(check_rows(report))), end="\n\n" if len(reports) > 1 else "\n")
    prompt = next(iter(reports.values()))["infill_prompt"]
    print(f"infilling prompt: {prompt['text']!r}\n  as token ids: {' '.join(map(str, prompt['ids']))}")
    if any(report["forced"] for report in reports.values()):
        print("warning: exported with --force although the soft-caps matter: the export is another model")
    warning = objection(next(iter(reports.values())))
    if warning:
        print(f"warning: {warning}")
    print(f"written to {options.out}")
    if "gguf" in reports:
        path = options.out / options.parts["gguf"] / gguf_file(reports["gguf"])
        print(f"to serve it: {server_command(path, reports['gguf']['context'])}")
    return 0
