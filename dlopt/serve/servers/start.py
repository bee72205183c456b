"""`dlopt serve`: where to listen, who is let in, and which of the two servers it is: the embedded one, or Ray Serve."""

from __future__ import annotations

import errno
import fcntl
import ipaddress
import json
import os
import socket
import ssl
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from dlopt import session
from dlopt.artifact import Artifact
from dlopt.part import DloptError, Signature
from dlopt.serve import Serve
from dlopt.serve.front.auth import Guard, Key, make_key, read_keys
from dlopt.serve.models.lineup import Entry
from dlopt.serve.models.plan import check
from dlopt.serve.protocols.example import example_row

Say = Callable[[str], None]
LOOPBACK, EVERYWHERE = "127.0.0.1", "0.0.0.0"
LONGEST_EXAMPLE = 2000
"""Characters of a row in the line for curl; a model of larger images gets a line that sends a file."""


@dataclass(frozen=True)
class Listening:
    """Where the server listens and what lets a client in."""

    host: str
    port: int
    keys: tuple[Key, ...] = ()
    file: Path | None = None
    """Where the keys come from."""
    made: str | None = None
    """The key that was made up, in plain text."""
    rpc_port: int | None = None
    """For gRPC."""
    tls: tuple[Path, Path] | None = None
    """Files of the certificate and of its key, in PEM."""
    log: Path | None = None
    """Where each request leaves a line."""

    @property
    def local_url(self) -> str:
        """The server as this machine reaches it."""
        host = LOOPBACK if self.host == EVERYWHERE else "::1" if self.host == "::" else self.host
        return f"{'https' if self.tls else 'http'}://{f'[{host}]' if ':' in host else host}:{self.port}"

    @property
    def family(self) -> socket.AddressFamily:
        """Of the host's addresses."""
        return socket.AF_INET6 if ":" in self.host else socket.AF_INET


def serve(
    entries: tuple[Entry, ...],
    section: Serve,
    *,
    host: str | None,
    port: int,
    keys: Path | None,
    address: str | None,
    say: Say,
    ray: bool = False,
    grpc_port: int | None = None,
    state: Path | None = None,
    tls: tuple[Path, Path] | None = None,
    log: Path | None = None,
) -> None:
    """Serve exported models until SIGINT or SIGTERM, then take down what was started.

    host: where to listen; None is this machine alone. keys: a file of API keys; None makes one up where others than this machine can
    connect. address: a running cluster to serve on. ray: use Ray Serve where one process would do. say: prints a line to the user.
    grpc_port: where the embedded server speaks gRPC as well. state: a folder that keeps what is deployed meanwhile, for a later start
    with the same models. tls: files of a certificate and of its key. log: a file for a line on each request. Raises DloptError.
    """
    for entry in entries:
        check(Artifact.open(entry.path))
    address = session.address_of(address)
    _check_tls(tls, address)
    listening = replace(listening_on(host, port, keys, shared=address is not None), rpc_port=grpc_port, tls=tls, log=log)
    on_ray = address is not None or ray or section.most_replicas > 1
    if grpc_port is not None and (on_ray or grpc_port == port):
        why = "Ray Serve has no port for it: leave out --ray and --address, with one replica" if on_ray else "it is --port: give another"
        raise DloptError(f"--grpc-port: {grpc_port}: {why}")
    if state is not None and on_ray:
        raise DloptError("--state: Ray Serve keeps it among its replicas: leave it out")
    if address is not None:
        from dlopt.serve.servers.cluster import serve as serve_on_ray

        serve_on_ray(entries, section, listening, address, say)
        return
    with _port_of_ours(listening) as listener:
        if on_ray:
            from dlopt.serve.servers.cluster import serve as serve_on_ray

            listener.close()  # the lock keeps others of us out
            serve_on_ray(entries, section, listening, None, say)
        else:
            _serve_embedded(entries, section, listening, listener, state, say)


def _serve_embedded(
    entries: tuple[Entry, ...], section: Serve, listening: Listening, listener: socket.socket, state: Path | None, say: Say
) -> None:
    from dlopt.serve.front.application import application_for
    from dlopt.serve.servers import embedded

    application = application_for(entries, section, Guard(listening.keys, listening.file, section.rate), board=state, log=listening.log)
    rpc = (listening.host, listening.rpc_port) if listening.rpc_port else None
    embedded.serve(application, section, listener, lambda: greet(entries, listening, say), rpc, listening.tls)
    say("stopped")


def _check_tls(tls: tuple[Path, Path] | None, address: str | None) -> None:
    """Raises DloptError for files that make no certificate."""
    if tls is None:
        return
    if address is not None:
        raise DloptError("--tls-cert: a cluster's own proxies listen there, which end TLS themselves: leave it out")
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(*tls)
    except OSError as error:  # ssl.SSLError is one
        raise DloptError(f"--tls-cert: {tls[0]} and {tls[1]}: {error.strerror or error.args[-1]}") from None


def listening_on(host: str | None, port: int, keys: Path | None, shared: bool = False) -> Listening:
    """Where to listen, and whom to let in. Raises DloptError."""
    if not 0 < port < 65536:
        raise DloptError(f"--port: {port} is no port: give a number from 1 to 65535")
    where = host or LOOPBACK
    if keys is not None:
        return Listening(where, port, read_keys(keys), keys.resolve())
    if not shared and _is_loopback(where):
        return Listening(where, port)
    made = make_key()
    return Listening(where, port, (Key.of(made),), made=made)


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


@contextmanager
def _port_of_ours(listening: Listening) -> Iterator[socket.socket]:
    """A socket that listens, and a lock on the port for as long as the server runs: HAProxy would share it. Raises DloptError."""
    in_use = DloptError(f"--port: {listening.port} is in use: stop what listens there or give another")
    path = Path(tempfile.gettempdir()) / f"dlopt-port-{listening.port}-{os.getuid()}.lock"
    with path.open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise in_use from None
        with socket.socket(listening.family, socket.SOCK_STREAM) as listener:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if listening.host == "::":
                listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
            try:
                listener.bind((listening.host, listening.port))
                listener.listen()
            except PermissionError:
                raise DloptError(f"--port: {listening.port} needs more rights: give one from 1024 on") from None
            except OSError as error:
                if error.errno == errno.EADDRINUSE:
                    raise in_use from None
                raise DloptError(f"--host: cannot listen on {listening.host}: {error.strerror or error}") from None
            yield listener


def greet(entries: tuple[Entry, ...], listening: Listening, say: Say) -> None:
    """Say where the models are served, and the line that asks the first one."""
    url, key = listening.local_url, listening.made
    exports = [Artifact.open(entry.path) for entry in entries]
    pairs = zip(entries, exports, strict=True)
    told = [f"{entry.name} {entry.version} ({export.manifest.digest})" for entry, export in pairs]
    if len(told) == 1:
        told = [f"{entries[0].name} ({exports[0].manifest.digest})"]
    say(f"{', '.join(told)} {'is' if len(told) == 1 else 'are'} served at {url}/{f'?token={key}' if key else ''}")
    if listening.rpc_port:
        say(f"gRPC (Open Inference Protocol v2) is at {url.rpartition('//')[2].rpartition(':')[0]}:{listening.rpc_port}")
    if listening.host in (EVERYWHERE, "::"):
        others = f"{'https' if listening.tls else 'http'}://{socket.gethostname()}:{listening.port}/"
        say(f"it listens on every interface (other machines: {others}); without --host it stays on this machine")
    if key:
        say(f"API key: {key}")
    trusted = f"--cacert {listening.tls[0]} " if listening.tls else ""
    guarded = f"-H 'Authorization: Bearer {key or 'KEY'}' " if listening.keys else ""
    example = _example(Signature.model_validate_json(exports[0].read("signature.json")))
    say(f"curl {trusted}{guarded}{example} {url}/v1/models/{entries[0].name}:predict")
    say("Ctrl-C stops it")


def _example(signature: Signature) -> str:
    """What curl sends: a row that the model takes."""
    body = json.dumps({"instances": [example_row(signature)]})
    if len(body) > LONGEST_EXAMPLE:
        return "-H 'Content-Type: image/png' --data-binary @image.png" if len(signature.inputs) == 1 else "-d @row.json"
    quoted = body.replace("'", "'\\''")
    return f"-d '{quoted}'"
