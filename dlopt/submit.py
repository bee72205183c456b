"""`dlopt submit`: what `ray job submit --working-dir . -- dlopt run JOB` does, with its logs followed."""

from __future__ import annotations

import asyncio
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from dlopt.part import DloptError
from dlopt.session import set_environment


def submit(job: Path, overrides: Sequence[str], address: str, working_dir: Path, home: str | None) -> int:
    """Send the folder and the command to the cluster's head, print its log, and return 0 when the job ends SUCCEEDED.

    Ctrl-C ends the following, not the job: 130. job: a file below working_dir. Raises DloptError.
    """
    if not job.resolve().is_relative_to(working_dir.resolve()):
        raise DloptError(f"{job}: not below the working folder {working_dir}, so the cluster would not get it: give --working-dir")
    set_environment(address)
    from ray.exceptions import AuthenticationError
    from ray.job_submission import JobStatus, JobSubmissionClient

    sent = str(job.resolve().relative_to(working_dir.resolve()))
    command = ["dlopt", "run", sent, *overrides, *(["--home", home] if home else [])]
    try:
        client = JobSubmissionClient(address)
        submission = client.submit_job(entrypoint=shlex.join(command), runtime_env={"working_dir": str(working_dir.resolve())})
    except AuthenticationError as error:
        said = str(error).strip().splitlines()[0]
        raise DloptError(f"--address: {address} does not let you in ({said}): set RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH") from None
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise DloptError(f"--address: {address} does not take the job: {str(error).strip().splitlines()[0]}") from None
    print(f"{submission}: submitted to {address}; `ray job stop {submission} --address {address}` stops it", file=sys.stderr)

    async def follow() -> None:
        async for lines in client.tail_job_logs(submission):
            print(lines, end="", flush=True)

    try:
        asyncio.run(follow())
    except KeyboardInterrupt:
        said = f"no longer followed, and the job goes on: `ray job stop {submission} --address {address}` stops it"
        print(f"\n{submission}: {said}, `ray job logs --follow {submission} --address {address}` follows it again", file=sys.stderr)
        return 130
    status = client.get_job_status(submission)
    message = client.get_job_info(submission).message or ""
    print(f"{submission}: {status}  {message}", file=sys.stderr)
    return 0 if status == JobStatus.SUCCEEDED else 1
