"""What an export is measured by: other programs' logits and tokens beside the checkpoint's, on held-out text.

Two things stand between a trained model and a stock architecture: the soft-caps, which no architecture
with QK-norm has, and the 8-bit activations, which each program rounds in its own way or not at all. Both are
measured here, and so is the tokenizer: in Transformers, and in llama.cpp itself where it is installed.
"""

import heapq
import os
import re
import shutil
import subprocess
import textwrap
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from smelter.base import DataError, UserError
from smelter.config import ActivationQuant
from smelter.export.architecture import qwen3_logits
from smelter.export.hf import hf_name
from smelter.kernels import reference
from smelter.model import Attention, Model
from smelter.run import Checkpoint, Results
from smelter.tokens import Tokenizer, open_shards

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
class CapReport:
    """What the soft-caps do on the probe: largest uncapped logits, and the KL of leaving both caps out."""

    attn_logit_soft_cap: float
    max_attention_logit: float
    final_logit_soft_cap: float
    max_final_logit: float
    caps_kl: float

    def objections(self) -> list[str]:
        """Why the caps cannot be left out; empty where they can."""
        reasons = []
        cap = self.attn_logit_soft_cap
        if cap and self.max_attention_logit > MAX_ATTENTION_SHARE * cap:
            reasons.append(
                f"attention logits reach {self.max_attention_logit:.1f}, more than {MAX_ATTENTION_SHARE * cap:g} "
                f"under the cap of {cap:g}"
            )
        if not self.caps_kl <= MAX_CAP_KL:
            reasons.append(
                f"without the caps the model changes by {self.caps_kl:.2g} nats per token (> {MAX_CAP_KL:g})"
            )
        return reasons


@dataclass(frozen=True)
class Source:
    """What is exported, and the text it is measured on."""

    name: str
    license: str
    model: Model
    tokenizer: Tokenizer
    checkpoint: Checkpoint
    results: Results | None
    """What `smelter evaluate` found, if it was asked."""
    shards: Path
    texts: list[str]
    probe: str
    windows: list[Tensor]
    caps: CapReport
    cursor: dict[str, Any]
    """What is missing at a cursor, in bits per byte (`export.cursor`)."""

    @property
    def context(self) -> int:
        """Tokens that the model sees."""
        return self.model.config.max_seq_len


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
    checks: dict[str, float] = {}
    for which, ours in (("same_numerics", runtime_model(model, "none")), ("as_trained", model)):
        kl, same = compare(logits_of(ours), lambda tokens: loaded(tokens).logits[0], windows)
        checks |= {f"kl_{which}": kl, f"top1_{which}": same}
    return checks


def check_architecture(model: Model, read: Callable[[str], Tensor], windows: list[Tensor]) -> dict[str, float]:
    """Qwen3 written out, from the stored tensors, beside our code without caps and activation rounding on the same."""
    ours, theirs = logits_of(runtime_model(model, "none", read)), qwen3_logits(model.config, read)
    kl, same = compare(ours, theirs, windows)
    return {"kl_architecture": kl, "top1_architecture": same}


def check_gguf_logits(
    model: Model, read: Callable[[str], Tensor], gguf_type: str, windows: list[Tensor]
) -> dict[str, float]:
    """The file's tensors under llama.cpp's activation rounding beside the checkpoint, both computed here."""
    stored = runtime_model(model, "none" if gguf_type == "F16" else "block256", read)
    kl, same = compare(logits_of(model), logits_of(stored), windows)
    return {"kl_as_trained": kl, "top1_as_trained": same}


EXAMPLE = ("def add(a, b):\n    return ", "\n\n\nprint(add(1, 2))\n")
"""Prefix and suffix of the infilling prompt that an export shows and checks."""


def infill_prompt(tokenizer: Tokenizer) -> dict[str, Any]:
    """What llama-server's /infill and an Ollama template send for `EXAMPLE`: text and token ids."""
    special, (prefix, suffix) = tokenizer.special, EXAMPLE
    return {
        "text": f"{special.fim_prefix}{prefix}{special.fim_suffix}{suffix}{special.fim_middle}",
        "ids": tokenizer.fim_prompt(prefix, suffix),
    }


def find_llama_cpp(program: str) -> Path | None:
    """One of llama.cpp's programs: in `$LLAMA_CPP_DIR/bin`, else on the PATH."""
    folder = os.environ.get("LLAMA_CPP_DIR")
    path = shutil.which(program, path=str(Path(folder) / "bin") if folder else None)
    return Path(path) if path else None


def llama_cpp_ids(program: Path, model: Path, text: str, *, parse_special: bool, work: Path) -> list[int]:
    """The ids of `text` in llama.cpp's tokenizer, from its llama-tokenize. UserError where that fails."""
    file = work / ".tmp_text"
    file.write_bytes(text.encode())
    try:
        command = [str(program), "-m", str(model), "-f", str(file), "--ids", "--no-bos", "--no-escape"]
        command += [] if parse_special else ["--no-parse-special"]
        run = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    finally:
        file.unlink()
    ids = re.search(r"^\[([\d, ]*)\]$", run.stdout, re.MULTILINE)
    if run.returncode or not ids:
        reason = (run.stderr.strip() or run.stdout.strip() or "no output").splitlines()[-1]
        raise UserError(f"{program}: cannot tokenize with {model.name}: {reason[:200]}: try another llama.cpp")
    return [int(number) for number in ids[1].split(",") if number.strip()]


def check_llama_cpp_tokenizer(file: Path, tokenizer: Tokenizer, texts: list[str]) -> dict[str, Any]:
    """llama.cpp's ids of the texts and of the infilling prompt beside ours; empty where it is not installed."""
    program = find_llama_cpp("llama-tokenize")
    if program is None:
        return {}
    texts = [*texts, *TRICKY, *tokenizer.special.names]
    different = sum(
        llama_cpp_ids(program, file, text, parse_special=False, work=file.parent) != tokenizer.encode(text)
        for text in texts
    )
    prompt = infill_prompt(tokenizer)
    same = llama_cpp_ids(program, file, prompt["text"], parse_special=True, work=file.parent) == prompt["ids"]
    return {
        "llama_cpp_texts": len(texts),
        "llama_cpp_tokenizer_differences": different,
        "llama_cpp_infill_prompt_differs": int(not same),
    }
