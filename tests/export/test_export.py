"""Exports against those who read them: Transformers, tokenizers and gguf-py."""

import copy
import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from smelter import kernels
from smelter.__main__ import main
from smelter.base.errors import UserError
from smelter.bitnet import bit_linears
from smelter.export.check import CapReport, compare, logits_of, measure_caps, probe_windows, runtime_model
from smelter.export.gguf import check_gguf, gguf_name, read_gguf, write_gguf
from smelter.export.hf import baked_tensors, compare_trits, qwen3_config, read_hf, write_hf
from smelter.model import Model
from smelter.run.load import load_model
from smelter.tokens.chat import TEMPLATE, ChatFormat, stop_ids
from smelter.tokens.roles import SpecialTokens
from smelter.tokens.tokenizer import Tokenizer
from tests import tiny

GGUF_SHAPE: dict[str, Any] = {"hidden_size": 256, "num_heads": 4, "head_dim": 64, "intermediate_size": 512}
FREE: dict[str, Any] = {"attn_logit_soft_cap": 0.0, "final_logit_soft_cap": 0.0, "activation_quant": "none"}
TEXT = tiny.CODE[:1_500]


def windows(tokens: Tokenizer) -> list[torch.Tensor]:
    return probe_windows([TEXT], tokens, 96)


def calm_model(**changes: Any) -> Model:
    """A model whose logits stay far below the caps."""
    model = tiny.model(**changes)
    with torch.no_grad():
        model.norm.weight.mul_(0.2)
    return model


def write_folder(folder: Path, model: Model, tokens: Tokenizer | None = None) -> Path:
    folder.mkdir()
    write_hf(folder, model, tokens or tiny.tokenizer())
    return folder


@pytest.mark.parametrize(
    "changes",
    [{}, {"tie_embeddings": False}, {"num_kv_heads": 1, "head_dim": 32, "rope_base": 1e6}, {"use_ternary": False}],
)
def test_transformers_qwen3_computes_our_logits(changes: dict[str, Any]) -> None:
    model = tiny.model(**FREE, **changes)
    config = transformers.Qwen3Config(**qwen3_config(model.config, tiny.tokenizer()))
    theirs = transformers.Qwen3ForCausalLM(config).float().eval()
    missing, unexpected = theirs.load_state_dict(baked_tensors(model), strict=False)
    assert not unexpected
    assert set(missing) <= ({"lm_head.weight"} if model.config.tie_embeddings else set())
    ids = torch.randint(0, 512, (3, 90), generator=torch.manual_seed(1))
    with torch.no_grad():
        ours = model.logits(model(ids))
        torch.testing.assert_close(theirs(ids).logits, ours, atol=1e-5 * float(ours.abs().max()), rtol=0)


@pytest.mark.parametrize("tie", [True, False])
def test_the_folder_loads_and_writes_our_tokens(tmp_path: Path, tie: bool) -> None:
    model = tiny.model(**FREE, tie_embeddings=tie)
    folder = write_folder(tmp_path / "hf", model)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(str(folder), dtype="auto")
    assert type(theirs) is transformers.Qwen3ForCausalLM
    assert {parameter.dtype for parameter in theirs.parameters()} == {torch.bfloat16}
    assert theirs.config.rope_parameters["rope_theta"] == model.config.rope_base
    stored = runtime_model(model, "none", read_hf(folder))
    prompt = tiny.tokenizer().encode(tiny.CODE[600:700])
    in_full = transformers.AutoModelForCausalLM.from_pretrained(str(folder), dtype=torch.float32)
    for reader, ours in ((in_full, stored), (theirs, None)):
        written = reader.generate(torch.tensor([prompt]), max_new_tokens=24, do_sample=False)[0, len(prompt) :].tolist()
        stop = [tiny.tokenizer().eos_id]
        if ours is not None:
            (expected,) = tiny.write(ours, [prompt], max_tokens=24, stop_ids=stop)
            assert [token for token in written if token not in stop] == expected.ids
    with torch.no_grad():
        ids = torch.tensor([prompt])
        # bf16 arithmetic has 8 bits: the same model up to its rounding.
        torch.testing.assert_close(theirs(ids).logits.float(), stored.logits(stored(ids)), atol=0.5, rtol=0.1)


def test_the_folder_holds_exactly_the_ternary_values(tmp_path: Path) -> None:
    model = tiny.model()
    tensors = load_file(write_folder(tmp_path / "hf", model) / "model.safetensors")
    assert set(tensors) == {f"model.{name}" for name, _ in model.named_parameters()}
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    for name, layer in bit_linears(model):
        values = tensors[f"model.{name}.weight"].float().unique()
        assert values.tolist() == [-float(layer.scale), 0.0, float(layer.scale)]


def test_reading_back_notices_every_kind_of_change(tmp_path: Path) -> None:
    model = tiny.model()
    folder = write_folder(tmp_path / "hf", model)
    counts = compare_trits(model, read_hf(folder))
    assert counts == {
        "trits": model.config.num_matrix_params,
        "layers": 14,
        "trits_changed": 0,
        "weights_changed": 0,
        "scales_changed": 0,
    }
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    zero = tuple(int(i) for i in (tensors[name] == 0).nonzero()[0])
    scale = float(tensors[name].abs().max())
    for value, expected in ((scale, (1, 1, 0)), (scale * 2, (1, 1, 1))):
        tensors[name][zero] = value
        save_file(tensors, folder / "model.safetensors")
        counts = compare_trits(model, read_hf(folder))
        assert (counts["trits_changed"], counts["weights_changed"], counts["scales_changed"]) == expected


def test_tokenizers_agree(tmp_path: Path) -> None:
    tokens = tiny.tokenizer()
    folder = write_folder(tmp_path / "hf", tiny.model())
    theirs = transformers.AutoTokenizer.from_pretrained(str(folder))
    texts = [tiny.CODE, "", "é漢🙂 e\u0301ﬁ\x00\u2028", "\r\n\t  x\n\n", "0123456789 ''' '''s"]
    for text in texts:
        assert theirs(text).input_ids == tokens.encode(text)
        assert theirs.decode(tokens.encode(text), clean_up_tokenization_spaces=False) == text
    assert (theirs.eos_token_id, theirs.pad_token_id) == (tokens.eos_id, tokens.pad_id)
    prompt = "<|fim_prefix|>def f(<|fim_suffix|>)<|fim_middle|>"
    assert theirs(prompt).input_ids == tokens.fim_prompt("def f(", ")")
    assert theirs.decode(tokens.fim_prompt("a", "b"), skip_special_tokens=True) == "ab"
    assert theirs.model_max_length == 96


def test_conversations_agree_and_end(tmp_path: Path) -> None:
    """Transformers renders them as we do, and its `generate` stops where ours does."""
    folder = write_folder(tmp_path / "hf", tiny.model())
    theirs = transformers.AutoTokenizer.from_pretrained(str(folder))
    turns = [{"role": role, "content": f"{role}: x = 1\n"} for role in ("system", "user", "assistant", "user")]
    made = theirs.apply_chat_template(turns, add_generation_prompt=True, return_dict=False)
    assert made == ChatFormat(tiny.tokenizer()).render(turns, add_generation_prompt=True).ids
    stops = transformers.GenerationConfig.from_pretrained(str(folder)).eos_token_id
    assert stops == stop_ids(tiny.tokenizer())
    assert theirs.decode(made, skip_special_tokens=True).startswith("system\nsystem: x = 1\n\nuser\n")


def test_without_tokens_for_conversations_there_is_no_template(tmp_path: Path) -> None:
    old = Tokenizer.train([tiny.CODE], 512, SpecialTokens(im_start="", im_end=""))
    theirs = transformers.AutoTokenizer.from_pretrained(str(write_folder(tmp_path / "hf", tiny.model(), old)))
    assert theirs.chat_template is None
    write_gguf(tmp_path / "m.gguf", tiny.model(**GGUF_SHAPE), old, name="tiny", gguf_type="F16")
    fields = gguf.GGUFReader(tmp_path / "m.gguf").fields
    assert not {"tokenizer.chat_template", "tokenizer.ggml.eot_token_id"} & set(fields)


@pytest.mark.parametrize("gguf_type", ["TQ2_0", "TQ1_0", "F16"])
@pytest.mark.parametrize("tie", [True, False])
def test_gguf_py_reads_the_same_weights(tmp_path: Path, gguf_type: str, tie: bool) -> None:
    model = tiny.model(**GGUF_SHAPE, tie_embeddings=tie)
    file = tmp_path / "model.gguf"
    check_gguf(model, tiny.tokenizer(), gguf_type)
    write_gguf(file, model, tiny.tokenizer(), name="tiny", gguf_type=gguf_type)
    reader = gguf.GGUFReader(file)
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    assert len(tensors) == len(list(model.parameters()))
    kinds = {
        "q_proj": "attn_q",
        "k_proj": "attn_k",
        "v_proj": "attn_v",
        "o_proj": "attn_output",
        "gate_proj": "ffn_gate",
        "up_proj": "ffn_up",
        "down_proj": "ffn_down",
    }
    for name, layer in bit_linears(model):
        _, number, _, kind = name.split(".")
        tensor = tensors[f"blk.{number}.{kinds[kind]}.weight"]
        assert tensor.tensor_type.name == gguf_type
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        np.testing.assert_array_equal(values, (layer.scale * layer.trits).numpy())
    table = tensors["token_embd.weight"]
    assert table.tensor_type.name == ("F16" if gguf_type == "F16" else "Q8_0")
    embedding = model.embed_tokens.weight.detach().numpy()
    error = np.abs(gguf.quants.dequantize(table.data, table.tensor_type) - embedding)
    assert error.max() <= np.abs(embedding).max() / 127
    assert ("output.weight" in tensors) != tie
    norm = tensors["blk.1.attn_k_norm.weight"]
    gain = model.get_parameter("layers.1.self_attn.k_norm.weight")
    np.testing.assert_array_equal(norm.data, gain.detach().numpy())
    assert norm.tensor_type.name == "F32"
    counts = compare_trits(model, read_gguf(file, 2))
    assert counts["trits_changed"] == counts["weights_changed"] == counts["scales_changed"] == 0


def test_gguf_describes_shape_and_vocabulary(tmp_path: Path) -> None:
    model, tokens = tiny.model(**GGUF_SHAPE, vocab_size=520), tiny.tokenizer()
    file = tmp_path / "model.gguf"
    write_gguf(file, model, tokens, name="tiny", gguf_type="TQ2_0")
    fields = {key: field.contents() for key, field in gguf.GGUFReader(file).fields.items()}
    expected = {
        "general.architecture": "qwen3",
        "general.name": "tiny",
        "general.file_type": 37,
        "qwen3.context_length": 96,
        "qwen3.embedding_length": 256,
        "qwen3.block_count": 2,
        "qwen3.feed_forward_length": 512,
        "qwen3.attention.head_count": 4,
        "qwen3.attention.head_count_kv": 2,
        "qwen3.attention.key_length": 64,
        "qwen3.attention.value_length": 64,
        "qwen3.rope.dimension_count": 64,
        "qwen3.rope.freq_base": 10_000.0,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "qwen2",
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.ggml.eos_token_id": tokens.eos_id,
        "tokenizer.ggml.eot_token_id": tokens.im_end_id,
        "tokenizer.chat_template": TEMPLATE,
        "tokenizer.ggml.padding_token_id": tokens.pad_id,
        "tokenizer.ggml.fim_pre_token_id": tokens.fim_prefix_id,
        "tokenizer.ggml.fim_suf_token_id": tokens.fim_suffix_id,
        "tokenizer.ggml.fim_mid_token_id": tokens.fim_middle_id,
    }
    assert {key: fields[key] for key in expected} == expected
    assert fields["qwen3.attention.layer_norm_rms_epsilon"] == pytest.approx(1e-6)
    names, types = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
    assert len(names) == len(types) == 520
    assert [tokens.token_to_id(name) for name in names[:512]] == list(range(512))
    assert types[512:] == [5] * 8
    special = [tokens.token_to_id(name) for name in tokens.special.names]
    assert [i for i, kind in enumerate(types) if kind == 3] == special
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"]]
    assert merges == [tuple(merge) for merge in tokens.values["model"]["merges"]]
    assert not [key for key in fields if "fim_rep" in key or "fim_sep" in key]


@pytest.mark.parametrize(
    ("changes", "gguf_type", "words"),
    [
        ({"intermediate_size": 320}, "TQ2_0", "intermediate_size = 320"),
        ({"hidden_size": 192}, "TQ1_0", "hidden_size = 192"),
        ({"head_dim": 48}, "TQ2_0", "num_heads \\* head_dim = 192"),
        ({"use_ternary": False}, "TQ2_0", "F16"),
    ],
)
def test_gguf_says_what_does_not_fit(changes: dict[str, Any], gguf_type: str, words: str) -> None:
    with pytest.raises(UserError, match=words):
        check_gguf(tiny.model(**GGUF_SHAPE | changes), tiny.tokenizer(), gguf_type)
    check_gguf(tiny.model(**GGUF_SHAPE | changes), tiny.tokenizer(), "F16")


@pytest.mark.parametrize("size", [0.0, 1.037e-5, 1.3e-5, 3.1e-5, 900.0])
def test_gguf_holds_the_smallest_and_largest_scales_exactly(tmp_path: Path, size: float) -> None:
    model = tiny.model(**GGUF_SHAPE)
    layer = dict(bit_linears(model))["layers.1.mlp.up_proj"]
    with torch.no_grad():
        layer.weight.fill_(size)
        layer.weight[0, :300] = -size
        layer.quantize(torch.float32)
    assert float(layer.scale) == pytest.approx(max(size, 1e-5), rel=1e-2)
    write_gguf(tmp_path / "model.gguf", model, tiny.tokenizer(), name="tiny", gguf_type="TQ2_0")
    counts = compare_trits(model, read_gguf(tmp_path / "model.gguf", 2))
    assert counts["trits_changed"] == counts["weights_changed"] == counts["scales_changed"] == 0


def test_gguf_refuses_tokenizers_that_split_otherwise(tmp_path: Path) -> None:
    values = copy.deepcopy(tiny.tokenizer().values)
    values["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = r"\s+|\S+"
    (tmp_path / "tokenizer.json").write_text(json.dumps(values))
    with pytest.raises(UserError, match="Qwen2"):
        check_gguf(tiny.model(**GGUF_SHAPE), Tokenizer.load(tmp_path / "tokenizer.json"), "TQ2_0")


def test_a_missing_gguf_package_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("smelter.export.gguf.importlib.util.find_spec", lambda _: None)
    with pytest.raises(UserError, match=r"smelter-foundry\[gguf\]"):
        check_gguf(tiny.model(**GGUF_SHAPE), tiny.tokenizer(), "TQ2_0")


def test_every_parameter_has_a_gguf_name() -> None:
    model = tiny.model(tie_embeddings=False)
    names = [gguf_name(name, 2) for name in baked_tensors(model)]
    assert len(set(names)) == len(names)
    with pytest.raises(KeyError, match="sub_norm"):
        gguf_name("model.layers.0.self_attn.sub_norm.weight", 2)


def test_attention_logits_are_those_that_attention_sees(monkeypatch: pytest.MonkeyPatch) -> None:
    model, seen = tiny.model(attn_logit_soft_cap=0.0), []
    attend = kernels.attention

    def spy(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cap: float, **where: Any) -> torch.Tensor:
        for head in range(q.shape[1]):
            scores = (q[0, head] @ k[0, head // (q.shape[1] // k.shape[1])].T).div(4).tril()
            seen.append(float(scores.abs().max()))
        return attend(q, k, v, cap, **where)

    probe = windows(tiny.tokenizer())
    report = measure_caps(model, probe)
    monkeypatch.setattr("smelter.model.run_attention", spy)
    final = []
    with torch.no_grad():
        for ids in probe:
            final.append(float(torch.atanh(model.logits(model(ids)).double() / 30).abs().max() * 30))
    assert report.max_attention_logit == pytest.approx(max(seen), rel=1e-5)
    assert report.max_final_logit == pytest.approx(max(final), rel=1e-2)


def test_caps_that_matter_are_objected_to() -> None:
    wild, calm = (
        measure_caps(tiny.model(), windows(tiny.tokenizer())),
        measure_caps(calm_model(), windows(tiny.tokenizer())),
    )
    assert wild.max_final_logit > 25
    assert wild.caps_kl > 1e-2
    assert "nats per token" in " ".join(wild.objections())
    assert calm.max_final_logit < 10
    assert not calm.objections()
    assert "attention logits reach 31" in CapReport(50, 31, 0, 5, 0).objections()[0]
    assert not CapReport(0, 31, 0, 5, 0).objections()
    assert CapReport(50, 1, 30, 5, float("nan")).objections()


def test_comparison_is_the_kl_divergence() -> None:
    first, second = tiny.model(seed=1), tiny.model(seed=2)
    probe = windows(tiny.tokenizer())
    assert compare(logits_of(first), logits_of(first), probe) == (0.0, 1.0)
    kl, same = compare(logits_of(first), logits_of(second), probe)
    with torch.no_grad():
        p, q = (logits_of(model)(probe[0]).double().softmax(-1) for model in (first, second))
    assert kl == pytest.approx(float((p * (p / q).log()).sum(-1).mean()), rel=1e-3)
    assert 0 <= same < 0.5


def run_export(run: Path, out: Path, *options: str) -> int:
    return main(["export", str(run), "--out", str(out), *options])


def test_hf_command_checks_what_it_wrote(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, out = tiny.checkpoint(tmp_path / "run", calm_model()), tmp_path / "run" / "export" / "hf"
    for _ in range(2):  # safe to repeat
        assert run_export(run, out, "--format", "hf") == 0
    text = capsys.readouterr().out
    report = json.loads((out / "export.json").read_text())
    assert report["trits"] == tiny.TINY.num_matrix_params
    for key in ("trits_changed", "weights_changed", "scales_changed", "tokenizer_differences", "forced"):
        assert report[key] == 0
    # The only difference between the same numerics there and here is the rounding of embedding and norms to bf16.
    assert 0 <= report["kl_same_numerics"] < 1e-4
    assert report["kl_same_numerics"] < report["kl_as_trained"] < 1e-2
    assert report["top1_same_numerics"] > 0.95
    assert "0 of 61,440" in text
    assert sorted(path.name for path in out.iterdir()) == sorted([*report["files"], "export.json"])
    assert "model.safetensors" in report["files"]
    assert len({path.stat().st_mode for path in out.iterdir()}) == 1, "all files are as readable as each other"
    transformers.AutoModelForCausalLM.from_pretrained(str(out))


def test_gguf_command_names_the_file_after_the_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = calm_model(**GGUF_SHAPE)
    run, out = tiny.checkpoint(tmp_path / "run", model), tmp_path / "gguf"
    assert run_export(run, out, "--format", "gguf") == 0
    assert run_export(run, out, "--format", "gguf", "--gguf-type", "TQ1_0") == 0
    assert sorted(path.name for path in out.iterdir()) == [
        "Modelfile",
        "export.json",
        "run-TQ1_0.gguf",
        "run-TQ2_0.gguf",
    ]
    report = json.loads((out / "export.json").read_text())
    assert report["trits_changed"] == report["scales_changed"] == 0
    assert 0 < report["kl_as_trained"] < 1e-2
    assert "llama.cpp's rounding" in capsys.readouterr().out
    loaded, _, _ = load_model(run)
    assert compare_trits(loaded, read_gguf(out / "run-TQ2_0.gguf", 2))["weights_changed"] == 0


def test_models_that_qwen3_cannot_express_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = calm_model(use_sub_norm=True, use_qk_norm=False)
    assert run_export(tiny.checkpoint(tmp_path / "run", model), tmp_path / "out", "--format", "hf") == 2
    error = capsys.readouterr().err
    assert "use_sub_norm = false" in error
    assert "use_qk_norm = true" in error
    assert not (tmp_path / "out").exists()


def test_caps_that_matter_need_force(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, out = tiny.checkpoint(tmp_path / "run", tiny.model()), tmp_path / "out"
    assert run_export(run, out, "--format", "hf") == 2
    error = capsys.readouterr().err
    assert "--force" in error
    assert error.count("\n") == 1
    assert not out.exists()
    assert run_export(run, out, "--format", "hf", "--force") == 0
    assert "warning" in capsys.readouterr().out
    assert json.loads((out / "export.json").read_text())["forced"] is True


def test_another_model_in_the_folder_is_not_overwritten(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, out = tiny.checkpoint(tmp_path / "run", calm_model()), tmp_path / "out"
    out.mkdir()
    (out / "config.json").write_text("{}")
    assert run_export(run, out, "--format", "hf") == 2
    assert f"{out / 'config.json'}: no export wrote this" in capsys.readouterr().err
    assert (out / "config.json").read_text() == "{}"
    assert run_export(run, out / "config.json", "--format", "hf") == 2
    assert "is not a folder" in capsys.readouterr().err
    assert run_export(run, out, "--format", "hf", "--force") == 0


@pytest.mark.parametrize(("part", "name"), [("hf", "/model.safetensors"), ("gguf", "")])
def test_a_full_disk_is_one_line_and_leaves_nothing(
    small_disk: Path, tmp_path: Path, part: str, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    run, out = tiny.checkpoint(tmp_path / "run", calm_model()), small_disk / "out"
    (small_disk / "others").write_bytes(bytes(2**21 - 2**16))
    assert run_export(run, out, "--format", part, "--gguf-type", "F16") == 2
    error = capsys.readouterr().err
    assert f"error: {out}{name}: No space left on device" in error
    assert error.count("\n") == 1
    assert not out.exists()


def test_a_failed_export_leaves_the_folder_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run, out = tiny.checkpoint(tmp_path / "run", calm_model()), tmp_path / "out"
    assert run_export(run, out, "--format", "hf") == 0
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    monkeypatch.setattr("smelter.export.export.compare_trits", lambda *_: {"trits_changed": 3})
    assert run_export(run, out, "--format", "hf") == 2
    assert "trits_changed = 3" in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
