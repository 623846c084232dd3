"""Errors a user can meet: each says where, what was found, what was expected and what to do.

One class for each reaction that a caller could have:

RouterLogError              tell the user: its text is one line
    InvalidOption           give another value; a ValueError, too
    MissingExtra            install the extra that it names; an ImportError, too
    MissingRun              look elsewhere; a FileNotFoundError, too
    RunExists               choose another folder; a FileExistsError, too
    EmptyText               give other texts
    KdeMismatch             give another null model, or fit one
    UnsupportedModel        take another model, or describe its router
    UnknownIdentity         give the model what tells its tokens apart
    AlreadyPatched          undo the other patch first
    WriterFailed            make room, and resume: what was sealed is whole
    Corrupt                 restore the file from a copy, or do without it
        CorruptManifest
            NewerLog        update bhlog
        CorruptShard
        CorruptRun
        CorruptKde
        CorruptProfile
        CorruptTrace
        UnsafePickle        ask who made it
"""


class RouterLogError(Exception):
    """Base of every error bhlog raises for a user's mistake or a broken file.

    Its text is one line, whatever a library's message or a stranger's name in it holds.
    """

    def __str__(self) -> str:
        text = " ".join(filter(None, map(str.strip, super().__str__().splitlines())))
        return text if text.isprintable() else "".join(map(_printable, text))


class InvalidOption(RouterLogError, ValueError):
    """An option, column or name is outside what is allowed."""


class MissingRun(RouterLogError, FileNotFoundError):
    """The folder is not there, or holds no run."""


class RunExists(RouterLogError, FileExistsError):
    """The folder already holds a run, which capture never overwrites."""


class Corrupt(RouterLogError):
    """A file is damaged, or not what it should be."""


class CorruptManifest(Corrupt):
    """run.json cannot be read as a manifest, or says what cannot be."""


class NewerLog(CorruptManifest):
    """A newer major version of bhlog wrote the run."""


class CorruptShard(Corrupt):
    """A shard is cut short, unreadable, or has other columns than its schema version says."""


class CorruptRun(Corrupt):
    """Files of a run are damaged, missing or at odds with one another; verify listed them."""


class CorruptKde(Corrupt):
    """A null model file cannot be read or breaks an invariant of the null model."""


class CorruptProfile(Corrupt):
    """A profile file cannot be read or breaks an invariant of a profile."""


class CorruptTrace(Corrupt):
    """What another engine wrote cannot be read, or says what cannot be."""


class KdeMismatch(RouterLogError):
    """The null model does not cover the layers or experts it is used for, or is not there."""


class UnsafePickle(Corrupt):
    """A pickle names something other than numpy arrays; nothing of it was run."""


class UnsupportedModel(RouterLogError):
    """The model has no router that bhlog knows how to read or to steer."""


class UnknownIdentity(RouterLogError):
    """A forward does not say which token each router row belongs to."""


class AlreadyPatched(RouterLogError):
    """The model is already observed or routed; one patch at a time."""


class WriterFailed(RouterLogError):
    """The background writer stopped; what was sealed before is whole."""


class EmptyText(RouterLogError):
    """There is no text to run through the model."""


class MissingExtra(RouterLogError, ImportError):
    """A command needs packages of an extra that is not installed."""


def _printable(character: str) -> str:
    shown = character.isprintable() or character == "\xa0"
    return character if shown else character.encode("unicode_escape").decode()


def one_line(text: str, most: int = 300) -> str:
    """A stranger's or a library's text, fit for an error message: escaped, and not too long."""
    return repr(text[:most])[1:-1]
