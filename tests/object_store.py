"""An S3 server on this machine that tests start, stop and make fail."""

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import Thread
from typing import Any

import pyarrow.fs as pafs
import pytest
from moto.server import DomainDispatcherApplication, MotoRequestHandler, create_backend_app
from werkzeug.serving import BaseWSGIServer, make_server


class Quiet(MotoRequestHandler):  # type: ignore[misc, unused-ignore]
    def log_request(self, *_: object) -> None:
        pass


Reply = Callable[[str, list[tuple[str, str]]], Any]


class ObjectStore:
    """S3 with one bucket, whose content outlives a stop.

    Attributes:
        fault: None serves; "503" refuses what writes, "truncate" keeps half of what is put and says
            it has it all, "deny" forbids what writes.
        allowed: objects that are taken before nothing is; None takes all.
        delay: seconds before each answer.
        puts: paths that were written, in order.
    """

    def __init__(self, bucket: str = "logs") -> None:
        self.bucket = bucket
        self.fault: str | None = None
        self.allowed: int | None = None
        self.delay = 0.0
        self.puts: list[str] = []
        self._app = DomainDispatcherApplication(create_backend_app)
        self._port = 0
        self.start()
        store = pafs.S3FileSystem(
            endpoint_override=self.endpoint, scheme="http", allow_bucket_creation=True,
            access_key="key", secret_key="secret",
        )  # fmt: skip
        store.create_dir(bucket)
        self.fs = store

    @property
    def endpoint(self) -> str:
        return f"127.0.0.1:{self._port}"

    @property
    def environment(self) -> dict[str, str]:
        return {
            "AWS_ENDPOINT_URL": f"http://{self.endpoint}",
            "AWS_ACCESS_KEY_ID": "key",
            "AWS_SECRET_ACCESS_KEY": "secret",
            "AWS_EC2_METADATA_DISABLED": "true",
        }

    def start(self) -> None:
        self._server: BaseWSGIServer = make_server(
            "127.0.0.1", self._port, self, threaded=True, request_handler=Quiet
        )
        self._port = self._server.server_port
        self._thread = Thread(target=self._server.serve_forever, args=(0.01,), daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """From here on connections are refused."""
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def __call__(self, environ: dict[str, Any], reply: Reply) -> Iterable[bytes]:
        time.sleep(self.delay)
        method, path = environ["REQUEST_METHOD"], environ["PATH_INFO"]
        writes = method in ("PUT", "POST")
        if method == "POST" and "uploadId=" in environ["QUERY_STRING"] and self.allowed is not None:
            self.allowed -= 1
        if writes and (self.fault in ("503", "deny") or (self.allowed or 0) < 0):
            environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
            status, code = (
                ("503 Slow Down", "SlowDown")
                if self.fault == "503"
                else ("403 Forbidden", "AccessDenied")
            )
            body = f"<Error><Code>{code}</Code><Message>no</Message></Error>".encode()
            reply(status, [("Content-Type", "text/xml"), ("Content-Length", str(len(body)))])
            return [body]
        if method == "PUT":
            self.puts.append(path)
        answer: Iterable[bytes] = self._app(environ, reply)
        if self.fault == "truncate" and method == "POST" and "uploadId=" in environ["QUERY_STRING"]:
            self.fault = None
            with self.fs.open_input_stream(path[1:]) as stream:
                content = stream.readall()
            with self.fs.open_output_stream(path[1:]) as stream:
                stream.write(content[: len(content) // 2])
            self.fault = "truncate"
        return answer

    def files(self, under: str = "") -> dict[str, bytes]:
        """What is there, by path inside the bucket."""
        selector = pafs.FileSelector(f"{self.bucket}/{under}", recursive=True, allow_not_found=True)
        found = [f.path for f in self.fs.get_file_info(selector) if f.is_file]
        start = len(self.bucket) + 1
        return {path[start:]: self.fs.open_input_stream(path).readall() for path in sorted(found)}

    def delete(self, path: str) -> None:
        """Remove an object, or all below a folder, with what marks the folder."""
        for method in (self.fs.delete_file, self.fs.delete_dir):
            with suppress(OSError):
                method(f"{self.bucket}/{path}")

    def upload(self, folder: Path) -> None:
        """Copy a folder there."""
        for file in folder.rglob("*.*"):
            if file.is_file():
                path = f"{self.bucket}/{file.relative_to(folder)}"
                with self.fs.open_output_stream(path) as stream:
                    stream.write(file.read_bytes())


@contextmanager
def object_store(staging: Path, bucket: str | None = None) -> Iterator[ObjectStore]:
    """A server that the environment names, and a cache of the user's in a folder."""
    server = ObjectStore(bucket or f"logs-{time.time_ns()}")
    with pytest.MonkeyPatch.context() as environment:
        for name, value in server.environment.items():
            environment.setenv(name, value)
        environment.setenv("XDG_CACHE_HOME", str(staging))
        yield server
    server.stop()
