"""Storage that runs lie in: a folder on disk, or an object store behind a URI."""

from pathlib import Path

import pyarrow.fs as pafs

from bhlog.capture.contract.errors import CorruptManifest, MissingRun
from bhlog.capture.contract.manifest import (
    MANIFEST_NAME,
    MOST_MANIFEST_BYTES,
    Manifest,
    merge_manifests,
)
from bhlog.capture.contract.opening import refused
from bhlog.capture.contract.store import Store, reached


def filesystem(path: str) -> tuple[pafs.FileSystem, str]:
    """The file system of a path or a URI, and the path in it.

    Raises:
        MissingRun: the URI cannot be read, or its storage does not answer.
    """
    if "://" in path:
        store = Store(path)
        return store.fs, store.root
    return pafs.LocalFileSystem(), Path(path).expanduser().resolve().as_posix()


def read_manifest(path: str, fs: pafs.FileSystem, root: str) -> Manifest:
    """The manifest of the run in a folder, merged over its ranks.

    Args:
        path: the folder, as errors call it.
        fs, root: its file system, and where it is in it.

    Raises:
        MissingRun: nothing there, not a run, or its storage does not answer.
        CorruptManifest: a manifest cannot be read, or they belong to different runs.
    """
    local = isinstance(fs, pafs.LocalFileSystem)
    with reached(path):
        info = fs.get_file_info(root)
        if info.type == pafs.FileType.NotFound:
            raise MissingRun(f"{path}: no such {'folder' if local else 'bucket or folder'}")
        if info.type == pafs.FileType.File:
            raise MissingRun(f"{path}: a file; expected the folder of a run")
        found = {file.base_name for file in fs.get_file_info(pafs.FileSelector(root))}
        if MANIFEST_NAME not in found:
            raise MissingRun(
                f"{path}: no {MANIFEST_NAME}, so this is not the folder of a run; expected a "
                "folder that bhlog capture wrote"
            )
        ranks = []
        # run.json (rank 0) holds the facts; it sorts before run.rank00001.json
        for name in sorted(n for n in found if n.startswith("run.") and n.endswith(".json")):
            if name == MANIFEST_NAME or name.startswith("run.rank"):
                why = refused(Path(root), name) if local else None
                if why is not None:
                    raise CorruptManifest(f"{path}/{name}: {why}; replace it by a copy of the file")
                with fs.open_input_file(f"{root}/{name}") as file:
                    text = file.read_at(min(MOST_MANIFEST_BYTES + 1, file.size()), 0)
                ranks.append(Manifest.from_json(text, f"{path}/{name}"))
    if len({manifest.run_id for manifest in ranks}) > 1:
        raise CorruptManifest(f"{path}: its manifests belong to different runs")
    return merge_manifests(ranks)
