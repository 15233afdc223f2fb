"""Conversations as token ids: ChatML, in this one place.

    <|im_start|>user
    How do I sort a list?<|im_end|>
    <|im_start|>assistant
    With sorted().<|im_end|>

The two special tokens are put by us and by us alone: a message that has them written out, in a file about chat
formats or from a person who would like to speak for the assistant, encodes to ordinary text. `TEMPLATE` is the same
format for Transformers (which takes written-out special tokens for the real ones) and llama.cpp (which knows ChatML
by its `<|im_start|>`).

A role and its message are encoded as one text, as those two do. Only the assistant's role stands apart from what
follows, because that is where generation begins: a model must go on from exactly the ids that it was trained on.
The ids are the same but for an answer that begins with a line break.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from smelter.base import DataError
from smelter.tokens.tokenizer import Tokenizer

ROLES = ("system", "user", "assistant", "tool")

TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
"""The format in Jinja, for `tokenizer_config.json` and GGUF's `tokenizer.chat_template`."""


@dataclass(frozen=True)
class Rendered:
    """A conversation's ids, and of each whether the assistant writes it: its answers, with the token that ends them."""

    ids: list[int]
    is_answer: list[bool]


class ChatFormat:
    """Lays out conversations in the ids of a tokenizer."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        """DataError if the tokenizer has no tokens for conversations."""
        if tokenizer.im_start_id is None or tokenizer.im_end_id is None:
            raise DataError(
                "this tokenizer has no <|im_start|> and <|im_end|>, so the model knows no conversations: use a model "
                'whose shards hold records of kind "instruct", tokenized by this version'
            )
        self.tokenizer = tokenizer
        self.im_start_id: int = tokenizer.im_start_id
        self.im_end_id: int = tokenizer.im_end_id
        self._line_break = tokenizer.encode("\n")
        self._answer_begins = [self.im_start_id, *tokenizer.encode(head("assistant"))]

    def render(self, messages: Sequence[Mapping[str, str]], *, add_generation_prompt: bool = False) -> Rendered:
        """Ids of {"role", "content"} messages, after which the assistant writes if `add_generation_prompt`.

        No eos: it follows the last message's end in training (`document`). DataError for an unknown role.
        """
        ids: list[int] = []
        is_answer: list[bool] = []
        for message in messages:
            role, content = message["role"], message["content"]
            if role not in ROLES:
                raise DataError(f"role {role!r} of a message: must be one of {', '.join(ROLES)}")
            if role == "assistant":
                begin, written = self._answer_begins, [*self.tokenizer.encode(content), self.im_end_id]
            else:
                begin, written = [self.im_start_id, *self.tokenizer.encode(head(role) + content), self.im_end_id], []
            ids += [*begin, *written, *self._line_break]
            is_answer += [*[False] * len(begin), *[True] * len(written), *[False] * len(self._line_break)]
        if add_generation_prompt:
            ids += self._answer_begins
            is_answer += [False] * len(self._answer_begins)
        return Rendered(ids, is_answer)

    def prompt(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """Ids after which the assistant writes: its next message, or the rest of the last one where that is its own."""
        if not messages or messages[-1]["role"] != "assistant":
            return self.render(messages, add_generation_prompt=True).ids
        ids = self.render(messages).ids
        return ids[: len(ids) - len(self._line_break) - 1]

    def document(self, question: list[int], answer: list[int]) -> tuple[list[int], int]:
        """A question and its answer as a document to train on: ids with eos, and how many of them are the prompt.

        `question` are the ids of `head("user")` and the question as one text, `answer` those of the answer. The
        prompt is what stands before the answer at inference, to the token.
        """
        prompt = [self.im_start_id, *question, self.im_end_id, *self._line_break, *self._answer_begins]
        return [*prompt, *answer, self.im_end_id, self.tokenizer.eos_id], len(prompt)


def stop_ids(tokenizer: Tokenizer) -> list[int]:
    """The tokens that end what a model writes: eos, and a message's end where there are conversations."""
    return [tokenizer.eos_id, *([] if tokenizer.im_end_id is None else [tokenizer.im_end_id])]


def head(role: str) -> str:
    """The text that begins a message."""
    return f"{role}\n"
