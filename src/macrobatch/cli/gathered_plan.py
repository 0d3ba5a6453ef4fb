"""What an update takes whose loss is over all its outputs: a micro-batch, kept graphs, the outputs, and the loss.

While the loss is computed the kept graphs stand beside it, and no gradients yet; in the first backward all graphs but
its own, and the gradients of all outputs. The larger of the two is what an update takes beside parameters, gradients,
optimizer state and inputs.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn
from torch.optim import Optimizer

from macrobatch import GatheredAccumulator, Window
from macrobatch.budget import budget_bytes
from macrobatch.checkpointing import compare_checkpointing
from macrobatch.cli.forecast import sample_batch
from macrobatch.cli.learner import accumulator_of
from macrobatch.cli.sampling import take
from macrobatch.fitting import Account, Fitting, Memory
from macrobatch.graph_budget import Needs
from macrobatch.planning import Choice, Plan, Point
from macrobatch.prediction import Trace, activations_at
from macrobatch.substitution import held_tensors
from macrobatch.tasks import Task


@dataclass(frozen=True)
class GatheredPlan(Plan):
    """A plan with one graph kept, or none where the loss leaves no room. Bytes of all `outputs`, and of the `loss`.

    `graphs`: the most that fit beside the largest micro-batch. Nothing is timed.
    """

    outputs: int
    loss: int
    graphs: int


@dataclass(frozen=True)
class GatheredNeeds:
    """What updates of `batch_size` samples take with this optimizer, within `needs.account.max_bytes`."""

    needs: Needs
    optimizer: Optimizer
    batch_size: int
    max_memory: int

    @classmethod
    def of(
        cls,
        task: Task,
        model: nn.Module,
        optimizer: Optimizer,
        batch_size: int,
        max_memory: int | str | None = None,
        autocast: torch.dtype | None = None,
    ) -> "GatheredNeeds":
        """The loss has run once, forward and backward, on repeated outputs. ValueError for a budget that is none."""
        device = next(model.parameters()).device
        held = sum(tensor.nbytes for tensor in held_tensors([model]))
        max_bytes = budget_bytes(max_memory, device, held)
        accumulator = accumulator_of(task, model, max_memory=max_memory, autocast=autocast)
        assert isinstance(accumulator, GatheredAccumulator)
        needs = accumulator.needs(_window(task, batch_size))
        assert needs is not None  # there are samples
        account = _Account(needs, optimizer, batch_size)
        return cls(replace(needs, account=account), optimizer, batch_size, max_bytes)

    def memory(self, size: int, traces: Sequence[Trace], graphs: int) -> Memory:
        """Bytes at the peak with micro-batches of `size` samples, the graphs of so many kept."""
        needs, account, first = self.needs, self.needs.account, traces[0]
        update, saved = account.update(first.idle), _saved_at(size, traces)
        others = max(graphs - 1, 0) * (saved + needs.outputs * size // self.batch_size)
        before_gradients = others + min(graphs, 1) * saved - (0 if needs.has_gradients else first.gradients)
        in_forward = before_gradients + needs.outputs + _random_state(account.rehearsal.device)
        in_loss = before_gradients + needs.loss
        in_backward = others + activations_at(size, traces) + needs.outputs
        activations = max(in_forward, in_loss, in_backward) + account.kept(size)
        return replace(account.memory(size, traces), activations=max(activations, update.peak - update.state))

    def predicted(self, size: int, graphs: int) -> Memory | None:
        """What `memory` says of a run at that very size; None where no fake tensor gets through the model."""
        try:
            return self.memory(size, [self.needs.account.rehearsal.fake(size)], graphs)
        except Exception:  # whatever a model of one's own raises on tensors without numbers: training will tell
            return None

    def graphs(self, size: int) -> int:
        """How many graphs can be kept beside micro-batches of that size. ValueError if an update has no room at all."""
        return self.needs.graphs(size, -(-self.batch_size // size))

    def fitting(self) -> Fitting:
        """The largest micro-batch that fits beside all outputs. ValueError where the loss, or one sample, does not."""
        try:
            return self.beside_outputs.search(check=True)
        except ValueError:
            self.needs.refuse_too_little(self.needs.trace(1))  # in words that fit a loss over all outputs
            raise

    @property
    def beside_outputs(self) -> Account:
        """The account of a micro-batch in its backward, when the gradients of all outputs stand beside it."""
        return _BesideOutputs(self.needs, self.optimizer, self.batch_size)


class _Account(Account):
    """Counts a micro-batch's outputs and a state of the random numbers with what a window keeps."""

    def __init__(self, needs: Needs, optimizer: Optimizer, batch_size: int) -> None:
        super().__init__(needs.account.rehearsal, [optimizer], batch_size, needs.account.max_bytes)
        self._outputs = needs.outputs

    def kept(self, size: int) -> int:
        """Bytes kept for a window, beside what the loss and its graphs take."""
        return super().kept(size) + _random_state(self.rehearsal.device) + self._outputs * size // self.num_samples


class _BesideOutputs(_Account):
    """Counts the outputs of the whole window as well, and has no room for a size at which the loss has none."""

    def __init__(self, needs: Needs, optimizer: Optimizer, batch_size: int) -> None:
        super().__init__(needs, optimizer, batch_size)
        self._needs = needs

    def kept(self, size: int) -> int:
        """With the outputs of all samples."""
        return super().kept(size) + self._needs.outputs

    def room(self, size: int, trace: Trace) -> int:
        """While the loss is computed there are no gradients yet, unless they were zeroed in place."""
        room = super().room(size, trace)
        gradients = 0 if self._needs.has_gradients else trace.gradients
        return room if self._needs.loss <= room + self._needs.outputs + gradients else -1


def _random_state(device: torch.device) -> int:
    """Bytes of a state of torch's random numbers, on the CPU: two are compared while forwards run, then one stays."""
    return torch.get_rng_state().nbytes if device.type == "cpu" else 0


def gathered_plan(needed: GatheredNeeds) -> GatheredPlan:
    """Which micro-batch fits; one graph is kept. ValueError where one sample, or the loss, does not fit."""
    fitting = needed.fitting()
    size, traces = fitting.fit.size, fitting.traces
    graphs, account, batch_size = needed.graphs(size), needed.needs.account, needed.batch_size
    kept = min(graphs, 1)
    sizes = sorted({1 << power for power in range(batch_size.bit_length())} | {size})
    return GatheredPlan(
        batch_size=batch_size,
        max_memory=needed.max_memory,
        device=account.rehearsal.device,
        largest=Choice(size, -(-batch_size // size), needed.memory(size, traces, kept), None),
        fastest=None,
        is_exact=fitting.fit.exact,
        method=fitting.method,
        reason=fitting.reason,
        num_passes=fitting.fit.num_runs,
        optimizer=account.update(traces[0].idle).assumption,
        curve=tuple(Point(b, needed.memory(b, traces, kept).peak, None) for b in sizes),
        checkpointing=compare_checkpointing(needed.beside_outputs, traces, size, {}),
        outputs=needed.needs.outputs,
        loss=needed.needs.loss,
        graphs=graphs,
    )


def _saved_at(size: int, traces: Sequence[Trace]) -> int:
    """Bytes of a graph of `size` samples: on the line through the smallest and the largest that were run."""
    low, high = (end(traces, key=lambda trace: trace.micro_batch_size) for end in (min, max))
    if low is high:
        return -(-low.saved * size // low.micro_batch_size)
    slope = (high.saved - low.saved) / (high.micro_batch_size - low.micro_batch_size)
    return round(low.saved + slope * (size - low.micro_batch_size))


def _window(task: Task, batch_size: int) -> Window:
    """A window of so many samples, the task's first again and again."""
    sample = sample_batch(task)
    n = Window([sample]).num_samples
    rest = [task.collate(take(task.train, range(batch_size % n)))] if batch_size % n else []
    return Window([sample] * (batch_size // n) + rest)
