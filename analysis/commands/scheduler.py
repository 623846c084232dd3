"""--scheduler: a Dask cluster that folds in place of threads here."""

import logging
import threading
from collections.abc import Callable
from concurrent.futures import Executor, Future
from functools import cached_property
from typing import Any

import click

from bhlog.analysis.imports import needed
from bhlog.analysis.workers import check_workers
from bhlog.capture.contract.errors import InvalidOption, RouterLogError, one_line

SCHEMES = ("tcp", "tls", "ucx", "ws", "wss")
WAIT_SECONDS = 10  # for a scheduler to answer


class Cluster(Executor):
    """The workers of a Dask scheduler, which is asked when the first task comes.

    Args:
        address: such as tcp://host:8786.
    """

    def __init__(self, address: str) -> None:
        self.address = address
        self._closing: list[Callable[[], Any]] = []

    def submit(self, task: Callable[..., Any], /, *args: Any, **named: Any) -> "Future[Any]":
        """Run a task on a worker; Dask's future has what is used of one here.

        Raises:
            MissingExtra: Dask is not installed.
            RouterLogError: no scheduler answers, or a worker has another bhlog.
        """
        future: Future[Any] = self._client.submit(task, *args, pure=False, **named)
        return future

    def connect(self) -> None:
        """Ask the scheduler now; raises as submit does."""
        self._client  # noqa: B018 - asked once

    def close(self) -> None:
        """Leave the cluster, which drops what it has not done."""
        while self._closing:
            self._closing.pop()()

    @cached_property
    def _client(self) -> Any:
        distributed = needed("distributed", "cluster")
        for name in ("distributed", "distributed.client"):  # errors here are one line
            logging.getLogger(name).setLevel(logging.CRITICAL)
        found: Future[Any] = Future()

        def connect() -> None:
            try:
                found.set_result(
                    distributed.Client(self.address, timeout=WAIT_SECONDS, set_as_default=False)
                )
            except BaseException as error:
                found.set_exception(error)

        # in a thread, which is left alone: some steps of a client wait for ever
        threading.Thread(target=connect, daemon=True).start()
        try:
            client = found.result(WAIT_SECONDS + 1)
        except Exception as error:  # of many libraries: of sockets, TLS, web sockets
            why = f" ({one_line(str(error))})" if str(error) else ""
            raise RouterLogError(
                f"{self.address}: no Dask scheduler answers there within {WAIT_SECONDS} s{why}"
            ) from error
        self._closing.append(client.close)
        if not check_workers(client):
            click.echo(f"bhlog: {self.address}: no workers yet: waiting for one", err=True)
        return client


def _cluster(ctx: click.Context, _: click.Parameter, address: str | None) -> Cluster | None:
    if address is None:
        return None
    scheme, there, host = address.partition("://")
    if scheme not in SCHEMES or not there or not host:
        raise InvalidOption(
            f"--scheduler {one_line(address)}: no address of a Dask scheduler, such as "
            "tcp://host:8786"
        )
    cluster = Cluster(address)
    ctx.call_on_close(cluster.close)
    return cluster


scheduler_option = click.option(
    "--scheduler",
    "executor",
    envvar="DASK_SCHEDULER_ADDRESS",
    metavar="URI",
    callback=_cluster,
    help="A Dask cluster to do it, such as tcp://host:8786, which sees the run under the same "
    "path; needs bhlog[cluster]. Also by DASK_SCHEDULER_ADDRESS in the environment.",
)
