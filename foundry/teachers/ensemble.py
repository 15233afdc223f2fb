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
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from foundry.journal import Account
from foundry.settings import GenerateSettings
from foundry.teacher import Answer, Question, TeacherError
from foundry.teachers.judging import is_good, judge_prompt, runs, verdict
from foundry.teachers.limits import Member
from smelter.base import content_id


@dataclass(frozen=True)
class Call:
    """One question to one teacher."""

    member: Member
    question: Question
    key: bytes
    """sha256 of all that determines the answer."""


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


class Ensemble:
    """The strategy over the members; an answer that `account` has is not asked for again."""

    def __init__(self, members: Sequence[Member], settings: GenerateSettings, account: Account) -> None:
        self.settings = settings
        judge = settings.judge if settings.strategy == "best_of" else None
        self.judge = next((member for member in members if member.name == judge), None)
        self.members = [member for member in members if member is not self.judge]
        self._account = account

    def calls(self, seed_id: str, prompt: str, system: str, material: Mapping[str, Any]) -> list[Call]:
        """What will be asked for a seed, in this order (a cascade or fallback may end early)."""
        if self.settings.strategy in ("round_robin", "weighted"):
            return [_call(self._chosen(seed_id), seed_id, prompt, system, material)]
        samples = self.settings.samples if self.settings.strategy == "best_of" else 1
        return [
            _call(member, seed_id, prompt, system, material, sample)
            for sample in range(samples)
            for member in self.members
        ]

    def key(self, calls: Sequence[Call]) -> bytes:
        """sha256 of all that determines what comes of a seed."""
        judge = (self.judge.settings.name, self.judge.settings.model) if self.judge else ()
        return bytes.fromhex(content_id(self.settings.strategy, *judge, *(call.key.hex() for call in calls)))

    def _chosen(self, seed_id: str) -> Member:
        """The member with the best draw (Thaler & Ravishankar's rendezvous, with weights)."""
        is_weighted = self.settings.strategy == "weighted"

        def draw(member: Member) -> float:
            return math.log(_hash(seed_id, member.name)) / (member.settings.weight if is_weighted else 1)

        return max(self.members, key=draw)

    async def answer(self, seed_id: str, calls: Sequence[Call]) -> Outcome:
        """Ask by the strategy. Raises nothing of a teacher's: its errors are in the outcome."""
        match self.settings.strategy:
            case "fallback" | "cascade":
                return await self._one_after_another(calls)
            case "best_of":
                return await self._best_of(seed_id, calls)
            case _:
                return await self._all(calls)

    async def _ask(self, call: Call) -> Answer:
        """The answer in the journal, or a new one."""
        entry = self._account.read(self._account.answers, call.key)
        if entry is None:
            return await call.member.ask(call.question, call.key, self._account)
        return Answer(text=entry["text"], finish=entry["finish"], usage=entry["usage"], cost=entry["cost"])

    async def _all(self, calls: Sequence[Call]) -> Outcome:
        outcome = Outcome()

        async def caught(call: Call) -> Answer | Exception:
            try:
                return await self._ask(call)
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
                weight = call.member.settings.weight if self.settings.strategy == "all" else 1.0
                outcome.replies.append(Reply(call, answer, weight))
        outcome.is_complete = not outcome.failures
        return outcome

    async def _one_after_another(self, calls: Sequence[Call]) -> Outcome:
        outcome = Outcome()
        for call in calls:
            try:
                answer = await self._ask(call)
            except TeacherError as error:
                outcome.failures.append((call.member.name, error))
                continue
            is_last = self.settings.strategy == "fallback" or is_good(answer)
            outcome.replies.append(Reply(call, answer, float(is_last)))
            if is_last:
                break
        return outcome

    async def _best_of(self, seed_id: str, calls: Sequence[Call]) -> Outcome:
        outcome = await self._all(calls)
        # In an order of the seed's own, so that no teacher gains from its place.
        order = sorted(outcome.replies, key=lambda reply: _hash(seed_id, reply.call.key.hex()))
        best = order[0] if order else None
        if self.judge is None:
            for reply in order:
                if await runs(reply.answer):
                    best = reply
                    break
        elif len({reply.answer.text for reply in order}) > 1:
            prompt = judge_prompt(calls[0].question.prompt, [reply.answer for reply in order])
            try:
                answer = await self._ask(_call(self.judge, seed_id, prompt, "", {}))
                best = order[verdict(answer.text, len(order))]
            except TeacherError as error:
                outcome.failures.append((self.judge.name, error))
                outcome.is_complete = False
        outcome.replies = [replace(reply, weight=float(reply is best)) for reply in outcome.replies]
        return outcome


def _call(member: Member, seed_id: str, prompt: str, system: str, material: Mapping[str, Any], sample: int = 0) -> Call:
    """A question in the member's own way of sampling."""
    settings = member.settings
    question = Question(
        prompt=prompt,
        system=system,
        max_tokens=settings.max_tokens,
        temperature=settings.temperature,
        top_p=settings.top_p,
        seed=int(_hash(seed_id, member.name, str(sample)) * 2**31) if settings.use_seed else None,
        material=material,
    )
    asked = json.dumps([vars(question), settings.extra, settings.omit, settings.logprobs, sample], sort_keys=True)
    own = {"opencode": settings.agent, "transformers": settings.dtype}.get(settings.backend)
    parts = (seed_id, settings.name, settings.backend, settings.model, asked, *([own] if own else []))
    return Call(member, question, bytes.fromhex(content_id(*parts)))


def _hash(*parts: str) -> float:
    """A number in (0, 1), the same for the same strings everywhere."""
    return (int(content_id(*parts)[:13], 16) + 1) / (16**13 + 2)
