"""A teacher in a folder: any causal language model of Hugging Face Transformers, run here, without a server.

The model is loaded with the first question and works in one thread of its own, so the event loop stays free. Each
question is one `generate` of Transformers' own, in which we choose the tokens: with the question's own random numbers
(torch's are one for all threads), and from its settings alone. What else the folder suggests (top_k, a repetition
penalty) is left aside, so a question means the same to every teacher.

One question at a time: in a batch the numbers change with the neighbours (other kernels, other padding), so the same
question would get another answer in another run. Measured with a random number generator for each row, 133 of 200
answers in bfloat16 were others beside seven neighbours than alone. Trade-off: a GPU could answer many questions in the
time of one; who needs that more than repeatable answers starts a server (vLLM) and uses `openai`. There is no time
limit: `max_tokens` bounds the work.
"""

import asyncio
import gc
import importlib.util
import math
import re
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from foundry.settings import TeacherSettings
from foundry.teacher import (
    Answer,
    GarbledAnswerError,
    Question,
    RejectedQuestionError,
    UnavailableError,
    read_answer,
    short,
)
from smelter.base import UserError

if TYPE_CHECKING:
    import torch

T = TypeVar("T")

_LOADING = threading.Lock()  # Transformers patches itself while it loads: two at once leave models without weights
_OUT_OF_MEMORY = re.compile(r"allocate memory|out of memory|not enough memory|ALLOC_FAILED")


class TransformersTeacher:
    """The model in one folder; implements `Teacher`. Raises UserError where the folder or a library is missing."""

    def __init__(self, settings: TeacherSettings) -> None:
        self.name = settings.name
        self._settings = settings
        for library in ("torch", "transformers"):  # now, not after an hour of other teachers' work
            if importlib.util.find_spec(library) is None:
                raise UserError(f"{self.name}: {library} is not installed: run: pip install 'smelter-foundry[hf]'")
        if not (Path(settings.model) / "config.json").is_file():
            raise UserError(
                f"{self.name}: no Hugging Face model in {settings.model} (no config.json): set model to its folder"
            )
        self._worker = ThreadPoolExecutor(1, thread_name_prefix=self.name)
        self._model: _Model | None = None

    async def ask(self, question: Question) -> Answer:
        """The answer, when those asked before have theirs. When cancelled, the generation ends at the next token.

        Raises a TeacherError, or UserError where the folder cannot be loaded: then no other question fares better.
        """
        stop = threading.Event()
        try:
            return await asyncio.wrap_future(self._worker.submit(self._answer, question, stop))
        finally:
            stop.set()

    async def close(self) -> None:
        """Wait for the thread, and give the model's memory back."""
        await asyncio.to_thread(self._worker.shutdown, cancel_futures=True)
        if self._model is not None:
            self._model = None
            gc.collect()  # a model is full of cycles
            _empty_cache()

    def _answer(self, question: Question, stop: threading.Event) -> Answer:
        """In the worker's thread."""
        if self._model is None:
            with _LOADING:
                self._model = self._within_memory("loading the model", lambda: _Model(self._settings))
        model = self._model
        text = model.render(question)
        prompt = model.encode(text)
        what = f"after a prompt of {len(prompt):,} tokens"
        return self._within_memory(what, lambda: model.answer(text, prompt, question, stop))

    def _within_memory(self, what: str, work: Callable[[], T]) -> T:
        """`work()`. Raises UnavailableError for torch's several ways to say that memory is short."""
        try:
            return work()
        except (MemoryError, RuntimeError) as error:  # torch.OutOfMemoryError is a RuntimeError
            if not isinstance(error, MemoryError) and not _OUT_OF_MEMORY.search(str(error)):
                raise
        # Outside of `except`: the new error does not keep alive, as its context, what filled the memory.
        _empty_cache()
        raise UnavailableError(f"out of memory {what}: lower max_tokens or take a smaller model")


class _Model:
    """A loaded model with its tokenizer. Not for more than one thread."""

    def __init__(self, settings: TeacherSettings) -> None:
        import safetensors
        import torch
        import transformers

        transformers.utils.logging.set_verbosity_error()  # the terminal shows the run's progress
        transformers.utils.logging.disable_progress_bar()
        self._settings = settings
        name, device = settings.name, settings.device
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        if device.startswith("cuda") and not torch.cuda.is_available():
            raise UserError(f'{name}: device = "{device}", but torch finds no CUDA device: set device = "cpu"')
        local = {"local_files_only": True, "trust_remote_code": False}
        try:
            self._tokenizer = transformers.AutoTokenizer.from_pretrained(settings.model, **local)
            model = transformers.AutoModelForCausalLM.from_pretrained(settings.model, dtype=settings.dtype, **local)
        except (OSError, ValueError, KeyError, ImportError, safetensors.SafetensorError) as error:
            raise UserError(f"{name}: cannot load the model in {settings.model}: {_words(error)}") from None
        try:
            self._model = model.eval().to(device)
        except (AssertionError, NotImplementedError, RuntimeError) as error:
            if isinstance(error, torch.OutOfMemoryError):
                raise
            raise UserError(f'{name}: cannot use device = "{device}": {_words(error)}') from None
        self._device = self._model.device
        context = getattr(self._model.config.get_text_config(), "max_position_embeddings", None)
        self._context = context if isinstance(context, int) and context > 0 else None
        ends = self._model.generation_config.eos_token_id
        self._ends = {*(ends if isinstance(ends, list) else [ends]), self._tokenizer.eos_token_id} - {None}
        # In the place of the folder's, so that nothing of that is left.
        self._model.generation_config = transformers.GenerationConfig(eos_token_id=sorted(self._ends) or None)

    def render(self, question: Question) -> str:
        """The prompt as the model knows prompts: by its chat template, or plain where it has none."""
        import jinja2

        if not self._has_template():
            return f"{question.system}\n\n{question.prompt}" if question.system else question.prompt
        messages = [{"role": "user", "content": question.prompt}]
        if question.system:
            messages.insert(0, {"role": "system", "content": question.system})
        try:
            text: str = self._tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=True, **self._settings.extra
            )
        except jinja2.TemplateError as error:
            hint = ": some take no system prompt" if question.system else ""
            raise RejectedQuestionError(f"the chat template fails: {_words(error)}{hint}") from None
        return text

    def encode(self, text: str) -> list[int]:
        """Token ids [L]. Raises RejectedQuestionError where the model cannot take them."""
        # A chat template writes the special tokens itself.
        tokens: list[int] = self._tokenizer(text, add_special_tokens=not self._has_template(), verbose=False).input_ids
        if not tokens:
            raise RejectedQuestionError("an empty prompt")
        if self._context is not None and len(tokens) >= self._context:
            raise RejectedQuestionError(
                f"a prompt of {len(tokens):,} tokens leaves no room for an answer in a context of {self._context:,}"
            )
        num_embeddings = self._model.get_input_embeddings().weight.shape[0]
        if max(tokens) >= num_embeddings:  # on a GPU this would end the process
            raise RejectedQuestionError(
                f"token {max(tokens)} of the prompt is unknown to the model ({num_embeddings:,}"
                f" embeddings): the folder's tokenizer belongs to another model"
            )
        return tokens

    def answer(self, text: str, prompt: list[int], question: Question, stop: threading.Event) -> Answer:
        """To `prompt`, which is `text` in tokens: until the model's end, `max_tokens` or the end of the context."""
        import torch

        random = torch.Generator(self._device)
        if question.seed is None:
            random.seed()
        else:
            random.manual_seed(question.seed % 2**64)
        logprobs: list[float] = []

        def choose(_: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
            """Logits [1, V] in which only the chosen token is left; called for one position after the other."""
            if stop.is_set():
                raise asyncio.CancelledError  # nobody waits for it any more
            if not math.isfinite(logits.max()):
                message = "logits that are not finite: try another dtype, float32 above all"
                raise GarbledAnswerError(message, is_worth_retrying=_has_chance(question))
            token = _choose(logits[0], question, random)
            if self._settings.logprobs:
                logprobs.append(float(logits[0].log_softmax(0)[token]))
            only = torch.full_like(logits, -math.inf)
            only[0, token] = 0.0
            return only

        limit = question.max_tokens
        if self._context is not None:
            limit = min(limit, self._context - len(prompt))
        inputs = torch.tensor([prompt], device=self._device)
        with torch.inference_mode():
            whole = self._model.generate(
                inputs,
                attention_mask=torch.ones_like(inputs),
                max_new_tokens=limit,
                do_sample=False,
                logits_processor=[choose],
            )
        tokens: list[int] = whole[0, len(prompt) :].tolist()
        is_ended = tokens[-1] in self._ends
        words = tokens[:-1] if is_ended else tokens
        return read_answer(
            # Some templates open the reasoning in the prompt, so the answer begins in the middle of it.
            ("<think>" if text.rstrip().endswith("<think>") else "") + self._decode(words, skip_special_tokens=True),
            finish="stop" if is_ended else "length",
            usage={"input": len(prompt), "output": len(tokens)},
            cost=0.0,
            # Before temperature and top_p; without the end of text.
            logprobs=tuple((self._decode([token]), value) for token, value in zip(words, logprobs, strict=False))
            if self._settings.logprobs
            else None,
            is_worth_retrying=_has_chance(question),
        )

    def _decode(self, tokens: list[int], *, skip_special_tokens: bool = False) -> str:
        # Many folders ask for a clean-up made for English prose: it takes the space before a dot, in code too.
        text: str = self._tokenizer.decode(
            tokens, skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False
        )
        return text

    def _has_template(self) -> bool:
        return bool(self._tokenizer.chat_template)


def _choose(logits: "torch.Tensor", question: Question, generator: "torch.Generator") -> int:
    """The next token from float32 logits [V]: the likeliest at temperature 0, else by nucleus sampling.

    `top_p` keeps the fewest likeliest tokens that hold that much of the probability (Holtzman et al. 2020).
    """
    import torch

    if question.temperature == 0:
        return int(logits.argmax())
    # Less the largest first: a tiny temperature does not overflow.
    probabilities = ((logits - logits.max()) / question.temperature).softmax(0)
    if question.top_p >= 1:
        return int(torch.multinomial(probabilities, 1, generator=generator))
    ordered, order = probabilities.sort(descending=True, stable=True)
    ordered[ordered.cumsum(0) - ordered >= question.top_p] = 0.0
    return int(order[torch.multinomial(ordered, 1, generator=generator)])


def _has_chance(question: Question) -> bool:
    """Whether the same question may get another answer."""
    return question.temperature > 0 and question.seed is None


def _words(error: Exception) -> str:
    return short(str(error)) or type(error).__name__


def _empty_cache() -> None:
    """Give freed GPU memory back to the other processes."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.empty_cache()
