"""`dlopt submit`: a job to a cluster and its end back here. On the cluster it is `dlopt run`, whose progress comes with its log."""

from __future__ import annotations

import asyncio
import json
import secrets
import shlex
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import aiohttp
from ray.job_submission import JobDetails, JobStatus

from dlopt.artifact import digest_of, versions
from dlopt.cluster.head import Head, NoSuchJob, Unreachable
from dlopt.cluster.package import SENDER, package_of
from dlopt.part import DloptError
from dlopt.progress import ENCODED, WARNING, Progress, decoded, silent
from dlopt.spec import Job

LOOK_SECONDS = 5.0
"""How often it is looked whether the head still answers, while its log says nothing."""
HEAD_SECONDS = 180.0
"""How long a head may be gone before its job is given up here."""
STOP_SECONDS = 40
"""How long a job that is told to stop has to save where it is."""
LOST = ("JOB_SUPERVISOR_ACTOR_DIED", "JOB_SUPERVISOR_ACTOR_UNKNOWN_FAILURE", "JOB_SUPERVISOR_ACTOR_START_TIMEOUT")
"""What Ray says of a job that has ended because its node has, and not by itself."""
NOT_FOUND = 127
"""The exit code of a shell that does not know the command."""

Say = Callable[[str], None]


@dataclass
class Log:
    """A job's log as it comes: lines for people, and what the newest of those for programs says."""

    said: dict[str, Any] = field(default_factory=dict)
    """Of work: {stage, share, text, seconds_left}."""
    result: dict[str, Any] = field(default_factory=dict)
    """Of its end: {run, name, metrics, seconds, made}."""
    taken: int = 0
    """Characters that have been read."""
    rest: str = ""

    def add(self, text: str) -> list[str]:
        """Whole lines that are for people."""
        self.taken += len(text)
        *lines, self.rest = (self.rest + text).split("\n")
        return [line for line in lines if not self._heeds(line)]

    def _heeds(self, line: str) -> bool:
        said = decoded(line)
        if said is not None and "stage" in said:
            self.said = said
        elif said is not None and "run" in said:
            self.result = said
        return said is not None

    @classmethod
    def of(cls, text: str) -> Log:
        """A whole one."""
        log = cls()
        log.add(text + "\n")
        return log


@dataclass(frozen=True)
class Sending:
    """A job with all that it needs there, ready to be sent, and to be sent once more if the head forgets it."""

    name: str
    command: str
    content: bytes
    digest: str
    """Of what is to be done, and where: the same job is not sent twice while it runs."""

    def send(self, head: Head) -> str:
        """The job's name there."""
        at = datetime.now(UTC).strftime("%Y%m%d-%H%M%S")
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / "package.zip").write_bytes(self.content)
            return head.submit_job(
                submission_id=f"{self.name}-{at}-{secrets.token_hex(2)}",
                entrypoint=self.command,
                runtime_env={
                    "working_dir": str(Path(folder) / "package.zip"),
                    "env_vars": {ENCODED: "json", SENDER: versions()["dlopt"], "RAY_JOB_STOP_WAIT_TIME_S": str(STOP_SECONDS)},
                },
                metadata={"dlopt": self.digest},
            )

    def running(self, head: Head) -> str | None:
        """The name of the same job, if it is there and has not ended."""
        found = (one for one in head.jobs() if (one.metadata or {}).get("dlopt") == self.digest and not one.status.is_terminal())
        return next((str(one.submission_id) for one in found), None)


def sending(job: Job, file: Path, overrides: Sequence[str], folder: Path, home: str | None) -> Sending:
    """What is to be sent of a job. Raises DloptError."""
    package = package_of(job, file, folder)
    command = shlex.join(["dlopt", "run", package.files[0], *overrides, *(["--home", home] if home else [])])
    return Sending(job.name, command, package.content, digest_of([job.model_dump(mode="json"), home, command]))


@dataclass(frozen=True)
class Ended:
    """A job that has ended: what `dlopt jobs status` says of it, and the exit code of its program."""

    state: dict[str, Any]

    @property
    def exit_code(self) -> int:
        code = self.state["exit_code"]
        if self.state["status"] == JobStatus.SUCCEEDED:
            return 0
        return int(code) if code and code > 0 else 143 if self.state["status"] == JobStatus.STOPPED else 1


def follow(head: Head, job: str, progress: Progress, say: Say, again: Sending | None = None, retries: int = 0) -> Ended:
    """Say what a job says until it ends. A head that is gone is waited for; a job that is lost with it is sent again, so many times.

    progress: told of its work; say: of lines of its log. Raises DloptError, Unreachable when the head stays away.
    """
    while True:
        log = Log()
        try:
            found = asyncio.run(_follow(head, job, log, progress, say))
            why = f"{job} was lost with its node" if str(found.error_type or "").rpartition(".")[2] in LOST else None
        except NoSuchJob:
            why = f"the head no longer knows {job}"
        if why is None or again is None or retries < 1:
            if why:
                raise DloptError(f"{why}: submit it again, and it goes on from its newest checkpoint")
            return Ended(state(found, log))
        retries -= 1
        job = again.send(head)
        progress("submit", None, f"{WARNING}{why}; sent again as {job}, it goes on from its newest checkpoint")


async def _follow(head: Head, job: str, log: Log, progress: Progress, say: Say) -> JobDetails:
    told: dict[str, Any] = {}
    status: JobStatus | None = None
    while True:
        found = await asyncio.to_thread(_patiently, head, job, progress)
        if found.status != status and found.status == JobStatus.PENDING:
            progress("submit", None, f"{job} waits for its turn on the cluster")
        status = found.status
        async for text in _tail(head, job, log.taken):
            for line in log.add(text):
                say(line)
            if log.said != told:
                told = log.said
                progress(told["stage"], told["share"], told["text"])
        found = await asyncio.to_thread(_patiently, head, job, progress)
        if found.status.is_terminal():
            if log.rest:
                say(log.rest)
            return found
        await asyncio.sleep(1.0)


async def _tail(head: Head, job: str, taken: int) -> AsyncIterator[str]:
    """What comes of a log after so many characters, until it ends, or the head is gone."""
    tail = head.tail_job_logs(job)
    waiting: asyncio.Task[str] | None = None
    try:
        while True:
            waiting = waiting or asyncio.ensure_future(anext(tail))
            done, _ = await asyncio.wait({waiting}, timeout=LOOK_SECONDS)
            if not done:
                await asyncio.to_thread(head.job, job)
                continue
            text, waiting = waiting.result(), None
            new, taken = text[taken:], max(0, taken - len(text))
            if new:
                yield new
    except (StopAsyncIteration, RuntimeError, OSError, aiohttp.ClientError, Unreachable):
        return  # what has become of the job, the head is asked for
    finally:
        if waiting:
            waiting.cancel()


def _patiently(head: Head, job: str, progress: Progress) -> JobDetails:
    """What the head knows of a job, once it answers. Raises Unreachable, NoSuchJob."""
    began, told = time.monotonic(), False
    while True:
        try:
            return head.job(job)
        except Unreachable as error:
            if time.monotonic() - began > HEAD_SECONDS:
                raise Unreachable(f"{error} {job} may go on there: `dlopt submit` of the same job follows it again") from None
            if not told:
                progress("submit", None, f"{WARNING}the head does not answer: it is waited for, for {HEAD_SECONDS:.0f} s")
            told = True
            time.sleep(1.0)


def state(found: JobDetails, log: Log) -> dict[str, Any]:
    """Status, progress, time left and what came out of a job, as JSON for other programs. Times are seconds since 1970."""
    ended = found.end_time / 1000 if found.end_time else None
    work = {} if found.status.is_terminal() else log.said
    return {
        "job": found.submission_id,
        "status": str(found.status.value),
        "stage": work.get("stage"),
        "share": work.get("share"),
        "text": work.get("text"),
        "seconds_left": work.get("seconds_left"),
        "started": found.start_time / 1000 if found.start_time else None,
        "ended": ended,
        "exit_code": found.driver_exit_code,
        "run": log.result.get("run"),
        "name": log.result.get("name"),
        "metrics": log.result.get("metrics"),
        "seconds": log.result.get("seconds"),
        "made": log.result.get("made"),
        "message": _message(found),
        "command": found.entrypoint,
    }


def _message(found: JobDetails) -> str:
    """Why it has ended as it has, in a line."""
    if found.driver_exit_code == NOT_FOUND:
        return f"dlopt is not installed on the cluster's head, or not on its PATH: pip install dlopt=={versions()['dlopt']} on every node"
    if found.driver_exit_code:
        return f"dlopt run ended with exit code {found.driver_exit_code}"
    return (str(found.message or "").strip().splitlines() or [""])[0]


def stop(head: Head, job: str) -> str:
    """Tell a job to stop, and wait until it has, which may take STOP_SECONDS while it saves; its status then."""
    head.stop_job(job)
    deadline = time.monotonic() + STOP_SECONDS + 20
    while not (found := head.job(job)).status.is_terminal():
        if time.monotonic() > deadline:
            raise DloptError(f"{job}: has not stopped yet: `dlopt jobs status {job}` says when it has")
        time.sleep(0.5)
    return str(found.status.value)


def ran(head: Head, name: str, command: Sequence[str]) -> Any:
    """The JSON that a command prints as a job on the cluster, the last of it. Raises DloptError when it fails."""
    job = head.submit_job(submission_id=f"{name}-{secrets.token_hex(4)}", entrypoint=shlex.join(command))
    lines = list[str]()
    ended = follow(head, job, silent, lines.append)
    for line in reversed(lines):  # Ray may say something after it
        try:
            return json.loads(line)
        except ValueError:
            continue
    said = next((line for line in reversed(lines) if line.startswith("dlopt: ")), ended.state["message"])
    raise DloptError(f"{name}: on the cluster: {said.removeprefix('dlopt: ')}")
