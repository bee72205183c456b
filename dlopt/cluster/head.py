"""A cluster's head, by Ray's REST interface for jobs: every wait has an end, and whatever goes wrong is one line."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit

import ray
import requests
from ray.exceptions import AuthenticationError
from ray.job_submission import JobDetails, JobSubmissionClient

from dlopt.part import DloptError

ADDRESSES = ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")
"""Where Ray's own commands look for an address, and prefer it to the one that is given."""
CONNECT_SECONDS, ANSWER_SECONDS = 10.0, 60.0
LOGGERS = ("ray.dashboard.modules.dashboard_sdk", "ray.dashboard.modules.job.sdk")
"""Which tell of uploads and of the ends of connections."""


class Unreachable(DloptError):
    """Nobody answers there, or not any more."""


class NoSuchJob(DloptError):
    """The head does not know the job."""


class Head(JobSubmissionClient):
    """The dashboard of a cluster's head at http://host:8265. Raises DloptError, when nobody answers Unreachable."""

    def __init__(self, address: str) -> None:
        self._address = address
        for name in LOGGERS:
            logging.getLogger(name).setLevel(logging.WARNING)
        place = urlsplit(address)
        if place.scheme not in ("http", "https") or not place.hostname:
            raise DloptError(f"--address: {address}: give the address of the head's dashboard, such as http://head:8265")
        with _alone(address):
            try:
                super().__init__(address)
            except (requests.RequestException, RuntimeError, KeyError, ValueError) as error:
                said = (str(error).strip().splitlines() or [type(error).__name__])[0]
                raise DloptError(f"--address: {address} answers, but not as a Ray dashboard does: {said}") from None
        there = str(self._server_ray_version)
        if _release(there) != _release(ray.__version__):
            raise DloptError(
                f"--address: {address} runs Ray {there}, and this is Ray {ray.__version__}: "
                f"pip install 'ray=={there}' here, or {ray.__version__} on all of its nodes"
            )

    def jobs(self) -> list[JobDetails]:
        """Those that were submitted, the newest first."""
        found = [one for one in self.list_jobs() if one.submission_id]
        return sorted(found, key=lambda one: one.start_time or 0, reverse=True)

    def job(self, job: str) -> JobDetails:
        """Raises NoSuchJob."""
        found = self.get_job_info(job)
        if not found.submission_id:
            raise NoSuchJob(f"{job}: was not submitted to {self._address}, but is a program that has joined it: `dlopt jobs` lists jobs")
        return found

    def _do_request(self, method: str, endpoint: str, **given: Any) -> requests.Response:
        try:
            return super()._do_request(method, endpoint, timeout=(CONNECT_SECONDS, ANSWER_SECONDS), **given)
        except AuthenticationError as error:
            wrong = "failed" in str(error).partition(":")[0]
            said = "does not accept your token" if wrong else "asks for a token"
            raise DloptError(
                f"--address: {self._address} {said}: set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN to the cluster's own "
                "(or RAY_AUTH_TOKEN_PATH to a file with it)"
            ) from None
        except (requests.ConnectionError, requests.Timeout) as error:
            why = "no answer in time" if isinstance(error, requests.Timeout) else _cause(error)
            raise Unreachable(f"--address: nobody answers at {self._address} ({why}): is the cluster up?") from None

    def _raise_error(self, r: requests.Response) -> None:
        said = (r.text.strip().splitlines() or [""])[-1]
        if r.status_code == 404:
            raise NoSuchJob(f"{self._address}: {said}: `dlopt jobs` lists those that there are")
        raise DloptError(f"{self._address} refuses this ({r.status_code}): {said}")


def _cause(error: BaseException) -> str:
    """What the system said, which requests and urllib3 wrap several times."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, OSError) and seen.strerror:
            return seen.strerror
        seen = (
            seen.__cause__
            or seen.__context__
            or getattr(seen, "reason", None)
            or next((one for one in seen.args if isinstance(one, BaseException)), None)
        )
    return type(error).__name__


def _release(version: str) -> list[str]:
    return version.split(".")[:2]


@contextmanager
def _alone(address: str) -> Iterator[None]:
    """Within it, Ray takes the address that it is given."""
    before = {name: os.environ.pop(name) for name in ADDRESSES if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(before)
