"""Run folders and checkpoints that survive a kill, a full disk and a careless copy.

A checkpoint is a folder `checkpoints/step_0001000/`: the weights (`model.safetensors`), the tokenizer,
the configuration, and `state/` with what only training needs. It appears whole and on the disk, or not
at all (`base.files`). `config.json` holds each file's size and SHA-256: a copy that was cut short is
refused by name instead of training on from noise. The trade-off is disk: while a checkpoint is written,
its predecessors are all still there.
"""

import json
import os
import re
import shlex
import shutil
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from smelter import __version__
from smelter.base import (
    DISK_FULL,
    CheckpointError,
    ConfigError,
    file_sha256,
    free_bytes,
    megabytes,
    whole_folder,
    write_json,
    write_text,
)
from smelter.config import Config, config_from_dict, config_to_dict, config_to_toml
from smelter.run.distributed import is_main
from smelter.run.metrics import METRICS_FILE, SAMPLES_FILE

FORMAT = "smelter-checkpoint"
FORMAT_VERSION = 1
MODEL_FILE, CONFIG_FILE = "model.safetensors", "config.json"
TOKENIZER_FILE, STATE_FILE = "tokenizer.json", "state/state.pt"
STEP_NAME = re.compile(r"step_(\d{7,})")

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

OURS = ("README.md", "config.toml", METRICS_FILE, SAMPLES_FILE, "checkpoints")
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


@dataclass(frozen=True)
class Checkpoint:
    """A loaded checkpoint; `state` is None where it was not asked for."""

    path: Path
    step: int
    config: Config
    tensors: dict[str, Tensor]
    state: dict[str, Any] | None

    @property
    def tokenizer_file(self) -> Path:
        """The tokenizer saved with the weights."""
        return self.path / TOKENIZER_FILE


def save_checkpoint(
    run_dir: Path,
    step: int,
    *,
    config: Config,
    tensors: dict[str, Tensor],
    tokenizer_file: Path,
    state: dict[str, Any],
    keep: int,
) -> Path:
    """Write `run_dir/checkpoints/step_<step>` and return its path; call it on the main process only.

    `tensors` are the weights by name. `state` is nested dicts, lists and tuples of tensors, numbers and
    strings (TypeError otherwise: it would not load again). The newest `keep` checkpoints up to `step` stay,
    0 keeps all; older ones go only after the new one is safe. A failed write, such as a full disk, leaves
    earlier checkpoints as they were and raises CheckpointError with path and space needed.
    """
    num_bytes = sum(_num_bytes(tensor, name) for name, tensor in tensors.items()) + _num_bytes(state, "state")
    folder = run_dir / "checkpoints"
    path = folder / f"step_{step:07d}"
    try:
        for leftover in folder.glob(".tmp*"):
            shutil.rmtree(leftover)
        with whole_folder(path) as temporary:
            _write_files(temporary, step, config, tensors, tokenizer_file, state)
        older = [earlier for number, earlier in _steps(folder) if number < step]
        for earlier in older[keep - 1 :] if keep else []:
            # Renamed first, so that a kill half-way leaves no half checkpoint under its name.
            shutil.rmtree(earlier.rename(folder / f".tmp-old_{earlier.name}"))
    except OSError as error:
        fix = (
            f"it needs {megabytes(num_bytes)} and {megabytes(free_bytes(folder))} are free: make room, or lower "
            "training.keep_checkpoints (earlier checkpoints are intact)"
            if error.errno in DISK_FULL
            else f"check {error.filename or folder} and its permissions (earlier checkpoints are intact)"
        )
        raise CheckpointError(f"{path}: cannot save the checkpoint: {error.strerror}: {fix}") from error
    return path


def _write_files(
    folder: Path, step: int, config: Config, tensors: dict[str, Tensor], tokenizer_file: Path, state: dict[str, Any]
) -> None:
    """Fill `folder`, config.json with the other files' digests last."""
    write_tensors(folder / MODEL_FILE, {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()})
    shutil.copyfile(tokenizer_file, folder / TOKENIZER_FILE)
    (folder / "state").mkdir()
    try:
        with (folder / STATE_FILE).open("wb") as file:
            torch.save(state, file)
    except RuntimeError as error:
        # torch hides a failed write (a full disk) behind an assertion about file positions.
        if isinstance(error.__context__, OSError):
            raise error.__context__ from None
        raise
    names = (MODEL_FILE, TOKENIZER_FILE, STATE_FILE)
    files = {name: {"bytes": (folder / name).stat().st_size, "sha256": file_sha256(folder / name)} for name in names}
    manifest = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "smelter_version": __version__,
        "step": step,
        "config": config_to_dict(config.at_step(step)),
        "files": files,
    }
    write_json(folder / CONFIG_FILE, manifest, ensure_ascii=True)


def write_tensors(file: Path, tensors: dict[str, Tensor]) -> None:
    """Write CPU tensors as safetensors with the permissions of any new file; OSError where that fails."""
    file.touch()
    mode = file.stat().st_mode
    try:
        safetensors.torch.save_file(tensors, file, metadata={"format": "pt"})
    except safetensors.SafetensorError as error:
        # safetensors has no OSError: the number stands in its message.
        if match := re.search(r"os error (\d+)", str(error)):
            raise OSError(int(match[1]), os.strerror(int(match[1])), str(file)) from None
        raise
    file.chmod(mode)  # it makes files that only their owner can read


def load_checkpoint(path: Path, *, with_state: bool) -> Checkpoint:
    """Load a checkpoint, or the newest one of a run folder, onto the CPU, after checking sizes and digests.

    Raises CheckpointError that names the damaged file and the newest whole checkpoint before it.
    """
    path = find_checkpoint(path)
    manifest = _manifest(path)
    problem = _problem(path, manifest, with_state)
    if problem:
        raise _damaged(path, *problem)
    config = config_from_dict(manifest["config"], str(path / CONFIG_FILE))
    tensors = safetensors.torch.load_file(path / MODEL_FILE)
    state = torch.load(path / STATE_FILE, map_location="cpu", weights_only=True) if with_state else None
    return Checkpoint(path, manifest["step"], config, tensors, state)


def _manifest(path: Path) -> dict[str, Any]:
    """config.json of a checkpoint. Raises CheckpointError where it is missing, damaged or of another kind."""
    file = path / CONFIG_FILE
    try:
        manifest = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise _damaged(path, file, "is missing") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise _damaged(path, file, f"is damaged ({error})") from None
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise CheckpointError(f"{file}: not a Smelter checkpoint: give a run folder or checkpoints/step_N inside one")
    if manifest.get("format_version") != FORMAT_VERSION:
        raise CheckpointError(
            f"{file}: format version {manifest.get('format_version')!r}, written by Smelter "
            f"{manifest.get('smelter_version')}; this is {__version__}, which reads version {FORMAT_VERSION}: "
            f"install the Smelter that wrote it"
        )
    typed = {"step": int, "config": dict, "files": dict}
    wrong = [key for key, kind in typed.items() if type(manifest.get(key)) is not kind]
    if wrong or not all(type(entry) is dict for entry in manifest["files"].values()):
        wrong = wrong or ["files"]
        raise _damaged(path, file, f"is damaged (no valid {wrong[0]!r})")
    return manifest


def _problem(path: Path, manifest: dict[str, Any], with_state: bool) -> tuple[Path, str] | None:
    """The first file that is not as it was written, and what is wrong with it."""
    for name in (MODEL_FILE, TOKENIZER_FILE) + ((STATE_FILE,) if with_state else ()):
        file, expected = path / name, manifest["files"].get(name, {})
        if not file.is_file():
            return file, "is missing"
        size = file.stat().st_size
        if size != expected.get("bytes"):
            return file, f"has {size} bytes instead of {expected.get('bytes')}"
        if file_sha256(file) != expected.get("sha256"):
            return file, "is damaged (its SHA-256 is not the one in config.json)"
    return None


def _damaged(path: Path, file: Path, what: str) -> CheckpointError:
    """The error for a damaged checkpoint, with the way out."""
    good = _previous_good(path)
    fix = f"remove {path} to go on from {good}" if good else "copy the checkpoint again from its source"
    return CheckpointError(f"{file} {what}: {fix}")


def _previous_good(path: Path) -> Path | None:
    """The newest whole checkpoint before `path` in the same folder."""
    match = STEP_NAME.fullmatch(path.name)
    for number, other in _steps(path.parent) if match else []:
        if match and number < int(match[1]) and (other / CONFIG_FILE).is_file():
            try:
                manifest = json.loads((other / CONFIG_FILE).read_text(encoding="utf-8"))
                if _problem(other, manifest, with_state=True) is None:
                    return other
            except (json.JSONDecodeError, UnicodeDecodeError, KeyError, AttributeError):
                continue  # damaged as well: look further back
    return None


def run_folder(checkpoint: Path) -> Path:
    """The run folder of a checkpoint in its place, else the checkpoint's own folder."""
    checkpoint = checkpoint.resolve()
    return checkpoint.parent.parent if checkpoint.parent.name == "checkpoints" else checkpoint


def is_run_folder(folder: Path) -> bool:
    """Whether a training run wrote this folder: by its README.md, or a checkpoint."""
    if latest_checkpoint(folder) is not None:
        return True
    try:
        beginning = (folder / "README.md").read_text(encoding="utf-8", errors="replace").splitlines()[:5]
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


def latest_checkpoint(run_dir: Path) -> Path | None:
    """The checkpoint of the highest step in a run folder, unread; None where there is none."""
    return next((path for _, path in _steps(run_dir / "checkpoints")), None)


def find_checkpoint(run_or_ckpt: Path) -> Path:
    """The checkpoint meant by a run folder, its `checkpoints` folder, or a checkpoint itself.

    Raises CheckpointError that names the path and what would do.
    """
    path = run_or_ckpt
    if STEP_NAME.fullmatch(path.name) or (path / CONFIG_FILE).is_file():
        if path.is_dir():
            return path
    elif path.is_dir():
        newest = latest_checkpoint(path) or next((checkpoint for _, checkpoint in _steps(path)), None)
        if newest:
            return newest
        raise CheckpointError(f"{path}: no checkpoint here: give a run folder that has been trained, or a checkpoint")
    raise CheckpointError(f"{path}: no such folder: give a run folder or a checkpoint inside one")


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
        if not (run_dir / "README.md").exists():  # before all else: by it the folder is known
            base = shlex.quote(os.path.relpath(Path.cwd(), run_dir.resolve()))
            write_text(run_dir / "README.md", README.format(mark=MARK, version=__version__, base=base))
        write_text(run_dir / "config.toml", config_to_toml(config))
    return checkpoint


def _check_resumable(checkpoint: Path, config: Config) -> None:
    """ConfigError where `config` would go on with something else than what the checkpoint has learned."""
    manifest = _manifest(checkpoint)
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


def _steps(folder: Path) -> list[tuple[int, Path]]:
    """Step and path of the checkpoints in a folder, newest first."""
    if not folder.is_dir():
        return []
    steps = [(int(match[1]), path) for path in folder.iterdir() if (match := STEP_NAME.fullmatch(path.name))]
    return sorted(steps, reverse=True)


def _num_bytes(value: Any, where: str) -> int:
    """Bytes of the tensors and strings in a nested value; TypeError for what `weights_only` would not load."""
    if isinstance(value, Tensor):
        return value.numel() * value.element_size()
    if type(value) in (dict, OrderedDict):
        return sum(_num_bytes(key, where) + _num_bytes(item, f"{where}.{key}") for key, item in value.items())
    if type(value) in (list, tuple):
        return sum(_num_bytes(item, f"{where}[{i}]") for i, item in enumerate(value))
    if type(value) in (str, bytes):
        return len(value)
    if type(value) in (int, float, bool, type(None)):
        return 8
    raise TypeError(f"{where} is a {type(value).__name__}: a checkpoint holds tensors, numbers and strings")
