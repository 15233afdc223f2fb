"""Folders, devices and libraries that the teacher in a folder cannot use: one line that says what to do."""

import sys
from pathlib import Path

import pytest
import torch
import transformers

from foundry.teacher import RejectedQuestionError
from smelter.base.errors import UserError
from tests.tiny_hf import IDS, ask, make_teacher, save_random, save_spelling, save_tokenizer


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_random(tmp_path_factory.mktemp("llama"))


def one_line(caught: pytest.ExceptionInfo[UserError]) -> str:
    assert type(caught.value) is UserError  # the run stops: no question will fare better
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith("hf/tiny: ")
    return str(caught.value)


def test_a_folder_that_cannot_be_used(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no Hugging Face model in .*absent \(no config.json\)") as caught:
        ask(tmp_path / "absent")
    one_line(caught)
    save_spelling(tmp_path, *"?ok", "<end>")
    weights = (tmp_path / "model.safetensors").read_bytes()
    for broken in (weights[: len(weights) // 2], b"", None):
        (tmp_path / "model.safetensors").unlink()
        if broken is not None:
            (tmp_path / "model.safetensors").write_bytes(broken)
        with pytest.raises(UserError, match="cannot load the model in") as caught:
            ask(tmp_path)
        one_line(caught)
        (tmp_path / "model.safetensors").touch()
    (tmp_path / "model.safetensors").write_bytes(weights)
    assert ask(tmp_path, "?").text == "ok"
    (tmp_path / "config.json").write_text('{"model_type": "no_such_model"}')
    with pytest.raises(UserError, match="cannot load the model in") as caught:
        ask(tmp_path)
    one_line(caught)


def test_code_in_the_folder_is_not_run(tmp_path: Path) -> None:
    (tmp_path / "theirs.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    save_tokenizer(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "theirs", "auto_map": {"AutoConfig": "theirs.Config"}}')
    with pytest.raises(UserError, match="cannot load the model in") as caught:
        ask(tmp_path)
    one_line(caught)
    assert not (tmp_path / "ran").exists()


def test_a_model_with_another_kind_of_memory(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = transformers.MambaConfig(
        vocab_size=len(IDS), hidden_size=32, state_size=4, num_hidden_layers=2, bos_token_id=None, eos_token_id=0
    )
    model = transformers.MambaForCausalLM(config).eval()
    model.save_pretrained(tmp_path)
    save_tokenizer(tmp_path)
    answer = ask(tmp_path, "Well?", max_tokens=20)
    tokens = torch.tensor([[IDS[character] for character in f"Well?{answer.text}"]])
    assert torch.equal(model(tokens).logits[0, 4:-1].argmax(1), tokens[0, 5:])
    assert len(answer.text) > 10


def test_a_tokenizer_of_another_model(tmp_path: Path) -> None:
    save_random(tmp_path)
    config = transformers.LlamaConfig(
        vocab_size=50, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1
    )
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path)
    with pytest.raises(RejectedQuestionError, match=r"\(50 embeddings\): the folder's tokenizer belongs to another"):
        ask(tmp_path, "z")


@pytest.mark.parametrize("device", ["cuda", "tpu", "mps"])
def test_a_device_that_is_not_there(device: str, llama: Path) -> None:
    if device == "cuda" and torch.cuda.is_available():
        pytest.skip("there is one")
    with pytest.raises(UserError, match=f'device = "{device}"') as caught:
        ask(llama, device=device)
    one_line(caught)


@pytest.mark.parametrize("library", ["torch", "transformers"])
def test_a_missing_library_names_the_extra(library: str, llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(UserError, match=rf"{library} is not installed: run: pip install 'smelter-foundry\[hf\]'"):
        make_teacher(llama)
