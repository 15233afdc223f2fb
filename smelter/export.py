"""A checkpoint in the formats that others read, and the proof that nothing changed on the way.

Two things stand between a trained model and a stock architecture: the soft-caps, which no architecture
with QK-norm has, and the 8-bit activations, which each program rounds in its own way or not at all. Export
measures both on real text and prints what they cost; it refuses where leaving the caps out would make
another model. After writing, the file is read back: every trit and scale must be what it was.
"""

import heapq
import importlib.util
import json
import shutil
import textwrap
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
import tyro
from torch import Tensor, nn

from smelter.cli import parse
from smelter.config import ActivationQuant
from smelter.errors import DataError, UserError
from smelter.evaluate import open_shards, run_folder
from smelter.export_gguf import check_gguf, read_gguf, write_gguf
from smelter.export_hf import check_expressible, compare_trits, hf_name, read_hf, write_hf
from smelter.generate import load_model
from smelter.kernels import reference
from smelter.model import Attention, Model
from smelter.results import table, write_json
from smelter.tokenizer import Tokenizer

MAX_CAP_KL = 1e-2
"""Nats per token that leaving the caps out may cost."""
MAX_ATTENTION_SHARE = 0.6
"""Largest |attention logit| as a share of the cap: 30 of 50, where tanh takes a tenth off."""
PROBE_TOKENS = 2_048
TRICKY = (
    "",
    " ",
    "é漢🙂 ﬁ e\u0301",
    "\tif x:\r\n\r\n    return  1_000e-3\n",
    "a" * 100 + "  \n \n",
    "\x00\u2028\ufeff",
)

LogitsOf = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class ExportOptions:
    """Write a trained model as a Hugging Face folder or a GGUF file, and check what was written."""

    checkpoint: tyro.conf.Positional[Annotated[Path, tyro.conf.arg(metavar="RUN_OR_CKPT")]]
    """Run folder (its newest checkpoint) or checkpoint."""
    format: Literal["hf", "gguf"]
    """hf: a folder for Transformers and what reads its files. gguf: one file for llama.cpp and what is built on it."""
    out: Path
    """Folder to write into."""
    gguf_type: Literal["TQ2_0", "TQ1_0", "F16"] = "TQ2_0"
    """TQ2_0: 2.06 bits a weight, the fastest. TQ1_0: 1.69 bits, slower. F16: any size of model."""
    shards: Path | None = None
    """Held-out text to measure on; by default the run's shards, or Python's own source where they are not here."""
    force: bool = False
    """Export although the caps matter, or over a model in the folder that is not an earlier export."""


@dataclass(frozen=True)
class CapReport:
    """What the soft-caps do on the probe: largest uncapped logits, and the KL of leaving both caps out."""

    attn_logit_soft_cap: float
    max_attention_logit: float
    final_logit_soft_cap: float
    max_final_logit: float
    caps_kl: float

    def objections(self) -> list[str]:
        """Why the caps cannot be left out; empty where they can."""
        found = []
        cap = self.attn_logit_soft_cap
        if cap and self.max_attention_logit > MAX_ATTENTION_SHARE * cap:
            found.append(
                f"attention logits reach {self.max_attention_logit:.1f}, more than {MAX_ATTENTION_SHARE * cap:g} "
                f"under the cap of {cap:g}"
            )
        if not self.caps_kl <= MAX_CAP_KL:
            found.append(f"without the caps the model changes by {self.caps_kl:.2g} nats per token (> {MAX_CAP_KL:g})")
        return found


def probe_texts(shards: Path, tokenizer: Tokenizer, *, must_exist: bool) -> tuple[list[str], str]:
    """Up to 16 held-out documents, and what they are; Python's own source where the shards are not to be had.

    Raises DataError for shards that were asked for (`must_exist`) and cannot be used.
    """
    try:
        split = open_shards(shards, tokenizer).split("val")
        texts = [tokenizer.decode(split.doc(i)) for i in range(0, split.num_docs, max(1, split.num_docs // 16))][:16]
        return texts, f"held-out documents of {shards}"
    except (DataError, OSError):
        if must_exist:
            raise
    source = [Path(str(module.__file__)).read_text(encoding="utf-8") for module in (textwrap, heapq)]
    return source, "Python's textwrap.py and heapq.py"


def probe_windows(texts: list[str], tokenizer: Tokenizer, context: int) -> list[Tensor]:
    """The beginnings of the texts as token ids [1, T], at most 512 each and `PROBE_TOKENS` together."""
    windows, room = [], PROBE_TOKENS
    for text in texts:
        ids = [tokenizer.eos_id, *tokenizer.encode(text)][: min(context, 512, room)]
        if len(ids) > 1:
            windows.append(torch.tensor([ids]))
            room -= len(ids)
    if not windows:
        raise DataError("the text to measure on is empty: give other --shards")
    return windows


@contextmanager
def _attention_logits(model: Model, report: Callable[[float], None]) -> Iterator[None]:
    """While active, `report` is told each layer's largest |q . k| / sqrt(D) before the cap, as they happen."""

    def before(layer: nn.Module, args: tuple[Any, ...]) -> None:
        assert isinstance(layer, Attention)
        x, norm, cos, sin, dim = *args[:4], layer.config.head_dim
        x = norm(x)
        q = layer.q_norm(layer.q_proj(x).unflatten(-1, (-1, dim))).transpose(1, 2)  # [B, H, T, D]
        k = layer.k_norm(layer.k_proj(x).unflatten(-1, (-1, dim))).transpose(1, 2)  # [B, G, T, D]
        q, k = reference.rotate(q, cos, sin), reference.rotate(k, cos, sin)
        scores = q @ k.repeat_interleave(q.shape[1] // k.shape[1], dim=1).mT * dim**-0.5
        seen = reference.causal_mask(None, x.shape[1], x.device)
        report(float(scores.masked_fill(~seen, 0.0).abs().max()))

    hooks = [layer.register_forward_pre_hook(before) for layer in model.modules() if isinstance(layer, Attention)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def runtime_model(
    model: Model, activation_quant: ActivationQuant, read: Callable[[str], Tensor] | None = None
) -> Model:
    """The model as another program runs it: no caps, activations rounded its way; `read` gives stored tensors.

    Trits and scales are the model's; embedding, head and norms are the stored ones where `read` is given.
    """
    config = replace(model.config, attn_logit_soft_cap=0.0, final_logit_soft_cap=0.0, activation_quant=activation_quant)
    with torch.random.fork_rng(devices=[]):
        other = Model(config, model.compute_dtype).eval()
    other.load_state_dict(model.state_dict())
    other.quantize_weights()
    if read is not None:
        with torch.no_grad():
            for name, parameter in other.named_parameters():
                if parameter.ndim == 1 or name in ("embed_tokens.weight", "lm_head.weight"):
                    parameter.copy_(read(hf_name(name)))
    return other


def logits_of(model: Model) -> LogitsOf:
    """Token ids [1, T] -> logits [T, V]."""
    return lambda tokens: model.logits(model(tokens))[0]


@torch.no_grad()
def compare(reference_logits: LogitsOf, other_logits: LogitsOf, windows: list[Tensor]) -> tuple[float, float]:
    """Mean KL(reference || other) in nats per token, and the share of tokens with the same likeliest next one."""
    kl, same, count = 0.0, 0, 0
    for tokens in windows:
        ours, others = reference_logits(tokens).log_softmax(-1), other_logits(tokens).float().log_softmax(-1)
        kl += float(F.kl_div(others.double(), ours.double(), reduction="sum", log_target=True))
        same += int((ours.argmax(-1) == others.argmax(-1)).sum())
        count += tokens.numel()
    return kl / count, same / count


@torch.no_grad()
def measure_caps(model: Model, windows: list[Tensor]) -> CapReport:
    """How far the logits reach into the caps, and what leaving the caps out changes."""
    config = model.config
    attention: list[float] = []
    final: list[float] = []
    # Largest logits are those of the model that will run: the one without caps.
    free = runtime_model(model, config.activation_quant)

    def observed(tokens: Tensor) -> Tensor:
        logits = free.logits(free(tokens))[0]
        final.append(float(logits.abs().max()))
        return logits

    with _attention_logits(free, attention.append):
        kl, _ = compare(logits_of(model), observed, windows)
    return CapReport(config.attn_logit_soft_cap, max(attention), config.final_logit_soft_cap, max(final), kl)


def check_tokenizer(folder: Path, tokenizer: Tokenizer, texts: list[str]) -> dict[str, Any]:
    """Transformers' ids of the texts beside ours; special tokens written out in a text are left out on purpose."""
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(str(folder), model_max_length=10**9)  # long texts need no warning here
    # Transformers takes written-out special tokens for the real ones; we never do.
    plain = [text for text in (*texts, *TRICKY) if not any(name in text for name in tokenizer.special.names)]
    different = sum(theirs(text).input_ids != tokenizer.encode(text) for text in plain)
    return {"tokenizer_texts": len(plain), "tokenizer_differences": different}


def check_hf_logits(folder: Path, model: Model, windows: list[Tensor]) -> dict[str, float]:
    """The folder as Transformers runs it (in float32) beside the checkpoint."""
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    loaded = transformers.AutoModelForCausalLM.from_pretrained(str(folder), dtype=torch.float32).eval()

    def theirs(tokens: Tensor) -> Tensor:
        logits: Tensor = loaded(tokens).logits[0]
        return logits

    exact_kl, exact_same = compare(logits_of(runtime_model(model, "none")), theirs, windows)
    trained_kl, trained_same = compare(logits_of(model), theirs, windows)
    return {
        "kl_same_numerics": exact_kl,
        "top1_same_numerics": exact_same,
        "kl_as_trained": trained_kl,
        "top1_as_trained": trained_same,
    }


def check_gguf_logits(
    model: Model, read: Callable[[str], Tensor], gguf_type: str, windows: list[Tensor]
) -> dict[str, float]:
    """The file's tensors under llama.cpp's activation rounding beside the checkpoint, both computed here."""
    stored = runtime_model(model, "none" if gguf_type == "F16" else "block256", read)
    kl, same = compare(logits_of(model), logits_of(stored), windows)
    return {"kl_as_trained": kl, "top1_as_trained": same}


def export(options: ExportOptions) -> dict[str, Any]:
    """Write and check; returns the report that export.json holds. Nothing is changed in `out` if it fails."""
    model, tokenizer, checkpoint = load_model(options.checkpoint, device="cpu", dtype=torch.float32)
    check_expressible(model.config)
    if options.format == "gguf":
        check_gguf(model, tokenizer, options.gguf_type)
    _check_out(options)
    shards = options.shards or Path(checkpoint.config.data.shards)
    texts, probe = probe_texts(shards, tokenizer, must_exist=options.shards is not None)
    windows = probe_windows(texts, tokenizer, model.config.max_seq_len)
    caps = measure_caps(model, windows)
    objections = caps.objections()
    if objections and not options.force:
        raise UserError(
            f"{checkpoint.path}: {options.format} has no soft-caps, and {' and '.join(objections)}: train on with "
            f"the caps at 0 or a larger z_loss, or export another model with --force"
        )
    name = run_folder(checkpoint.path).name
    work = options.out / ".tmp_export"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    try:
        checks: dict[str, Any] = {}
        if options.format == "hf":
            write_hf(work, model, tokenizer, name=name, step=checkpoint.step, path=options.out)
            checks |= compare_trits(model, read_hf(work))
            if importlib.util.find_spec("transformers"):
                checks |= check_tokenizer(work, tokenizer, texts) | check_hf_logits(work, model, windows)
        else:
            file = work / f"{name}-{options.gguf_type}.gguf"
            write_gguf(file, model, tokenizer, name=name, gguf_type=options.gguf_type)
            read = read_gguf(file, model.config.num_layers)
            checks |= compare_trits(model, read) | check_gguf_logits(model, read, options.gguf_type, windows)
        wrong = [f"{key} = {checks[key]}" for key in MUST_BE_ZERO if checks.get(key)]
        if wrong:
            raise UserError(f"{work}: read back, the export differs ({', '.join(wrong)}): check the disk and try again")
        report = {
            "format": options.format,
            "gguf_type": options.gguf_type if options.format == "gguf" else None,
            "checkpoint": str(checkpoint.path),
            "step": checkpoint.step,
            "files": {path.name: path.stat().st_size for path in sorted(work.iterdir())},
            "forced": bool(objections),
            "probe": probe,
            "probe_tokens": sum(window.numel() for window in windows),
            **asdict(caps),
            **checks,
        }
        for path in sorted(work.iterdir()):
            path.replace(options.out / path.name)
        write_json(options.out / "export.json", report)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return report


MUST_BE_ZERO = ("trits_changed", "weights_changed", "scales_changed", "tokenizer_differences")


def _check_out(options: ExportOptions) -> None:
    """UserError where `out` is no folder, or holds a model that we did not write."""
    if options.out.exists() and not options.out.is_dir():
        raise UserError(f"{options.out}: is a file: give a folder")
    if options.format == "hf" and (options.out / "config.json").exists() and not options.force:
        try:
            ours = json.loads((options.out / "export.json").read_text(encoding="utf-8"))["format"] == "hf"
        except (OSError, ValueError, KeyError, TypeError):
            ours = False
        if not ours:
            raise UserError(f"{options.out}: holds another model: give another folder, or --force to overwrite it")


def _summary(report: dict[str, Any]) -> str:
    size = sum(report["files"].values()) / 1e6
    rows = [
        ("written", f"{size:,.1f} MB, checkpoint of step {report['step']:,}"),
        ("trits changed", f"{report['trits_changed']} of {report['trits']:,}"),
        ("scales changed", f"{report['scales_changed']} of {report['layers']}"),
    ]
    if "tokenizer_texts" in report:
        rows.append(
            ("texts tokenised differently", f"{report['tokenizer_differences']} of {report['tokenizer_texts']}")
        )
    elif report["format"] == "hf":
        rows.append(("texts and logits", "not compared: pip install 'smelter-foundry[hf]'"))
    rows += [
        ("largest attention logit", _beside_cap(report["max_attention_logit"], report["attn_logit_soft_cap"])),
        ("largest output logit", _beside_cap(report["max_final_logit"], report["final_logit_soft_cap"])),
        ("KL of leaving the caps out", f"{report['caps_kl']:.1e} nats per token"),
    ]
    if "kl_same_numerics" in report:
        rows.append(("KL, Transformers against us", _kl(report, "same_numerics")))
    if "kl_as_trained" in report:
        how = "without 8-bit activations" if report["format"] == "hf" else "with llama.cpp's rounding"
        rows.append((f"KL {how}", _kl(report, "as_trained")))
    rows.append(("measured on", f"{report['probe_tokens']:,} tokens of {report['probe']}"))
    return table(rows)


def _beside_cap(value: float, cap: float) -> str:
    return f"{value:.1f}  (cap {cap:g})" if cap else f"{value:.1f}  (no cap)"


def _kl(report: dict[str, Any], which: str) -> str:
    return f"{report[f'kl_{which}']:.1e} nats per token, same first choice {report[f'top1_{which}']:.1%}"


def main(argv: list[str]) -> int:
    """`smelter export`."""
    options = parse(ExportOptions, argv, "smelter export")
    report = export(options)
    print(_summary(report))
    if report["forced"]:
        print("warning: exported with --force although the soft-caps matter: the export is another model")
    print(f"written to {options.out}")
    return 0
