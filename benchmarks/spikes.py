"""What a spike guard saves on `code-lm`, and what it flags without need: python benchmarks/spikes.py.

Batches of 16 at lr 3e-3 with AdamW, three seeds. Clean: 1100 updates under a guard that only warns, so that it changes
nothing; its flags are false alarms; the validation loss is that after 1000. Every other run goes on from the clean one,
99 updates before the event at update 600, so that its last snapshot is as old as snapshots get:

(a) labels shuffled among the bytes of a batch for 10 windows, at 30 times the rate;
(b) correct labels, at 30 times the rate for 4 updates: what is wrong is the step, and shows only afterwards.

Each without a guard and with `policy="rollback"`, all options as they are by default, and once with a snapshot every 50
updates, which is too seldom for what is asked; (b) also with `policy="skip"`, the control, which cannot undo a step.
Each run is written when it ends and is not made again. --report makes none.
Results: benchmarks/results/spikes.json.
"""

import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from common import kept_runs, make_missing, parsed, parser
from torch import Tensor, nn
from torch.nn import functional as F

import macrobatch as mb
from macrobatch.snapshots import Run, capture, restore
from macrobatch.tasks import Task, load_task

RESULTS = Path(__file__).parent / "results" / "spikes.json"
SEEDS = (0, 1, 2)
BATCH_SIZE, RATE, MAX_NORM = 16, 3e-3, 1.0
RATE_FACTOR = 30.0
EVENTS = {"a": 10, "b": 4}  # windows that it lasts
OPTIONS = {"rollback-50": {"policy": "rollback", "snapshot_every": 50}}  # the others as they are by default
RUNS = (
    *(("a", policy) for policy in ("off", "rollback", "rollback-50")),
    *(("b", policy) for policy in ("off", "rollback", "rollback-50", "skip")),
)
TARGETS = {  # validation loss over the clean one: at least, at most
    ("a", "off"): (1.15, None),
    ("a", "rollback"): (None, 1.02),
    ("b", "off"): (1.05, None),
    ("b", "rollback"): (None, 1.02),
    ("b", "skip"): (1.02, None),
}
MOST_FALSE_ALARMS = 2.0  # per 1000
TASK_OPTIONS: dict[str, Any] = {}  # the task as it is; a test has a smaller model

Batch = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Lengths:
    """Updates: of the clean run, until the validation loss, until the event, and from the fork to the event."""

    clean: int = 1100
    end: int = 1000
    event: int = 600
    lead: int = 99

    @property
    def fork(self) -> int:
        """Where the other runs leave the clean one."""
        return self.event - self.lead


class Training:
    """One run of the task: everything follows from the seed, and window t is the same in every run."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.task: Task = load_task("code-lm", seed=seed, **TASK_OPTIONS)
        self.optimizer = self.task.make_optimizer(self.task.model, RATE)
        self.accumulator = mb.Accumulator(self.task.model, byte_loss, micro_batch_size=8)
        self.run = Run([self.task.model], [self.optimizer])

    def window(self, t: int, *, shuffled: bool = False) -> Batch:
        """Bytes and the bytes that follow them, (B, T) each; `shuffled` deals the latter out anew."""
        generator = torch.Generator().manual_seed(1_000_000 * self.seed + t)
        chosen = torch.randint(len(self.task.train), (BATCH_SIZE,), generator=generator)  # type: ignore[arg-type]
        pieces = torch.stack([self.task.train[int(i)] for i in chosen]).long()
        inputs, targets = pieces[:, :-1], pieces[:, 1:]
        if shuffled:
            order = torch.randperm(targets.numel(), generator=generator)
            targets = targets.flatten()[order].view_as(targets)
        return inputs, targets

    def update(self, t: int, guard: mb.SpikeGuard | None, event: str | None) -> str:
        """One window, in the event if one is named; what the guard said."""
        report = self.accumulator.run(self.window(t, shuffled=event == "a"))
        kind = "accepted" if guard is None else guard.check(report).kind
        if kind in ("accepted", "warned"):
            rates = [group["lr"] for group in self.optimizer.param_groups]
            for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * (RATE_FACTOR if event else 1.0)
            mb.apply_update(self.optimizer, report, max_norm=MAX_NORM)
            for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
                group["lr"] = rate
        return kind

    def guard(self, policy: str) -> mb.SpikeGuard:
        """A guard with all options as they are by default, but those that the name of the policy says."""
        return mb.SpikeGuard(self.task.model, self.optimizer, **OPTIONS.get(policy, {"policy": policy}))

    @torch.no_grad()
    def validation_loss(self) -> float:
        """The mean over 512 held-out samples, evenly spread."""
        count = len(self.task.validation)  # type: ignore[arg-type]
        chosen = torch.linspace(0, count - 1, min(count, 512)).long().tolist()
        pieces = torch.stack([self.task.validation[i] for i in chosen]).long()
        evaluator = mb.Accumulator(self.task.model, byte_loss, micro_batch_size=64)
        return float(evaluator.evaluate((pieces[:, :-1], pieces[:, 1:])).loss)


def byte_loss(model: nn.Module, batch: Batch) -> tuple[Tensor, int]:
    """Cross-entropy in nats, summed, and the number of bytes."""
    inputs, targets = batch
    return F.cross_entropy(model(inputs).flatten(0, 1), targets.flatten(), reduction="sum"), targets.numel()


def clean_run(seed: int, lengths: Lengths, fork: Path) -> dict[str, Any]:
    """The run without an event; its state where the others begin goes to the file `fork`."""
    training = Training(seed)
    guard = training.guard("warn")
    flagged, loss = [], float("nan")
    for t in range(lengths.clean):
        if t == lengths.fork:
            fork.parent.mkdir(parents=True, exist_ok=True)
            torch.save({"run": capture(training.run), "guard": guard.state_dict()}, fork)
        if t == lengths.end:
            loss = training.validation_loss()
        if training.update(t, guard, None) != "accepted":
            flagged.append(t)
    judged = lengths.clean - guard.min_updates
    return {"validation_loss": loss, "judged": judged, "flagged": flagged}


def forked_run(seed: int, event: str, policy: str, lengths: Lengths, fork: Path) -> dict[str, Any]:
    """The run that goes through the event, from the fork to the end, or until the guard gives up."""
    training = Training(seed)
    state = torch.load(fork, weights_only=True)
    restore(training.run, state["run"])
    guard = None
    if policy != "off":
        guard = training.guard(policy)
        guard.load_state_dict(state["guard"])
    kinds: dict[int, str] = {}
    gave_up = None
    for t in range(lengths.fork, lengths.end):
        in_event = lengths.event <= t < lengths.event + EVENTS[event]
        try:
            kind = training.update(t, guard, event if in_event else None)
        except mb.SpikeError:
            gave_up = t
            break
        if kind != "accepted":
            kinds[t - lengths.event] = kind
    return {
        "validation_loss": training.validation_loss(),
        "flagged": kinds,  # by windows since the event began
        "gave_up": gave_up,
        "lr_scale": 1.0 if guard is None else guard.lr_scale,
        "rollbacks": 0 if guard is None else guard.rollbacks,
    }


# ---------------------------------------------------------------------------------------------------------------------
# the table

Runs = Mapping[str, Mapping[str, Any]]
NAMES = {
    "off": "no guard",
    "rollback": "rollback",
    "rollback-50": "rollback, a snapshot every 50 updates",
    "skip": "skip only (control)",
}
SAYS = {"a": "(a) shuffled labels and lr x 30, 10 windows", "b": "(b) lr x 30, 4 updates"}


def ratios(runs: Runs, seeds: Sequence[int], event: str, policy: str) -> list[float]:
    """Validation loss over that of the clean run, by seed."""
    name = f"{event} {policy}"
    return [runs[f"{name} {s}"]["validation_loss"] / runs[f"clean {s}"]["validation_loss"] for s in seeds]


def holds(event: str, policy: str, found: Sequence[float]) -> bool:
    """Whether every seed keeps what was asked of it."""
    low, high = TARGETS.get((event, policy), (None, None))
    return all((low is None or r >= low) and (high is None or r <= high) for r in found)


def table(runs: Runs, seeds: Sequence[int]) -> str:
    """One line for each event and policy, and a sentence on false alarms."""
    of_seeds = ", ".join(str(s) for s in seeds)
    lines = [
        f"| what goes wrong | guard | measured: validation loss against the clean run, seeds {of_seeds} | "
        "asked of every seed | is it so? |",
        "|---|---|---|---|---|",
    ]
    for event, policy in RUNS:
        low, high = TARGETS.get((event, policy), (None, None))
        found = ratios(runs, seeds, event, policy)
        asked = f"at least {low - 1:+.0%}" if low is not None else f"at most {(high or 0) - 1:+.0%}"
        asked = asked if low or high else "nothing: for comparison"
        each = ", ".join(f"{r - 1:+.1%}" for r in found)
        gave_up = all(runs[f"{event} {policy} {s}"]["gave_up"] is not None for s in seeds)
        note = ("yes" if holds(event, policy, found) else "no") if low or high else ""
        note += "; ended early with a `SpikeError`" if gave_up else ""
        lines.append(f"| {SAYS[event]} | {NAMES[policy]} | {each} | {asked} | {note} |")
    judged = sum(runs[f"clean {s}"]["judged"] for s in seeds)
    alarms = sum(len(runs[f"clean {s}"]["flagged"]) for s in seeds)
    guarded = [runs[f"{event} rollback {s}"] for event in EVENTS for s in seeds]
    later = sum(int(t) > EVENTS["a"] for run in guarded for t in run["flagged"])
    scales = " or ".join(f"{scale:g}" for scale in sorted({run["lr_scale"] for run in guarded}))
    losses = ", ".join(f"{runs[f'clean {s}']['validation_loss']:.3f}" for s in seeds)
    words = [
        f"The clean runs ended at validation losses of {losses}.",
        f"In their {judged} judged updates {alarms} {'was' if alarms == 1 else 'were'} flagged, a false alarm: "
        f"{1000 * alarms / judged:.2f} per 1000, where at most {MOST_FALSE_ALARMS:g} were asked for.",
        f"The {len(guarded)} runs with rollback flagged {later} more windows after the events; every one of these runs "
        f"ended with its rates at {scales} times those of the clean run.",
    ]
    return "\n".join([*lines, "", " ".join(words)])


def names(seeds: Sequence[int]) -> list[str]:
    """Keys of all runs, seed by seed."""
    return [name for s in seeds for name in (f"clean {s}", *(f"{e} {p} {s}" for e, p in RUNS))]


def make(name: str, lengths: Lengths, folder: Path) -> dict[str, Any]:
    """The run of this name; the clean one is made again where its state at the fork is gone."""
    *what, seed = name.split()
    fork = folder / f"{seed}-{lengths.fork}.pt"
    if what == ["clean"]:
        return clean_run(int(seed), lengths, fork)
    if not fork.exists():
        clean_run(int(seed), lengths, fork)
    return forked_run(int(seed), what[0], what[1], lengths, fork)


def main() -> None:
    """Make the runs that are missing, and print the table."""
    command_line = parser(
        __doc__,
        output=RESULTS,
        seeds=len(SEEDS),
        **{name: getattr(Lengths(), name) for name in ("clean", "end", "event", "lead")},
    )
    command_line.add_argument("--forks", type=Path, default=Path(tempfile.gettempdir()) / "macrobatch-spikes")
    command_line.add_argument("--report", action="store_true", help="print what there is, make no runs")
    arguments = parsed(command_line)
    lengths = Lengths(arguments.clean, arguments.end, arguments.event, arguments.lead)
    found: dict[str, Any] = {"seeds": list(range(arguments.seeds)), "lengths": vars(lengths)}
    if arguments.output.exists():
        of_kept = json.loads(arguments.output.read_text(encoding="utf-8"))["lengths"]
        if of_kept != found["lengths"]:
            command_line.error(f"{arguments.output} holds runs of other lengths, {of_kept}: give another --output")
    found["runs"] = kept_runs(arguments.output)
    missing = [] if arguments.report else names(found["seeds"])
    make_missing(found, missing, lambda name: make(name, lengths, arguments.forks), arguments.output)
    print(table(found["runs"], found["seeds"]))


if __name__ == "__main__":
    main()
