"""Several teachers as one: who is asked, and which answers count.

Who is asked is a function of the seed alone (rendezvous hashing, Thaler & Ravishankar 1998), never of timing. So the
result does not depend on concurrency or on interruptions, and a new teacher takes over its share of the seeds and
leaves all other answers valid. Answers that lose (in a cascade, or before the judge) are kept with weight 0: they are
paid for, and comparing teachers needs them.

Left out: debate and aggregation, where teachers read each other's answers. They multiply the cost of a record, and
best_of with a judge takes most of what they gain.
"""

import asyncio
import json
import math
import re
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field, replace

from foundry.settings import GenerateSettings
from foundry.teacher import Answer, GarbledAnswerError, Question, TeacherError
from foundry.teachers.limits import Member
from smelter.base import content_id


@dataclass(frozen=True)
class Call:
    """One question to one teacher."""

    member: Member
    question: Question
    key: bytes
    """sha256 of all that determines the answer."""

    @classmethod
    def make(cls, member: Member, seed_id: str, question: Question, sample: int = 0) -> "Call":
        """`question` in the member's own way of sampling."""
        settings = member.settings
        sampling_seed = None
        if settings.use_seed:
            sampling_seed = int(_hash(seed_id, member.name, str(sample)) * 2**31)
        question = Question(
            prompt=question.prompt,
            system=question.system,
            max_tokens=settings.max_tokens,
            temperature=settings.temperature,
            top_p=settings.top_p,
            seed=sampling_seed,
            material=question.material,
        )
        asked = json.dumps(
            [dict(vars(question)), settings.extra, settings.omit, settings.logprobs, sample], sort_keys=True
        )
        own = {"opencode": settings.agent, "transformers": settings.dtype}.get(settings.backend)
        parts = (seed_id, settings.name, settings.backend, settings.model, asked)
        key = content_id(*parts, own) if own else content_id(*parts)
        return cls(member, question, bytes.fromhex(key))


@dataclass(frozen=True)
class Reply:
    """An answer and its weight in training."""

    call: Call
    answer: Answer
    weight: float


@dataclass
class Outcome:
    """What came of a seed."""

    replies: list[Reply] = field(default_factory=list)
    failures: list[tuple[str, TeacherError]] = field(default_factory=list)
    """Teacher and error of the calls without an answer."""
    is_complete: bool = True
    """False: it is worth asking again for what is missing."""


Ask = Callable[[Call], Awaitable[Answer]]
Accept = Callable[[Call, Answer], bool]
Runs = Callable[[str], Awaitable[bool]]


class Ensemble:
    """The strategy over the members. `accept` decides in a cascade; `runs` whether an answer's code does (best_of)."""

    def __init__(self, members: Sequence[Member], settings: GenerateSettings, *, accept: Accept, runs: Runs) -> None:
        self.settings = settings
        self.judge = next((member for member in members if _is_judge(member, settings)), None)
        self.members = [member for member in members if member is not self.judge]
        self._accept = accept
        self._runs = runs

    def calls(self, seed_id: str, question: Question) -> list[Call]:
        """What will be asked for a seed, in this order (a cascade or fallback may end early)."""
        if self.settings.strategy in ("round_robin", "weighted"):
            return [Call.make(self._chosen(seed_id), seed_id, question)]
        samples = self.settings.samples if self.settings.strategy == "best_of" else 1
        return [Call.make(member, seed_id, question, sample) for sample in range(samples) for member in self.members]

    def _chosen(self, seed_id: str) -> Member:
        """The member with the best draw (Thaler & Ravishankar's rendezvous, with weights)."""
        is_weighted = self.settings.strategy == "weighted"

        def draw(member: Member) -> float:
            return math.log(_hash(seed_id, member.name)) / (member.settings.weight if is_weighted else 1)

        return max(self.members, key=draw)

    async def answer(self, seed_id: str, calls: Sequence[Call], ask: Ask) -> Outcome:
        """Ask by the strategy. Raises nothing of a teacher's: its errors are in the outcome."""
        match self.settings.strategy:
            case "fallback" | "cascade":
                return await self._one_after_another(calls, ask)
            case "best_of":
                return await self._best_of(seed_id, calls, ask)
            case "all":
                return await self._all(calls, ask, weighted=True)
            case _:
                return await self._all(calls, ask, weighted=False)

    async def _all(self, calls: Sequence[Call], ask: Ask, *, weighted: bool) -> Outcome:
        outcome = Outcome()

        async def caught(call: Call) -> Answer | Exception:
            try:
                return await ask(call)
            except Exception as error:  # raised below, when the others have ended
                return error

        # A single call needs no task of its own.
        answers = [await caught(calls[0])] if len(calls) == 1 else await asyncio.gather(*map(caught, calls))
        for call, answer in zip(calls, answers, strict=True):
            if isinstance(answer, TeacherError):
                outcome.failures.append((call.member.name, answer))
            elif isinstance(answer, Exception):
                raise answer
            else:
                outcome.replies.append(Reply(call, answer, call.member.settings.weight if weighted else 1.0))
        outcome.is_complete = not outcome.failures
        return outcome

    async def _one_after_another(self, calls: Sequence[Call], ask: Ask) -> Outcome:
        outcome = Outcome()
        for call in calls:
            try:
                answer = await ask(call)
            except TeacherError as error:
                outcome.failures.append((call.member.name, error))
                continue
            is_good = self.settings.strategy == "fallback" or self._accept(call, answer)
            outcome.replies.append(Reply(call, answer, float(is_good)))
            if is_good:
                break
        return outcome

    async def _best_of(self, seed_id: str, calls: Sequence[Call], ask: Ask) -> Outcome:
        outcome = await self._all(calls, ask, weighted=False)
        # In an order of the seed's own, so that no teacher gains from its place.
        order = sorted(outcome.replies, key=lambda reply: _hash(seed_id, reply.call.key.hex()))
        best = order[0] if order else None
        if self.judge is None:
            for reply in order:
                if await self._runs(reply.answer.text):
                    best = reply
                    break
        elif len({reply.answer.text for reply in order}) > 1:
            call = Call.make(self.judge, seed_id, judge_question(order[0].call.question, order))
            try:
                best = order[verdict((await ask(call)).text, len(order))]
            except TeacherError as error:
                outcome.failures.append((self.judge.name, error))
                outcome.is_complete = False
        outcome.replies = [replace(reply, weight=float(reply is best)) for reply in outcome.replies]
        return outcome


def judge_question(question: Question, replies: Sequence[Reply]) -> Question:
    """The question that asks which answer is best."""
    answers = "\n\n".join(
        f'<answer number="{number}">\n{reply.answer.text}\n</answer>' for number, reply in enumerate(replies, start=1)
    )
    prompt = (
        "Here is a task and several answers to it. Judge them as an experienced programmer: the code must be correct, "
        "then complete, then clear.\n\n"
        f"<task>\n{question.prompt}\n</task>\n\n{answers}\n\n"
        "Which answer is the best? End your reply with its number alone on the last line."
    )
    return replace(question, prompt=prompt, system="", material={})


def verdict(text: str, number: int) -> int:
    """Index of the answer that the judge names: the last number in the reply. Raises GarbledAnswerError."""
    numbers = re.findall(r"\d+", text)
    if not numbers or not 1 <= int(numbers[-1][:9]) <= number:
        raise GarbledAnswerError(f"the judge names none of {number} answers: {text.strip()[-40:]!r}")
    return int(numbers[-1]) - 1


def _is_judge(member: Member, settings: GenerateSettings) -> bool:
    return settings.strategy == "best_of" and member.settings.name == settings.judge


def _hash(*parts: str) -> float:
    """A number in (0, 1), the same for the same strings everywhere."""
    return (int(content_id(*parts)[:13], 16) + 1) / (16**13 + 2)
