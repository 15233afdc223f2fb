"""A run's folder: what a new one holds, how it is known again, and what may change when a run goes on.

It can be moved and copied. A copy is a run of its own: a configuration in a run folder means that folder, whatever it
was called when the file was written.
"""

import os
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from smelter import __version__
from smelter.base import CheckpointError, ConfigError, write_text
from smelter.config import Config, config_to_dict, config_to_toml, load_config
from smelter.run.checkpoint import latest_checkpoint, read_manifest
from smelter.run.distributed import is_main
from smelter.run.metrics import METRICS_FILE, SAMPLES_FILE, WANDB_ID_FILE

RECIPE_FILE, README_FILE = "config.toml", "README.md"

MAY_DIFFER = {
    f"training.{name}"
    for name in (
        *("run_dir", "resume", "device", "device_batch_size", "loss_chunk_size", "num_steps", "train_minutes"),
        *("log_every", "eval_every", "eval_tokens", "sample_every", "checkpoint_every", "keep_checkpoints"),
        *("trackers", "use_torch_compile", "use_gradient_checkpointing"),
    )
}
"""Keys that may change when a run is resumed: they say how long, how often and where, not what is learned."""

MARK = "A training run of Smelter"
"""By these words in its README.md a run folder is known for one."""

OURS = (README_FILE, RECIPE_FILE, METRICS_FILE, SAMPLES_FILE, "checkpoints")
"""Names that a run takes in its folder."""

README = """# {mark}

Begun with Smelter {version}. This folder can be moved or copied as it is; a copy goes on by itself.

| file | what it is |
|---|---|
| `config.toml` | the whole resolved configuration |
| `metrics.jsonl` | one JSON object per logged step |
| `samples.jsonl` | code the model wrote along the way |
| `checkpoints/step_N/` | weights, tokenizer, configuration and training state after N steps |
| `results.json`, `report.html`, `export/` | written by the commands below |

The paths in `config.toml` begin at `{base}`, so from this folder:

    run=$PWD && cd {base}
    smelter train "$run/config.toml" --resume must    # go on from the last checkpoint
    smelter evaluate "$run"                           # bits per byte and infilling -> results.json
    smelter report "$run"                             # curves and results -> report.html
    smelter export "$run" --format gguf --out "$run/export/gguf"

A checkpoint is published by a rename once it is whole on disk; folders named `.tmp_*` are left
over from a save that was killed and are removed by the next one.
"""


def is_run_folder(folder: Path) -> bool:
    """Whether a training run wrote this folder: by its README.md, or a checkpoint."""
    if latest_checkpoint(folder) is not None:
        return True
    try:
        beginning = (folder / README_FILE).read_text(encoding="utf-8", errors="replace").splitlines()[:5]
    except OSError:
        return False
    return any(line.removeprefix("# ").startswith(MARK) for line in beginning)


def _check_ours(run_dir: Path) -> None:
    """ConfigError where a name that a run takes in its folder is taken by somebody else."""
    if is_run_folder(run_dir):
        return
    for path in (run_dir / name for name in OURS):
        if path.exists():
            raise ConfigError(f"{path}: no training run wrote this: move it, or choose another --run-dir")


def in_place(config: Config, recipe: Path) -> Config:
    """The configuration for the folder in which `recipe` lies, where that is the `config.toml` of a run."""
    folder = recipe.parent
    if recipe.name != RECIPE_FILE or not is_run_folder(folder) or _is_same(folder, Path(config.training.run_dir)):
        return config
    name = str(folder.resolve() if folder == Path() else folder)  # "." would mean another folder from elsewhere
    return replace(config, training=replace(config.training, run_dir=name))


def _is_same(first: Path, second: Path) -> bool:
    return first.exists() and second.exists() and first.samefile(second)


def _leave_the_original(run_dir: Path) -> None:
    """Drop the tracker's id in a copy whose original is still there: two runs would write into one curve."""
    recipe, own = run_dir / RECIPE_FILE, run_dir / WANDB_ID_FILE
    if not recipe.is_file() or not own.is_file():
        return
    original = Path(load_config(recipe).training.run_dir)
    other = original / WANDB_ID_FILE
    if not _is_same(original, run_dir) and other.is_file() and other.read_bytes() == own.read_bytes():
        own.unlink()


def prepare_run_dir(run_dir: Path, config: Config, resume: Literal["auto", "must", "never"]) -> Path | None:
    """Make the run folder (config.toml, README.md) and return the checkpoint to go on from, or None.

    Call it on every rank; only the main one writes. A README.md that is there stays as it is. Raises CheckpointError
    where `must` finds no checkpoint or `never` finds one, and ConfigError where a file of somebody else has a name that
    a run takes, or naming the keys where the checkpoint was trained otherwise (keys in `MAY_DIFFER` may change).
    """
    checkpoint = latest_checkpoint(run_dir)
    if is_main():
        _check_ours(run_dir)
    if resume == "must" and checkpoint is None:
        raise CheckpointError(f"{run_dir}: no checkpoint to resume from: use --resume auto to start a new run")
    if resume == "never" and checkpoint is not None:
        raise CheckpointError(
            f"{run_dir}: already holds {checkpoint.name}, which --resume never would overwrite: use --resume auto to "
            f"go on, or another --run-dir to start anew"
        )
    if checkpoint is not None:
        _check_resumable(checkpoint, config)
    if is_main():
        _leave_the_original(run_dir)
        if not (run_dir / README_FILE).exists():  # before all else: by it the folder is known
            base = shlex.quote(os.path.relpath(Path.cwd(), run_dir.resolve()))
            write_text(run_dir / README_FILE, README.format(mark=MARK, version=__version__, base=base))
        write_text(run_dir / RECIPE_FILE, config_to_toml(config))
    return checkpoint


def _check_resumable(checkpoint: Path, config: Config) -> None:
    """ConfigError where `config` would go on with something else than what the checkpoint has learned."""
    manifest = read_manifest(checkpoint)
    new = _flat(config_to_dict(config.at_step(manifest["step"])))
    # A key that the version which saved it did not know had its default.
    old = _flat(config_to_dict(Config())) | _flat(manifest["config"])
    # A checkpoint says the cap that its model had, which training with this option lowers.
    changing = {"model.final_logit_soft_cap"} if new["training.final_cap_anneal_fraction"] else set()
    differing = [
        f"{key} = {new.get(key)!r} (was {old.get(key)!r})"
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key) and key not in MAY_DIFFER | changing
    ]
    if differing:
        raise ConfigError(
            f"{checkpoint}: cannot resume with {', '.join(differing)}: set them back, or start a new run with another "
            f"--run-dir"
        )


def _flat(table: dict[str, Any]) -> dict[str, Any]:
    """The values of a configuration's tables by `section.key`."""
    return {f"{section}.{key}": value for section, values in table.items() for key, value in values.items()}
