"""A run: where it computes, what it costs, what it leaves behind."""

from smelter.run import distributed
from smelter.run.checkpoint import (
    CONFIG_FILE,
    Checkpoint,
    find_checkpoint,
    latest_checkpoint,
    load_checkpoint,
    run_folder,
    save_checkpoint,
    write_tensors,
)
from smelter.run.device import Machine, Precision, pick_device, pick_dtype
from smelter.run.distributed import print0
from smelter.run.folder import in_place, prepare_run_dir
from smelter.run.load import load_initial_weights, load_model
from smelter.run.metrics import (
    METRICS_FILE,
    SAMPLES_FILE,
    MetricsLogger,
    Sample,
    progress_line,
    read_metrics,
)
from smelter.run.packed import write_packed
from smelter.run.plan import plan
from smelter.run.results import (
    RESULTS_FILE,
    AtCursor,
    Case,
    DocumentCase,
    Editor,
    GapCase,
    GapsFilled,
    LanguageBits,
    Latency,
    LevelSolved,
    ProblemCase,
    Results,
    Solved,
    Suggester,
    Typed,
    check_results_file,
    read_cases,
    read_results,
    write_editor,
    write_results,
)
from smelter.run.schedule import RunLength, final_cap, kl_weight, set_rates
from smelter.run.signals import StopSignal
from smelter.run.trits import TritWatch, trit_counts
