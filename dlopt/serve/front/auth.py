"""API keys: read from a file or made up, and checked in the app itself, so that every port that leads to it is guarded.

A line of a file of keys is a key, or `sha256:` and the hash of one, and then what holds for it: `role=predict` (else admin),
`expires=2027-01-31` (or a moment, 2027-01-31T12:00:00Z), `rate=50` (requests a second), `name=alice` (for people). The file is looked at
again while the server runs: a key that is taken out lets nobody in a second later.
"""

from __future__ import annotations

import fcntl
import hashlib
import hmac
import logging
import mmap
import os
import re
import secrets
import struct
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from http.cookies import CookieError, SimpleCookie
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs

from dlopt.part import DloptError
from dlopt.serve.exchange import Refusal

KEY = re.compile(r"[A-Za-z0-9._~+/=-]{8,256}")
"""What fits unquoted into a header, a cookie and (nearly) a URL: the b64token of RFC 6750."""
HASH = re.compile(r"sha256:([0-9a-fA-F]{64})")
ROLES = ("predict", "admin")
LOOK_SECONDS = 1.0
"""How often the file of keys is looked at."""
SLOTS, SLOT = 4096, struct.Struct("16sdd")
EMPTY = bytes(16)
"""Keys whose rates are kept, and how: the beginning of a digest, what is left, and when."""
MOST_PROVEN = 1000
"""Ways of writing a key are many; so many are remembered at most."""
NO_KEY = "missing or wrong key: send 'Authorization: Bearer KEY' or 'X-API-Key: KEY', or open /?token=KEY"
logger = logging.getLogger(__name__)


def make_key() -> str:
    """A fresh key of 192 random bits."""
    return secrets.token_urlsafe(24)


def digest(key: str) -> str:
    """What is kept of a key: Serve stores a deployment's arguments, and the key itself should not lie there."""
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).hexdigest()


@dataclass(frozen=True)
class Key:
    """What is known of a key."""

    digest: str
    role: str = "admin"
    expires: float = float("inf")
    """Seconds since 1970."""
    rate: float = 0.0
    """Requests a second; 0 is what the section says."""
    name: str = ""

    @classmethod
    def of(cls, key: str) -> Key:
        """A key that may do everything."""
        return cls(digest(key))


def read_keys(path: Path) -> tuple[Key, ...]:
    """Keys of a file, one a line; empty lines and lines that begin with # are left out. Raises DloptError."""
    try:
        lines = [line.strip() for line in path.read_text().splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not a text file"
        raise DloptError(f"--keys: {path}: {reason}") from None
    keys = []
    for number, line in enumerate(lines, 1):
        if line and not line.startswith("#"):
            try:
                keys.append(_read(line))
            except ValueError as error:
                raise DloptError(f"--keys: {path}: line {number}: {error}") from None
    if not keys:
        raise DloptError(f"--keys: {path}: holds no key")
    return tuple(keys)


def _read(line: str) -> Key:
    """One line. Raises ValueError saying what is wrong, without the key."""
    word, *settings = line.split()
    if found := HASH.fullmatch(word):
        key = Key(found[1].lower())
    elif KEY.fullmatch(word):
        key = Key.of(word)
    else:
        raise ValueError("a key has 8 to 256 characters out of A-Z a-z 0-9 . _ ~ + / = -")
    for setting in settings:
        name, equals, value = setting.partition("=")
        if not equals or name not in ("role", "expires", "rate", "name"):
            raise ValueError("after a key there may be role=, expires=, rate= and name=, with blanks in between")
        key = replace(key, **{name: _SETTINGS[name](value)})
    return key


def _role(value: str) -> str:
    if value not in ROLES:
        raise ValueError(f"role={value[:20]}: there are {' and '.join(ROLES)}")
    return value


def _moment(value: str) -> float:
    try:
        moment = datetime.fromisoformat(value)
    except ValueError:
        raise ValueError(f"expires={value[:40]}: give a day or a moment, such as 2027-01-31 or 2027-01-31T12:00:00Z") from None
    return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()


def _rate(value: str) -> float:
    try:
        rate = float(value)
    except ValueError:
        rate = 0.0
    if not 0 < rate < float("inf"):
        raise ValueError(f"rate={value[:20]}: give requests a second, more than 0")
    return rate


_SETTINGS: dict[str, Callable[[str], Any]] = {"role": _role, "expires": _moment, "rate": _rate, "name": str}


class Allowances:
    """How many requests each key may still send: a bucket that fills with so many a second, and holds those of one second."""

    def __init__(self) -> None:
        self.left: dict[str, tuple[float, float]] = {}
        """By a key's digest: how many, and when that was so."""

    def spend(self, digest: str, rate: float) -> bool:
        """Whether one more may be sent, which is taken."""
        found, self.left[digest] = _spent(self.left.get(digest), rate)
        return found


class SharedAllowances(Allowances):
    """The same for all processes of this machine that open the file."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.file = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        os.ftruncate(self.file, SLOTS * SLOT.size)
        self.memory = mmap.mmap(self.file, SLOTS * SLOT.size)

    def spend(self, digest: str, rate: float) -> bool:
        """Whether one more may be sent, which is taken. Keys beyond SLOTS share what they may send."""
        name = bytes.fromhex(digest[:32])
        fcntl.flock(self.file, fcntl.LOCK_EX)
        try:
            first = int.from_bytes(name[:4]) % SLOTS
            for step in range(SLOTS):
                at = (first + step) % SLOTS * SLOT.size
                there, left, when = SLOT.unpack_from(self.memory, at)
                if there in (name, EMPTY):
                    break
            found, (left, when) = _spent((left, when) if there != EMPTY else None, rate)
            SLOT.pack_into(self.memory, at, name, left, when)
        finally:
            fcntl.flock(self.file, fcntl.LOCK_UN)
        return found


def _spent(before: tuple[float, float] | None, rate: float) -> tuple[bool, tuple[float, float]]:
    """Whether there is one, and what is left and when; the clock is the machine's, the same for all processes."""
    now, most = time.monotonic(), max(rate, 1.0)
    left, when = before or (most, now)
    left = min(most, left + max(0.0, now - when) * rate)
    return left >= 1, (left - 1 if left >= 1 else left, now)


class Guard:
    """Lets a request in when it shows one of the keys; without keys, everyone.

    path: the file that they come from, which is looked at again. rate: requests a second of a key that says nothing of its own; 0 is any.
    """

    def __init__(self, keys: tuple[Key, ...] = (), path: Path | None = None, rate: float = 0.0, shared: Path | None = None) -> None:
        """shared: a file in which all replicas of this machine note what a key has sent; None where there is one."""
        self.keys, self.path, self.rate = keys, path, rate
        self.proven: dict[tuple[bytes, bytes], Key] = {}
        """Headers that have shown a key before: looking one up takes a tenth of the time of hashing it, and tells as little."""
        self.allowances = SharedAllowances(shared) if shared else Allowances()
        self.seen = _state(path) if path else None
        self.looked = time.monotonic()

    def admit(self, headers: Mapping[bytes, bytes], query: bytes) -> Key | None:
        """The key that a request shows, in any of the four places; None where none is asked for. Raises Refusal."""
        if self.path and time.monotonic() - self.looked > LOOK_SECONDS:
            self._look_again()
        if not self.keys:
            return None
        key = self._shown(headers, query)
        if key is None:
            raise Refusal(401, NO_KEY, "key")
        if key.expires <= time.time():
            raise Refusal(401, "this key has expired", "key")
        if rate := key.rate or self.rate:
            self._spend(key, rate)
        return key

    def known(self, key: str) -> Key | None:
        """The key of this text, if it is one; takes the same time wherever it differs."""
        found, match = digest(key), None
        for known in self.keys:
            if hmac.compare_digest(found, known.digest):
                match = known
        return match

    def cookie(self, key: str) -> str:
        """Value of the Set-Cookie header that lets the page in. Browsers share cookies over a host's ports, so each key has its own."""
        return f"{_cookie_name(digest(key))}={key}; Path=/; HttpOnly; SameSite=Strict"

    def _shown(self, headers: Mapping[bytes, bytes], query: bytes) -> Key | None:
        for name in (b"authorization", b"x-api-key"):
            if (value := headers.get(name)) is not None and (key := self._proves(name, value)):
                return key
        if cookies := headers.get(b"cookie"):
            for text in self._cookies(cookies.decode("latin-1")):
                if key := self.known(text):
                    return key
        token = token_of(query)
        return self.known(token) if token is not None else None

    def _proves(self, name: bytes, value: bytes) -> Key | None:
        if found := self.proven.get((name, value)):
            return found
        if name == b"authorization":
            if value[:7].lower() != b"bearer ":
                return None
            text = value[7:]
        else:
            text = value
        if found := self.known(text.decode("latin-1").strip()):
            if len(self.proven) >= MOST_PROVEN:
                self.proven.clear()
            self.proven[name, value] = found
        return found

    def _spend(self, key: Key, rate: float) -> None:
        """Raises Refusal."""
        if not self.allowances.spend(key.digest, rate):
            raise Refusal(429, f"this key may send {rate:g} requests a second", "rate")

    def _look_again(self) -> None:
        """Take what the file of keys says now. One that is damaged, or gone, changes nothing: who was let in stays in, and nobody else."""
        self.looked = time.monotonic()
        assert self.path is not None
        if (state := _state(self.path)) == self.seen:
            return
        self.seen = state
        try:
            self.keys = read_keys(self.path)
        except DloptError as error:
            logger.warning("%s; the keys from before go on", error)
            return
        self.proven.clear()

    def _cookies(self, text: str) -> list[str]:
        try:
            cookies = SimpleCookie(text)
        except CookieError:
            return []
        return [cookies[name].value for name in (_cookie_name(key.digest) for key in self.keys) if name in cookies]


def token_of(query: bytes) -> str | None:
    """The key in a URL's query string."""
    if b"token=" not in query:
        return None
    try:
        return next(iter(parse_qs(query.decode("latin-1"), max_num_fields=64).get("token", [])), None)
    except ValueError:  # more fields than that
        return None


def _state(path: Path) -> tuple[int, ...] | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size, found.st_ino


def _cookie_name(key_digest: str) -> str:
    return f"dlopt-{key_digest[:12]}"
