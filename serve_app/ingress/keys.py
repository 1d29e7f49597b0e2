"""API keys: made of 32 random bytes, kept as hashes in a TOML file, read again when that changes.

    [[key]]
    name = "alice"
    role = "user"
    hash = "sha256:9f86d08..."

A key has 256 bits of chance, so one round of SHA-256 hides it as well as anything could. What slows guessing down, such
as bcrypt, is for passwords that people think of; here it would only make each request cost a tenth of a second of CPU,
and a flood of wrong keys a way to stop the server. For the same reason salt is not needed: no two keys are alike.
"""

import hashlib
import hmac
import logging
import os
import re
import secrets
import time
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import msgspec

from serve_app.errors import ConfigError

log = logging.getLogger(__name__)

MAX_KEYS = 1_000  # each request is compared with all: a fifth of a millisecond
MAX_FILE_BYTES = 1 << 20
MAX_KEY_CHARS = 256  # of what a client presents
LOOK_S = 1.0  # at most so often the file is looked at
PREFIX = "octavo-"  # so that a key that leaked is found by who looks for such
KEY_BYTES = 32

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", re.ASCII)
_HASH = re.compile(r"sha256:[0-9a-f]{64}", re.ASCII)

Role = Literal["user", "admin"]


class Key(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One entry of the file."""

    name: str  # the tenant
    hash: str
    role: Role = "user"


class _File(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    key: list[Key] = []


class Keys:
    """The keys of a file, as it is now. A file that is broken or gone later changes nothing but the log."""

    def __init__(self, path: Path, clock: Callable[[], float] = time.monotonic) -> None:
        """Raises ConfigError when the file cannot be read or is no such file."""
        self._path, self._clock = path, clock
        self._stamp = _stamp(path)
        self._keys = read_keys(path)
        self._looked_s = clock()
        if not self._keys:
            log.warning("%s has no key: nobody can ask anything", path)

    def find(self, presented: str) -> Key | None:
        """Whose key this is. It takes as long for a wrong key as for a right one."""
        self._look()
        digest = hash_of(presented[:MAX_KEY_CHARS]).encode()
        found = None
        for key in self._keys:
            if hmac.compare_digest(digest, key.hash.encode()):
                found = key
        return found

    def _look(self) -> None:
        now = self._clock()
        if now - self._looked_s < LOOK_S:
            return
        self._looked_s = now
        stamp = _stamp(self._path)
        if stamp == self._stamp:
            return
        self._stamp = stamp
        try:
            self._keys = read_keys(self._path)
        except ConfigError as error:
            log.error("the keys stay as they were: %s", error)
        else:
            log.info("%s has changed: %d keys are valid", self._path, len(self._keys))


def hash_of(secret: str) -> str:
    """The form in which a key is kept."""
    return "sha256:" + hashlib.sha256(secret.encode("utf-8", errors="surrogatepass")).hexdigest()


def read_keys(path: Path) -> list[Key]:
    """The entries of a file of keys. ConfigError says in one sentence what is wrong with it."""
    try:
        with path.open("rb") as file:
            content = file.read(MAX_FILE_BYTES + 1)
        if len(content) > MAX_FILE_BYTES:
            raise ConfigError(f"the file of keys {path} is larger than {MAX_FILE_BYTES} bytes")
        keys = msgspec.convert(tomllib.loads(content.decode()), _File).key
    except OSError as error:
        raise ConfigError(f"the file of keys {path} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError, msgspec.ValidationError) as error:  # no UTF-8, no TOML, other fields
        raise ConfigError(f"the file of keys {path} is broken: {' '.join(str(error).split())}") from None
    _check(keys, path)
    return keys


def keys_path(keys_file: str) -> Path:
    """The path in a config. ConfigError when it is relative: an ingress replica may run elsewhere."""
    path = Path(keys_file).expanduser()
    if not path.is_absolute():
        raise ConfigError(f"`security.keys_file` = {keys_file!r}: it must be an absolute path")
    return path


def check_keys(keys_file: str | None) -> None:
    """What can be known of a config's keys before anything starts. Raises ConfigError."""
    if keys_file is not None:
        read_keys(keys_path(keys_file))


def make_key(path: Path, name: str, role: Role) -> str:
    """Append a new key's hash to a file, which may not be there yet, and return the key. ConfigError."""
    if not _NAME.fullmatch(name):
        raise ConfigError(f"{name!r} is no name for a key: letters, digits, `.`, `_` and `-`, 64 at most")
    keys = read_keys(path) if path.exists() else []
    if any(key.name == name for key in keys):
        raise ConfigError(f"{path} has a key of the name {name} already")
    if len(keys) >= MAX_KEYS:
        raise ConfigError(f"{path} has {len(keys)} keys already; the limit is {MAX_KEYS}")
    secret = PREFIX + secrets.token_urlsafe(KEY_BYTES)
    _append(path, f'\n[[key]]\nname = "{name}"\nrole = "{role}"\nhash = "{hash_of(secret)}"\n')
    return secret


def _append(path: Path, entry: str) -> None:
    """In one write, so that a server that reads meanwhile sees all of it or nothing."""
    try:
        handle = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        try:
            os.write(handle, entry.encode())
        finally:
            os.close(handle)
    except OSError as error:
        raise ConfigError(f"{path} cannot be written: {error.strerror}") from None


def _check(keys: list[Key], path: Path) -> None:
    if len(keys) > MAX_KEYS:
        raise ConfigError(f"the file of keys {path} has {len(keys)} keys; the limit is {MAX_KEYS}")
    for key in keys:
        if not _NAME.fullmatch(key.name):
            raise ConfigError(f"the file of keys {path} has a key with the name {key.name[:80]!r}")
        if not _HASH.fullmatch(key.hash):
            raise ConfigError(f"the file of keys {path} has no SHA-256 hash for {key.name}: sha256: and 64 hex digits")
    for field in ("name", "hash"):
        if len({getattr(key, field) for key in keys}) != len(keys):
            raise ConfigError(f"the file of keys {path} has two keys of one {field}")


def _stamp(path: Path) -> tuple[int, int, int] | None:
    """What changes with a file's content; None where there is none."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size, found.st_ino
