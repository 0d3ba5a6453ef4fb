"""Functions that take turns: each in a thread of its own, one at a time, with torch's settings of the thread they left.

A thread rather than a generator, because what must wait is a layer deep inside of somebody else's forward. torch keeps
grad mode, autocast, modes and hooks per thread: `Surroundings` carries them over.
"""

import contextvars
import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Generic, TypeVar

import torch
from torch.overrides import _get_current_function_mode_stack
from torch.overrides import _pop_mode as pop_function_mode
from torch.overrides import _push_mode as push_function_mode
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack
from torch.utils._python_dispatch import _pop_mode as pop_dispatch_mode
from torch.utils._python_dispatch import _push_mode as push_dispatch_mode

T = TypeVar("T")
Meet = Callable[[Any], Any]
AUTOCAST_DEVICES = ("cpu", "cuda", "xpu", "mps", "hpu")


class Abandoned(BaseException):
    """Raised in a strand whose fellows failed: it unwinds, and its context managers put back what they changed."""


class Surroundings:
    """What torch keeps for each thread, as it is in the thread that makes this; `entered` sets it in another one.

    Modes are pushed as they are, not entered again: one meter counts what all of the threads allocate.
    """

    def __init__(self) -> None:
        self._grad = torch.is_grad_enabled()
        self._inference = torch.is_inference_mode_enabled()
        self._autocast = {d: torch.get_autocast_dtype(d) for d in AUTOCAST_DEVICES if torch.is_autocast_enabled(d)}
        self._autocast_cache = torch.is_autocast_cache_enabled()
        self._function_modes = _get_current_function_mode_stack()
        self._dispatch_modes = _get_current_dispatch_mode_stack()
        self._hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
        self._cuda = _cuda_stream()

    @contextmanager
    def entered(self) -> Iterator[None]:
        """Within the context this thread works with the settings."""
        with ExitStack() as stack:
            if self._inference:
                stack.enter_context(torch.inference_mode())
            stack.enter_context(torch.set_grad_enabled(self._grad))
            if self._cuda is not None:
                stack.enter_context(torch.cuda.stream(self._cuda))
            for device, dtype in self._autocast.items():
                stack.enter_context(torch.autocast(device, dtype, cache_enabled=self._autocast_cache))
            if self._hooks is not None:
                stack.enter_context(torch.autograd.graph.saved_tensors_hooks(*self._hooks))
            for mode in self._dispatch_modes:
                push_dispatch_mode(mode)
                stack.callback(pop_dispatch_mode)
            for mode in self._function_modes:
                push_function_mode(mode)
                stack.callback(pop_function_mode)
            yield


def _cuda_stream() -> torch.cuda.Stream | None:
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return torch.cuda.current_stream()
    return None


class Strand(Generic[T]):
    """`function(meet)` in a thread that runs only while `advance` waits for it.

    Inside, `meet(request)` hands `request` out and waits; what the next `advance(answer)` gives is its result.
    """

    def __init__(self, function: Callable[[Meet], T], surroundings: Surroundings) -> None:
        self.request: Any = None
        self.has_ended = False
        self.result: T | None = None
        self._surroundings = surroundings
        self._function: Callable[[Meet], T] | None = function
        self._error: BaseException | None = None
        self._answer: Any = None
        self._is_abandoned = False
        self._go: queue.SimpleQueue[None] = queue.SimpleQueue()  # whose turn it is: an interrupt cannot break these
        self._back: queue.SimpleQueue[None] = queue.SimpleQueue()
        self._end = threading.Event()
        run = contextvars.copy_context().run
        self._thread = threading.Thread(target=run, args=(self._main,), name="macrobatch strand", daemon=True)
        self._has_started = False

    def advance(self, answer: Any = None) -> None:
        """The function has run on, until it met or ended; what it raised is raised here."""
        self._answer = answer
        if self._has_started:
            self._go.put(None)
        else:
            self._start()
        self._back.get()
        if self.has_ended:
            self._thread.join()
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def _start(self) -> None:
        self._has_started = True  # from here on, even if Ctrl-C comes before `start` returns
        try:
            self._thread.start()
        except RuntimeError:  # the system has no more threads
            self._has_started = False
            raise

    def abandon(self) -> None:
        """The thread has ended; a function that waits gets `Abandoned`, and what it still held is let go."""
        if self._has_started:
            self._is_abandoned = True
            self._go.put(None)
            self._end.wait()
            self._thread.join()
        self._error = self._answer = self.request = None

    def _meet(self, request: Any) -> Any:
        if self._is_abandoned:  # a function that caught it is told again
            raise Abandoned
        self.request = request
        del request
        self._back.put(None)
        self._go.get()
        if self._is_abandoned:
            raise Abandoned
        answer, self._answer = self._answer, None
        return answer

    def _main(self) -> None:
        function, self._function = self._function, None
        assert function is not None
        try:
            with self._surroundings.entered():
                self.result = function(self._meet)
        except BaseException as error:
            self._error = error
        finally:
            del function
            self.has_ended = True
            self._back.put(None)
            self._end.set()


@contextmanager
def strands(functions: Sequence[Callable[[Meet], T]]) -> Iterator[list[Strand[T]]]:
    """Within the context there is a strand for each function, none of them started; after it no thread is alive."""
    surroundings = Surroundings()
    all_of_them = [Strand(function, surroundings) for function in functions]
    with ExitStack() as stack:  # which goes on to the next, whatever interrupts the end of one
        for strand in reversed(all_of_them):
            stack.callback(strand.abandon)
        yield all_of_them
