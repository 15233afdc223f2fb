"""What an export needs besides the weights to be published: card, Modelfile, packed folder, the checks of it all."""

import json
import shutil
from pathlib import Path
from typing import Any

import gguf
import huggingface_hub
import pytest
import torch
import transformers
from safetensors.torch import load_file

from smelter.__main__ import main
from smelter.base.errors import CheckpointError, UserError
from smelter.bitnet import bit_linears
from smelter.decoding.generate import Prompt, complete_many
from smelter.export.card import data_section, modelfile, server_command
from smelter.export.check import check_llama_cpp_tokenizer, infill_prompt, llama_cpp_ids
from smelter.export.gguf import read_gguf, write_gguf
from smelter.run.load import load_model
from smelter.run.packed import is_packed, load_packed, write_packed
from smelter.run.results import write_results
from tests import tiny
from tests.export.test_export import FREE, GGUF_SHAPE, calm_model, run_export, write_folder


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder with results and shards, exported with --format all --packed."""
    folder = tmp_path_factory.mktemp("published")
    pieces = [piece for piece in tiny.CODE.split("\n\n") if piece][:40]
    records: list[dict[str, Any]] = [
        {"kind": "text", "text": piece, "license": "PSF-2.0" if i % 2 else "MIT", "split": "val" if i == 3 else "train"}
        for i, piece in enumerate(pieces)
    ]
    answers = [{"teacher": "acme/large", "text": "a = 1\n"}]
    records.append({"kind": "instruct", "prompt": "An assignment.", "responses": answers, "split": "train"})
    (folder / "corpus.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    tiny.tokenizer().save(folder / "tokenizer.json")
    tokenizer = ["--tokenizer", str(folder / "tokenizer.json")]
    assert main(["tokenize", str(folder / "corpus.jsonl"), "--out", str(folder / "shards"), *tokenizer]) == 0
    run = tiny.checkpoint(folder / "run", calm_model(**GGUF_SHAPE), shards=str(folder / "shards"))
    write_results(run / "results.json", tiny.results(val_bpb=1.25, infill_cases=200), [])
    assert run_export(run, folder / "out", "--format", "all", "--packed", "--license", "mit") == 0
    return folder


def test_all_writes_every_folder_and_one_card(published: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = published / "out"
    files = {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()}
    assert files == {
        *("README.md", "export.json"),
        *(f"packed/{name}" for name in ("config.json", "export.json", "model.safetensors", "tokenizer.json")),
        *(f"gguf/{name}" for name in ("Modelfile", "export.json", "run-TQ2_0.gguf")),
        *(f"hf/{name}" for name in ("README.md", "config.json", "export.json", "generation_config.json")),
        *(f"hf/{name}" for name in ("model.safetensors", "special_tokens_map.json")),
        *(f"hf/{name}" for name in ("tokenizer.json", "tokenizer_config.json")),
    }
    parts = json.loads((out / "export.json").read_text())["parts"]
    assert list(parts) == ["hf", "gguf", "packed"]
    for name, report in parts.items():
        assert report == json.loads((out / name / "export.json").read_text())
        assert report["trits_changed"] == report["weights_changed"] == report["scales_changed"] == 0
        assert {*report["files"], "export.json"} == {path.name for path in (out / name).iterdir()}
    assert run_export(published / "run", out, "--format", "all", "--license", "mit") == 0, "safe to repeat"
    said = capsys.readouterr().out
    line = f"llama-server -m {out}/gguf/run-TQ2_0.gguf -c 384 -np 4 -kvu -n 12 -b 48 -ub 48 -fa off -ctk f32 -ctv f32"
    assert f"to serve it: {line}" in said
    assert run_export(published / "run", published / "other", "--format", "hf", "--packed") == 2
    assert "--format all" in capsys.readouterr().err


def test_the_card_says_what_is_known(published: Path) -> None:
    card = huggingface_hub.ModelCard.load(published / "out" / "README.md")
    assert card.data.license == "mit"
    assert card.data.pipeline_tag == "text-generation"
    assert "ternary" in card.data.tags
    text = card.text
    assert text.index("| MIT |") < text.index("| PSF-2.0 |") < text.index("| not named by the records |")
    assert "| acme/large | 21 |" in text
    assert "The terms under which the teachers' vendors" in text
    assert "| bits per byte on held-out documents | 1.250 |" in text
    assert "| lines asked for | 200 |" in text
    assert "[training]" in text
    assert "ollama create run -f Modelfile" in text
    assert "| trits changed | 0 of" in text
    assert "not measured" not in text.lower()
    assert infill_prompt(tiny.tokenizer())["text"] in text


def test_the_card_of_unknown_things_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, out = tiny.checkpoint(tmp_path / "run", calm_model(), shards=str(tmp_path / "gone")), tmp_path / "out"
    assert run_export(run, out, "--format", "hf") == 0
    text = (out / "README.md").read_text()
    assert "nothing is known of them here" in text
    assert "`smelter evaluate` was not run" in text
    assert "license: other" in text


def test_data_without_teachers_and_old_shards(published: Path, tmp_path: Path) -> None:
    index = json.loads((published / "shards" / "index.json").read_text())
    train = index["splits"]["train"]
    # Of an answer, num_bytes has what the model writes; its licence is that of the question too.
    assert sum(train["licenses"].values()) == train["num_bytes"] + len("An assignment.\n")
    train["teachers"] = {}
    (tmp_path / "index.json").write_text(json.dumps(index))
    assert "No teacher model's answers" in data_section(tmp_path, ())
    assert "Distilled from `runs/big`." in data_section(tmp_path, ("runs/big",))
    del train["teachers"], train["licenses"]
    (tmp_path / "index.json").write_text(json.dumps(index))
    old = data_section(tmp_path, ())
    assert "does not record licences" in old
    assert "teacher" not in old


def test_the_code_in_the_card_runs(published: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = (published / "out" / "hf" / "README.md").read_text()
    code = text.split("```python\n")[1].split("```")[0]
    monkeypatch.chdir(published / "out" / "hf")
    exec(compile(code, "README.md", "exec"), {})


def test_packed_is_the_same_model_in_two_bits(published: Path) -> None:
    folder = published / "out" / "packed"
    model, _, checkpoint = load_model(published / "run")
    again, _, loaded = load_model(folder)
    assert is_packed(folder)
    assert not is_packed(checkpoint.path)
    assert (loaded.step, loaded.config) == (checkpoint.step, checkpoint.config)
    for (name, ours), (_, theirs) in zip(bit_linears(model), bit_linears(again), strict=True):
        assert torch.equal(ours.trits, theirs.trits), name
        assert torch.equal(ours.scale, theirs.scale), name
    matrices = {name: t for name, t in load_file(folder / "model.safetensors").items() if t.dtype == torch.uint8}
    assert sum(tensor.numel() for tensor in matrices.values()) * 4 == model.config.num_matrix_params
    # Only the embedding is rounded, to bf16.
    assert 0 < json.loads((folder / "export.json").read_text())["kl_as_trained"] < 1e-2
    assert not torch.equal(model.embed_tokens.weight, again.embed_tokens.weight)
    assert torch.equal(model.embed_tokens.weight.bfloat16(), again.embed_tokens.weight.bfloat16())


@pytest.mark.slow
def test_packed_completes_evaluates_and_exports(published: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(published / "out" / "packed", tmp_path / "packed")
    assert run_export(folder, tmp_path / "gguf", "--format", "gguf") == 0
    first, second = (next((path / "gguf").glob("*.gguf")) for path in (published / "out", tmp_path))
    assert abs(first.stat().st_size - second.stat().st_size) < 64, "of the same size, but for the name inside"
    shards = ["--shards", str(published / "shards"), "--max-infill", "2"]
    assert main(["evaluate", str(folder), *shards]) == 0
    assert json.loads((folder / "results.json").read_text())["val_bpb"] > 0
    model, tokenizer, _ = load_model(folder)
    assert len(complete_many(model, tokenizer, [Prompt("import ")], max_tokens=4)) == 1


def test_packed_layers_without_a_single_weight_come_back(tmp_path: Path) -> None:
    model = calm_model()
    layers = [layer for _, layer in bit_linears(model)]
    with torch.no_grad():
        layers[0].weight.zero_()
        layers[1].weight.zero_()[0, 0] = 7.0
    model.quantize_weights()
    assert (float(layers[0].trits.abs().sum()), float(layers[1].trits.abs().sum())) == (0, 1)
    run = tiny.checkpoint(tmp_path / "run", model)
    _, tokenizer, checkpoint = load_model(run)
    (tmp_path / "packed").mkdir()
    write_packed(tmp_path / "packed", model, tokenizer, checkpoint.config, 7)
    again, _, _ = load_model(tmp_path / "packed")
    for layer, (_, other) in zip(layers, bit_linears(again), strict=True):
        assert torch.equal(layer.trits, other.trits)
        assert torch.equal(layer.scale, other.scale)


def test_widths_that_four_does_not_divide_are_packed_too(tmp_path: Path) -> None:
    """The last byte of a row then holds fewer than four trits."""
    model = calm_model(hidden_size=66, num_heads=3, num_kv_heads=1, head_dim=22, intermediate_size=91)
    run = tiny.checkpoint(tmp_path / "run", model)
    options = ["--gguf-type", "F16", "--gguf-embedding", "F16"]
    assert run_export(run, tmp_path / "out", "--format", "all", "--packed", *options) == 0
    trained, again = (load_model(path)[0] for path in (run, tmp_path / "out" / "packed"))
    for (name, ours), (_, theirs) in zip(bit_linears(trained), bit_linears(again), strict=True):
        assert torch.equal(ours.trits, theirs.trits), name
        assert torch.equal(ours.scale, theirs.scale), name


def test_damaged_packed_folders_are_named(published: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(published / "out" / "packed", tmp_path / "packed")
    (folder / "model.safetensors").write_bytes(b"nonsense")
    with pytest.raises(CheckpointError, match="not readable"):
        load_packed(folder)
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(values | {"format_version": 99}))
    with pytest.raises(CheckpointError, match="format version 99"):
        load_packed(folder)
    (folder / "config.json").write_text(json.dumps(values | {"step": 8}))
    with pytest.raises(CheckpointError, match="damaged"):
        load_packed(folder)


def test_packed_needs_ternary_weights(tmp_path: Path) -> None:
    run = tiny.checkpoint(tmp_path / "run", tiny.model(use_ternary=False))
    model, tokenizer, checkpoint = load_model(run)
    with pytest.raises(UserError, match="--format hf"):
        write_packed(tmp_path, model, tokenizer, checkpoint.config, 7)


def test_the_infilling_prompt_is_one_text_for_all(published: Path) -> None:
    prompt = infill_prompt(tiny.tokenizer())
    theirs = transformers.AutoTokenizer.from_pretrained(str(published / "out" / "hf"))
    assert theirs(prompt["text"]).input_ids == prompt["ids"]
    assert json.loads((published / "out" / "gguf" / "export.json").read_text())["infill_prompt"] == prompt


@pytest.mark.parametrize("kind", ["F16", "F32"])
def test_the_embedding_can_be_kept_finer(tmp_path: Path, kind: str) -> None:
    model = calm_model(**GGUF_SHAPE)
    write_gguf(tmp_path / "m", model, tiny.tokenizer(), name="tiny", gguf_type="TQ2_0", embedding_type=kind)
    kinds = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(tmp_path / "m").tensors}
    assert (kinds["token_embd.weight"], kinds["blk.0.attn_q.weight"]) == (kind, "TQ2_0")
    stored = read_gguf(tmp_path / "m", 2)("model.embed_tokens.weight")
    assert torch.equal(stored, model.embed_tokens.weight.to(torch.float16 if kind == "F16" else torch.float32).float())


def test_the_modelfile_has_our_order_and_stops(published: Path) -> None:
    text = (published / "out" / "gguf" / "Modelfile").read_text()
    assert text == modelfile("run", "run-TQ2_0.gguf", tiny.tokenizer(), 96)
    assert "<|fim_prefix|>{{ .Prompt }}<|fim_suffix|>{{ .Suffix }}<|fim_middle|>" in text
    assert "\nFROM ./run-TQ2_0.gguf\n" in text
    assert "PARAMETER stop <|endoftext|>" in text


def test_the_server_line_leaves_half_of_the_context(tmp_path: Path) -> None:
    command = server_command(Path("my models/a.gguf"), 2_048)
    options = "-c 8192 -np 4 -kvu -n 256 -b 1024 -ub 1024 -fa off -ctk f32 -ctv f32 --port 8012"
    assert command == f"llama-server -m 'my models/a.gguf' {options}"


def test_llama_cpp_that_fails_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "bin" / "llama-tokenize"
    program.parent.mkdir()
    program.write_text("#!/bin/sh\necho 'unknown architecture' >&2\nexit 1\n")
    program.chmod(0o755)
    with pytest.raises(UserError, match="unknown architecture"):
        llama_cpp_ids(program, tmp_path / "model.gguf", "x", parse_special=False, work=tmp_path)
    program.write_text("#!/bin/sh\necho 'loading'\necho '[1, 2]'\n")
    assert llama_cpp_ids(program, tmp_path / "model.gguf", "x", parse_special=False, work=tmp_path) == [1, 2]
    monkeypatch.setenv("LLAMA_CPP_DIR", str(tmp_path))
    report = check_llama_cpp_tokenizer(tmp_path / "model.gguf", tiny.tokenizer(), ["x"])
    assert report["llama_cpp_tokenizer_differences"] == report["llama_cpp_texts"] > 1
    assert report["llama_cpp_infill_prompt_differs"] == 1
    monkeypatch.setenv("LLAMA_CPP_DIR", str(tmp_path / "elsewhere"))
    assert check_llama_cpp_tokenizer(tmp_path / "model.gguf", tiny.tokenizer(), ["x"]) == {}


def test_several_prompts_are_padded_at_their_beginning(tmp_path: Path) -> None:
    """Transformers' own default pads behind a shorter prompt, which then goes on after the padding."""
    folder = write_folder(tmp_path / "hf", tiny.model(**FREE))
    tokenizer = transformers.AutoTokenizer.from_pretrained(str(folder))
    model = transformers.AutoModelForCausalLM.from_pretrained(str(folder), dtype=torch.float32)
    prompts = ["import os\nimport re\n\nclass A:", "def f("]
    together = tokenizer(prompts, return_tensors="pt", padding=True)
    written = model.generate(**together, max_new_tokens=8, do_sample=False)[:, -8:]
    assert tokenizer.padding_side == "left"
    for prompt, ids in zip(prompts, written, strict=True):
        alone = tokenizer(prompt, return_tensors="pt")
        assert model.generate(**alone, max_new_tokens=8, do_sample=False)[0, -8:].tolist() == ids.tolist()


# ---------------------------------------------------------------- what is not ours to replace


def foreign(capsys: pytest.CaptureFixture[str], run: Path, out: Path, path: Path, *options: str) -> None:
    """Export is refused with one line because of `path`, and leaves everything in `out` as it is."""
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    capsys.readouterr()
    assert run_export(run, out, *options) == 2
    error = capsys.readouterr().err
    assert f"error: {path}: no export wrote this, or it was changed since" in error
    assert error.count("\n") == 1
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("README.md", ("--format", "hf")),
        ("README.md", ("--format", "all")),
        ("export.json", ("--format", "all")),
        ("tokenizer.json", ("--format", "hf")),
        ("Modelfile", ("--format", "gguf")),
        ("run-TQ2_0.gguf", ("--format", "gguf")),
        ("gguf/Modelfile", ("--format", "all")),
        ("packed/config.json", ("--format", "all", "--packed")),
    ],
)
def test_a_file_that_no_export_wrote_is_not_replaced(
    tmp_path: Path, name: str, options: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    run, out = tiny.checkpoint(tmp_path / "run", calm_model(**GGUF_SHAPE)), tmp_path / "out"
    (out / name).parent.mkdir(parents=True)
    (out / name).write_text('{"mine": "all mine"}')
    foreign(capsys, run, out, out / name, *options)
    assert run_export(run, out, *options, "--force") == 0
    assert "mine" not in (out / name).read_bytes().decode("utf-8", "replace")[:100]


@pytest.mark.parametrize("name", ["README.md", "hf/README.md", "gguf/Modelfile"])
def test_a_file_that_somebody_changed_is_not_replaced(
    tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    run, out = tiny.checkpoint(tmp_path / "run", calm_model(**GGUF_SHAPE)), tmp_path / "out"
    assert run_export(run, out, "--format", "all") == 0
    (out / "notes.md").write_text("mine")
    assert run_export(run, out, "--format", "all") == 0
    text = (out / name).read_text()
    (out / name).write_text(text.swapcase())  # of the same length
    foreign(capsys, run, out, out / name, "--format", "all")
    assert (out / "notes.md").read_text() == "mine"


def test_each_kind_of_file_can_be_written_again(tmp_path: Path) -> None:
    run, out = tiny.checkpoint(tmp_path / "run", calm_model(**GGUF_SHAPE)), tmp_path / "out"
    for kind in ("TQ2_0", "TQ1_0", "F16", "TQ2_0"):
        assert run_export(run, out, "--format", "gguf", "--gguf-type", kind) == 0
    assert len(json.loads((out / "export.json").read_text())["sha256"]) == 4


def test_exports_of_an_older_version_are_replaced_where_nobody_changed_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """They know the sizes alone, and of the card above all formats nothing."""
    run, out = tiny.checkpoint(tmp_path / "run", calm_model(**GGUF_SHAPE)), tmp_path / "out"
    assert run_export(run, out, "--format", "all") == 0
    for path in out.rglob("export.json"):
        report = json.loads(path.read_text())
        del report["sha256"]
        path.write_text(json.dumps(report))
    with (out / "gguf" / "Modelfile").open("a") as file:
        file.write("# mine\n")
    foreign(capsys, run, out, out / "gguf" / "Modelfile", "--format", "all")
    (out / "gguf" / "Modelfile").unlink()
    assert run_export(run, out, "--format", "all") == 0
