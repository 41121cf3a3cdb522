"""The next batches of training, made ready before they are needed: beside the SAE's steps on a GPU, else in turn.

On CUDA the language model runs in a thread and a stream of its own, and the training loop waits for neither. On a CPU
the products of both use all cores by themselves: there a batch is made when it is asked for.
"""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import contextmanager
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from csae.data.activations import Batch, Place
from csae.data.batches import Batches, Step
from csae.data.seen import window_hashes

AHEAD = 2
T = TypeVar("T")


class Ready(NamedTuple):
    """A step's batches on the device of the SAEs, with what the training loop would have to wait for."""

    step: Step
    positions: dict[Place, int]
    """how many of them take part"""
    hashes: dict[Place, tuple[bytes, bool]]
    """of the windows (`csae.data.seen`) without the padding, and whether they are of their tokens"""


@contextmanager
def ready_steps(
    batches: Batches,
    first: int,
    last: int,
    state: dict[str, Tensor] | None,
    device: torch.device,
    places: set[Place],
    in_background: bool | None = None,
) -> Iterator[Iterator[Ready]]:
    """The steps from `first` to before `last`, in order, at these places, on this device; and those without batches.

    state: as `Batches.start` takes it. in_background: AHEAD steps are made in a thread while the caller works; by
    default where the device is CUDA. An error of the source is raised where its step would have come. On leaving,
    the thread ends after the step that it is at.
    """
    threaded = device.type == "cuda" if in_background is None else in_background

    def steps() -> Iterator[Ready]:
        left = last - first
        made = batches.start(first, state)
        while left:
            step = next(made, None)
            if step is None:
                return
            wanted = {place: batch for place, batch in step.batches.items() if place in places}
            yield _ready(step._replace(batches=wanted), device)
            left -= bool(step.batches)

    if not threaded:
        yield steps()
    elif device.type != "cuda":
        with ahead(steps(), AHEAD) as made:
            yield made
    else:
        with ahead(_on_a_stream_of_its_own(steps, device), AHEAD) as timed:
            yield (_used_here(ready, event) for ready, event in timed)


@contextmanager
def ahead(items: Iterable[T], count: int) -> Iterator[Iterator[T]]:
    """The items in order, of which up to `count` are made in a thread before they are asked for.

    An error is raised in its place in the order. The thread has ended when the block is left, however that is.
    """
    made: queue.Queue[tuple[T | None, BaseException | None]] = queue.Queue()
    room, over = threading.Semaphore(count), threading.Event()

    def work() -> None:
        iterator = iter(items)
        try:
            while True:
                room.acquire()
                if over.is_set():
                    return
                made.put((next(iterator), None))
        except BaseException as error:  # StopIteration is the end
            made.put((None, error))
        finally:
            if isinstance(iterator, Generator):
                iterator.close()  # here, where it has set a stream

    def given() -> Iterator[T]:
        while True:
            item, error = made.get()
            if isinstance(error, StopIteration):
                return
            if error is not None:
                raise error
            room.release()
            yield item  # type: ignore[misc]

    # A daemon: if the program is ended by force, it does not wait for the language model.
    thread = threading.Thread(target=work, name="csae-batches", daemon=True)
    thread.start()
    try:
        yield given()
    finally:
        over.set()
        room.release()
        thread.join()


def _ready(step: Step, device: torch.device) -> Ready:
    positions = {place: int(batch.mask.cpu().numpy().sum()) for place, batch in step.batches.items()}
    of_tokens: dict[int, bytes] = {}  # all places have the same tokens
    hashes = {}
    for place, batch in step.batches.items():
        own = slice(len(batch.acts) - step.padding)
        if batch.tokens is None:
            hashes[place] = window_hashes(None, batch.acts[own]).tobytes(), False
        else:
            if id(batch.tokens) not in of_tokens:
                of_tokens[id(batch.tokens)] = window_hashes(batch.tokens[own], batch.acts[own]).tobytes()
            hashes[place] = of_tokens[id(batch.tokens)], True
    moved = {place: Batch(*(_to(tensor, device) for tensor in batch)) for place, batch in step.batches.items()}  # type: ignore[arg-type]
    return Ready(step._replace(batches=moved), positions, hashes)


def _to(tensor: Tensor | None, device: torch.device) -> Tensor | None:
    if tensor is None or tensor.device == device:
        return tensor
    if tensor.device.type == "cpu" and device.type == "cuda":
        tensor = tensor.pin_memory()  # else the copy waits
    return tensor.to(device, non_blocking=True)


def _on_a_stream_of_its_own(
    steps: Callable[[], Iterator[Ready]], device: torch.device
) -> Iterator[tuple[Ready, torch.cuda.Event]]:
    """The steps, made in another stream of the device, each with an event that says when it is made."""
    stream = torch.cuda.Stream(device)
    # What the source holds, such as the weights of the language model, may still be on its way.
    stream.wait_stream(torch.cuda.default_stream(device))
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.cuda.stream(stream))
        for ready in steps():
            event = torch.cuda.Event()
            event.record(stream)
            yield ready, event


def _used_here(ready: Ready, event: torch.cuda.Event) -> Ready:
    """The step for the current stream, which waits until it is made, and keeps its memory until it is used."""
    for batch in ready.step.batches.values():
        for tensor in batch:
            if tensor is not None and tensor.device.type == "cuda":
                here = torch.cuda.current_stream(tensor.device)
                here.wait_event(event)
                tensor.record_stream(here)
    return ready
