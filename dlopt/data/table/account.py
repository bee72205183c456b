"""What has become of the rows: the account that the manifest gives, and when it is too bad to go on."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from dlopt.data.clean import ExactDuplicates, NearDuplicates
from dlopt.data.section import Data
from dlopt.data.table.passes import Observed
from dlopt.data.table.plan import Plan
from dlopt.data.table.spill import OTHERS, Read
from dlopt.data.table.split import NAMES, AnySplit, GivenSplit
from dlopt.part import DloptError


def refuse_bad(section: Data, read: dict[str, Read], quarantine: Path) -> None:
    """More rows that cannot be read than the job allows, or none that can be used."""
    for name, said in read.items():
        if not said.rows:
            raise DloptError(
                f"data.{name}: none of its {said.read:,} rows can be used: {_say([said]) or 'cleaning drops all'}; they are in {quarantine}"
            )
    total, wrong = sum(said.read for said in read.values()), bad_rows(read)
    if wrong > section.most_bad * total:
        raise too_bad(section, read, quarantine, f"{wrong:,} of {total:,} rows cannot be read ({wrong / total:.1%}, ")


def bad_rows(read: dict[str, Read]) -> int:
    return sum(said.reasons.total() for said in read.values())


def too_bad(section: Data, read: dict[str, Read], quarantine: Path, what: str) -> DloptError:
    return DloptError(f"data: {what}data.most_bad allows {section.most_bad:.1%}): {_say(read.values())}; they are in {quarantine}")


def refuse_dropped(plan: Plan, read: dict[str, Read], seen: Observed) -> None:
    """A part of `clean` that drops a larger share of the rows than it may."""
    total = sum(said.read for said in read.values())
    for place, dropped in dropped_rows(plan, read, seen).items():
        clean = plan.section.clean[place]
        if dropped > clean.most * total:
            raise DloptError(
                f"data.clean.{place}: {clean.title} drops {dropped:,} of {total:,} rows "
                f"({dropped / total:.1%}, its `most` allows {clean.most:.0%})"
            )


def refuse_unlearnable(plan: Plan, seen: Observed) -> None:
    """A split that came out empty, or a class that is only in validation or test, is the user's to mend."""
    section = plan.section
    wanted = {
        "train": True,
        "validation": section.split.validation > 0 or section.validation is not None or section.fold is not None,
        "test": section.split.test > 0 or section.test is not None,
    }
    for name in NAMES:
        if wanted[name] and not seen.counts[name]:
            raise DloptError(f"data.split: the {name} split is empty: {_why_empty(section.split, name)}")
    for name in NAMES:
        for code, count in seen.labels[name].items():
            if count and not seen.labels["train"][code]:
                cure = (
                    "add rows of it, or drop it"
                    if plan.target.kind == "multi_label"
                    else "add rows, drop duplicates, or use a stratified split"
                )
                raise DloptError(f"data: label {plan.target.labels[code]!r} is in the {name} split but not in train: {cure}")
    for code, label in enumerate(plan.target.labels if plan.target.kind == "category" else ()):
        if not seen.labels["train"][code]:
            raise DloptError(f"data: cleaning drops every row of label {label!r}: there is nothing to learn of it")


def _why_empty(split: AnySplit, name: str) -> str:
    if not isinstance(split, GivenSplit):
        return "there are too few rows for its share"
    values = " or ".join(repr(value) for value, meant in split.names.items() if meant == name)
    return f"no row has {values} in column {split.column!r}: leave it out of split.names"


def dropped_rows(plan: Plan, read: dict[str, Read], seen: Observed) -> Counter[int]:
    """The rows that each part of `clean` has dropped, by its place; 0 for one that has dropped none."""
    early = sum((said.dropped for said in read.values()), Counter[int]())
    return Counter({place: early[place] + seen.dropped[place] for place in range(len(plan.section.clean))})


def account(plan: Plan, read: dict[str, Read], seen: Observed, warnings: list[str], seconds: dict[str, float]) -> dict[str, Any]:
    """What the manifest says of the rows."""
    dropped, reasons = dropped_rows(plan, read, seen), sum((said.reasons for said in read.values()), Counter[str]())
    duplicates = sum(rows for place, rows in dropped.items() if isinstance(plan.section.clean[place], (ExactDuplicates, NearDuplicates)))
    labels = {name: {str(label): seen.labels[name][code] for code, label in enumerate(plan.target.labels)} for name in NAMES}
    return {
        "counts": {
            "read": sum(said.read for said in read.values()),
            "bad": reasons.total(),
            "dropped": sum(dropped.values()),
            "duplicates": duplicates,
            **seen.counts,
        },
        "bad_reasons": dict(sorted(reasons.items())),
        "cleaning": [
            {"kind": clean.kind, "title": clean.title, "dropped": dropped[place]} for place, clean in enumerate(plan.section.clean)
        ],
        "left_out": list(plan.left_out),
        "across": {name: seen.across[name] for name in NAMES[1:]},
        "labels": labels if plan.target.labels else {},
        "warnings": warnings,
        "seconds": seconds,
    }


def _say(read: Iterable[Read]) -> str:
    """The most frequent reasons, in one line."""
    reasons = sum((said.reasons for said in read), Counter[str]())
    first = sorted(reasons.items(), key=lambda pair: (pair[0] == OTHERS, -pair[1], pair[0]))[:3]
    return "; ".join(f"{reason} ({count:,})" for reason, count in first)
