"""Following `generate`: when a prompt begins, and which rows end with the token just chosen."""

import functools
import gc
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor, nn
from transformers import StoppingCriteriaList

from bhlog.capture.changes import Changes
from bhlog.capture.contract.errors import UnknownIdentity
from bhlog.capture.tokens.identity import Tracker

_CRITERIA = "_get_stopping_criteria"
# each packs several requests in a row, in a thread that keeps errors to itself
_BATCHING = "generate_batch", "continuous_batching_context_manager", "init_continuous_batching"


class _Told(StoppingCriteriaList):
    """A generation's stopping criteria that tell the tracker what they decided."""

    def __init__(self, criteria: StoppingCriteriaList, tracker: Tracker) -> None:
        super().__init__(criteria)
        self._tracker = tracker

    def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
        done: Tensor = super().__call__(input_ids, scores, **kwargs)
        self._tracker.tokens_chosen(done)
        return done


def watch_generation(changes: Changes, model: nn.Module, tracker: Tracker) -> None:
    """Let generations of the model tell the tracker what they do.

    `generate` asks its model for the stopping criteria once, before the prompt is fed, and calls
    them after every token. What a model feeds without it, in a loop of its caller's, is text to the
    last id. Where the model observed is the inner one of a model that generates, that one is
    watched. A generation that fails leaves the settings of its model as they were.
    """
    generating = [module for module in model.modules() if _generates(module)]
    for module in generating or filter(_generates, _holders(model)):
        _watch(changes, module, tracker)


def _generates(module: nn.Module) -> bool:
    return hasattr(type(module), _CRITERIA) and hasattr(type(module), "generate")


def _watch(changes: Changes, module: Any, tracker: Tracker) -> None:
    criteria, generate = module._get_stopping_criteria, module.generate
    configs = _configs(module)

    @functools.wraps(criteria)
    def told_criteria(*args: Any, **kwargs: Any) -> StoppingCriteriaList:
        tracker.generation_begins()
        return _Told(criteria(*args, **kwargs), tracker)

    @functools.wraps(generate)
    def told_generate(*args: Any, **kwargs: Any) -> Any:
        if _exits_early(module, args, kwargs):
            raise UnknownIdentity(
                "assistant_early_exit drafts with the first layers of the model alone, whose rows "
                "are at some layers and not at others; generate without it, or with another model "
                "as assistant_model"
            )
        before = [dict(vars(config)) for config in configs]
        try:
            return generate(*args, **kwargs)
        except BaseException:
            for config, values in zip(configs, before, strict=True):
                vars(config).clear()
                vars(config).update(values)
            raise
        finally:
            tracker.generation_ends()

    changes.set(module, _CRITERIA, told_criteria)
    changes.set(module, "generate", told_generate)
    for name in _BATCHING:
        if hasattr(module, name):
            changes.set(module, name, _refused(name))


def _refused(name: str) -> Callable[..., Any]:
    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise UnknownIdentity(
            f"{name} packs several requests in a row, and bhlog cannot tell their tokens apart; "
            "call generate on padded batches, or leave the block first"
        )

    return refuse


def _exits_early(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    name = "assistant_early_exit"
    configs = [kwargs.get("generation_config"), *args, getattr(module, "generation_config", None)]
    config = next((c for c in configs if hasattr(c, name)), None)
    return kwargs.get(name, getattr(config, name, None)) is not None


def _configs(module: nn.Module) -> list[Any]:
    """Settings of a model and its parts, each once."""
    names = "config", "generation_config"
    found = [vars(part).get(name) for part in module.modules() for name in names]
    return list({id(config): config for config in found if hasattr(config, "__dict__")}.values())


def _holders(module: nn.Module) -> Iterator[nn.Module]:
    """Modules that have a module inside, found by who refers to it."""
    seen, inner = {id(module)}, [module]
    while inner:
        for holder in _parents(inner.pop()):
            if id(holder) not in seen:
                seen.add(id(holder))
                inner.append(holder)
                yield holder


def _parents(module: nn.Module) -> Iterator[nn.Module]:
    children = [found for found in gc.get_referrers(module) if type(found) is dict]
    for owner in gc.get_referrers(*children) if children else ():
        for holder in (owner, *(gc.get_referrers(owner) if type(owner) is dict else ())):
            if isinstance(holder, nn.Module) and any(holder._modules is d for d in children):
                yield holder
