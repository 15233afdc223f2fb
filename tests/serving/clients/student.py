"""A small model that has learned a few pages by heart, so that an answer shows whether a request was read aright.

Two of the gaps differ in what follows alone: who leaves out the suffix, or reads the tokens around it as text, gets the
wrong number. A gap's middle ends where the suffix begins, so plain continuation of the same prefix is another text.
"""

from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from smelter.config import ModelConfig
from smelter.model import Model
from smelter.muon import MuonAdamW
from smelter.tokens.chat import ChatFormat
from smelter.tokens.tokenizer import Tokenizer
from tests import tiny

CONTEXT = 512
STEPS = 200
BATCH = 8

CONFIG = ModelConfig(
    vocab_size=512,
    hidden_size=256,  # a block of TQ2_0
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=64,
    intermediate_size=512,
    max_seq_len=CONTEXT,
    rope_base=10_000.0,
    attn_logit_soft_cap=0.0,  # llama.cpp's Qwen3 has none
    final_logit_soft_cap=0.0,
)


@dataclass(frozen=True)
class Gap:
    """What stands before a cursor and after it, and what belongs between."""

    prefix: str
    middle: str
    suffix: str

    def typed(self, text: str) -> "Gap":
        """The gap after somebody has typed `text`, with which its middle begins."""
        assert self.middle.startswith(text)
        return Gap(self.prefix + text, self.middle.removeprefix(text), self.suffix)


TWICE = Gap("def scale(x):\n    return ", "x * 2", "\n\n\nassert scale(3) == 6\n")
THRICE = Gap(TWICE.prefix, "x * 3", TWICE.suffix.replace("6", "9"))
BLOCK = Gap(
    "def clamp(x, low, high):\n",
    "    if x < low:\n        return low\n    return min(x, high)",
    "\n\n\nprint(clamp(7, 0, 5))\n",
)
PAGE = "import os\n\nfor name in sorted(os.listdir()):\n    print(name)\n"
PAGES = (PAGE, PAGE, *[gap.prefix + gap.middle + gap.suffix for gap in (TWICE, THRICE, BLOCK)])
QUESTION, ANSWER = "Which function sorts?", "sorted() returns a new list."

SECOND_LINE = BLOCK.typed("    if x < low:\n")
INSIDE_A_WORD = BLOCK.typed("    if x < l")
INDENTED = SECOND_LINE.typed("        return")

GAPS = (TWICE, TWICE.typed("x *"), THRICE, THRICE.typed("x *"), BLOCK, SECOND_LINE, INSIDE_A_WORD, INDENTED)


@cache
def tokenizer() -> Tokenizer:
    """Knows the pages' words."""
    return Tokenizer.train([tiny.CODE, *[text for text in [*PAGES, QUESTION, ANSWER] for _ in range(20)]], 512)


class Drill:
    """Draws what the model is to learn: token ids, and how many of them are only read."""

    def __init__(self) -> None:
        self._tokenizer = tokenizer()
        self._rng = np.random.default_rng(0)
        chat = ChatFormat(self._tokenizer)
        self._chat = chat.document(self._tokenizer.encode(f"user\n{QUESTION}"), self._tokenizer.encode(ANSWER))

    def draw(self) -> tuple[list[int], int]:
        """A gap in four of six cases, with other code before it half the time."""
        kind = int(self._rng.integers(6))
        if kind == 4:
            return self._page()
        if kind == 5:
            return self._chat
        gap = GAPS[int(self._rng.integers(len(GAPS)))]
        other = self._other()
        if self._rng.random() < 0.5:
            before = self._tokenizer.encode(other)
            ids = [*before, *self._tokenizer.fim_prompt(gap.prefix, gap.suffix)]
            return [*ids, *self._tokenizer.encode(gap.middle), self._tokenizer.eos_id], len(ids)
        whole = self._tokenizer.encode(other + gap.prefix + gap.middle)
        ids = self._tokenizer.join_fim_prompt(whole, self._tokenizer.encode(gap.suffix), use_spm=True)
        known = len(ids) - len(self._tokenizer.encode(gap.middle)) - 1
        return [*ids, self._tokenizer.eos_id], known

    def _page(self) -> tuple[list[int], int]:
        """A page without a gap; some begin where a document does."""
        page = PAGES[int(self._rng.integers(len(PAGES)))]
        ids = [*self._tokenizer.encode(page), self._tokenizer.eos_id]
        return ([self._tokenizer.eos_id, *ids], 1) if self._rng.random() < 0.5 else (ids, 1)

    def _other(self) -> str:
        """Lines of another file, none half the time."""
        if self._rng.random() < 0.5:
            return ""
        lines = tiny.CODE.splitlines(keepends=True)
        first = int(self._rng.integers(len(lines) - 4))
        head = ("", "\n\n--- snippet ---\n\n")[int(self._rng.integers(2))]
        return head + "".join(lines[first : first + int(self._rng.integers(1, 5))]) + "\n"


def train() -> Model:
    """The model, after some 25 seconds."""
    torch.manual_seed(0)
    model, drill = Model(CONFIG), Drill()
    optimizer = MuonAdamW(model)
    rates = [group["lr"] for group in optimizer.param_groups]
    for step in range(STEPS):
        rows = [drill.draw() for _ in range(BATCH)]
        width = max(len(ids) for ids, _ in rows)
        tokens = torch.full((BATCH, width), tokenizer().pad_id)
        labels = torch.full((BATCH, width), -100)
        for row, (ids, known) in enumerate(rows):
            tokens[row, : len(ids)] = torch.tensor(ids)
            labels[row, known : len(ids)] = torch.tensor(ids[known:])
        logits = model.logits(model(tokens[:, :-1]))
        loss = F.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)
        optimizer.zero_grad()
        loss.backward()
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * min(1.0, 2 * (STEPS - step) / STEPS)
        optimizer.step()
        model.quantize_weights()
    with torch.no_grad():
        model.norm.weight.mul_(3)  # so sure that sampled answers are the greedy ones
    return model.eval()


def checkpoint(folder: Path) -> Path:
    """A run folder with the trained model."""
    return tiny.checkpoint(folder, train(), tokenizer())
