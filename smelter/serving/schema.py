"""What clients may send: the fields of OpenAI's and llama.cpp's interfaces that mean something here.

Fields that would change the answer and are not supported are refused where they are set to anything but their neutral
value (`neutral`); all others that a client sends are ignored, so that clients written for other servers work
unchanged. null stands for a field that was left out, and numbers outside their range for the nearest inside it, as in
llama.cpp's server.
"""

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StrictInt, model_validator

MAX_CHOICES = 64
"""Answers to one request: prompts times `n`."""
MAX_SEED = 2**53
MAX_TOP = 20
"""Likeliest tokens that are told with each token, at most."""


def _check_text(text: str) -> str:
    if "\0" in text:
        raise ValueError("holds a NUL byte: source code has none; is this a binary file?")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError("is not Unicode text: it holds half a surrogate pair") from None
    return text


def _within(low: float, high: float) -> AfterValidator:
    return AfterValidator(lambda value: type(value)(min(max(value, low), high)))


def neutral(*values: Any) -> AfterValidator:
    """Refuses everything else: "repeat_penalty: is not supported by this server: leave it out, or send 1"."""

    def check(value: Any) -> Any:
        if value is not None and value not in values:
            raise ValueError(f"is not supported by this server: leave it out{_or(values)}")
        return value

    return AfterValidator(check)


def _or(values: tuple[Any, ...]) -> str:
    return f", or send {values[0]}" if values and isinstance(values[0], int) else ""


def _below_zero(value: float | None) -> float | None:
    if value is not None and value > 0:
        raise ValueError("is not supported by this server: leave it out, or send -1")
    return value


def _only_text(value: dict[str, Any] | None) -> dict[str, Any] | None:
    if value and value.get("type") not in (None, "text"):
        raise ValueError(f"{value['type']!r} is not supported by this server: leave it out, or send {{'type': 'text'}}")
    return value


Text = Annotated[str, AfterValidator(_check_text)]
Empty = Annotated[dict[str, Any] | list[Any] | bool | str | None, neutral({}, [], False, "")]
Zero = Annotated[float | None, neutral(0)]
One = Annotated[float | None, neutral(1)]
Off = Annotated[float | None, AfterValidator(_below_zero)]
Temperature = Annotated[float, Field(allow_inf_nan=False), _within(0, 100)]
Share = Annotated[float, Field(allow_inf_nan=False), _within(0, 1)]
TopK = Annotated[int, _within(0, 2**31)]
NumTokens = Annotated[int, Field(ge=-1), _within(-1, 2**31)]
Indent = Annotated[int, Field(ge=0), _within(0, 2**31)]
Milliseconds = Annotated[int, Field(ge=-1), _within(-1, 2**31)]
NumTop = Annotated[int, Field(ge=-1, le=MAX_TOP), _within(0, MAX_TOP)]
Choices = Annotated[int, Field(ge=1, le=MAX_CHOICES)]
Stops = Annotated[list[Annotated[Text, Field(max_length=1_000)]], Field(max_length=64)]
TokenId = Annotated[StrictInt, Field(ge=0, le=2**31)]
Piece = TokenId | Text
Prompt = Text | Annotated[list[Piece | list[Piece]], Field(max_length=100_000)]
"""A text; a list of texts, of token ids and of texts among token ids; a list of all these."""


class _Body(BaseModel):
    model_config = ConfigDict(extra="ignore", protected_namespaces=())


class _Request(_Body):
    @model_validator(mode="before")
    @classmethod
    def _null_is_left_out(cls, values: Any) -> Any:
        return {name: value for name, value in values.items() if value is not None} if type(values) is dict else values


class StreamOptions(_Request):
    """OpenAI's stream_options."""

    include_usage: bool = False


class _Unsupported(_Request):
    """What both interfaces have and would change the answer: only the values that change nothing."""

    frequency_penalty: Zero = None
    presence_penalty: Zero = None
    repeat_penalty: One = None
    dry_multiplier: Zero = None
    xtc_probability: Zero = None
    typical_p: One = None
    top_n_sigma: Off = None
    dynatemp_range: Zero = None
    adaptive_target: Off = None
    mirostat: Zero = None
    min_keep: Zero = None
    logit_bias: Empty = None
    lora: Empty = None
    grammar: Empty = None
    json_schema: Annotated[Any, neutral()] = None
    response_format: Annotated[dict[str, Any] | None, AfterValidator(_only_text)] = None
    ignore_eos: Annotated[bool | None, neutral(False)] = None
    post_sampling_probs: Annotated[bool | None, neutral(False)] = None


class Sampling(_Unsupported):
    """How to write, and how much; each interface has defaults of its own."""

    model: Text = Field("", description="Any name: there is one model, and the answer tells its name.")
    temperature: Temperature = Field(1.0, description="0 takes the likeliest token each time.")
    top_k: TopK = Field(0, description="Sample among this many likeliest tokens only; 0 for all.")
    top_p: Share = Field(1.0, description="Sample among the fewest tokens that hold this share.")
    min_p: Share = Field(0.0, description="Leave out tokens with less than this share of the likeliest's probability.")
    samplers: list[Text] | Text | None = Field(
        None, description='Which of top_k, top_p, min_p and temperature count, and "infill"; by default all but that.'
    )
    seed: int = Field(-1, description="The same seed gives the same answer; -1 or none: another each time.")
    stop: Stops | Annotated[Text, Field(max_length=1_000)] = Field([], description="Texts that end it.")
    n: Choices = 1
    n_cmpl: Choices | None = Field(None, description="llama.cpp's name for n, and stronger.")
    max_tokens: NumTokens | None = Field(None, description="Most tokens; 0 reads the prompt only, -1: what fits.")
    max_completion_tokens: NumTokens | None = Field(None, description="Another name for max_tokens, and stronger.")
    n_predict: NumTokens | None = Field(None, description="llama.cpp's name for max_tokens, the strongest.")
    n_indent: Indent = Field(0, description="End before a line that is indented by less than this.")
    t_max_predict_ms: Milliseconds = Field(
        0, description="Time to write, after which the next line break ends it; 0: no limit."
    )
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()

    @property
    def limit(self) -> int | None:
        """Tokens to write at most, by whichever name; -1 for all that fit, None where nothing is said."""
        names = (self.n_predict, self.max_completion_tokens, self.max_tokens)
        return next((value for value in names if value is not None), None)

    @property
    def num_choices(self) -> int:
        """Answers to each prompt."""
        return self.n_cmpl or self.n

    def stops(self) -> list[str]:
        """The stop strings as a list; an empty one stops nothing."""
        return [text for text in ([self.stop] if isinstance(self.stop, str) else self.stop) if text]


class CompletionRequest(Sampling):
    """POST /v1/completions. With `suffix` (even an empty one) the text between prompt and suffix is written."""

    prompt: Prompt = Field(description="Text or token ids.")
    suffix: Text | None = None
    logprobs: NumTop | bool | None = None
    echo: bool = False
    best_of: Choices | None = None


class TextPart(_Body):
    """A part of a message's content."""

    type: Literal["text"]
    text: Text


class Message(_Body):
    """A turn of a conversation. Calls of tools that a turn made are not shown to the model."""

    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: Text | list[TextPart] | None = None
    tool_calls: list[Any] | None = None

    @model_validator(mode="after")
    def _says_something(self) -> "Message":
        if self.role != "assistant" and "content" not in self.model_fields_set:
            raise ValueError(f"a message of role {self.role!r} needs content")
        return self

    def text(self) -> str:
        """The content in one piece."""
        parts = self.content or ""
        return parts if isinstance(parts, str) else "\n".join(part.text for part in parts)


class TemplateRequest(_Request):
    """POST /apply-template: a conversation."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=1_000)]


class ChatRequest(TemplateRequest, Sampling):
    """POST /v1/chat/completions."""

    logprobs: bool = False
    top_logprobs: NumTop = 0
    tools: list[Any] = []
    tool_choice: Any = None
    functions: Annotated[list[Any], neutral([])] = []


class LlamaSampling(Sampling):
    """The same with the defaults of llama.cpp's server, but for the temperature, and its names."""

    temperature: Temperature = 0.0
    top_k: TopK = 40
    top_p: Share = 0.95
    min_p: Share = 0.05
    n_probs: NumTop | None = Field(None, description="Likeliest tokens to tell with each token.")
    logprobs: NumTop | None = Field(None, description="Another name for n_probs.")
    response_fields: Annotated[list[Text], Field(max_length=64)] = []


class ExtraFile(_Request):
    """Another file of the project, for context."""

    filename: Text = ""
    text: Text


class InfillRequest(LlamaSampling):
    """POST /infill, as llama.cpp's server has it."""

    input_prefix: Text = ""
    input_suffix: Text = ""
    input_extra: Annotated[list[ExtraFile], Field(max_length=256)] = []
    prompt: Text = Field("", description="What follows the prefix already.")


class LlamaCompletionRequest(LlamaSampling):
    """POST /completion, as llama.cpp's server has it."""

    prompt: Prompt


class TokenizeRequest(_Request):
    """POST /tokenize."""

    content: Text | Annotated[list[Piece], Field(max_length=100_000)] = ""
    parse_special: bool = Field(True, description="Whether a special token's name is that token, or text.")
    with_pieces: bool = False


class DetokenizeRequest(_Request):
    """POST /detokenize."""

    tokens: Annotated[list[TokenId], Field(max_length=100_000)] = []


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
