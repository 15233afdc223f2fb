"""Presets, precedence, strictness, and that every mistake is one line naming place and fix."""

import ast
import inspect
import itertools
import tomllib
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from smelter.base import cli
from smelter.base.errors import ConfigError, UserError, nearest
from smelter.config import (
    PRESETS,
    Config,
    DataConfig,
    DistillationConfig,
    ModelConfig,
    TrainingConfig,
    config_from_dict,
    config_to_dict,
    config_to_toml,
    load_config,
    preset,
)
from smelter.decoding.kv_cache import KVCache
from smelter.model import Model
from smelter.train import parse_options

TABLES = (ModelConfig, DataConfig, DistillationConfig, TrainingConfig)


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def one_line(error: pytest.ExceptionInfo[UserError]) -> str:
    message = str(error.value)
    assert message
    assert "\n" not in message
    return message


# --- figures ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["50m", "100m", "125m", "300m"])
def test_presets_weigh_what_their_names_say(name: str) -> None:
    assert preset(name).model.num_params_estimate == pytest.approx(float(name[:-1]) * 1e6, rel=0.05)


@settings(max_examples=40)
@given(
    kv=st.sampled_from([1, 2, 3, 6]),
    switches=st.lists(st.booleans(), min_size=4, max_size=4),
    sizes=st.tuples(*(st.integers(1, 40) for _ in range(4))),
)
def test_parameter_estimate_is_the_real_count(kv: int, switches: list[bool], sizes: tuple[int, ...]) -> None:
    names = ("use_qk_norm", "use_sub_norm", "tie_embeddings", "use_ternary")
    shape = dict(zip(("vocab_size", "hidden_size", "intermediate_size", "num_layers"), sizes, strict=True))
    shape["num_layers"] = 1 + shape["num_layers"] % 3
    values: dict[str, Any] = {**shape, **dict(zip(names, switches, strict=True))}
    config = ModelConfig(num_heads=6, num_kv_heads=kv, head_dim=4, **values)
    with torch.device("meta"):
        model = Model(config)
    assert sum(parameter.numel() for parameter in model.parameters()) == config.num_params_estimate
    matrices = sum(p.numel() for name, p in model.named_parameters() if name.startswith("layers.") and p.ndim == 2)
    assert matrices == config.num_matrix_params


def test_kv_cache_bytes_are_what_the_cache_holds() -> None:
    assert ModelConfig(num_kv_heads=4, head_dim=64).kv_cache_size_per_token == 1_024
    assert ModelConfig(num_kv_heads=12, head_dim=64).kv_cache_size_per_token == 3_072
    config = ModelConfig(num_layers=3, num_heads=6, num_kv_heads=2, head_dim=10)
    cache = KVCache(config, 1, 7, torch.bfloat16, "cpu")
    assert cache.keys.nbytes + cache.values.nbytes == 7 * config.num_layers * config.kv_cache_size_per_token


def test_flops_follow_from_the_shape() -> None:
    """Counted by PyTorch on the products of one forward pass; training is three times that."""
    config = ModelConfig(
        vocab_size=96, hidden_size=32, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8, intermediate_size=48,
        max_seq_len=128, activation_quant="none",
    )  # fmt: skip
    model = Model(config)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.logits(model(torch.zeros(1, 128, dtype=torch.long)))
    # PyTorch does not look into the attention operation: two products a layer, of which the causal half counts.
    square = 2 * 2 * config.num_layers * 128 * 128 * config.query_size
    assert config.flops_per_token(128) * 128 == 3 * (counter.get_total_flops() + square // 2)


# --- TOML ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", list(PRESETS))
def test_toml_gives_the_same_configuration_back(name: str, tmp_path: Path) -> None:
    config = PRESETS[name]
    assert load_config(write(tmp_path / "r.toml", config_to_toml(config))) == config


FLOATS = st.floats(1e-6, 1.0, allow_nan=False)
TEXT = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12)


@settings(max_examples=40)
@given(
    run_dir=TEXT,
    teachers=st.lists(TEXT, max_size=3),
    lr=FLOATS,
    trackers=st.permutations(["wandb", "tensorboard"]),
    seed=st.integers(0, 2**63 - 1),
)
def test_any_value_survives_toml_and_dict(
    run_dir: str, teachers: list[str], lr: float, trackers: list[Any], seed: int
) -> None:
    config = Config(
        distillation=DistillationConfig(teachers=tuple(teachers), teacher_weights=(lr,) * len(teachers)),
        training=TrainingConfig(run_dir=run_dir, muon_lr=lr, trackers=tuple(trackers), seed=seed),
    )
    assert config_from_dict(tomllib.loads(config_to_toml(config)), "r.toml") == config
    assert config_from_dict(config_to_dict(config), "r.toml") == config


def test_preset_then_recipe_then_command_line(tmp_path: Path) -> None:
    recipe = write(
        tmp_path / "r.toml", 'preset = "tiny"\n[model]\nnum_layers = 3\n[training]\nmuon_lr = 1\nadamw_lr = 0.5\n'
    )
    assert load_config(recipe).training.muon_lr == 1.0
    assert type(load_config(recipe).training.muon_lr) is float
    parsed = parse_options([str(recipe), "--muon-lr", "0.25", "--max_seq_len", "256"]).config
    assert parsed.model == replace(PRESETS["tiny"].model, num_layers=3, max_seq_len=256)
    assert parsed.training == replace(PRESETS["tiny"].training, muon_lr=0.25, adamw_lr=0.5)
    assert parse_options([]).config == PRESETS["100m"] == Config()
    assert parse_options(["--preset", "50m"]).config == PRESETS["50m"]


def test_base_replaces_the_preset() -> None:
    base = replace(Config(), training=TrainingConfig(num_steps=7))
    laid = config_from_dict({"training": {"seed": 3}}, "x", base)
    assert laid == replace(base, training=TrainingConfig(num_steps=7, seed=3))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[model]\nhidden_sise = 3", ["[model]", "'hidden_sise'", "'hidden_size'"]),
        ("[modle]", ["'modle'", "'model'"]),
        ("[model]\nzzzz = 3", ["'zzzz'", "vocab_size", "rope_base"]),
        ('preset = "100M"', ["'100M'", "'100m'"]),
        ('preset = "gigantic"', ["'gigantic'", "tiny", "300m"]),
        ("preset = 5", ["preset = 5", "quotes"]),
        ("preset = []", ["preset = []", "quotes"]),
        ("model = 3", ["model", "table", "[model]"]),
        ("[model\nx = 1", ["not valid TOML", "line 1"]),
        ("[model]\nnum_layers = 2.0", ["[model]: num_layers = 2.0", "a whole number"]),
        ("[model]\nnum_layers = true", ["num_layers = True", "a whole number"]),
        ('[model]\nnum_layers = "2"', ["num_layers = '2'", "a whole number"]),
        ("[model]\nuse_qk_norm = 1", ["use_qk_norm = 1", "true or false"]),
        ("[training]\nmuon_lr = true", ["muon_lr = True", "a number"]),
        ("[training]\nrun_dir = 3", ["run_dir = 3", "text in quotes"]),
        ('[training]\nadamw_schedule = "linear"', ["adamw_schedule = 'linear'", "'wsd'", "'cosine'"]),
        ('[training]\ntrackers = "wandb"', ["trackers = 'wandb'", "list"]),
        ('[training]\ntrackers = ["wand"]', ["'wand'", "'wandb'"]),
        ("[distillation]\nteachers = [1]", ["teachers = 1", "text in quotes"]),
        ("[model]\nnum_heads = 12\nnum_kv_heads = 5", ["num_kv_heads = 5", "num_heads = 12", "[1, 2, 3, 4, 6, 12]"]),
        ("[model]\nhead_dim = 63", ["head_dim = 63", "even"]),
        ("[model]\nnum_layers = 0", ["num_layers = 0", "at least 1"]),
        ("[model]\nattn_logit_soft_cap = -1.0", ["attn_logit_soft_cap = -1.0", "0 for no cap"]),
        ("[model]\nrms_norm_eps = 0", ["rms_norm_eps = 0", "positive"]),
        ("[model]\nrope_base = 1", ["rope_base = 1", "above 1"]),
        ('[model]\nhidden_size = 300\nactivation_quant = "block256"', ["hidden_size = 300", "256"]),
        ("[data]\nfim_rate = 1.5", ["fim_rate = 1.5", "between 0 and 1"]),
        ('[data]\nfim_middle_token = "<|fim_prefix|>"', ["fim_*_token", "differ"]),
        ("[training]\nmuon_lr = inf", ["muon_lr = inf", "finite"]),
        ("[training]\nmuon_lr = nan", ["muon_lr = nan", "finite"]),
        ("[training]\nmuon_lr = 0", ["muon_lr = 0", "positive"]),
        ("[training]\nwarmup_steps = -1", ["warmup_steps = -1", "negative"]),
        ("[training]\nadamw_beta2 = 1", ["adamw_beta2 = 1", "[0, 1)"]),
        ("[training]\nseed = -1", ["seed = -1", "2**63"]),
        ('[training]\ntrain_minutes = 5\nadamw_schedule = "cosine"', ["train_minutes", '"wsd"', '"cosine"']),
        ("[distillation]\ntemperature = 0", ["temperature = 0", "positive"]),
        ("[distillation]\nvalidation_tau = 0", ["validation_tau = 0", "positive"]),
        ("[distillation]\nkl_weight_end = 2", ["kl_weight_end = 2", "between 0 and 1"]),
        ("[distillation]\nskew_alpha = 1", ["skew_alpha = 1", "[0, 1)"]),
        ("[distillation]\njs_beta = 0", ["js_beta = 0", "both excluded"]),
        ('[distillation]\nkl_direction = "sideways"', ["'sideways'", "'skew'", "'js'"]),
        ('[distillation]\nteachers = ["a", "b"]\nteacher_weights = [1]', ["1 entries", "2 teachers"]),
        ('[distillation]\nteachers = ["a"]\nteacher_weights = [inf]', ["teacher_weights = inf", "finite"]),
        ('[distillation]\nteachers = ["a"]\nteacher_weights = [0]', ["teacher_weights", "positive"]),
    ],
)
def test_mistakes_name_file_key_and_fix(text: str, words: list[str], tmp_path: Path) -> None:
    path = write(tmp_path / "recipe.toml", text)
    with pytest.raises(ConfigError) as error:
        load_config(path)
    message = one_line(error)
    assert message.startswith(f"{path}: ")
    for word in words:
        assert word in message


RANGES: list[tuple[str, str, tuple[float, ...], str]] = [
    ("model", "vocab_size hidden_size num_layers num_heads num_kv_heads", (0, -1), "must be at least 1"),
    ("model", "head_dim intermediate_size max_seq_len", (0, -1), "must be at least 1"),
    ("model", "rope_base", (1.0, 0.0), "must be above 1"),
    ("model", "rms_norm_eps", (0.0, -0.5), "must be positive"),
    ("model", "attn_logit_soft_cap final_logit_soft_cap", (-0.5,), "must be positive, or 0 for no cap"),
    (
        "data",
        "fim_rate fim_spm_rate fim_split_rate fim_cursor_rate fim_cut_rate",
        (-0.5, 1.5),
        "must lie between 0 and 1",
    ),
    ("data", "fim_piece_tokens fim_peek_tokens fim_position_skip", (-1,), "must not be negative"),
    ("data", "fim_middle_weight", (0.0, -0.5), "must be positive"),
    ("data", "instruct_share", (1.5,), "must lie between 0 and 1, or be negative for as they come"),
    ("data", "instruct_weight", (0.0, -0.5), "must be positive (instruct_share = 0 leaves them out)"),
    ("distillation", "kl_weight kl_weight_end chunk_weight", (-0.5, 1.5), "must lie between 0 and 1"),
    ("distillation", "temperature validation_tau chunk_temperature", (0.0, -0.5), "must be positive"),
    ("distillation", "skew_alpha", (-0.5, 1.0), "must lie in [0, 1)"),
    ("distillation", "js_beta", (0.0, 1.0), "must lie between 0 and 1, both excluded"),
    ("training", "num_steps device_batch_size total_batch_size loss_chunk_size", (0, -1), "must be positive"),
    ("training", "log_every eval_tokens muon_newton_schulz_steps", (0, -1), "must be positive"),
    ("training", "muon_lr adamw_lr embedding_lr", (0.0, -0.5), "must be positive"),
    ("training", "muon_weight_decay adamw_weight_decay grad_clip z_loss", (-0.5,), "must not be negative"),
    ("training", "train_minutes", (-0.5,), "must not be negative"),
    ("training", "warmup_steps muon_momentum_warmup eval_every sample_every", (-1,), "must not be negative"),
    ("training", "checkpoint_every keep_checkpoints", (-1,), "must not be negative"),
    ("training", "ternary_start_step ternary_warmup_steps", (-1,), "must not be negative"),
    ("training", "muon_momentum adamw_beta1 adamw_beta2", (-0.5, 1.0), "must lie in [0, 1)"),
    ("training", "cooldown_fraction min_lr_ratio final_cap_anneal_fraction", (-0.5, 1.5), "must lie between 0 and 1"),
    ("training", "seed", (-1, 2**63), "must lie in [0, 2**63)"),
]
"""Table, keys, values beyond each end, and what is said: written down once more, so that a lost range is noticed."""


@pytest.mark.parametrize(("table", "keys", "values", "demand"), RANGES)
def test_every_range_stands(table: str, keys: str, values: tuple[float, ...], demand: str) -> None:
    for key in keys.split():
        for value in values:
            with pytest.raises(ConfigError) as error:
                config_from_dict({table: {key: value}}, "r.toml")
            assert str(error.value) == f"r.toml: [{table}]: {key} = {value}: {demand}"


def test_the_list_of_ranges_is_whole() -> None:
    listed = {(table, key) for table, keys, _, _ in RANGES for key in keys.split()}
    hints = {item.name: get_type_hints(item.type, include_extras=True) for item in fields(Config)}
    assert listed == {
        (table, key) for table, keys in hints.items() for key, hint in keys.items() if "Annotated" in str(hint)
    }


def test_ranges_hold_on_the_command_line() -> None:
    with pytest.raises(UserError) as error:
        parse_options(["--muon-lr", "-1"])
    assert one_line(error) == "muon_lr = -1.0: must be positive (see smelter train --help)"


def test_unreadable_recipes_are_named(tmp_path: Path) -> None:
    for path in (tmp_path / "none.toml", tmp_path):
        with pytest.raises(ConfigError, match=r"cannot read the recipe") as error:
            load_config(path)
        assert str(path) in one_line(error)
    (tmp_path / "latin.toml").write_bytes(b"# \xff")
    with pytest.raises(ConfigError, match=r"latin\.toml: not valid TOML"):
        load_config(tmp_path / "latin.toml")


@given(name=st.sampled_from([f.name for f in fields(TrainingConfig)]), data=st.data())
def test_one_wrong_letter_is_recognised(name: str, data: st.DataObject) -> None:
    index = data.draw(st.integers(0, len(name) - 1))
    wrong = name[:index] + "Q" + name[index + 1 :]
    assert nearest(wrong, [f.name for f in fields(TrainingConfig)]) == f"did you mean {name!r}?" or (
        # Names that differ in one letter themselves (adamw_beta1 and adamw_beta2).
        name.startswith("adamw_beta")
    )


# --- batches ---------------------------------------------------------------------------------------


@given(batch=st.integers(1, 64), length=st.integers(1, 4_096), world=st.integers(1, 16), total=st.integers(1, 2**20))
def test_micro_steps_divide_or_name_a_batch_that_does(batch: int, length: int, world: int, total: int) -> None:
    def config(total: int) -> Config:
        return Config(
            model=ModelConfig(max_seq_len=length),
            training=TrainingConfig(device_batch_size=batch, total_batch_size=total),
        )

    if total % (batch * length * world) == 0:
        assert config(total).micro_steps(world) * batch * length * world == total
        return
    with pytest.raises(ConfigError) as error:
        config(total).micro_steps(world)
    assert f"total_batch_size = {total} " in one_line(error)
    better = int(str(error.value).rpartition("try ")[2])
    assert config(better).micro_steps(world) >= 1


def test_every_preset_has_a_batch_that_divides() -> None:
    for config in PRESETS.values():
        assert config.micro_steps() >= 1


# --- help ------------------------------------------------------------------------------------------


def documented(table: type[Any]) -> dict[str, str]:
    """Docstrings under the fields of a dataclass."""
    (body,) = (node.body for node in ast.parse(inspect.getsource(table)).body if isinstance(node, ast.ClassDef))
    found = {}
    for field, text in itertools.pairwise(body):
        if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant):
            assert isinstance(field.target, ast.Name)
            found[field.target.id] = str(text.value.value)
    return found


def test_help_explains_every_field(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "400")
    with pytest.raises(SystemExit) as stop:
        cli.parse(Config, ["--help"], "smelter train")
    assert stop.value.code == 0
    shown = " ".join(capsys.readouterr().out.replace("│", " ").split())
    for table in TABLES:
        texts = documented(table)
        for item in fields(table):
            assert f"--{item.name.replace('_', '-')}" in shown
            assert texts[item.name].endswith("."), f"{table.__name__}.{item.name} needs a docstring that is a sentence"
            assert " ".join(texts[item.name].split()) in shown


def test_option_names_are_unique() -> None:
    names = [item.name for table in TABLES for item in fields(table)]
    assert len(set(names)) == len(names)


def test_the_specified_names_stand() -> None:
    names = {item.name for table in TABLES for item in fields(table)}
    assert names >= {
        *("num_kv_heads", "use_qk_norm", "attn_logit_soft_cap", "final_logit_soft_cap", "rope_base", "max_seq_len"),
        *("vocab_size", "muon_lr", "muon_momentum", "adamw_lr", "adamw_weight_decay", "optimizer", "muon_schedule"),
        *("fim_prefix_token", "fim_middle_token", "fim_suffix_token", "use_torch_compile"),
    }
    assert get_args(get_type_hints(TrainingConfig)["muon_schedule"]) == ("constant", "wsd", "cosine")
    assert TrainingConfig().muon_schedule == "constant"


def test_configurations_are_frozen() -> None:
    with pytest.raises(AttributeError):
        Config().training.muon_lr = 1.0  # type: ignore[misc]
