"""Replayed decisions as Parquet shards, row-aligned with the log they came from."""

import fcntl
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory

from bhlog.analysis.fold import WHOLE, Scope
from bhlog.analysis.log import Log
from bhlog.analysis.replay.decide import Decider, decider_of
from bhlog.analysis.replay.listed import LIST_NAME, write_list
from bhlog.analysis.replay.parts import Parts
from bhlog.capture.contract.errors import InvalidOption, RouterLogError, RunExists
from bhlog.capture.contract.files import make_folder, require_local, sync_folder
from bhlog.capture.contract.null.model import KdeModel
from bhlog.capture.contract.rule import BhOptions
from bhlog.capture.contract.store import Store
from bhlog.capture.contract.uris import shown


def setting_name(options: BhOptions, n_experts: int, null: str | None = None) -> str:
    """Name of a replay's folder, told from its settings: alpha-0.3_k-1-16.

    Args:
        null: where p-values come from, unless from the run's own null model.
    """
    low, high = options.bounds(n_experts)
    one = options.policy is None
    rule = f"alpha-{float(options.alpha)}" if one else options.named.file_name
    parts = [rule, f"k-{low}-{high}"]
    if options.temperature != 1:
        parts.append(f"t-{float(options.temperature)}")
    if options.renormalize != "model":
        parts.append("renormalized" if options.renormalize else "not-renormalized")
    if null is not None:
        parts.append(null)
    return "_".join(parts)


def write_decisions(
    log: Log,
    settings: Sequence[BhOptions],
    out: str | Path,
    *,
    kde: KdeModel | None = None,
    scope: Scope = WHOLE,
) -> list[Path | str]:
    """Write the decisions of a replay: OUT/NAME/rank00000-00000.parquet for each setting.

    A file has the rows of the routing shard of the same name, in the same order; _replay.json lists
    them. A folder gets its name when it is whole; until then it is in OUT/.part, which one call at
    a time writes. Behind a URI, files are uploaded as they are made, and the list at the end: there
    is no replay without one. Memory stays flat.

    Weights follow the model's formula as far as the manifest tells it, in float32: a softmax or
    sigmoid of each logit, divided by its sum where the model does so, times its scale. Models that
    compute weights in bfloat16 round them further. A row without a finite logit keeps the logged
    experts and weights.

    Args:
        settings: see settings_of.
        kde: null model; None takes the run's own.
        scope: threads, progress and an executor, whose workers write where OUT is: to a folder that
            all machines share, or to a URI; a file has every row of its shard.

    Returns:
        The folder or URI of each setting.

    Raises:
        RunExists: a folder is there already, or another call is writing it.
        InvalidOption: a setting is there twice, the scope leaves rows out, the model has a formula
            of its own, or OUT cannot be written.
        InvalidOption, KdeMismatch: see Decider.
    """
    if scope.layers is not None or scope.where is not None or scope.sample < 1:
        raise InvalidOption(
            f"{shown(str(out))}: holds every row of the log: leave layers, where and sample out"
        )
    decider = decider_of(log, settings, kde)
    model = log.manifest.model
    if model.scoring not in ("softmax", "sigmoid"):
        raise InvalidOption(
            f"{log.path}: the weights of {model.class_name} follow a formula ({model.scoring}) "
            "that the run does not hold, so decisions cannot be written; the summary needs none"
        )
    null = _null_name(log, decider, kde)
    names = [setting_name(options, log.n_experts, null) for options in settings]
    if len({*names}) < len(names):
        raise InvalidOption("a setting is asked for twice: write each replay once")
    if "://" in str(out):
        return _upload(log, decider, settings, names, str(out), scope)
    require_local(Path(out))
    folders = [Path(out) / name for name in names]
    for folder in folders:
        if folder.exists():
            raise _there(folder)
    try:
        with ExitStack() as stack:
            place = Path(out).absolute() / ".part"
            parts = [
                stack.enter_context(_part(place / name, folder))
                for name, folder in zip(names, folders, strict=True)
            ]
            seals = Parts(decider, settings, names, str(place)).write_all(log, scope)
            for part in parts:
                write_list(part, seals[part.name])
            for part, folder in zip(parts, folders, strict=True):
                _name(part, folder)
        sync_folder(Path(out))
    except RouterLogError:  # some are OSErrors too
        raise
    except OSError as error:
        raise InvalidOption(f"{out}: cannot write there ({error.strerror or error})") from error
    finally:
        with suppress(OSError):  # not there, or in use by another replay
            (Path(out) / ".part").rmdir()
    return [*folders]


def _upload(
    log: Log,
    decider: Decider,
    settings: Sequence[BhOptions],
    names: Sequence[str],
    uri: str,
    scope: Scope,
) -> list[Path | str]:
    """Write into an object store: the parts of each setting, then their lists.

    What was uploaded is removed if anything fails; a part without a list is no replay's.
    """
    store = Store(uri)
    where, mark, options = store.name.partition("?")
    try:
        store.check()
        for name in names:
            left = store.names(name)
            if LIST_NAME in left:
                raise _there(f"{where}/{name}")
            for file in left:  # of an upload that did not come to its end
                store.remove(f"{name}/{file}")
        try:
            seals = Parts(decider, settings, names, uri).write_all(log, scope)
            with TemporaryDirectory(prefix="bhlog-") as folder:
                for name in names:
                    write_list(Path(folder), seals[name])
                    store.put(Path(folder) / LIST_NAME, f"{name}/{LIST_NAME}")
        except BaseException:
            with suppress(OSError):  # away: the parts have no list
                for name in names:
                    for file in store.names(name):
                        store.remove(f"{name}/{file}")
            raise
    except RouterLogError:
        raise
    except OSError as error:
        raise InvalidOption(f"{where}: cannot write there ({error.strerror or error})") from error
    return [f"{where}/{name}{mark}{options}" for name in names]


@contextmanager
def _part(part: Path, folder: Path) -> Iterator[Path]:
    """An empty folder that this call alone writes, by a lock that ends with its process.

    It is gone afterwards, unless it got its name.

    Raises:
        RunExists: another call is writing it.
    """
    while True:
        make_folder(part)
        try:
            lock = os.open(part, os.O_RDONLY | os.O_DIRECTORY)
        except FileNotFoundError:  # another call has just ended
            continue
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(lock)
            raise RunExists(
                f"{folder}: another command is writing this replay; wait for it, or choose --out"
            ) from error
        if _is_there(lock, part):
            break
        os.close(lock)
    try:
        for left in part.iterdir():  # by a call that was killed
            left.unlink(missing_ok=True)
        yield part
    finally:
        if _is_there(lock, part):  # and not another call's already
            shutil.rmtree(part, ignore_errors=True)
        os.close(lock)


def _is_there(descriptor: int, path: Path) -> bool:
    """Whether what is open still has this path."""
    try:
        return os.path.samestat(path.stat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _name(part: Path, folder: Path) -> None:
    """Give a whole replay its name.

    Raises:
        RunExists: another one got it meanwhile.
    """
    try:
        part.rename(folder)
    except OSError as error:
        if folder.is_dir():
            raise _there(folder) from error
        raise


def _there(folder: Path | str) -> RunExists:
    return RunExists(f"{folder}: this replay is there already; remove it or choose --out")


def _null_name(log: Log, decider: Decider, kde: KdeModel | None) -> str | None:
    """How a folder's name tells the null model, unless it is the run's own."""
    if decider.empirical:
        return "empirical"
    if kde is None:
        return None
    sha256 = kde.sha256
    return None if sha256 == log.manifest.routing.kde_sha256 else f"kde-{sha256[:8]}"
