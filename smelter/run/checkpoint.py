"""Checkpoints that survive a kill, a full disk and a careless copy.

A checkpoint is a folder `checkpoints/step_0001000/`: the weights (`model.safetensors`), the tokenizer,
the configuration, and `state/` with what only training needs. It appears whole and on the disk, or not
at all (`base.files`). `config.json` holds each file's size and SHA-256, and its own: a copy that was cut short is
refused by name instead of training on from noise. The trade-off is disk: while a checkpoint is written,
its predecessors are all still there.
"""

import json
import os
import re
import shutil
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from smelter import __version__
from smelter.base import (
    DISK_FULL,
    CheckpointError,
    file_sha256,
    free_bytes,
    is_intact,
    megabytes,
    sealed,
    whole_folder,
    write_json,
)
from smelter.config import Config, config_from_dict, config_to_dict

FORMAT = "smelter-checkpoint"
FORMAT_VERSION = 1
MODEL_FILE, CONFIG_FILE = "model.safetensors", "config.json"
TOKENIZER_FILE, STATE_FILE = "tokenizer.json", "state/state.pt"
STEP_NAME = re.compile(r"step_(\d{7,})")


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
    write_json(folder / CONFIG_FILE, sealed(manifest), ensure_ascii=True)


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
    manifest = read_manifest(path)
    problem = _problem(path, manifest, with_state)
    if problem:
        raise _damaged(path, *problem)
    config = config_from_dict(manifest["config"], str(path / CONFIG_FILE))
    tensors = safetensors.torch.load_file(path / MODEL_FILE)
    state = torch.load(path / STATE_FILE, map_location="cpu", weights_only=True) if with_state else None
    return Checkpoint(path, manifest["step"], config, tensors, state)


def read_manifest(path: Path) -> dict[str, Any]:
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
    if not is_intact(manifest):
        raise _damaged(path, file, "is damaged (its SHA-256 is not the one that it names)")
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
                if is_intact(manifest) and _problem(other, manifest, with_state=True) is None:
                    return other
            except (json.JSONDecodeError, UnicodeDecodeError, KeyError, AttributeError, TypeError):
                continue  # damaged as well: look further back
    return None


def run_folder(checkpoint: Path) -> Path:
    """The run folder of a checkpoint in its place, else the checkpoint's own folder."""
    checkpoint = checkpoint.resolve()
    return checkpoint.parent.parent if checkpoint.parent.name == "checkpoints" else checkpoint


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
