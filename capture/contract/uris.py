"""URIs and command lines as they may be shown and kept: without the secrets that they can hold."""

import re
from collections.abc import Iterable
from pathlib import Path, PurePosixPath
from urllib.parse import unquote

# Options of a URI that say where its storage is; any other may be a secret.
_HARMLESS = ("endpoint_override", "scheme", "region", "allow_bucket_creation", "anonymous")


def shown(path: str) -> str:
    """A path or URI as messages show it: without the secrets that a URI can hold."""
    if "://" not in path:
        return path
    scheme, _, rest = path.partition("://")
    place, mark, query = rest.partition("?")
    authority, slash, inside = place.partition("/")
    options = [option for option in query.split("&") if option.partition("=")[0] in _HARMLESS]
    return f"{scheme}://{authority.rpartition('@')[2]}{slash}{inside}" + (
        f"{mark}{'&'.join(options)}" if options else ""
    )


def suffix_of(path: str | Path) -> str:
    """What the name of a file or object ends in, in lower case: .parquet."""
    return PurePosixPath(str(path).partition("?")[0] if "://" in str(path) else path).suffix.lower()


def without_secrets(text: str, path: str) -> str:
    """A library's message about a URI, without what the URI holds beyond what is shown of it."""
    if "://" not in path:
        return text
    text = text.replace(path, shown(path))
    place, _, query = path.partition("://")[2].partition("?")
    account = place.partition("/")[0].rpartition("@")[0]
    options = [option.partition("=") for option in query.split("&")]
    secrets = [*account.split(":"), *(o[2] for o in options if o[0] not in _HARMLESS)]
    for secret in secrets:
        for spelled in (secret, unquote(secret)):
            text = text.replace(spelled, "...") if spelled else text
    return text


# The last part of an option's or variable's name whose value is nobody's business.
_SECRET = frozenset(
    {"token", "key", "apikey", "secret", "password", "passwd", "credentials", "auth"}
)
_KEY = re.compile(r"(hf|sk|ghp|gho|glpat|github_pat|xox[a-z])[_-]\w{8,}|AKIA[0-9A-Z]{12,}")
HIDDEN = "..."


def command_line(words: Iterable[str]) -> tuple[str, ...]:
    """A command's words as a log may keep them, HIDDEN for values that look like secrets.

    Those are values of options and variables called so (--hf-token X, --api-key=X, SECRET=X), words
    that look like keys of well-known services, and what a URI holds beyond its place.
    """
    kept: list[str] = []
    value_is_secret = False
    for word in words:
        if value_is_secret and not word.startswith("-"):
            kept.append(HIDDEN)
            value_is_secret = False
            continue
        name, mark, _ = word.partition("=")
        secret = _is_secret(name)
        value_is_secret = secret and not mark and word.startswith("-")
        shown_word = f"{name}={HIDDEN}" if secret and mark else shown(word)
        kept.append(_KEY.sub(HIDDEN, shown_word))
    return tuple(kept)


def _is_secret(name: str) -> bool:
    return name.replace("-", "_").isidentifier() and re.split("[-_]", name.lower())[-1] in _SECRET
