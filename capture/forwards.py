"""A model's forwards: the one place that knows which is under way, and what becomes of it."""

import os
import threading
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from bhlog.capture.calls import (
    around,
    by_name,
    chosen_in,
    head_logits,
    is_traced,
    takes,
    vocabularies,
)
from bhlog.capture.changes import Changes
from bhlog.capture.contract.errors import UnsupportedModel, WriterFailed
from bhlog.capture.graphs import Graph, at_border
from bhlog.capture.recorder import Record, Recorder
from bhlog.capture.routers.routing import warn_of_few_rows
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
        outer_ids: of each model around the base model that is running, its input_ids or those of
            the one around it.
        forward: the base model's forward under way.
        record: the forward whose routers' outputs are taken, until the head has answered.
    """

    in_head: bool = False
    paused: int = 0
    outer_ids: tuple[Tensor | None, ...] = ()
    forward: Forward | None = None
    record: Record | None = None

    def __init__(self) -> None:
        self.steered: dict[int, Any] = {}


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

    A forward that runs as a graph of torch.compile begins where the graph is entered, at the model
    with a head or the base model, and what its routers returned is added to its record at the end.

    Args:
        layers: decoder layers that every forward must have.
        writer: where rows go; None follows the forwards and records nothing.
        pad_token_id: see bhlog.capture.observe.observe.
        ranked_at: level of BH where rows are ranked within their forward; None where none are.
    """

    def __init__(
        self,
        layers: Sequence[int],
        writer: RunWriter | None,
        *,
        pad_token_id: int | None = None,
        ranked_at: float | None = None,
    ) -> None:
        self.recorder = None if writer is None else Recorder(writer, layers)
        self.tracker = Tracker(pad_token_id=pad_token_id, on_cut=self._cut)
        if writer is not None:
            self.tracker.next_sequence = writer.next_sequence
            self.tracker.next_forward = writer.next_forward
        self.graph = Graph()
        self._ranked_at = ranked_at
        self._here = _Thread()
        self._pid = os.getpid()

    def attach(self, changes: Changes, model: nn.Module, base: nn.Module, head: nn.Module) -> None:
        """Follow a model from now on, until the changes are undone and this is closed.

        Args:
            model: the model that is observed or routed.
            base: the innermost one in it that holds all routers: its arguments say who their rows
                are.
            head: the outermost that the library made, whose answer has the vocabulary's logits.
        """
        self._changes = changes
        outside = around(model, base)

        def follow(module: nn.Module, begin: Any, end: Any, *, prepend: bool = True) -> None:
            changes.before_forward(module, at_border(begin, self.graph), prepend=prepend)
            changes.after_forward(module, at_border(end, self.graph), always=True)

        if head is not base:
            follow(head, self._begin_head, self._end_head)
        if self.recorder is not None:
            self._vocabularies = vocabularies(head)
            for outer in outside:
                if "input_ids" in takes(outer).parameters:
                    follow(outer, self._begin_outer, self._end_outer)
            if self.tracker.pad_token_id is None:
                self.tracker.suspects = _suspects(base)
        self._base_takes, self._head_takes = takes(base), takes(head)
        self._embeds = head in outside[:-1]  # a model between them turns ids into embeddings
        follow(base, self._begin, self._end, prepend=False)
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
    def recording(self) -> bool:
        """Whether routers' outputs are taken now, in this thread or graph."""
        if torch.compiler.is_compiling():
            return self.graph.taken is not None
        return self._here.record is not None

    @property
    def keep(self) -> Tensor | None:
        """(T,) bool, which rows of the forward under way are tokens; None if it is not followed."""
        if torch.compiler.is_compiling():
            return self.graph.keep
        forward = self._here.forward
        return None if forward is None else forward.keep.reshape(-1)

    def record(self, layers: tuple[int, ...], tensors: dict[str, Tensor]) -> None:
        """Take a router's output; see Record.take."""
        if torch.compiler.is_compiling():
            if self.graph.taken is not None:
                self.graph.taken.append((layers, tensors))
        elif self._here.record is not None:
            self._here.record.take(layers, tensors)

    def at_door(self, layers: tuple[int, ...], given: tuple[Any, ...]) -> None:
        """The experts of a layer are called: log those that they are given.

        Args:
            layers: as `record` had them.
            given: the arguments of the call.

        Raises:
            UnsupportedModel: routing has decided otherwise, or it is not known what they get.
        """
        taken = self._taken(layers)
        if taken is None or any(argument is taken["experts"] for argument in given):
            return
        experts, weights = chosen_in(given, like=taken["experts"])
        if "n_selected" not in taken:
            if experts is None or weights is None:
                raise UnsupportedModel(
                    f"layer {layers[0]}: its experts are given something else than its router "
                    "returned, and which experts run with which weights cannot be read of it"
                )
            taken.update(experts=experts, weights=weights)
        elif torch.compiler.is_compiling():
            self.graph.changed = layers[0]
        elif experts is None or not torch.equal(experts, taken["experts"]):
            raise _changed(layers[0])

    def _taken(self, layers: tuple[int, ...]) -> dict[str, Tensor] | None:
        """What the router of these layers has returned last."""
        if torch.compiler.is_compiling():
            found = (tensors for at, tensors in reversed(self.graph.taken or ()) if at == layers)
        else:
            record = self._here.record
            by_layer = {} if record is None else record.layers
            found = (by_layer[layer] for layer in reversed(layers) if layer in by_layer)
        return next(found, None)

    def steered(self, layer: int, output: Any) -> None:
        """Note what a router hands on, as it is recorded."""
        if torch.compiler.is_compiling():
            self.graph.handed.append(output)
        elif self._here.record is not None:
            self._here.steered[layer] = output

    def check_steered(self, layer: int, output: Any) -> None:
        """Raise if another hook has put something else in its place.

        Raises:
            UnsupportedModel: the experts that run are not those that are logged.
        """
        if torch.compiler.is_compiling():
            noted = self.graph.handed.pop()
            if not (noted[1] is output[1] and noted[2] is output[2]):
                self.graph.changed = layer
        elif self._here.steered.pop(layer, output) is not output:
            raise _changed(layer)

    def _begin(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], *, compiled: bool
    ) -> None:
        if not self.graph.around(module):
            self._identify(module, by_name(self._base_takes, args, kwargs), compiled=compiled)

    def _identify(self, module: nn.Module, inputs: dict[str, Any], *, compiled: bool) -> None:
        """A forward begins at a module."""
        if os.getpid() != self._pid:
            raise WriterFailed(
                f"process {os.getpid()} was forked inside the block of process {self._pid}, which "
                "writes the run: nothing of it would be logged; run the model in that process, or "
                "observe it within the forked one"
            )
        here = self._here
        here.forward = here.record = None
        if not (here.paused or is_traced(inputs)):
            self._changes.stay_last()
            foreign = self._take_outer_ids(inputs) or (compiled and self._embeds)
            here.forward = self.tracker.begin(inputs)
            here.forward.foreign = foreign
            ranked_at = self._ranked_at
            if ranked_at is not None and warn_of_few_rows(here.forward.keep.numel(), ranked_at):
                self._ranked_at = None  # once
            if self.recorder is not None:
                here.record = self.recorder.begin(here.forward)
        if compiled:
            self.graph.begin(module, self.keep, recorded=here.record is not None)

    def _end(
        self, module: nn.Module, args: Any, kwargs: Any, output: Any, *, compiled: bool
    ) -> None:
        if self.graph.around(module):
            return
        here = self._here
        forward, here.forward = here.forward, None
        changed, taken = self.graph.end() if self.graph.is_at(module) else (None, ())
        if output is None or changed is not None:
            here.record = None
        if output is not None and changed is not None:
            raise _changed(changed)
        if output is None:
            return
        if forward is not None:
            self.tracker.end(forward, output)
            if here.record is not None:
                for layers, tensors in taken:
                    here.record.take(layers, tensors)
            if not here.in_head:
                self._ended()

    def _take_outer_ids(self, inputs: dict[str, Any]) -> bool:
        """Give a forward of embeddings the ids that a model around it was given, if it has them."""
        ids = self._here.outer_ids[-1] if self._here.outer_ids else None
        embeds = inputs.get("inputs_embeds")
        if ids is None or embeds is None or inputs.get("input_ids") is not None:
            return False
        if ids.shape != embeds.shape[:2]:
            return False
        inputs["input_ids"] = ids.to(embeds.device)
        return True

    def _begin_outer(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: Any, *, compiled: bool
    ) -> None:
        here = self._here
        ids = kwargs.get("input_ids")
        if ids is None and args:
            ids = by_name(takes(module), args, kwargs).get("input_ids")
        if not isinstance(ids, Tensor):
            ids = here.outer_ids[-1] if here.outer_ids else None
        here.outer_ids = (*here.outer_ids, ids)

    def _end_outer(
        self, module: nn.Module, args: Any, kwargs: Any, output: Any, *, compiled: bool
    ) -> None:
        self._here.outer_ids = self._here.outer_ids[:-1]

    def _begin_head(self, module: nn.Module, args: Any, kwargs: Any, *, compiled: bool) -> None:
        self._here.in_head = True
        if compiled:
            self._identify(module, by_name(self._head_takes, args, kwargs), compiled=True)

    def _end_head(
        self, module: nn.Module, args: Any, kwargs: Any, output: Any, *, compiled: bool
    ) -> None:
        here = self._here
        if self.graph.is_at(module):
            self._end(module, args, kwargs, output, compiled=True)
        here.in_head = False
        if output is None:
            here.record = None
        if here.record is None:
            return
        logits = head_logits(output, self._vocabularies)
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


def _changed(layer: int) -> UnsupportedModel:
    return UnsupportedModel(
        f"layer {layer}: a hook that was added inside the block, or code around the router, "
        "changes what routing by BH has decided, so the experts that run are not those that are "
        "logged; add hooks before the block, or observe the model instead of routing it"
    )


def _suspects(base: nn.Module) -> Suspects | None:
    """A count of what may be padding, if the model says how many ids it knows."""
    embed = getattr(base, "get_input_embeddings", lambda: None)()
    n_ids = getattr(embed, "num_embeddings", None)
    if n_ids is None:
        return None
    config: Any = base.config
    names = "pad_token_id", "bos_token_id", "eos_token_id"
    pad, bos, eos = (getattr(config, name, None) for name in names)
    ends = eos if isinstance(eos, list) else [eos]
    return Suspects(n_ids, {0, pad, bos, *ends} - {None}, pad)
