"""Artifacts are made once, sealed whole, and never used when they are not what was sealed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dlopt.artifact import MANIFEST, Artifact, Stage, digest_of, is_sealed, once, place, versions, write_atomically
from dlopt.part import DloptError, Part


class Section(Part):
    number: int = 0
    """What the stage writes."""


class Maker:
    """A stage's function that counts how often it ran, and fails as often as it is told to."""

    def __init__(self, failures: int = 0) -> None:
        self.calls, self.failures, self.found = 0, failures, []

    def __call__(self, section: Section, out: Path, *parents: Artifact, word: str = "-") -> dict[str, Any]:
        self.calls += 1
        self.found = sorted(str(file.relative_to(out)) for file in out.rglob("*"))
        (out / "below").mkdir(exist_ok=True)
        (out / "below" / "rows.txt").write_text(f"{section.number}{''.join(parent.read('below/rows.txt').decode() for parent in parents)}")
        if self.calls <= self.failures:
            raise RuntimeError("the lights went out")
        (out / "done.txt").write_text(word)
        return {"rows": 3, "word": word}


def make(home: Path, number: int = 0, name: str = "data", **options: Any) -> Artifact:
    return once(Stage(name, Maker(), **options), Section(number=number), home)


def test_a_stage_runs_once_for_the_same_section_and_hands_back_what_it_left(tmp_path: Path) -> None:
    maker = Maker()
    stage = Stage("data", maker)
    first = once(stage, Section(), tmp_path, word="hello")
    again = once(stage, Section(), tmp_path, word="other")  # what it runs with is not what it is
    assert maker.calls == 1
    assert first == again == Artifact.open(first.path)
    assert again.info == {"rows": 3, "word": "hello"}
    assert first.read("below/rows.txt") == b"0"
    assert first.path.parent == tmp_path / "data"


def test_the_manifest_tells_what_made_it_from_what_and_how_long_it_took(tmp_path: Path) -> None:
    data = make(tmp_path, 7)
    model = once(Stage("model", Maker()), Section(number=1), tmp_path, data)
    manifest = model.manifest
    assert (manifest.stage, manifest.digest, manifest.section) == ("model", model.path.name, {"number": 1})
    assert manifest.parents == {"data": data.path.name}
    assert sorted(manifest.files) == ["below/rows.txt", "done.txt"]
    assert manifest.files["below/rows.txt"].size == 2
    assert 0 <= manifest.seconds < 60
    assert manifest.versions == versions()
    assert {"dlopt", "torch", "ray", "onnxruntime"} <= set(manifest.versions)
    assert model.read("below/rows.txt") == b"17"


def test_a_digest_follows_section_parents_version_found_and_name_and_nothing_else(tmp_path: Path) -> None:
    one, other = make(tmp_path, 1), make(tmp_path, 2)
    stage = Stage("model", Maker())
    base = place(stage, Section(), tmp_path, (one,))
    assert place(Stage("model", Maker(), scratch="kept"), Section(), tmp_path, (one,)) == base
    assert place(stage, Section.model_validate({"number": "0"}), tmp_path, (one,)) == base
    assert place(stage, Section(), tmp_path / "elsewhere", (one,)).name == base.name
    changed = {
        place(stage, Section(number=1), tmp_path, (one,)),
        place(stage, Section(), tmp_path, (other,)),
        place(stage, Section(), tmp_path, (one, other)),
        place(stage, Section(), tmp_path, ()),
        place(stage, Section(), tmp_path, (one,), found=[["a.csv", 1]]),
        place(stage, Section(), tmp_path, (one,), found=[["a.csv", 2]]),
        place(Stage("model", Maker(), version=2), Section(), tmp_path, (one,)),
        place(Stage("export", Maker()), Section(), tmp_path, (one,)),
        base,
    }
    assert len({path.name for path in changed}) == 9


def test_a_digest_is_twelve_digits_of_sha256_over_canonical_json() -> None:
    assert digest_of({"b": [1, 2.5], "a": "x"}) == digest_of({"a": "x", "b": (1, 2.5)})
    assert digest_of({"a": 1}) != digest_of({"a": "1"})
    assert digest_of({}) == "44136fa355b3"  # of the two bytes {}


def test_a_stage_that_fails_leaves_nothing_sealed_and_the_next_try_starts_from_nothing(tmp_path: Path) -> None:
    maker = Maker(failures=1)
    stage = Stage("data", maker)
    with pytest.raises(RuntimeError, match="the lights went out"):
        once(stage, Section(), tmp_path)
    path = place(stage, Section(), tmp_path, ())
    assert not is_sealed(path)
    with pytest.raises(DloptError, match="not a finished artifact"):
        Artifact.open(path)
    once(stage, Section(), tmp_path)
    assert maker.found == []
    assert is_sealed(path)


def test_a_stage_that_resumes_finds_what_it_left(tmp_path: Path) -> None:
    maker = Maker(failures=1)
    stage = Stage("model", maker, scratch="kept")
    with pytest.raises(RuntimeError):
        once(stage, Section(), tmp_path)
    artifact = once(stage, Section(), tmp_path)
    assert maker.found == ["below", "below/rows.txt"]
    assert sorted(artifact.manifest.files) == ["below/rows.txt", "done.txt"]


def test_scratch_is_there_for_the_next_try_and_gone_once_it_is_sealed(tmp_path: Path) -> None:
    maker = Maker(failures=1)
    stage = Stage("model", maker, scratch="below")
    with pytest.raises(RuntimeError):
        once(stage, Section(), tmp_path)
    artifact = once(stage, Section(), tmp_path)
    assert maker.found == ["below", "below/rows.txt"]
    assert sorted(artifact.manifest.files) == ["done.txt"]
    assert sorted(path.name for path in artifact.path.iterdir()) == ["done.txt", "manifest.json"]
    assert Artifact.open(artifact.path).check("done.txt")


def test_temporary_files_of_a_process_that_was_killed_are_not_sealed(tmp_path: Path) -> None:
    maker = Maker(failures=1)
    stage = Stage("model", maker, scratch="kept")
    with pytest.raises(RuntimeError):
        once(stage, Section(), tmp_path)
    path = place(stage, Section(), tmp_path, ())
    (path / ".weights.safetensors.4711").write_bytes(b"half")
    assert sorted(once(stage, Section(), tmp_path).manifest.files) == ["below/rows.txt", "done.txt"]


def flip(path: Path, place: int) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


def rewrite(path: Path, old: bytes, new: bytes) -> None:
    content = path.read_bytes()
    assert old in content
    path.write_bytes(content.replace(old, new))


DAMAGE: dict[str, Callable[[Path], object]] = {
    "cut short": lambda path: os.truncate(path, 100),
    "empty": lambda path: os.truncate(path, 0),
    "no text": lambda path: path.write_bytes(b"\xff" * 10),
    "no mapping": lambda path: path.write_text("[1]"),
    "null": lambda path: path.write_text("null"),
    "no seal": lambda path: rewrite(path, b'"seal"', b'"sael"'),
    "another number": lambda path: rewrite(path, b'"rows": 3', b'"rows": 4'),
    "another word": lambda path: rewrite(path, b'"stage": "data"', b'"stage": "date"'),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE.keys())
def test_a_damaged_manifest_is_one_line_and_nothing_is_made_over_it(tmp_path: Path, damage: Callable[[Path], object]) -> None:
    artifact = make(tmp_path)
    damage(artifact.path / MANIFEST)
    expected = f"{artifact.path / MANIFEST}: damaged: delete the folder {artifact.path} and run the job again"
    for use in (lambda: Artifact.open(artifact.path), lambda: make(tmp_path)):
        with pytest.raises(DloptError) as caught:
            use()
        assert str(caught.value) == expected
    assert (artifact.path / "done.txt").is_file()


@pytest.mark.parametrize("change", [lambda path: path.unlink(), lambda path: path.write_text("123")])
def test_a_file_that_is_missing_or_of_another_size_is_one_line(tmp_path: Path, change: Callable[[Path], object]) -> None:
    artifact = make(tmp_path)
    file = artifact.path / "below" / "rows.txt"
    change(file)
    with pytest.raises(DloptError) as caught:
        Artifact.open(artifact.path)
    assert str(caught.value) == f"{file}: missing or damaged: delete the folder {artifact.path} and run the job again"


def test_a_file_of_the_right_size_and_other_content_is_never_read(tmp_path: Path) -> None:
    artifact = make(tmp_path)
    file = artifact.path / "below" / "rows.txt"
    flip(file, 0)
    opened = Artifact.open(artifact.path)
    for use in (opened.read, opened.check):
        with pytest.raises(DloptError) as caught:
            use("below/rows.txt")
        assert str(caught.value) == f"{file}: content differs from its seal: delete the folder {artifact.path} and run the job again"
    with pytest.raises(DloptError, match=r"has no file nothing\.txt"):
        opened.read("nothing.txt")
    assert opened.read("done.txt") == b"-"


def test_what_is_no_artifact_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for path in (tmp_path, tmp_path / "nowhere", tmp_path / "file"):
        with pytest.raises(DloptError) as caught:
            Artifact.open(path)
        assert str(caught.value) == f"{path}: not a finished artifact (no manifest.json): run its job again"


HOLD = """
import sys
from pathlib import Path
from dlopt.artifact import Stage, once
from tests.house.test_artifact import Section

def make(section, out):
    (out / "mine.txt").write_text("mine")
    print("making", flush=True)
    sys.stdin.readline()
    return {}

once(Stage("data", make), Section(), Path(sys.argv[1]))
"""


def test_while_another_process_makes_it_one_line_says_so_and_its_files_stay(tmp_path: Path) -> None:
    maker = Maker()
    stage = Stage("data", maker)
    path = place(stage, Section(), tmp_path, ())
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2]
    ) as other:
        assert other.stdin and other.stdout
        assert other.stdout.readline() == "making\n"
        with pytest.raises(DloptError) as caught:
            once(stage, Section(), tmp_path)
        assert str(caught.value) == f"{path}: another dlopt process is making it now: wait for it, or stop it"
        once(stage, Section(number=1), tmp_path)  # another one is free
        other.stdin.write("\n")
        other.stdin.flush()
        assert other.wait(timeout=60) == 0
    assert once(stage, Section(), tmp_path).read("mine.txt") == b"mine"
    assert maker.calls == 1


def test_a_process_that_was_killed_holds_no_lock(tmp_path: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2]
    ) as other:
        assert other.stdout
        assert other.stdout.readline() == "making\n"
        other.kill()
    artifact = make(tmp_path)
    assert sorted(artifact.manifest.files) == ["below/rows.txt", "done.txt"]  # not the one that it had begun


def test_a_file_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_atomically(path, "old")
    with pytest.raises(UnicodeEncodeError):
        write_atomically(path, "\ud800")
    assert path.read_text() == "old"
    write_atomically(path, b"new")
    assert path.read_bytes() == b"new"
    assert list(tmp_path.iterdir()) == [path]


def test_numbers_in_the_info_that_json_does_not_have_do_not_break_the_seal(tmp_path: Path) -> None:
    artifact = once(Stage("data", lambda section, out: {"loss": float("nan"), "rows": 1}), Section(), tmp_path)
    assert Artifact.open(artifact.path).info["rows"] == 1
    json.loads((artifact.path / MANIFEST).read_text(), parse_constant=pytest.fail)
