"""Training the same transformer with other people's code, each in a process of its own that steps on demand.

A contestant holds model, loss and optimizer; `micro_step` runs forward and backward of one batch, `optimizer_step`
ends the step. `Worker` starts one in a new process, so that memory is its own and several can be stepped in turn:
what drifts on the machine then hits all alike. All start from the same architecture (Qwen3's, the recipe's sizes)
and see the same random tokens.

    python benchmarks/contestants.py NAME [--preset 100m] ...        # normally started by a benchmark
"""

import argparse
import contextlib
import json
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from smelter.config import ModelConfig, preset
from smelter.loss import LossConfig, chunked_loss
from smelter.model import Model
from smelter.muon import MuonAdamW, is_matrix

Result = dict[str, float]


@dataclass(frozen=True)
class Setting:
    """What every contestant trains: sizes, tokens in a batch, device and compute dtype."""

    preset: str = "100m"
    seq_len: int = 2_048
    batch_size: int = 1
    device: str = "cpu"
    dtype: str = "bf16"
    recompute: bool = False
    """Ours alone: recompute each block in the backward pass."""

    @property
    def model(self) -> ModelConfig:
        """The architecture, with room for `seq_len` tokens."""
        return replace(preset(self.preset).model, max_seq_len=self.seq_len)

    @property
    def torch_dtype(self) -> torch.dtype:
        """The compute dtype."""
        return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[self.dtype]


class Contestant(Protocol):
    """What a worker steps."""

    def micro_step(self, tokens: Tensor) -> Tensor:
        """Forward and backward of tokens [B, T + 1]; the mean loss, detached."""
        ...

    def optimizer_step(self) -> None:
        """Apply and clear the gradients gathered so far."""
        ...


class Smelter:
    """Ours as `smelter train` runs it: compiled blocks, soft-caps on, trits made once per optimizer step."""

    def __init__(
        self, setting: Setting, *, use_ternary: bool = True, use_compile: bool = True, int8_gradients: bool = False
    ) -> None:
        config = replace(setting.model, use_ternary=use_ternary)
        self.model = Model(config, setting.torch_dtype).to(setting.device)
        self.model.trit_dtype = torch.int8
        self.model.use_gradient_checkpointing = setting.recompute
        self.model.use_int8_gradients(int8_gradients)
        self.model.quantize_weights()
        self.use_compile = use_compile
        if use_compile:
            for block in self.model.layers:
                block.compile()
        is_bf16 = setting.torch_dtype == torch.bfloat16
        self.optimizer = MuonAdamW(self.model, newton_schulz_dtype=torch.bfloat16 if is_bf16 else torch.float32)
        self.scaler = torch.amp.GradScaler(setting.device, enabled=setting.torch_dtype == torch.float16)
        self.loss_config = LossConfig(soft_cap=config.final_logit_soft_cap, z_loss=1e-4)

    def micro_step(self, tokens: Tensor) -> Tensor:
        hidden = self.model(tokens[:, :-1]).flatten(0, 1)
        targets = tokens[:, 1:].flatten()
        loss = chunked_loss(hidden, self.model.head, targets, self.loss_config, use_compile=self.use_compile)
        self.scaler.scale(loss.total).backward()
        return loss.ce

    def optimizer_step(self) -> None:
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        self.model.quantize_weights()


class Foreign:
    """A Transformers Qwen3 (no soft-caps: it has none) with autocast, and PyTorch's own Muon and AdamW."""

    def __init__(
        self, setting: Setting, *, use_bitnet: bool, use_compile: bool = True, pure_bf16: bool = False
    ) -> None:
        from transformers import Qwen3Config, Qwen3ForCausalLM

        config = setting.model
        self.model: Any = Qwen3ForCausalLM(
            Qwen3Config(
                vocab_size=config.vocab_size,
                hidden_size=config.hidden_size,
                intermediate_size=config.intermediate_size,
                num_hidden_layers=config.num_layers,
                num_attention_heads=config.num_heads,
                num_key_value_heads=config.num_kv_heads,
                head_dim=config.head_dim,
                max_position_embeddings=config.max_seq_len,
                tie_word_embeddings=config.tie_embeddings,
                use_cache=False,
                attn_implementation="sdpa",
            )
        )
        if use_bitnet:
            from transformers import BitNetQuantConfig
            from transformers.integrations.bitnet import replace_with_bitnet_linear

            weights = self.model.state_dict()
            options = BitNetQuantConfig(linear_class="autobitlinear", quantization_mode="online")
            replace_with_bitnet_linear(self.model, ["lm_head"], options)
            self.model.load_state_dict(weights, assign=True)
            self.model.tie_weights()
        self.model.to(setting.device, torch.bfloat16 if pure_bf16 else torch.float32)
        self.device, self.dtype = torch.device(setting.device), setting.torch_dtype
        self.use_autocast = not pure_bf16 and setting.torch_dtype != torch.float32
        self.scaler = torch.amp.GradScaler(setting.device, enabled=setting.torch_dtype == torch.float16)
        self.call: Callable[..., Any] = torch.compile(self.model) if use_compile else self.model
        self.optimizers: list[torch.optim.Optimizer] | None = None

    def micro_step(self, tokens: Tensor) -> Tensor:
        with torch.autocast(self.device.type, self.dtype, enabled=self.use_autocast):
            # `labels` of the same length: Transformers shifts them itself.
            loss: Tensor = self.call(input_ids=tokens[:, :-1], labels=tokens[:, :-1]).loss
        self.scaler.scale(loss).backward()
        return loss.detach()

    def optimizer_step(self) -> None:
        if self.optimizers is None:  # made late, as its state would count as memory of forward and backward
            named = list(self.model.named_parameters())
            matrices = [parameter for name, parameter in named if is_matrix(name, parameter)]
            rest = [parameter for name, parameter in named if not is_matrix(name, parameter)]
            self.optimizers = [torch.optim.Muon(matrices, lr=0.02), torch.optim.AdamW(rest, lr=3e-3, fused=True)]
        for optimizer in self.optimizers:
            self.scaler.step(optimizer)
            optimizer.zero_grad(set_to_none=True)
        self.scaler.update()


def _torchao(setting: Setting) -> Contestant:
    """torchao's prototype: int8 forward product, weights, gradients and optimizer in bf16 throughout."""
    from torchao.prototype.quantized_training import bitnet_training
    from torchao.quantization import quantize_

    made = Foreign(setting, use_bitnet=False, pure_bf16=True, use_compile=False)
    quantize_(made.model.model.layers, bitnet_training())
    made.call = torch.compile(made.model)
    return made


def _onebitllms(setting: Setting, *, use_compile: bool) -> Contestant:
    """onebitllms's layer in Triton (CUDA only), weights in bf16 as its manual has them."""
    from onebitllms import replace_linear_with_bitnet_linear

    made = Foreign(setting, use_bitnet=False, pure_bf16=True, use_compile=False)
    replace_linear_with_bitnet_linear(made.model)
    torch.set_default_dtype(torch.float32)  # which it had set to bf16
    made.call = torch.compile(made.model) if use_compile else made.model
    return made


CONTESTANTS: dict[str, Callable[[Setting], Contestant]] = {
    "smelter": Smelter,
    "smelter full precision": lambda setting: Smelter(setting, use_ternary=False),
    "smelter int8 gradients": lambda setting: Smelter(setting, int8_gradients=True),
    "smelter reference": lambda setting: Smelter(setting, use_compile=False),
    "transformers bitnet": lambda setting: Foreign(setting, use_bitnet=True),
    "transformers bitnet eager": lambda setting: Foreign(setting, use_bitnet=True, use_compile=False),
    "transformers full precision": lambda setting: Foreign(setting, use_bitnet=False),
    "torchao bitnet": _torchao,
    "onebitllms": lambda setting: _onebitllms(setting, use_compile=True),
    "onebitllms eager": lambda setting: _onebitllms(setting, use_compile=False),
}


def missing_package(name: str) -> str | None:
    """The package that contestant `name` needs and that is not installed, or None."""
    import importlib.util

    first = name.split()[0]
    needed = ["transformers"] if first == "transformers" else ["transformers", first] if first != "smelter" else []
    return next((package for package in needed if importlib.util.find_spec(package) is None), None)


class Worker:
    """A contestant in a process of its own. Raises SystemExit with its last words where it fails."""

    def __init__(self, name: str, setting: Setting, env: dict[str, str] | None = None) -> None:
        self.name = name
        command = [sys.executable, __file__, name, "--setting", json.dumps(asdict(setting))]
        self._process = subprocess.Popen(command, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def ask(self, what: str) -> Result:
        """Send a command and wait for its answer: seconds, loss, and peak_mib since the last reset.

        `micro_step`, `optimizer_step`, `reset_peak`, `train N` (N micro-steps and the optimizer's, a whole step),
        `release` (the GPU's unused memory, to the others on it) or `trace FILE` (the profiler's record of `train 1`).
        """
        self.send(what)
        return self.receive()

    def send(self, what: str) -> None:
        """Only send: several workers then compile at once."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # `receive` says that it ended
            self._process.stdin.write(what + "\n")
            self._process.stdin.flush()

    def receive(self) -> Result:
        """The answer to what was sent. SystemExit where the process has ended."""
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"{self.name}: failed (exit {self._process.wait()}); its error stands above")
        found: Result = json.loads(line)
        return found

    def close(self) -> None:
        """End the process."""
        self._process.communicate()


def reset_peak(device: torch.device) -> None:
    """Forget the highest memory use so far."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        Path("/proc/self/clear_refs").write_text("5")


def peak_mib(device: torch.device) -> float:
    """Most memory since `reset_peak`: of this whole process (VmHWM), or allocated on the GPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) / 2**10


def write_trace(contestant: Contestant, tokens: Tensor, path: str) -> None:
    """One whole step under PyTorch's profiler, written for chrome://tracing or Perfetto."""
    from torch.profiler import ProfilerActivity, profile

    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * torch.cuda.is_available()
    with profile(activities=activities) as record:
        contestant.micro_step(tokens)
        contestant.optimizer_step()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
    record.export_chrome_trace(path)


def serve(name: str, setting: Setting) -> None:
    """Step the contestant as standard input says; one line of JSON for each line."""
    device = torch.device(setting.device)
    torch.manual_seed(0)
    contestant = CONTESTANTS[name](setting)
    generator = torch.Generator().manual_seed(1)
    for line in sys.stdin:
        command, _, argument = line.strip().partition(" ")
        count = int(argument) if command == "train" else 1
        shape = (count, setting.batch_size, setting.seq_len + 1)
        batches = torch.randint(0, setting.model.vocab_size, shape, generator=generator).to(device)
        loss: Tensor | None = None
        start = time.perf_counter()
        match command:
            case "micro_step":
                loss = contestant.micro_step(batches[0])
            case "optimizer_step":
                contestant.optimizer_step()
            case "train":
                for tokens in batches:
                    loss = contestant.micro_step(tokens)
                contestant.optimizer_step()
            case "trace":
                write_trace(contestant, batches[0], argument)
            case "reset_peak":
                reset_peak(device)
            case "release":
                torch.cuda.empty_cache()
            case unknown:
                raise SystemExit(f"contestants: unknown command {unknown!r}")
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds = time.perf_counter() - start
        answer = {
            "seconds": seconds,
            "peak_mib": peak_mib(device),
            "loss": float("nan") if loss is None else float(loss),
        }
        print(json.dumps(answer), flush=True)


def main() -> None:
    """Be one contestant."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=list(CONTESTANTS))
    parser.add_argument("--setting", default="{}", help="values of Setting as JSON")
    options = parser.parse_args()
    serve(options.name, Setting(**json.loads(options.setting)))


if __name__ == "__main__":
    main()
