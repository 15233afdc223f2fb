"""`foundry generate`: seed -> question -> teachers -> journal -> JSONL, resumable at any moment and within its cap.

The run is a function of foundry.toml: every seed has a key (of its words and of whom it is put to), and a key that is
finished in the journal is not worked on again. `in_flight` seeds are worked on at once, each by the same four steps:
reserve, wait for the disk, ask, write down. The output is written from the journal at the end, in the order of the
seeds, all of it or nothing; so neither concurrency nor interruptions show in it. Failed seeds stay in the journal with
their cause and are asked again by the next run, as are answers that are missing in an otherwise good record.
"""

import ast
import asyncio
import dataclasses
import re
import signal
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from foundry.journal import BudgetReachedError, Journal, JournalError
from foundry.settings import Settings, load_settings
from foundry.teacher import Answer, Question
from foundry.teachers import Call, Ensemble, Member, Outcome, StoppedError, make_teacher
from smelter.base import Progress, Record, Response, UserError, content_id, parse, write_records

if TYPE_CHECKING:
    from foundry.seeds import Seed

MAX_LISTED = 5
"""Failed seeds that the summary lists; the journal has all."""
_CODE = re.compile(r"^```[ \t]*(\w*)[^\n]*\n(.*?)^```", re.DOTALL | re.MULTILINE)


@dataclasses.dataclass(frozen=True)
class Options:
    """Ask teachers and write what they answer as records. After any interruption the same command goes on."""

    settings: Annotated[Path, tyro.conf.Positional]
    """foundry.toml: teachers, strategy, seeds, spending cap."""
    out: Path = Path("data/teachers.jsonl")
    """File of records; beside it OUT.journal keeps every answer as it comes."""
    count: int | None = None
    """Number of seeds, instead of the settings'."""
    max_cost: float | None = None
    """US dollars that may be spent in all, instead of the settings'."""


class Account:
    """The books of one question's calls in the journal."""

    def __init__(self, journal: Journal, call: Call) -> None:
        self._journal = journal
        self._call = call
        self._usd = 0.0

    async def reserve(self, usd: float) -> None:
        """Write the worst case down before the call; a call that cannot cost anything needs no entry.

        Either way all that was written before is on the disk before the call is made, so that whoever works through
        the seeds has at most one call to lose at any moment, and one sync a call does for answer and reservation.
        """
        self._usd = usd
        if usd:
            await self._journal.reserve(self._call.key, usd)
        else:
            await self._journal.sync()

    def answered(self, answer: Answer, usd: float) -> None:
        """Write the answer down."""
        member = self._call.member
        entry = {
            "t": "answer",
            "key": self._call.key.hex(),
            "teacher": member.name,
            "text": answer.text,
            "finish": answer.finish,
            "usage": dict(answer.usage),
            "cost": usd,
        }
        if answer.reasoning and member.settings.keep_reasoning:
            entry["reasoning"] = answer.reasoning
        if answer.logprobs is not None:
            entry["logprobs"] = answer.logprobs
        try:
            self._journal.write(entry)
        finally:
            self._end()

    def unanswered(self, *, is_free: bool) -> None:
        """Give the reservation back, or leave it in the books until the question is answered."""
        try:
            if self._usd and is_free:
                self._journal.write({"t": "release", "key": self._call.key.hex()})
        finally:
            self._end()

    def _end(self) -> None:
        if self._usd:
            self._journal.end_call()


class Run:
    """One run over all seeds."""

    def __init__(self, settings: Settings, seeds: Iterator["Seed"], journal: Journal, ensemble: Ensemble) -> None:
        self.settings = settings
        self.journal = journal
        self.ensemble = ensemble
        self.order: dict[bytes, None] = {}
        """Keys in the order of the seeds."""
        self.num_repeated = 0
        """Seeds that were given before."""
        self.num_done = 0
        """Seeds with a complete record, from earlier runs too."""
        self.num_new = 0
        """Of those, finished by this run."""
        self.failures: Counter[str] = Counter()
        """Calls without an answer in this run, by cause."""
        self.signal = 0
        self.error: UserError | None = None
        """Why no more seeds were taken, if that was not a signal."""
        self.budget_reached: BudgetReachedError | None = None
        """What is finished is still taken, but nothing is asked any more."""
        self._seeds = seeds
        self._stop_event = asyncio.Event()
        self._now_event = asyncio.Event()
        self._progress = Progress("asking", "seeds", seconds=10.0)

    @property
    def members(self) -> list[Member]:
        """All teachers, the judge too."""
        return [*self.ensemble.members, *([self.ensemble.judge] if self.ensemble.judge else [])]

    async def run(self) -> None:
        """Work on every seed, or until a signal, an error or the loss of every teacher; then see `signal`, `error`."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self._on_signal, number)
        workers = [asyncio.create_task(self._work()) for _ in range(self.settings.generate.in_flight)]
        work = asyncio.gather(*workers)
        progress = asyncio.create_task(self._show_progress())
        stop = asyncio.create_task(self._stop_event.wait())
        now = asyncio.create_task(self._now_event.wait())
        try:
            awaited: list[asyncio.Future[Any]] = [work, stop]
            await asyncio.wait(awaited, return_when=asyncio.FIRST_COMPLETED)
            if not work.done():  # calls in flight may end, until a second signal or the end of our patience
                grace = self.settings.generate.grace_seconds
                awaited = [work, now]
                await asyncio.wait(awaited, timeout=grace, return_when=asyncio.FIRST_COMPLETED)
            if work.done():
                work.result()
        finally:
            for task in (*workers, progress, stop, now):
                task.cancel()
            await asyncio.gather(work, *workers, progress, stop, now, return_exceptions=True)
            for number in (signal.SIGINT, signal.SIGTERM):
                loop.remove_signal_handler(number)
            self._print_progress(last=True)

    def _on_signal(self, number: int) -> None:
        if self.signal:
            self._now_event.set()
        self.signal = self.signal or number
        self._stop()

    def _stop(self, error: UserError | None = None) -> None:
        self.error = self.error or error
        if isinstance(error, JournalError):  # no answer can be kept any more
            self._now_event.set()
        for member in self.members:
            member.stop()
        self._stop_event.set()

    async def _work(self) -> None:
        try:
            while not self._stop_event.is_set() and (seed := next(self._seeds, None)) is not None:
                await self._take(seed)
        except StoppedError:
            pass
        except UserError as error:
            self._stop(error)

    async def _take(self, seed: "Seed") -> None:
        """Skip a seed that is finished, else work on it."""
        generate, judge = self.settings.generate, self.ensemble.judge
        question = Question(prompt=seed.prompt, system=seed.system or generate.system, material=seed.material)
        calls = self.ensemble.calls(seed.id, question)
        names = (judge.settings.name, judge.settings.model) if judge else ()
        key = bytes.fromhex(content_id(generate.strategy, *names, *(call.key.hex() for call in calls)))
        if key in self.order:
            self.num_repeated += 1
            return
        self.order[key] = None
        if self.journal.is_finished(key):
            self.num_done += 1
        if self.journal.is_finished(key) or self.budget_reached:
            await asyncio.sleep(0)  # signals and progress have their turn, however many there are
            return
        try:
            outcome = await self.ensemble.answer(seed.id, calls, self._ask)
        except BudgetReachedError as error:
            self.budget_reached = error
            return
        for _, failure in outcome.failures:
            self.failures[failure.cause] += 1
        self.journal.write(self._entry(key, seed, question, outcome))
        if outcome.replies and outcome.is_complete:
            self.num_done += 1
            self.num_new += 1
        if all(member.given_up for member in self.ensemble.members):
            raise UserError(f"no teacher is left: {self.ensemble.members[-1].given_up}")

    async def _ask(self, call: Call) -> Answer:
        """The answer in the journal, or a new one."""
        offset = self.journal.answers.get(call.key)
        if offset is None:
            return await call.member.ask(call.question, Account(self.journal, call))
        entry = self.journal.read(offset)
        return Answer(text=entry["text"], finish=entry["finish"], usage=entry["usage"], cost=entry["cost"])

    def _entry(self, key: bytes, seed: "Seed", question: Question, outcome: Outcome) -> dict[str, Any]:
        """The journal's entry of a seed that was worked on."""
        failures = [{"teacher": name, "cause": error.cause} for name, error in outcome.failures]
        if not outcome.replies:
            messages = [str(error) for _, error in outcome.failures]
            return {"t": "failed", "key": key.hex(), "seed": seed.id, "failures": failures, "messages": messages}
        meta: dict[str, Any] = {"seed": seed.id, "kind": seed.kind}
        meta |= {"strategy": self.settings.generate.strategy, "system": question.system, "failures": failures}
        return {
            "t": "record",
            "key": key.hex(),
            "complete": outcome.is_complete,
            "answers": [[reply.call.key.hex(), reply.weight] for reply in outcome.replies],
            "prompt": seed.prompt,
            "language": seed.language,
            "source": seed.source,
            "license": seed.license,
            "meta": {name: value for name, value in meta.items() if value},
        }

    def records(self) -> Iterator[Record]:
        """What the journal holds of this run's seeds, in their order."""
        for key in self.order:
            if (offset := self.journal.records.get(key)) is None:
                continue
            entry = self.journal.read(offset)
            answers = [self.journal.read(self.journal.answers[bytes.fromhex(part)]) for part, _ in entry["answers"]]
            for extra in ("reasoning", "logprobs"):  # in the order of the answers
                if any(extra in answer for answer in answers):
                    entry["meta"][extra] = [answer.get(extra) for answer in answers]
            yield Record(
                id=key.hex(),
                kind="instruct",
                prompt=entry["prompt"],
                responses=tuple(
                    Response(weight=weight, **{name: answer[name] for name in _RESPONSE})
                    for answer, (_, weight) in zip(answers, entry["answers"], strict=True)
                ),
                language=entry["language"],
                source=entry["source"],
                license=entry["license"],
                meta=entry["meta"],
            )

    async def _show_progress(self) -> None:
        while True:
            await asyncio.sleep(1.0)
            if self._progress.is_due:
                await self.journal.sync()  # what is shown as done is on the disk
                self._print_progress()

    def _print_progress(self, *, last: bool = False) -> None:
        """This run's seeds, earlier runs', spend, failures by cause, and what is being waited for."""
        ledger, num_before = self.journal.ledger, self.num_done - self.num_new
        count = len(self.order) if last else max(self.settings.seeds.count, len(self.order))
        self._progress.total = count - num_before
        notes = [f"{num_before:,} done before"] if num_before else []
        if ledger.cap:
            notes.append(f"${ledger.settled:,.4f} spent and ${ledger.reserved:,.4f} reserved of ${ledger.cap:,.2f}")
        notes += [f"{number:,} {cause}" for cause, number in self.failures.most_common()]
        if not last:
            notes += [f"waiting: {member.trouble}"[:120] for member in self.members if member.trouble]
        self._progress(self.num_new, *notes, now=last)


_RESPONSE = ("teacher", "text", "finish", "usage", "cost")


def code_of(text: str) -> str:
    """The Python of an answer: its fenced blocks, or all of it where there are none."""
    blocks = [code for language, code in _CODE.findall(text) if language.lower() in ("", "python", "py", "python3")]
    return "\n".join(blocks) if blocks or "```" in text else text


def is_good(call: Call, answer: Answer) -> bool:
    """A cascade's test: the answer is finished and the Python in it parses."""
    if answer.finish == "length":
        return False
    try:
        ast.parse(code_of(answer.text))
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return "```" not in answer.text  # prose needs not parse
    return True


async def runs(text: str) -> bool:
    """Whether an answer's code runs to its end in the sandbox."""
    from smelter.base import sandbox

    try:
        result = await asyncio.to_thread(sandbox.run_python, code_of(text))
    except sandbox.SandboxError as error:
        raise UserError(f'judge = "execution": {error}: name a teacher as the judge instead') from None
    return result.reason == "ok"


async def generate(settings: Settings, out: Path) -> int:
    """Do the whole job and say what came of it; returns the exit code. Raises UserError."""
    from foundry.seeds import iterate

    members = [Member(make_teacher(teacher), teacher) for teacher in settings.teachers]
    ensemble = Ensemble(members, settings.generate, accept=is_good, runs=runs)
    journal = Journal(out.with_name(f"{out.name}.journal"), cap=settings.generate.max_cost)
    try:
        run = Run(settings, iterate(settings.seeds), journal, ensemble)
        try:
            await run.run()
            await journal.sync()
        finally:
            for member in members:
                await member.teacher.close()
        return finish(run, out)
    finally:
        await journal.close()


def finish(run: Run, out: Path) -> int:
    """Write the output and the summary; returns the exit code. Raises UserError where there is nothing to write."""
    journal = run.journal
    kept = f"{run.num_done:,} finished seeds are kept in {journal.path}, and the same command goes on"
    if run.signal:
        print(f"foundry generate: interrupted: {kept}", file=sys.stderr)
        return 128 + run.signal
    if isinstance(run.error, JournalError):
        raise run.error
    if run.error:
        raise UserError(f"{run.error} ({kept})")
    failed = [journal.read(journal.failed[key]) for key in run.order if key in journal.failed]
    if not any(key in journal.records for key in run.order):
        raise run.budget_reached or UserError(
            f"no seed was answered: {failed[0]['messages'][0]}" if failed else "there is no seed: see [seeds]"
        )
    answers: Counter[str] = Counter()
    costs: Counter[str] = Counter()

    def counted() -> Iterator[Record]:
        for record in run.records():
            for response in record.responses:
                answers[response.teacher] += 1
                costs[response.teacher] += response.cost  # type: ignore[assignment]  # dollars, not a count
            yield record

    print(f"wrote {write_records(out, counted()):,} records to {out}")
    for teacher, count in answers.most_common():
        print(f"  {teacher:40} {count:9,} answers  ${costs[teacher]:,.4f}")
    if run.num_repeated:
        print(f"{run.num_repeated:,} seeds were given more than once and asked once")
    if failed:
        print(f"{len(failed):,} seeds failed; the same command asks them again:")
        for entry in failed[:MAX_LISTED]:
            print(f"  {entry['seed']}: {entry['messages'][-1]}")
    if run.budget_reached:
        print(f"stopped early: {run.budget_reached}; raise max_cost and the same command goes on")
    return 0


def main(argv: list[str]) -> int:
    """`foundry generate`: 0 when done (failed seeds are listed), 130 or 143 when interrupted."""
    options = parse(Options, argv, "foundry generate")
    settings = load_settings(options.settings)
    seeds, rules = settings.seeds, settings.generate
    if options.count is not None:
        seeds = dataclasses.replace(seeds, count=options.count)
    if options.max_cost is not None:
        rules = dataclasses.replace(rules, max_cost=options.max_cost)
    return asyncio.run(generate(dataclasses.replace(settings, seeds=seeds, generate=rules), options.out))
