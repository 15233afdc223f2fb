"""A teacher that runs here: a Smelter checkpoint, or the folder of any causal language model of Transformers.

Both become the same thing: hidden states and a head whose product, soft-capped, are the logits. So the loss makes a
teacher's logits a chunk at a time as it makes the student's. What a folder's model does to its logits beyond that
(a scale, a bias) is folded into the two, and a probe at loading holds the result against the model's own logits.

A teacher must give the student's ids the student's meaning. Teachers with another tokenizer score text, not ids:
that is done in `smelter.distillation.teach_chunks`, for which their ids are their own affair.
"""

import hashlib
import json
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from smelter.base import CheckpointError, ConfigError, DataError, file_sha256
from smelter.losses import TeacherHead
from smelter.model import Model
from smelter.run import CONFIG_FILE, find_checkpoint, load_model, run_folder
from smelter.tokens import Tokenizer

PROBE_TEXTS = (
    "def add(a: int, b: int) -> int:\n    return a + b\n\n\nclass A(B):\n\tpass\n",
    '#include <stdio.h>\r\nint main(void) { printf("%d\\n", 0x1F << 3); return 0; }\r\n',
    "for (let i = 0; i < xs.length; i++) { sum += xs[i] ?? 1e-9; } // TODO\n",
    "The quick brown fox's café: naïve, 漢字, 🙂, e\u0301, \u00a0 12,345.678 and    spaces   \n\n\n",
    "SELECT name, COUNT(*) FROM users WHERE id != 42 GROUP BY name;",
)
"""Texts that both tokenizers must give the same ids."""


class TeacherModel(Protocol):
    """What a teacher gives; logits [N, V] are soft_cap(hidden @ head.T)."""

    path: Path
    head: Tensor
    """[V, C']."""
    soft_cap: float
    max_seq_len: int
    """Longest row that it can read."""

    def hidden(self, inputs: Tensor, doc_ids: Tensor | None) -> Tensor:
        """Hidden states [B * T, C'] of token ids [B, T]; doc_ids [B, T] keep attention inside each document."""


class CheckpointTeacher:
    """A model of ours."""

    def __init__(self, path: Path, model: Model) -> None:
        self.path, self._model = path, model.requires_grad_(False)
        self.head = model.head
        self.soft_cap = model.config.final_logit_soft_cap
        self.max_seq_len = model.config.max_seq_len

    @torch.no_grad()
    def hidden(self, inputs: Tensor, doc_ids: Tensor | None) -> Tensor:
        """Hidden states [B * T, C] of token ids [B, T]."""
        states: Tensor = self._model(inputs, doc_ids)
        return states.flatten(0, 1)


class FolderTeacher:
    """A causal language model of Transformers. No code from the folder is run."""

    def __init__(
        self, path: Path, tokenizer: Tokenizer | None, vocab_size: int, device: torch.device, dtype: torch.dtype
    ):
        """Load it, and check its ids and its logits. Raises DataError or ConfigError that names the folder.

        Without a `tokenizer` its ids are its own affair, and inputs have no padding.
        """
        self.path, self._device = path, device
        self._model = _load_folder(path, device, dtype)
        config = self._model.config.get_text_config()
        self._scale = float(getattr(config, "logit_scale", None) or 1.0)
        self._scale /= float(getattr(config, "logits_scaling", None) or 1.0)
        self.soft_cap = float(getattr(config, "final_logit_softcapping", None) or 0.0)
        self.max_seq_len = int(getattr(config, "max_position_embeddings", None) or 2**31)
        self.start_id = _start_id(self._model)
        num_rows = int(self._model.get_input_embeddings().weight.shape[0])
        output = self._model.get_output_embeddings()
        self.head, bias = output.weight.detach(), getattr(output, "bias", None)
        self._has_bias = bias is not None
        if bias is not None:  # one more column, against a hidden state that is always 1
            self.head = torch.cat([self.head, bias.detach()[:, None]], dim=1)
        self._pad_id = -1 if tokenizer is None else tokenizer.pad_id
        if tokenizer is not None:
            _check_ids(path, tokenizer, min(num_rows, len(self.head)))
        self._check_logits(min(num_rows, 64))
        self.head = self.head[:vocab_size]

    @torch.no_grad()
    def hidden(self, inputs: Tensor, doc_ids: Tensor | None) -> Tensor:
        """Hidden states [B * T, C'] of token ids [B, T]."""
        # Padding stands at the end of a row, where nothing sees it; the model may not know its id.
        tokens = inputs.masked_fill(inputs == self._pad_id, 0)
        positions = None if doc_ids is None else positions_in_documents(doc_ids)
        states: Tensor = self._model.base_model(tokens, position_ids=positions, use_cache=False).last_hidden_state
        states = states * self._scale if self._scale != 1.0 else states
        return (F.pad(states, (0, 1), value=1.0) if self._has_bias else states).flatten(0, 1)

    @torch.no_grad()
    def _check_logits(self, num_ids: int) -> None:
        """Hold hidden states and head against the model's own logits, and documents against being alone."""
        generator = torch.Generator().manual_seed(0)
        tokens = torch.randint(num_ids, (1, 12), generator=generator).to(self._device)
        own = self._model(tokens, use_cache=False).logits[0].float()
        if not torch.isfinite(own).all():
            raise DataError(f"{self.path}: logits that are not finite: try another precision, fp32 above all")
        ours = TeacherHead(self.hidden(tokens, None), self.head, self.soft_cap).logits(slice(None))
        margin = 0.02 * float(own.std()) + 1e-6
        if not torch.allclose(ours, own, rtol=0.02, atol=margin):
            raise DataError(
                f"{self.path}: {type(self._model).__name__} makes its logits in a way that is not known here (not a "
                "head on hidden states with scale, bias or soft-cap): use another model"
            )
        docs = torch.tensor([[0] * 5 + [1] * 7], device=self._device)
        together, alone = self.hidden(tokens, docs)[5:].float(), self.hidden(tokens[:, 5:], None).float()
        self._keeps_documents = torch.allclose(together, alone, rtol=0.02, atol=0.02 * float(alone.std()) + 1e-6)

    def check_documents(self) -> None:
        """ConfigError where the model cannot be kept inside packed documents."""
        if not self._keeps_documents:
            raise ConfigError(
                f"{self.path}: {type(self._model).__name__} looks across packed documents: set "
                "data.use_document_mask = false, or use another model"
            )


def positions_in_documents(doc_ids: Tensor) -> Tensor:
    """Each token's place in its document [B, T], by which Transformers tells packed documents apart."""
    places = torch.arange(doc_ids.shape[1], device=doc_ids.device).expand(doc_ids.shape)
    is_first = F.pad(doc_ids[:, 1:] != doc_ids[:, :-1], (1, 0), value=True)
    return places - (places * is_first).cummax(dim=1).values


def is_hf_folder(path: Path) -> bool:
    """Whether this is a model of Transformers, not a run or checkpoint of ours."""
    try:
        config = json.loads((path / CONFIG_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(config, dict) and "model_type" in config


def load_teacher(
    path: Path,
    tokenizer: Tokenizer,
    vocab_size: int,
    *,
    device: torch.device,
    dtype: torch.dtype,
    use_document_mask: bool = False,
) -> TeacherModel:
    """The teacher at `path`, frozen, with a head for the first `vocab_size` ids, or fewer where it has no more.

    Raises CheckpointError, DataError or ConfigError that says what does not fit the student's `tokenizer`.
    """
    if is_hf_folder(path):
        teacher = FolderTeacher(path, tokenizer, vocab_size, device, dtype)
        if use_document_mask:
            teacher.check_documents()
        return teacher
    model, own, checkpoint = load_model(path, device=device, dtype=dtype)
    if own.hash != tokenizer.hash:
        raise ConfigError(
            f"{checkpoint.path}: its tokenizer is not that of the shards ({own.vocab_size:,} and "
            f"{tokenizer.vocab_size:,} tokens): use a teacher trained on the same shards or with the same tokenizer"
        )
    if model.config.vocab_size > vocab_size:
        raise ConfigError(
            f"{checkpoint.path}: has a vocabulary of {model.config.vocab_size}, the student {vocab_size}: set "
            f"model.vocab_size = {model.config.vocab_size}"
        )
    return CheckpointTeacher(checkpoint.path, model)


def weights_hash(path: Path) -> str:
    """sha256 of a teacher's weights: of its one file, or of the list of its files with theirs."""
    files = sorted(file for pattern in ("*.safetensors", "*.bin") for file in path.glob(pattern))
    if not files:
        raise CheckpointError(f"{path}: no weights here (*.safetensors): copy the folder again")
    hashes = [file_sha256(file) for file in files]
    if len(files) == 1:
        return hashes[0]
    names = "".join(f"{file.name} {digest}\n" for file, digest in zip(files, hashes, strict=True))
    return hashlib.sha256(names.encode()).hexdigest()


def _start_id(model: Any) -> int | None:
    """The id that begins a text for a model of Transformers: bos, or eos, of several the first; None without."""
    for name in ("bos_token_id", "eos_token_id"):
        for config in (model.config.get_text_config(), model.generation_config):
            token = getattr(config, name, None)
            if token is not None:
                return int(token[0] if isinstance(token, (list, tuple)) else token)
    return None


def _check_ids(path: Path, tokenizer: Tokenizer, num_rows: int) -> None:
    """The folder's tokenizer gives texts the ids that ours gives, and the model knows all ids that can be read."""
    theirs = Tokenizer.load(path, tokenizer.special)
    for text in PROBE_TEXTS if theirs.hash != tokenizer.hash else ():
        ours, others = tokenizer.encode(text), theirs.encode(text)
        if ours != others:
            place = next((i for i, (a, b) in enumerate(zip(ours, others, strict=False)) if a != b), 0)
            raise DataError(
                f"{path}: another tokenizer than the shards': {text[:20]!r}... is {ours[place : place + 4]} for the "
                f"shards and {others[place : place + 4]} for the teacher (from id {place} on): tokenize with "
                f"--tokenizer {path}, or compare chunks of text (--method chunks, docs/other-tokenizers.md)"
            )
    unknown = sorted(set(range(num_rows, tokenizer.vocab_size)) - {tokenizer.pad_id})
    if unknown:
        raise DataError(
            f"{path}: the model has {num_rows:,} ids, the shards' tokenizer {tokenizer.vocab_size:,} (id {unknown[0]} "
            f"is {tokenizer.decode([unknown[0]], skip_special_tokens=False)!r}): resize the model's embeddings, or "
            "use another teacher"
        )


def _load_folder(path: Path, device: torch.device, dtype: torch.dtype) -> Any:
    try:
        import transformers
    except ImportError:
        raise ConfigError(
            f"{path}: a Hugging Face model needs Transformers: run: pip install 'smelter-foundry[hf]'"
        ) from None
    import safetensors

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    try:
        model = transformers.AutoModelForCausalLM.from_pretrained(
            str(path), dtype=dtype, local_files_only=True, trust_remote_code=False
        )
    except (OSError, ValueError, KeyError, ImportError, RuntimeError, safetensors.SafetensorError) as error:
        raise DataError(f"{path}: cannot load the model: {' '.join(str(error).split())[:300]}") from None
    return model.requires_grad_(False).eval().to(device)


def teacher_name(path: Path) -> str:
    """What a teacher is called: of one of ours the run's name, else the folder's."""
    return path.resolve().name if is_hf_folder(path) else run_folder(find_checkpoint(path)).name
