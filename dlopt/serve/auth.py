"""API keys: read from a file or made up, and checked in the app itself, so that every port that leads to it is guarded."""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
from collections.abc import Iterable
from http.cookies import CookieError, SimpleCookie
from pathlib import Path
from urllib.parse import parse_qs

from dlopt.part import DloptError

KEY = re.compile(r"[A-Za-z0-9._~+/=-]{8,256}")
"""What fits unquoted into a header, a cookie and (nearly) a URL: the b64token of RFC 6750."""

MOST_PROVEN = 1000
"""Ways of writing a key are many; so many are remembered at most."""

Headers = Iterable[tuple[bytes, bytes]]


def make_key() -> str:
    """A fresh key of 192 random bits."""
    return secrets.token_urlsafe(24)


def read_keys(path: Path) -> tuple[str, ...]:
    """Keys of a file, one a line; empty lines and lines that begin with # are left out. Raises DloptError."""
    try:
        lines = [line.strip() for line in path.read_text().splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not a text file"
        raise DloptError(f"--keys: {path}: {reason}") from None
    numbered = [(number, line) for number, line in enumerate(lines, 1) if line and not line.startswith("#")]
    for number, line in numbered:
        if not KEY.fullmatch(line):
            raise DloptError(f"--keys: {path}: line {number}: a key has 8 to 256 characters out of A-Z a-z 0-9 . _ ~ + / = -")
    if not numbered:
        raise DloptError(f"--keys: {path}: holds no key")
    return tuple(line for _, line in numbered)


def digest(key: str) -> str:
    """What is kept of a key: Serve stores a deployment's arguments, and the key itself should not lie there."""
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).hexdigest()


class Guard:
    """Lets a request in when it shows one of the keys; without keys, everyone."""

    def __init__(self, digests: tuple[str, ...]) -> None:
        self.digests = digests
        self.proven: set[tuple[bytes, bytes]] = set()
        """Headers that have shown a key before: looking one up takes a tenth of the time of hashing it, and tells as little."""

    def lets_in(self, headers: Headers, query: bytes) -> bool:
        """Whether a request with these headers and this query string shows a key, in any of the four places."""
        if not self.digests or any(self._proves(name, value) for name, value in headers):
            return True
        return (token := token_of(query)) is not None and self.knows(token)

    def knows(self, key: str) -> bool:
        """Whether it is one of the keys; takes the same time wherever it differs."""
        found = digest(key)
        return sum(hmac.compare_digest(found, known) for known in self.digests) > 0

    def cookie(self, key: str) -> str:
        """Value of the Set-Cookie header that lets the page in. Browsers share cookies over a host's ports, so each key has its own."""
        return f"{_cookie_name(digest(key))}={key}; Path=/; HttpOnly; SameSite=Strict"

    def _proves(self, name: bytes, value: bytes) -> bool:
        if (name, value) in self.proven:
            return True
        if name == b"cookie":
            return any(self.knows(key) for key in self._cookies(value.decode("latin-1")))
        if name == b"authorization" and value[:7].lower() == b"bearer ":
            key = value[7:]
        elif name == b"x-api-key":
            key = value
        else:
            return False
        if found := self.knows(key.decode("latin-1").strip()):
            self.proven.add((name, value))
            if len(self.proven) > MOST_PROVEN:
                self.proven.clear()
        return found

    def _cookies(self, text: str) -> list[str]:
        try:
            cookies = SimpleCookie(text)
        except CookieError:
            return []
        return [cookies[name].value for name in map(_cookie_name, self.digests) if name in cookies]


def token_of(query: bytes) -> str | None:
    """The key in a URL's query string."""
    if b"token=" not in query:
        return None
    return next(iter(parse_qs(query.decode("latin-1"), max_num_fields=64).get("token", [])), None)


def _cookie_name(key_digest: str) -> str:
    return f"dlopt-{key_digest[:12]}"
