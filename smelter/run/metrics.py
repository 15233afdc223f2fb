"""What a run says about itself: `metrics.jsonl`, `samples.jsonl`, the progress line, and trackers.

The JSONL files are the record: one line per logged step, flushed as it is written, readable while the
run goes on. wandb and TensorBoard get a copy where asked. Resuming drops the lines after the
checkpoint, so that a killed run and its continuation read as one run.

| key | unit |
|---|---|
| step, tokens, skipped_steps | counts since the start of the run |
| loss, ce_loss, z_loss, kl_loss, chunk_loss | nats per token |
| lr_muon, lr_adamw, lr_embedding, grad_norm, loss_scale | as they were in this step |
| final_logit_soft_cap | the same; only with training.final_cap_anneal_fraction |
| tok_per_sec, peak_memory_mib, elapsed_seconds | tokens/s, MiB, seconds |
| is_ternary | 0 or 1; only with training.ternary_start_step |
| mfu, trit_flips, sparsity/LAYER_KIND | shares, 0 to 1 |
| val_loss, val_bpb | nats per token, bits per byte; only where evaluated |

A value that is not finite is null: JSON has no NaN.
"""

import json
import math
import os
import sys
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, SupportsFloat

from smelter.base import (
    ConfigError,
    DataError,
    fsync,
    make_folder,
    short_duration,
    short_number,
    whole_file,
    write_text,
)
from smelter.config import Config, config_to_dict

METRICS_FILE, SAMPLES_FILE, WANDB_ID_FILE = "metrics.jsonl", "samples.jsonl", "wandb_id.txt"


@dataclass(frozen=True)
class Sample:
    """What the model wrote between two pieces of held-out code, and what stands there."""

    prefix: str
    suffix: str
    completion: str
    expected: str


class MetricsLogger:
    """Writes metrics and samples of one run; on every rank but the main one it does nothing.

    `resume_step` is the step of the checkpoint the run goes on from, None for a new run: later lines (all
    lines) of an earlier life are dropped. Raises ConfigError where a tracker's package is missing.
    """

    def __init__(self, run_dir: Path, config: Config, trackers: Sequence[str], resume_step: int | None) -> None:
        # Imported here because it needs torch, and `smelter report` reads metrics without it.
        from smelter.run.distributed import is_main

        self.run_dir = run_dir
        self.enabled = is_main()
        self._wandb: Any = None
        self._tensorboard: Any = None
        if not self.enabled:
            return
        make_folder(run_dir)
        if "wandb" in trackers:
            self._wandb = _start_wandb(run_dir, config, resume_step)
        if "tensorboard" in trackers:
            self._tensorboard = _start_tensorboard(run_dir, resume_step)
        for name in (METRICS_FILE, SAMPLES_FILE):
            drop_after(run_dir / name, -1 if resume_step is None else resume_step)
        self._metrics = (run_dir / METRICS_FILE).open("a", encoding="utf-8")

    def log(self, step: int, values: Mapping[str, SupportsFloat]) -> None:
        """Append one line for `step` (optimizer steps done); tensors and numpy scalars count as numbers."""
        if not self.enabled:
            return
        numbers = {key: _number(value) for key, value in values.items() if key != "step"}
        self._metrics.write(json.dumps({"step": step, **numbers}, allow_nan=False) + "\n")
        self._metrics.flush()
        finite = {key: value for key, value in numbers.items() if value is not None}
        if self._wandb is not None:
            self._wandb.log(finite, step=step)
        if self._tensorboard is not None:
            for key, value in finite.items():
                self._tensorboard.add_scalar(key, value, step)
            self._tensorboard.flush()

    def samples(self, step: int, samples: Sequence[Sample]) -> None:
        """Append samples, one line each."""
        if not self.enabled or not samples:
            return
        with (self.run_dir / SAMPLES_FILE).open("a", encoding="utf-8") as file:
            for sample in samples:
                file.write(json.dumps({"step": step, **asdict(sample)}, ensure_ascii=False) + "\n")

    def sync(self) -> None:
        """Bring what was logged to the disk: a checkpoint that is safe has its metrics, too."""
        if not self.enabled:
            return
        for path in (self.run_dir / METRICS_FILE, self.run_dir / SAMPLES_FILE, self.run_dir):
            if path.exists():
                fsync(path)

    def close(self) -> None:
        """End the trackers and close the file; safe to call twice."""
        if not self.enabled:
            return
        self._metrics.close()
        if self._wandb is not None:
            self._wandb.finish()
        if self._tensorboard is not None:
            self._tensorboard.close()
        self._wandb = self._tensorboard = None


def _number(value: SupportsFloat) -> float | int | None:
    """A plain JSON number; None for NaN and infinities."""
    number = value if type(value) is int else float(value)
    return number if math.isfinite(number) else None


def _start_wandb(run_dir: Path, config: Config, resume_step: int | None) -> Any:
    """A wandb run that a resumed training goes on with (its id is kept in the run folder)."""
    try:
        import wandb
    except ImportError:
        raise ConfigError("training.trackers has wandb, which is not installed: pip install wandb") from None
    id_file = run_dir / WANDB_ID_FILE
    if resume_step is None or not id_file.is_file():
        write_text(id_file, uuid.uuid4().hex[:12])
    try:
        return wandb.init(
            project=os.environ.get("WANDB_PROJECT", "smelter"),
            name=run_dir.resolve().name,
            id=id_file.read_text(encoding="utf-8").strip(),
            resume="allow",
            dir=run_dir,
            config=config_to_dict(config),
        )
    except wandb.Error as error:
        raise ConfigError(f"wandb did not start: {error}: run `wandb login`, or set WANDB_MODE=offline") from error


def _start_tensorboard(run_dir: Path, resume_step: int | None) -> Any:
    """A TensorBoard writer whose steps after the checkpoint are hidden."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise ConfigError(
            "training.trackers has tensorboard, which is not installed: pip install tensorboard"
        ) from None
    purge_step = None if resume_step is None else resume_step + 1
    return SummaryWriter(str(run_dir / "tensorboard"), purge_step=purge_step)


def progress_line(values: Mapping[str, float | None]) -> str:
    """One short line for people: `step 120/2000 | loss 3.21 | 18.2k tok/s | mfu 41% | lr .02/.006 | ETA 6m12s`.

    Beside the logged keys it knows `num_steps` and `eta_seconds`; what is absent is left out. The rates are
    Muon's and the embedding's.
    """
    total = f"/{values['num_steps']:.0f}" if values.get("num_steps") else ""
    parts = [f"step {values['step']:.0f}{total}"]
    for key, name in (("loss", "loss"), ("val_loss", "val loss"), ("val_bpb", "val bpb")):
        if key in values:
            value = values[key]
            parts.append(f"{name} {'not finite' if value is None else format(value, '.3f')}")
    if (rate := values.get("tok_per_sec")) is not None:
        parts.append(f"{short_number(rate)} tok/s")
    if (mfu := values.get("mfu")) is not None:
        parts.append(f"mfu {mfu:.0%}" if mfu >= 0.1 or mfu == 0 else f"mfu {mfu:.1%}")
    rates = [values.get("lr_muon", values.get("lr_adamw")), values.get("lr_embedding")]
    shown = "/".join(f"{rate:.2g}".removeprefix("0") or "0" for rate in rates if rate is not None)
    if shown:
        parts.append(f"lr {shown}")
    if "is_ternary" in values:
        parts.append("ternary" if values["is_ternary"] else "full precision")
    if skipped := values.get("skipped_steps"):
        parts.append(f"{skipped:.0f} skipped")
    if (eta := values.get("eta_seconds")) is not None:
        parts.append(f"ETA {short_duration(eta)}")
    return " | ".join(parts)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Every line of a metrics or samples file.

    Raises DataError naming file and line. Only an unfinished last line, left by a killed writer, is passed over,
    which is said on standard error.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: cannot read: {error.strerror}: check the path") from None
    lines = content.split(b"\n")
    torn = lines.pop()
    rows = [_row(line, path, number) for number, line in enumerate(lines, start=1)]
    if torn:
        try:
            rows.append(_row(torn, path, len(lines) + 1))
        except DataError:
            print(f"{path}:{len(lines) + 1}: unfinished last line passed over", file=sys.stderr)
    return rows


def _row(line: bytes, path: Path, number: int) -> dict[str, Any]:
    """One JSON object with an integer `step`. Raises DataError."""
    try:
        row = json.loads(line)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise DataError(f"{path}:{number}: not JSON ({error}): remove this line") from None
    if not isinstance(row, dict) or type(row.get("step")) is not int:
        raise DataError(f'{path}:{number}: no JSON object with an integer "step": remove this line')
    return row


def drop_after(path: Path, step: int) -> None:
    """Rewrite a metrics or samples file without the lines after `step` (-1: without any), in one rename."""
    if not path.exists():
        return
    rows = [row for row in read_metrics(path) if row["step"] <= step] if step >= 0 else []
    with whole_file(path) as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
