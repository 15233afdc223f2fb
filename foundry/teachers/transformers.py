"""A teacher in a folder: any causal language model of Hugging Face Transformers, run here, without a server.

The model is loaded with the first question and works in one thread of its own, so the event loop stays free. It
answers one question at a time, with a sampling loop of ours: the choice of a token depends on the question, its seed
and the model's numbers, and nothing else. In a batch the numbers change with the neighbours (other kernels, other
padding), so the same question would get another answer in another run. Trade-off: a GPU could answer many questions
in the time of one; who needs that more than repeatable answers starts a server (vLLM) and uses `openai_teacher`.

Only `Question` decides how tokens are chosen; what else the folder suggests (top_k, a repetition penalty) is left
aside, so a question means the same to every teacher. There is no time limit: `max_tokens` bounds the work.
"""

import asyncio
import gc
import importlib.util
import inspect
import math
import re
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from foundry.teacher import (
    Answer,
    GarbledAnswerError,
    OnlyReasonedError,
    Question,
    RejectedQuestionError,
    TeacherError,
    UnavailableError,
    split_reasoning,
)
from smelter.base import UserError

if TYPE_CHECKING:
    import torch

T = TypeVar("T")
Dtype = Literal["auto", "float32", "bfloat16", "float16"]

_OUT_OF_MEMORY = re.compile(r"allocate memory|out of memory|not enough memory|ALLOC_FAILED")


class TransformersTeacher:
    """The model in one folder; implements `Teacher`. Raises UserError where the folder or a library is missing.

    `device` is "auto" (CUDA where there is one) or torch's name of one. `dtype` "auto" is the one in which the weights
    are stored. `template_values` goes to the chat template as it is, e.g. {"enable_thinking": False}.
    """

    def __init__(
        self,
        name: str,
        *,
        folder: Path | str,
        device: str = "auto",
        dtype: Dtype = "auto",
        logprobs: bool = False,
        template_values: Mapping[str, Any] | None = None,
    ) -> None:
        self.name = name
        self._folder = Path(folder)
        self._device = device
        self._dtype = dtype
        self._logprobs = logprobs
        self._template_values = dict(template_values or {})
        for library in ("torch", "transformers"):  # now, not after an hour of other teachers' work
            if importlib.util.find_spec(library) is None:
                raise UserError(f"{name}: {library} is not installed: run: pip install 'smelter-foundry[hf]'")
        if not (self._folder / "config.json").is_file():
            raise UserError(f"{name}: no Hugging Face model in {folder} (no config.json): set model to its folder")
        self._worker = ThreadPoolExecutor(1, thread_name_prefix=name)
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
            self._model = self._within_memory(
                "loading the model", lambda: _Model(self.name, self._folder, self._device, self._dtype)
            )
        model = self._model
        text = model.render(question, self._template_values)
        prompt = model.encode(text)
        generation = self._within_memory(
            f"after a prompt of {len(prompt):,} tokens",
            lambda: model.generate(prompt, question, stop, use_logprobs=self._logprobs),
        )
        # Some templates open the reasoning in the prompt, so the answer begins in the middle of it.
        answer = ("<think>" if text.rstrip().endswith("<think>") else "") + generation.text
        reasoning, answer = split_reasoning(answer)
        if not answer.strip():
            if reasoning and generation.finish == "length":
                raise OnlyReasonedError(f"{self.name}: all of max_tokens went into reasoning: raise max_tokens")
            raise _garbled(f"{self.name}: an empty answer (finish: {generation.finish})", question)
        return Answer(
            text=answer,
            finish=generation.finish,
            reasoning=reasoning,
            usage={"input": len(prompt), "output": generation.num_tokens},
            cost=0.0,
            logprobs=generation.logprobs if self._logprobs else None,
        )

    def _within_memory(self, what: str, work: Callable[[], T]) -> T:
        """`work()`. Raises UnavailableError for torch's several ways to say that memory is short."""
        try:
            return work()
        except (MemoryError, RuntimeError) as error:  # torch.OutOfMemoryError is a RuntimeError
            if not isinstance(error, MemoryError) and not _OUT_OF_MEMORY.search(str(error)):
                raise
        # Outside of `except`: the new error does not keep alive, as its context, what filled the memory.
        _empty_cache()
        raise UnavailableError(f"{self.name}: out of memory {what}: lower max_tokens or take a smaller model")


@dataclass(frozen=True)
class _Generation:
    text: str
    """Without special tokens."""
    finish: str
    """ "stop" or "length"."""
    num_tokens: int
    """The end-of-text token too."""
    logprobs: tuple[tuple[str, float], ...]
    """Without the end-of-text token, before temperature and top_p; empty unless asked for."""


class _Model:
    """A loaded model with its tokenizer. Not for more than one thread."""

    def __init__(self, name: str, folder: Path, device: str, dtype: Dtype) -> None:
        import safetensors
        import torch
        import transformers

        transformers.utils.logging.set_verbosity_error()  # the terminal shows the run's progress
        transformers.utils.logging.disable_progress_bar()
        self._name = name
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        if device.startswith("cuda") and not torch.cuda.is_available():
            raise UserError(f'{name}: device = "{device}", but torch finds no CUDA device: set device = "cpu"')
        local = {"local_files_only": True, "trust_remote_code": False}
        try:
            self._tokenizer = transformers.AutoTokenizer.from_pretrained(str(folder), **local)
            model = transformers.AutoModelForCausalLM.from_pretrained(str(folder), dtype=dtype, **local)
        except (OSError, ValueError, KeyError, ImportError, safetensors.SafetensorError) as error:
            raise UserError(f"{name}: cannot load the model in {folder}: {_one_line(error)}") from None
        try:
            self._model = model.eval().to(device)
        except (AssertionError, NotImplementedError, RuntimeError) as error:
            if isinstance(error, torch.OutOfMemoryError):
                raise
            raise UserError(f'{name}: cannot use device = "{device}": {_one_line(error)}') from None
        self._device = self._model.device
        parameters = inspect.signature(self._model.forward).parameters
        if "past_key_values" not in parameters:
            kind = type(self._model).__name__
            raise UserError(f'{name}: {kind} has no key-value cache: serve it and use backend = "openai"')
        # Where it can, the model computes the last position's logits only: a long prompt's would fill the memory.
        self._options = {"logits_to_keep": 1} if "logits_to_keep" in parameters else {}
        context = getattr(self._model.config.get_text_config(), "max_position_embeddings", None)
        self._context = context if isinstance(context, int) and context > 0 else None
        ends = self._model.generation_config.eos_token_id
        self._ends = {*(ends if isinstance(ends, list) else [ends]), self._tokenizer.eos_token_id} - {None}

    def render(self, question: Question, template_values: Mapping[str, Any]) -> str:
        """The prompt as the model knows prompts: by its chat template, or plain where it has none."""
        import jinja2

        if not self._has_template():
            return f"{question.system}\n\n{question.prompt}" if question.system else question.prompt
        messages = [{"role": "user", "content": question.prompt}]
        if question.system:
            messages.insert(0, {"role": "system", "content": question.system})
        try:
            text: str = self._tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=True, **template_values
            )
        except jinja2.TemplateError as error:
            hint = ": some take no system prompt" if question.system else ""
            raise RejectedQuestionError(f"{self._name}: the chat template fails: {_one_line(error)}{hint}") from None
        return text

    def encode(self, text: str) -> list[int]:
        """Token ids [L]. Raises RejectedQuestionError where the model cannot take them."""
        # A chat template writes the special tokens itself.
        tokens: list[int] = self._tokenizer(text, add_special_tokens=not self._has_template(), verbose=False).input_ids
        if not tokens:
            raise RejectedQuestionError(f"{self._name}: an empty prompt")
        if self._context is not None and len(tokens) >= self._context:
            raise RejectedQuestionError(
                f"{self._name}: a prompt of {len(tokens):,} tokens leaves no room for an answer in a context of"
                f" {self._context:,}"
            )
        num_embeddings = self._model.get_input_embeddings().weight.shape[0]
        if max(tokens) >= num_embeddings:  # on a GPU this would end the process
            raise RejectedQuestionError(
                f"{self._name}: token {max(tokens)} of the prompt is unknown to the model ({num_embeddings:,}"
                f" embeddings): the folder's tokenizer belongs to another model"
            )
        return tokens

    def generate(
        self, prompt: list[int], question: Question, stop: threading.Event, *, use_logprobs: bool
    ) -> _Generation:
        """Token by token over a key-value cache, until the end of text, `max_tokens` or the end of the context."""
        import torch

        generator = torch.Generator(self._device)
        if question.seed is None:
            generator.seed()
        else:
            generator.manual_seed(question.seed % 2**64)
        limit = question.max_tokens
        if self._context is not None:
            limit = min(limit, self._context - len(prompt))
        tokens: list[int] = []
        logprobs: list[float] = []
        cache, inputs, finish = None, prompt, "length"
        with torch.inference_mode():
            while len(tokens) < limit and finish == "length":
                if stop.is_set():
                    raise asyncio.CancelledError  # nobody waits for it any more
                output = self._model(
                    input_ids=torch.tensor([inputs], device=self._device),
                    past_key_values=cache,
                    use_cache=True,
                    **self._options,
                )
                cache = output.past_key_values
                logits = output.logits[0, -1].float()
                if not math.isfinite(logits.max()):
                    text = f"{self._name}: logits that are not finite: try another dtype, float32 above all"
                    raise _garbled(text, question)
                token = _choose(logits, question, generator)
                tokens.append(token)
                if use_logprobs:
                    logprobs.append(float(logits.log_softmax(0)[token]))
                if token in self._ends:
                    finish = "stop"
                inputs = [token]
        words = tokens[:-1] if finish == "stop" else tokens
        return _Generation(
            text=self._decode(words, skip_special_tokens=True),
            finish=finish,
            num_tokens=len(tokens),
            logprobs=tuple((self._decode([token]), value) for token, value in zip(words, logprobs, strict=False)),
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


def _garbled(message: str, question: Question) -> TeacherError:
    """An answer of no use. To ask again helps only where chance has a part in it."""
    error = GarbledAnswerError(message)
    error.is_worth_retrying = question.temperature > 0 and question.seed is None
    return error


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 300 else f"{text[:297]}..."


def _empty_cache() -> None:
    """Give freed GPU memory back to the other processes."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.empty_cache()
