"""`foundry generate`: seed -> question -> teachers -> journal -> JSONL, resumable at any moment and within its cap.

The run is a function of foundry.toml: every seed has a key (of its words and of whom it is put to), and a key that is
finished in the journal is not worked on again. `in_flight` seeds are worked on at once; the account reserves each
call's worst case, waits for the disk, and writes down what came of it. The output is written from the journal at the
end, in the order of the seeds, all of it or nothing; so neither concurrency nor interruptions show in it. Failed seeds
stay in the journal with their cause and are asked again by the next run, as are answers that are missing in an
otherwise good record.
"""

import asyncio
import dataclasses
import signal
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import tyro

from foundry.journal import Account, JournalError
from foundry.ledger import BudgetReachedError
from foundry.seeds import Seed, iterate
from foundry.settings import Settings, load_settings
from foundry.teachers import Ensemble, Member, Outcome, StoppedError, make_teacher
from smelter.base import (
    Progress,
    Record,
    Response,
    UserError,
    left_alone,
    parse,
    require,
    stop_signals,
    write_records,
)

MAX_LISTED = 5
"""Failed seeds that the summary lists; the journal has all."""


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
    settle_held: float | None = None
    """US dollars that the vendor's bill has for the calls that are held back: they are booked at this, before anything
    is asked. 0: the bill has none of them."""


class Run:
    """The work: every seed through the ensemble and into the account, until all are done or something stops it."""

    def __init__(self, settings: Settings, members: Sequence[Member], account: Account) -> None:
        self.settings = settings
        self.members = members
        self.account = account
        self.ensemble = Ensemble(members, settings.generate, account)
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
        self.failed: list[bytes] = []
        """Keys of the seeds that this run has asked and got no record of."""
        self.signal = 0
        """The signal that ended it, if one did."""
        self.error: UserError | None = None
        """Why no more seeds were taken, if that was not a signal."""
        self.budget_reached: BudgetReachedError | None = None
        """What is finished is still taken, but nothing is asked any more."""
        self._seeds = iterate(settings.seeds)
        self._workers: list[asyncio.Task[None]] = []
        self._is_stopping = False
        self._progress = Progress("asking", "seeds", seconds=10.0)

    async def run(self) -> None:
        """Work on every seed, or until a signal, an error or the loss of every teacher; then see `signal`, `error`."""
        loop = asyncio.get_running_loop()
        handlers = {number: signal.getsignal(number) for number in stop_signals()}
        for number in handlers:
            loop.add_signal_handler(number, self._on_signal, number)
        self._workers = [asyncio.create_task(self._work()) for _ in range(self.settings.generate.in_flight)]
        progress = asyncio.create_task(self._show_progress())
        try:
            done, _ = await asyncio.wait(self._workers, return_when=asyncio.FIRST_EXCEPTION)
            for worker in done:
                if not worker.cancelled():
                    worker.result()
            await self.account.journal.sync()
        finally:
            for task in (*self._workers, progress):
                task.cancel()
            await asyncio.gather(*self._workers, progress, return_exceptions=True)
            for number, handler in handlers.items():
                loop.remove_signal_handler(number)
                signal.signal(number, handler)
            self._print_progress(last=True)
            for member in self.members:
                await member.teacher.close()

    def _on_signal(self, number: int) -> None:
        """The first lets calls in flight end, as far as our patience goes; the second does not."""
        left_alone(number)
        if self.signal:
            self._cut()
        self.signal = self.signal or number
        self._stop()

    def _stop(self) -> None:
        if not self._is_stopping:
            self._is_stopping = True
            for member in self.members:
                member.stop()
            asyncio.get_running_loop().call_later(self.settings.generate.grace_seconds, self._cut)

    def _cut(self) -> None:
        for worker in self._workers:
            worker.cancel()

    async def _work(self) -> None:
        try:
            while not self._is_stopping and (seed := next(self._seeds, None)) is not None:
                await self._take(seed)
        except StoppedError:
            pass
        except UserError as error:
            self.error = self.error or error
            self._stop()
            if isinstance(error, JournalError):  # no answer can be kept any more
                self._cut()

    async def _take(self, seed: Seed) -> None:
        """Skip a seed that is finished, else work on it."""
        system = seed.system or self.settings.generate.system
        calls = self.ensemble.calls(seed.id, seed.prompt, system, seed.material)
        key = self.ensemble.key(calls)
        if key in self.order:
            self.num_repeated += 1
            return
        self.order[key] = None
        is_finished = self.account.is_finished(key)
        self.num_done += is_finished
        if is_finished or self.budget_reached:
            await asyncio.sleep(0)  # signals and progress have their turn, however many there are
            return
        try:
            outcome = await self.ensemble.answer(seed.id, calls)
        except BudgetReachedError as error:
            self.budget_reached = error
            return
        self.failures.update(failure.cause for _, failure in outcome.failures)
        self._write(key, seed, system, outcome)
        if outcome.replies and outcome.is_complete:
            self.num_done += 1
            self.num_new += 1
        last = self.ensemble.members[-1]
        if all(member.given_up for member in self.ensemble.members):
            raise UserError(f"no teacher is left: {last.name}: {last.given_up}")

    def _write(self, key: bytes, seed: Seed, system: str, outcome: Outcome) -> None:
        """What came of a seed, in the journal."""
        failures = [{"teacher": name, "cause": error.cause} for name, error in outcome.failures]
        if not outcome.replies:
            messages = [f"{name}: {error}" for name, error in outcome.failures]
            self.account.write("failed", key, seed=seed.id, failures=failures, messages=messages)
            self.failed.append(key)
            return
        meta: dict[str, Any] = {"seed": seed.id, "kind": seed.kind}
        meta |= {"strategy": self.settings.generate.strategy, "system": system, "failures": failures}
        self.account.write(
            "record",
            key,
            complete=outcome.is_complete,
            answers=[[reply.call.key.hex(), reply.weight] for reply in outcome.replies],
            prompt=seed.prompt,
            language=seed.language,
            source=seed.source,
            license=seed.license,
            meta={name: value for name, value in meta.items() if value},
        )

    async def _show_progress(self) -> None:
        while True:
            await asyncio.sleep(1.0)
            if self._progress.is_due:
                await self.account.journal.sync()  # what is shown as done is on the disk
                self._print_progress()

    def _print_progress(self, *, last: bool = False) -> None:
        """This run's seeds, earlier runs', spend, failures by cause, and what is being waited for."""
        ledger, num_before = self.account.ledger, self.num_done - self.num_new
        count = len(self.order) if last else max(self.settings.seeds.count, len(self.order))
        self._progress.total = count - num_before
        notes = [f"{num_before:,} done before"] if num_before else []
        if ledger.cap:
            held = sum(usd for _, usd in ledger.held.values())
            notes.append(f"${ledger.settled:,.4f} spent")
            if held:
                notes.append(f"${held:,.4f} held back")
            notes.append(f"${ledger.reserved - held:,.4f} in flight, of ${ledger.cap:,.2f}")
        notes += [f"{number:,} {cause}" for cause, number in self.failures.most_common()]
        if not last:
            notes += [f"waiting: {member.trouble}"[:120] for member in self.members if member.trouble]
        self._progress(self.num_new, *notes, now=last)


async def generate(settings: Settings, out: Path, settle_held: float | None = None) -> int:
    """Do the whole job and say what came of it; returns the exit code. Raises UserError."""
    members = [Member(make_teacher(teacher), teacher) for teacher in settings.teachers]
    account = Account(out.with_name(f"{out.name}.journal"), cap=settings.generate.max_cost)
    try:
        if settle_held is not None:
            account.settle_held(settle_held)
            await account.journal.sync()
        run = Run(settings, members, account)
        await run.run()
        return finish(run, out)
    finally:
        await account.journal.close()


def records_of(account: Account, keys: Iterable[bytes]) -> Iterator[Record]:
    """What the journal holds of these seeds, in their order."""
    for key in keys:
        if (entry := account.read(account.records, key)) is None:
            continue
        answers = [account.journal.read(account.answers[bytes.fromhex(part)]) for part, _ in entry["answers"]]
        for extra in ("reasoning", "logprobs"):  # in the order of the answers
            if any(extra in answer for answer in answers):
                entry["meta"][extra] = [answer.get(extra) for answer in answers]
        yield Record(
            id=key.hex(),
            kind="instruct",
            prompt=entry["prompt"],
            responses=tuple(
                Response(
                    teacher=answer["teacher"],
                    text=answer["text"],
                    weight=weight,
                    finish=answer["finish"],
                    usage=answer["usage"],
                    cost=answer["cost"],
                )
                for answer, (_, weight) in zip(answers, entry["answers"], strict=True)
            ),
            language=entry["language"],
            source=entry["source"],
            license=entry["license"],
            meta=entry["meta"],
        )


def finish(run: Run, out: Path) -> int:
    """Write the output and the summary; returns the exit code. Raises UserError where there is nothing to write."""
    account = run.account
    kept = f"{run.num_done:,} finished seeds are kept in {account.journal.path}, and the same command goes on"
    account.ledger.hold_all()
    if (held := account.ledger.held_words()) and not run.budget_reached:
        print(f"foundry generate: {held}", file=sys.stderr)
    if run.signal:
        print(f"foundry generate: interrupted: {kept}", file=sys.stderr)
        return 128 + run.signal
    if isinstance(run.error, JournalError):
        raise run.error
    if run.error:
        raise UserError(f"{run.error} ({kept})")
    failed = [entry for key in run.failed if (entry := account.read(account.failed, key))]
    if not any(key in account.records for key in run.order):
        raise run.budget_reached or UserError(
            f"no seed was answered: {failed[0]['messages'][0]}" if failed else "there is no seed: see [seeds]"
        )
    answers: Counter[str] = Counter()
    costs: defaultdict[str, float] = defaultdict(float)

    def counted() -> Iterator[Record]:
        for record in records_of(account, run.order):
            for response in record.responses:
                answers[response.teacher] += 1
                costs[response.teacher] += response.cost or 0.0
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
    if unasked := sum(key not in account.records for key in run.order) - len(failed):
        print(f"{unasked:,} seeds were not asked")
    if run.budget_reached:
        print(f"stopped early: {run.budget_reached}; or raise max_cost, and the same command goes on")
    return 0


def main(argv: list[str]) -> int:
    """`foundry generate`: 0 when done (failed seeds are listed), 130 or 143 when interrupted."""
    options = parse(Options, argv, "foundry generate")
    if options.settle_held is not None:
        require(options.settle_held >= 0, f"--settle-held {options.settle_held:g}: must be 0 or more US dollars")
    settings = load_settings(options.settings)
    seeds, rules = settings.seeds, settings.generate
    if options.count is not None:
        seeds = dataclasses.replace(seeds, count=options.count)
    if options.max_cost is not None:
        rules = dataclasses.replace(rules, max_cost=options.max_cost)
    settings = dataclasses.replace(settings, seeds=seeds, generate=rules)
    return asyncio.run(generate(settings, options.out, options.settle_held))
