"""Forwards that run as graphs of torch.compile, and the hooks that they hold.

torch.compile runs the hooks of the module that it is given outside of the graph, as plain Python:
the border, where a forward is identified. The hooks of the modules inside are part of the graph.
Those of routers are tensor code, and what they take comes out of the graph as further outputs of
it, so nothing waits and nothing breaks the graph.
"""

import functools
import threading
from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch._C._dynamo.eval_frame import set_eval_frame
from torch._dynamo.eval_frame import skip_code

from bhlog.capture.contract.errors import UnsupportedModel

Hook = Callable[..., Any]
Taken = list[tuple[tuple[int, ...], dict[str, Tensor]]]

WHOLE_GRAPH = (
    "hooks of bhlog at the border of a model cannot be part of a compiled graph: compile the model "
    "itself with fullgraph=True, not a function or a part of it"
)


class Graph:
    """The graph that runs a forward, from the border of a model to the same border.

    Its attributes are read and written by the hooks that the graph holds.

    Attributes:
        border: the module at which the forward was identified; None while no graph runs.
        taken: layers and tensors (T, ...) by name of the routers that have run, in their order;
            None where nothing is recorded.
        keep: (T,) bool, the forward's rows that are tokens; None if it is not followed.
        handed: what a router has handed on, until the hooks after bhlog's have run.
        changed: a layer where they put something else in its place.
    """

    def __init__(self) -> None:
        self._clear()

    def _clear(self) -> None:
        self.border: nn.Module | None = None
        self.under_way = False
        self.taken: Taken | None = None
        self.keep: Tensor | None = None
        self.handed: list[Any] = []
        self.changed: int | None = None
        self._thread = 0

    @classmethod
    def unfollowed(cls) -> Self:
        """Stands for any graph, where nobody asks which forward it runs."""
        graph = cls()
        graph.under_way = True
        return graph

    def begin(self, border: nn.Module, keep: Tensor | None, *, recorded: bool) -> None:
        """Python is at the border, and the graph runs next.

        Raises:
            UnsupportedModel: another thread runs one.
        """
        if self.under_way and self._thread != threading.get_ident():
            raise UnsupportedModel(
                "two threads run a compiled model at once, and bhlog follows one at a time; run "
                "them in turn, or observe a copy of the model in each"
            )
        self._thread = threading.get_ident()
        self.border, self.under_way, self.keep = border, True, keep
        self.taken = [] if recorded else None

    def is_at(self, module: nn.Module) -> bool:
        """Whether a graph of this thread runs that was entered at this module."""
        return self.under_way and self._thread == threading.get_ident() and module is self.border

    def around(self, module: nn.Module) -> bool:
        """Whether a graph of this thread runs that was entered at another module."""
        here = self.under_way and self._thread == threading.get_ident()
        return here and module is not self.border

    def end(self) -> tuple[int | None, Taken]:
        """The graph is done, or failed: a layer that was changed, and what routers returned."""
        changed, taken = self.changed, self.taken or []
        self._clear()
        return changed, taken


def at_border(hook: Hook, graph: Graph) -> Hook:
    """A hook that graphs do not hold, called as hook(..., compiled=C).

    C says whether a graph is about to run, or has run. Inside one that runs it does nothing.
    """
    apart = torch.compiler.disable(hook, reason=WHOLE_GRAPH)  # type: ignore[no-untyped-call]

    def call(*args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():  # traced
            if _exporting() or graph.under_way:
                return None
            return apart(*args, compiled=True, **kwargs)
        compiler = set_eval_frame(None)  # the hook's own code is not compiled
        try:
            return hook(*args, compiled=compiler is not None, **kwargs)
        finally:
            set_eval_frame(compiler)

    skip_code(call.__code__)  # outside of a graph it runs as it is
    return call


def at_router(hook: Hook, graph: Graph, *, exported: bool = False) -> Hook:
    """A hook that graphs hold; in a graph that was not entered at the border it breaks them.

    Args:
        exported: whether it takes part in a model's export, which is no run of it.
    """
    apart = torch.compiler.disable(hook, reason=WHOLE_GRAPH)  # type: ignore[no-untyped-call]

    @functools.wraps(hook)
    def call(*args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            if _exporting():
                return hook(*args, **kwargs) if exported else None
            if not graph.under_way:
                return apart(*args, **kwargs)
        return hook(*args, **kwargs)

    return call


def _exporting() -> bool:
    """Whether a model is exported; dynamo of torch 2.11 answers is_exporting() with True always."""
    return bool(getattr(torch.compiler, "_is_exporting_flag", False))
