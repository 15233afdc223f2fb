"""A teacher of ours and one of Transformers are the same thing: hidden states and a head that give its logits."""

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers

from smelter.base.errors import ConfigError, DataError
from smelter.distillation import teacher as teacher_model
from smelter.distillation.objective import load_teachers
from smelter.distillation.teacher import TeacherModel, load_teacher, positions_in_documents, weights_hash
from smelter.export.hf import write_hf
from smelter.kernels import reference
from smelter.tokens.shards import ShardSet
from smelter.tokens.tokenizer import Tokenizer
from tests import tiny
from tests.distillation.teaching import SEQ_LEN, make_cache, make_shards, stream_of, student_config

CPU = torch.device("cpu")
SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
KINDS: dict[str, dict[str, Any]] = {
    "Qwen3": {**SIZES, "head_dim": 8},
    "Llama": SIZES,
    "Mistral": {**SIZES, "sliding_window": 6},
    "Gemma2": {**SIZES, "head_dim": 8, "final_logit_softcapping": 3.0, "sliding_window": 6},
    "Cohere": {**SIZES, "logit_scale": 0.25},
    "Granite": {**SIZES, "logits_scaling": 8.0},
    "Phi": SIZES,  # its head has a bias
    "GPT2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128},
}


def save_folder(folder: Path, kind: str = "Qwen3", vocab_size: int = 520, **options: Any) -> Path:
    """A random model with the tokenizer of the tests, and a few rows more than it has ids, as many have."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=vocab_size, initializer_range=0.4, bos_token_id=None, eos_token_id=0, pad_token_id=None,
        **{**KINDS[kind], **options},
    )  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("lm_head.bias"):
                parameter.normal_()
    model.save_pretrained(folder)
    tiny.tokenizer().save(folder / "tokenizer.json")
    return folder


def load(folder: Path, vocab_size: int = 512, **options: Any) -> TeacherModel:
    return load_teacher(folder, tiny.tokenizer(), vocab_size, device=CPU, dtype=torch.float32, **options)


def logits_of(teacher: TeacherModel, tokens: torch.Tensor, docs: torch.Tensor | None = None) -> torch.Tensor:
    hidden = teacher.hidden(tokens, docs)
    logits: torch.Tensor = reference.soft_cap(F.linear(hidden, teacher.head.to(hidden.dtype)), teacher.soft_cap)
    return logits.view(*tokens.shape, -1)


def random_tokens() -> tuple[torch.Tensor, torch.Tensor]:
    tokens = torch.randint(500, (3, 40), generator=torch.Generator().manual_seed(1))
    docs = (torch.arange(40) >= torch.tensor([[7], [39], [99]])).int() + (torch.arange(40) >= 20).int()
    return tokens, docs


@pytest.mark.parametrize("kind", KINDS)
def test_hidden_states_and_head_are_the_models_logits(kind: str, tmp_path: Path) -> None:
    teacher = load(save_folder(tmp_path, kind), use_document_mask=True)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    tokens, docs = random_tokens()
    with torch.no_grad():
        expected = model(tokens).logits[..., :512]
        assert torch.allclose(logits_of(teacher, tokens), expected, rtol=1e-4, atol=1e-4)
        inside = logits_of(teacher, tokens, docs)
        for row in range(3):
            for doc in docs[row].unique():
                alone = model(tokens[row][docs[row] == doc][None]).logits[0, :, :512]
                assert torch.allclose(inside[row][docs[row] == doc], alone, rtol=1e-4, atol=1e-4)
    assert float(expected.std()) > 0.1


def test_our_export_is_the_same_teacher_as_our_checkpoint(tmp_path: Path) -> None:
    made = tiny.model(attn_logit_soft_cap=0.0, final_logit_soft_cap=0.0, use_ternary=False, activation_quant="none")
    (tmp_path / "hf").mkdir()
    write_hf(tmp_path / "hf", made, tiny.tokenizer())
    ours, theirs = load(tiny.checkpoint(tmp_path / "run", made)), load(tmp_path / "hf")
    assert theirs.max_seq_len == ours.max_seq_len == 96
    tokens, docs = random_tokens()
    for each in (None, docs):
        a, b = logits_of(ours, tokens, each).log_softmax(-1), logits_of(theirs, tokens, each).log_softmax(-1)
        assert float((a.exp() * (a - b)).sum(-1).mean()) < 5e-3  # the export rounds weights to bf16


def test_padding_whose_id_the_model_does_not_know(tmp_path: Path) -> None:
    """Padding was added to the vocabulary; the model, older than it, has no row for it."""
    tokenizer = copy.copy(tiny.tokenizer())
    tokenizer.pad_id = 600
    teacher = load_teacher(save_folder(tmp_path, vocab_size=512), tokenizer, 601, device=CPU, dtype=torch.float32)
    assert len(teacher.head) == 512
    tokens = random_tokens()[0]
    tokens[:, 30:] = tokenizer.pad_id
    other = tokens.masked_fill(tokens == tokenizer.pad_id, 17)
    assert torch.equal(logits_of(teacher, tokens)[:, :30], logits_of(teacher, other)[:, :30])


def test_positions_tell_documents_apart() -> None:
    docs = torch.tensor([[0, 0, 0, 1, 2, 2], [4, 4, 4, 4, 4, 4]])
    assert positions_in_documents(docs).tolist() == [[0, 1, 2, 0, 0, 1], [0, 1, 2, 3, 4, 5]]


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_shards(tmp_path_factory.mktemp("shards"))


def test_a_folder_teaches_online_and_from_the_disk(shards: Path, tmp_path: Path) -> None:
    folder = save_folder(tmp_path / "qwen")
    opened = ShardSet.open(shards)
    whole = {"method": "top_k", "top_k": 512, "log_prob_dtype": "float32", "use_document_mask": True}
    cache = make_cache(folder, shards, tmp_path / "c", **whole)
    assert cache.index["teacher"]["weights_sha256"] == weights_hash(folder)
    config = student_config(shards, teachers=(folder,))
    config = replace(config, data=replace(config.data, use_document_mask=True))
    (teacher,) = load_teachers(config, opened.tokenizer, torch.float32, CPU)
    batch = stream_of(config, opened).batch(1, 0, 0, 1)
    online = logits_of(teacher, batch.inputs, batch.doc_ids).softmax(-1)
    rows = cache.rows([3, 4, 5])
    stored = torch.zeros(3 * SEQ_LEN, 512).scatter_(-1, rows.ids, rows.probs).view(3, SEQ_LEN, 512)
    valid = batch.targets >= 0
    assert torch.allclose(stored[valid], online[valid], rtol=1e-3, atol=1e-6)


# ---------------------------------------------------------------- what does not fit


def test_another_tokenizer_points_to_the_other_method(tmp_path: Path) -> None:
    folder = save_folder(tmp_path)
    other = Tokenizer.train(["another corpus, with other words " * 20, *tiny.CODE.split("\n")[:40]], 512)
    other.save(folder / "tokenizer.json")
    with pytest.raises(DataError, match=r"another tokenizer than the shards'.*--tokenizer .*--method chunks"):
        load(folder)
    (folder / "tokenizer.json").unlink()
    with pytest.raises(DataError, match=r"tokenizer\.json: cannot read"):
        load(folder)


def test_a_vocabulary_that_is_too_small(shards: Path, tmp_path: Path) -> None:
    folder = save_folder(tmp_path / "small", vocab_size=510)
    with pytest.raises(DataError, match=r"has 510 ids, the shards' tokenizer 512 \(id 51"):
        load(folder)
    config = student_config(shards, teachers=(save_folder(tmp_path / "fits"),))
    config = replace(config, model=replace(config.model, vocab_size=640))
    with pytest.raises(ConfigError, match=r"vocabulary of 520, the student 640: .*smelter teach"):
        load_teachers(config, tiny.tokenizer(), torch.float32, CPU)
    short = save_folder(tmp_path / "short", max_position_embeddings=32)
    with pytest.raises(ConfigError, match="reads at most 32 tokens, the student's rows have 64"):
        load_teachers(student_config(shards, teachers=(short,)), tiny.tokenizer(), torch.float32, CPU)


def test_a_folder_that_cannot_be_loaded(tmp_path: Path) -> None:
    folder = save_folder(tmp_path / "broken")
    weights = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    with pytest.raises(DataError, match="cannot load the model"):
        load(folder)
    (tmp_path / "theirs.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    (tmp_path / "config.json").write_text('{"model_type": "theirs", "auto_map": {"AutoConfig": "theirs.Config"}}')
    with pytest.raises(DataError, match="cannot load the model"):
        load(tmp_path)
    assert not (tmp_path / "ran").exists()


def test_logits_made_otherwise_are_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save_folder(tmp_path / "cohere", "Cohere")
    original = teacher_model._load_folder

    def without_scale(*arguments: Any) -> Any:
        model = original(*arguments)
        model.config.logit_scale = None  # the model keeps its own; what reads the configuration does not know
        return model

    monkeypatch.setattr(teacher_model, "_load_folder", without_scale)
    with pytest.raises(DataError, match="makes its logits in a way that is not known here"):
        load(folder)


def test_a_model_that_looks_across_documents_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save_folder(tmp_path)
    monkeypatch.setattr(teacher_model, "positions_in_documents", lambda docs: torch.arange(docs.shape[1])[None])
    load(folder)
    with pytest.raises(ConfigError, match=r"looks across packed documents: set data\.use_document_mask = false"):
        load(folder, use_document_mask=True)


def test_without_transformers_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save_folder(tmp_path)
    monkeypatch.setitem(__import__("sys").modules, "transformers", None)
    with pytest.raises(ConfigError, match=r"pip install 'smelter-foundry\[hf\]'"):
        load(folder)


def test_weights_in_several_files_have_one_hash(tmp_path: Path) -> None:
    (tmp_path / "b.safetensors").write_bytes(b"2")
    first = weights_hash(tmp_path)
    (tmp_path / "a.safetensors").write_bytes(b"1")
    assert len({first, weights_hash(tmp_path)}) == 2
    with pytest.raises(ValueError, match="no weights here"):
        weights_hash(tmp_path / "none")
