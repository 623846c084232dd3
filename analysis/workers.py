"""Workers: tasks done by threads here, or on an executor of the caller's; results in order."""

import os
import pickle
import secrets
import socket
import sys
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import (
    BrokenExecutor,
    CancelledError,
    Executor,
    Future,
    ThreadPoolExecutor,
)
from contextlib import suppress
from functools import cache, lru_cache, partial
from importlib.metadata import PackageNotFoundError, version
from itertools import islice
from typing import Any, TypeVar

from bhlog.analysis.allocator import kept_memory
from bhlog.analysis.memory_limit import is_out_of_memory
from bhlog.capture.contract.errors import MissingRun, RouterLogError, one_line

T = TypeVar("T")
R = TypeVar("R")

MOST_WAITING = 1 << 10  # tasks that an executor is given at a time


def in_order(
    work: Callable[[T], R], items: Iterable[T], threads: int, stopped: threading.Event
) -> Generator[R, None, None]:
    """What work gives for each item, in their order, from several threads; few results wait.

    Args:
        stopped: set when no more is wanted: after an error, or when the generator is closed.
    """
    with ThreadPoolExecutor(threads) as pool:
        jobs: deque[Future[R]] = deque()
        try:
            for item in items:
                jobs.append(pool.submit(work, item))
                if len(jobs) == 2 * threads:
                    yield jobs.popleft().result()
            while jobs:
                yield jobs.popleft().result()
        except BaseException:
            stopped.set()
            for job in jobs:
                job.cancel()
            raise


def elsewhere(
    executor: Executor, task: Callable[[T], R], items: Iterable[T]
) -> Generator[R, None, None]:
    """What a task gives for each item, in their order, from an executor of the caller's.

    Args:
        task: pickles, as items and results do.

    Raises:
        RouterLogError: a task failed, or its workers ended; it names the worker where that is
            known.
    """
    waiting = iter(items)
    jobs: deque[Future[R]] = deque()
    packed: Any = _packed(task)
    give = executor.submit
    # Dask's executor fails where a worker dies just after its task; the client behind it does not.
    # What tasks share is a task, too: workers pass it on, and another makes it again.
    client = getattr(executor, "_client", None)
    if client is not None:
        give = partial(client.submit, **getattr(executor, "_kwargs", {}) | {"pure": False})
        packed = give(_same, packed)

    def submit(most: int) -> None:
        for item in islice(waiting, most):
            jobs.append(give(_there, packed, item, own_version()))

    try:
        submit(MOST_WAITING)
        while jobs:
            done = jobs[0].result()
            jobs.popleft()
            submit(1)
            yield done
    except (BrokenExecutor, CancelledError, ModuleNotFoundError) as error:
        if isinstance(error, ModuleNotFoundError) and client is not None:
            check_workers(client)  # one that joined late, which it names
        name = getattr(executor, "address", type(executor).__name__)
        raise RouterLogError(f"{name}: {_ended(error)}") from error
    except Exception as error:
        if type(error).__name__ != "KilledWorker":  # Dask's, which is not imported for it
            raise
        last = getattr(getattr(error, "last_worker", None), "address", "unknown")
        raise RouterLogError(
            f"worker {last}: ended in the middle of a task, as others did before it; look at the "
            "workers' logs, and give each more memory or fewer threads"
        ) from error
    finally:
        for job in jobs:
            if client is None:
                job.cancel()
        jobs.clear()  # Dask drops what nobody waits for


@cache
def own_version() -> str:
    """The version of bhlog that is installed here; "none" where it is not."""
    try:
        return version("bhlog")
    except PackageNotFoundError:
        return "none"


def check_workers(client: Any) -> int:
    """How many workers a client of Dask has now.

    Raises:
        RouterLogError: one of them has no bhlog, or another version.
    """
    found: dict[str, Any] = client.run(version, "bhlog", on_error="return")
    for address, theirs in sorted(found.items()):
        if isinstance(theirs, Exception) and not isinstance(theirs, PackageNotFoundError):
            raise RouterLogError(f"worker {address}: {one_line(str(theirs))}") from theirs
        if theirs != own_version():
            words = theirs if isinstance(theirs, str) else "none"
            raise _other_version(f"worker {address}", words, own_version())
    return len(found)


def _other_version(worker: str, found: str, expected: str) -> RouterLogError:
    """What to say of a worker that has another bhlog, or "none"."""
    return RouterLogError(
        f"{worker}: bhlog there is {found}, here {expected}; install the same version on every "
        "worker"
    )


def _there(packed: bytes, item: T, expected: str) -> Any:
    """A task where it runs, whose errors say where that is."""
    if own_version() != expected:
        raise _other_version(_worker(), own_version(), expected)
    try:
        with kept_memory():
            return _unpacked(packed)(item)
    except MissingRun as error:
        raise MissingRun(
            f"{_worker()}: {error}; a worker opens the run itself: put it where all of them see it "
            "under this path"
        ) from error
    except RouterLogError as error:
        raise type(error)(f"{_worker()}: {error}") from error
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        raise RouterLogError(
            f"{_worker()}: out of memory; give workers more, or fewer threads each"
        ) from error


def _packed(task: Callable[[T], R]) -> bytes:
    """A task, with what makes it another one than those before."""
    # Dask's pickler takes what a script or a notebook defines, such as a policy
    dumps = getattr(sys.modules.get("cloudpickle"), "dumps", pickle.dumps)
    data: bytes = dumps((secrets.token_bytes(16), task))
    return data


@lru_cache(maxsize=2)
def _unpacked(packed: bytes) -> Callable[[Any], Any]:
    """The task, made once in a worker: logs that it opens and tables that it computes are kept."""
    task: Callable[[Any], Any] = pickle.loads(packed)[1]
    return task


def _same(packed: bytes) -> bytes:
    return packed


def _worker() -> str:
    """How errors name the process that runs a task."""
    distributed = sys.modules.get("distributed")
    if distributed is not None:
        with suppress(ValueError):  # of a process that is no worker of Dask's
            return f"worker {distributed.get_worker().address}"
    return f"worker {os.getpid()} on {socket.gethostname()}"


def _ended(error: BaseException) -> str:
    """Why an executor gives no more results."""
    if isinstance(error, ModuleNotFoundError):
        return (
            f"a worker lacks the package {error.name}; install the same version of bhlog on every "
            "worker"
        )
    if isinstance(error, CancelledError):
        return "its tasks were cancelled; is its scheduler still there?"
    return (
        f"its workers ended before their task was done ({one_line(str(error))}); look at their "
        "memory and logs, and run again with a new executor"
    )
