"""What clients may send: the fields of OpenAI's and llama.cpp's interfaces that mean something here.

Fields that would change the answer and are not supported are refused where they are set; all others that a client
sends are ignored, so that clients written for other servers work unchanged.
"""

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

MAX_CHOICES = 64
"""Answers to one request: prompts times `n`."""
MAX_SEED = 2**53


def _check_text(text: str) -> str:
    if "\0" in text:
        raise ValueError("holds a NUL byte: source code has none; is this a binary file?")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError("is not Unicode text: it holds half a surrogate pair") from None
    return text


def _nothing(value: Any) -> Any:
    if value:
        raise ValueError("is not supported by this server: leave it out")
    return value


Text = Annotated[str, AfterValidator(_check_text)]
Unsupported = Annotated[float | dict[str, Any] | list[Any] | None, AfterValidator(_nothing)]
Temperature = Annotated[float, Field(ge=0, le=100, allow_inf_nan=False)]
TopP = Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)]
TopK = Annotated[int, Field(ge=0, le=2**31)]
Seed = Annotated[int, Field(ge=-1, le=MAX_SEED)]
Stops = Annotated[list[Annotated[Text, Field(min_length=1, max_length=1_000)]], Field(max_length=16)]
TokenId = Annotated[int, Field(ge=0, le=2**31)]


class _Body(BaseModel):
    model_config = ConfigDict(extra="ignore", protected_namespaces=())


class StreamOptions(_Body):
    """OpenAI's stream_options."""

    include_usage: bool = False


class _Sampling(_Body):
    model: Text | None = Field(None, description="Name of the model, as /v1/models tells it; any if left out.")
    temperature: Temperature | None = Field(1.0, description="0 takes the likeliest token each time.")
    top_p: TopP | None = Field(1.0, description="Sample among the fewest tokens that hold this share.")
    top_k: TopK | None = Field(0, description="Sample among this many likeliest tokens only; 0 for all.")
    seed: Seed | None = Field(None, description="The same seed gives the same answer; -1 or none: another each time.")
    stop: Stops | Annotated[Text, Field(max_length=1_000)] | None = Field(None, description="Texts that end it.")
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = 1
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    frequency_penalty: Unsupported = None
    presence_penalty: Unsupported = None
    logit_bias: Unsupported = None

    def stops(self) -> list[str]:
        """The stop strings as a list."""
        return [each for each in ([self.stop] if isinstance(self.stop, str) else self.stop or []) if each]


class CompletionRequest(_Sampling):
    """POST /v1/completions. With `suffix` (even an empty one) the text between prompt and suffix is written."""

    prompt: Text | list[TokenId] | list[Text] | list[list[TokenId]] = Field(description="Text or token ids.")
    suffix: Text | None = None
    max_tokens: Annotated[int, Field(ge=0, le=2**31)] | None = 64
    logprobs: Annotated[int, Field(ge=0, le=20)] | bool | None = None
    echo: bool | None = False
    best_of: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None


class TextPart(_Body):
    """A part of a message's content."""

    type: Literal["text"]
    text: Text


class Message(_Body):
    """A turn of a conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Text | list[TextPart]

    def text(self) -> str:
        """The content in one piece."""
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


class ChatRequest(_Sampling):
    """POST /v1/chat/completions."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=1_000)]
    max_tokens: Annotated[int, Field(ge=1, le=2**31)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1, le=2**31)] | None = None
    logprobs: bool | None = False
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    tools: Unsupported = None
    functions: Unsupported = None


class _LlamaSampling(_Body):
    n_predict: Annotated[int, Field(ge=-1, le=2**31)] = Field(-1, description="Most tokens; -1: what fits.")
    temperature: Temperature = 0.0
    top_k: TopK = 40
    top_p: TopP = 0.95
    seed: Seed = -1
    stop: Stops = Field(default_factory=list)
    stream: bool = False
    n_probs: Annotated[int, Field(ge=0, le=20)] = Field(0, description="Likeliest tokens to tell with each token.")
    t_max_predict_ms: Annotated[int, Field(ge=0, le=2**31)] = Field(0, description="Time to write; 0: no limit.")
    response_fields: Annotated[list[Text], Field(max_length=64)] | None = None


class ExtraFile(_Body):
    """Another file of the project, for context."""

    filename: Text = ""
    text: Text


class InfillRequest(_LlamaSampling):
    """POST /infill, as llama.cpp's server has it."""

    input_prefix: Text = ""
    input_suffix: Text = ""
    input_extra: Annotated[list[ExtraFile], Field(max_length=256)] = Field(default_factory=list)
    prompt: Text = Field("", description="What follows the prefix already.")


class LlamaCompletionRequest(_LlamaSampling):
    """POST /completion, as llama.cpp's server has it."""

    prompt: Text | list[TokenId]


class TokenizeRequest(_Body):
    """POST /tokenize."""

    content: Text


class ErrorBody(_Body):
    """What went wrong, in OpenAI's form."""

    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorResponse(_Body):
    """Every answer that is not a success."""

    error: ErrorBody


class Usage(_Body):
    """Tokens of a request."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: dict[str, int]


class CompletionLogprobs(_Body):
    """Log-probabilities of an answer's tokens."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class CompletionChoice(_Body):
    """One answer."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: str | None


class CompletionResponse(_Body):
    """Answer to POST /v1/completions."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage | None = None


class ChatResponse(_Body):
    """Answer to POST /v1/chat/completions."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[dict[str, Any]]
    usage: Usage


class Health(_Body):
    """Answer to GET /health."""

    status: Literal["ok"]
    active: int
    slots: int
    waiting: int


ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorResponse} for status in (400, 401, 403, 404, 413, 422, 429, 500, 503)
}
