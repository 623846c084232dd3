"""A model's forwards: the one place that knows which is under way, and what becomes of it."""

import inspect
import os
import threading
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from bhlog.capture.changes import Changes
from bhlog.capture.contract.errors import WriterFailed
from bhlog.capture.recorder import Record, Recorder
from bhlog.capture.tokens.filler import Suspects
from bhlog.capture.tokens.generation import watch_generation
from bhlog.capture.tokens.identity import Tracker
from bhlog.capture.tokens.stream import Forward, Stream
from bhlog.capture.writing.writer import RunWriter


class _Thread(threading.local):
    """Where a thread stands; DataParallel runs a forward per thread.

    Attributes:
        in_head: the model with a head is running, so its logits are still to come.
        paused: blocks of `paused` that it is in.
        forward: the base model's forward under way.
        record: the forward whose routers' outputs are taken, until the head has answered.
    """

    in_head: bool = False
    paused: int = 0
    forward: Forward | None = None
    record: Record | None = None


class Forwards:
    """Follows the forwards of a model, by hooks on its base model and on the model with a head.

    It owns the tracker, which says who a forward's rows are, and the recorder, which keeps what its
    routers returned; neither knows of the other. The states of a forward, in the thread that runs
    it:

        ______ base runs ______         ______ model with a head ______
        begun ----> base is done ----> head seen ----> ended ----> released
          |              |                 |            |  ^
          |              |                 |            v  |
          +---- an exception: gone <-------+           may be cut

    begun: the tracker has numbered it, and routers add their outputs to its record. Outside of this
        state they are ignored: activation checkpointing runs routers again in the backward pass.
    base is done: its columns are in the tracker's stream, as they are in the cache. Without a head
        it ends here.
    head seen: the loss of its tokens is known.
    ended: every router has run, and their outputs are copied on the device.
    may be cut: a cache that drops its last columns takes rejected drafts out of the forward that
        fed them.
    released: another forward begins in the thread, or all is flushed. It can no longer change, and
        is on its way to the writer.

    Args:
        layers: decoder layers that every forward must have.
        writer: where rows go; None follows the forwards and records nothing.
        pad_token_id: see bhlog.capture.observe.observe.
    """

    def __init__(
        self, layers: Sequence[int], writer: RunWriter | None, *, pad_token_id: int | None = None
    ) -> None:
        self.recorder = None if writer is None else Recorder(writer, layers)
        self.tracker = Tracker(pad_token_id=pad_token_id, on_cut=self._cut)
        if writer is not None:
            self.tracker.next_sequence = writer.next_sequence
            self.tracker.next_forward = writer.next_forward
        self._here = _Thread()
        self._pid = os.getpid()

    def attach(self, changes: Changes, model: nn.Module, base: nn.Module) -> None:
        """Follow a model from now on, until the changes are undone and this is closed.

        Args:
            model: with a head, or the base model itself.
            base: the model whose arguments say who the routers' rows are.
        """
        if base is not model and self.recorder is not None:
            changes.before_forward(model, self._begin_head, prepend=True)
            changes.after_forward(model, self._end_head, always=True)
        if self.tracker.pad_token_id is None and self.recorder is not None:
            self.tracker.suspects = _suspects(base)
        self._signature = inspect.signature(base.forward)
        changes.before_forward(base, self._begin)
        changes.after_forward(base, self._end, always=True)
        watch_generation(changes, model, self.tracker)

    def close(self) -> None:
        """Release the last forwards and leave no trace on caches that are still alive.

        Warns of what was logged and may be padding.

        Raises:
            WriterFailed: the writer stopped on an error.
        """
        self.tracker.release()
        if self.recorder is not None and os.getpid() == self._pid:
            self.recorder.flush()
            words = None if self.tracker.suspects is None else self.tracker.suspects.words()
            if words is not None:
                warnings.warn(words, stacklevel=2)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Log nothing of what this thread runs inside the block."""
        self._here.paused += 1
        try:
            yield
        finally:
            self._here.paused -= 1

    @property
    def forward(self) -> Forward | None:
        """The base model's forward under way in this thread."""
        return self._here.forward

    def record(self, layers: Sequence[int], tensors: dict[str, Tensor]) -> None:
        """Take a router's output; see Record.take."""
        record = self._here.record
        if record is not None:
            record.take(layers, tensors)

    def _begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if os.getpid() != self._pid:
            raise WriterFailed(
                f"process {os.getpid()} was forked inside the block of process {self._pid}, which "
                "writes the run: nothing of it would be logged; run the model in that process, or "
                "observe it within the forked one"
            )
        here = self._here
        here.forward = here.record = None
        if here.paused:
            return
        here.forward = self.tracker.begin(_by_name(self._signature, args, kwargs))
        if self.recorder is not None:
            here.record = self.recorder.begin(here.forward)

    def _end(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        here = self._here
        forward, here.forward = here.forward, None
        if output is None:
            here.record = None
        elif forward is not None:
            self.tracker.end(forward, output)
            if not here.in_head:
                self._ended()

    def _begin_head(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        self._here.in_head = True

    def _end_head(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        here = self._here
        here.in_head = False
        if output is None:
            here.record = None
        if here.record is None:
            return
        logits = _head_logits(output)
        # a tensor names columns of the caller's choice: which tokens they predict is not known
        if logits is not None and not isinstance(kwargs.get("logits_to_keep"), Tensor):
            here.record.see(logits.detach())
        self._ended()

    def _ended(self) -> None:
        record, self._here.record = self._here.record, None
        if record is not None and self.recorder is not None:
            self.recorder.end(record)

    def _cut(self, stream: Stream, length: int) -> None:
        if self.recorder is not None:
            self.recorder.cut(stream, length)


def _by_name(
    signature: inspect.Signature, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> dict[str, Any]:
    """A call's arguments, those that the signature takes as further keywords too."""
    inputs = dict(signature.bind_partial(*args, **kwargs).arguments)
    for name, parameter in signature.parameters.items():
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:
            inputs.update(inputs.pop(name, {}))
    return inputs


def _head_logits(output: Any) -> Tensor | None:
    """(B, H, V) logits of the vocabulary in what a model with a head returned."""
    found = [getattr(output, "logits", None), *(output if isinstance(output, tuple) else ())]
    return next((t for t in found if isinstance(t, Tensor) and t.dim() == 3), None)


def _suspects(base: nn.Module) -> Suspects | None:
    """A count of what may be padding, if the model says how many ids it knows."""
    embed = getattr(base, "get_input_embeddings", lambda: None)()
    n_ids = getattr(embed, "num_embeddings", None)
    if n_ids is None:
        return None
    config: Any = base.config
    pad, eos = getattr(config, "pad_token_id", None), getattr(config, "eos_token_id", None)
    ends = eos if isinstance(eos, list) else [eos]
    return Suspects(n_ids, {0, pad, *ends} - {None}, pad)
