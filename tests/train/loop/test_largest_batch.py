"""The largest batch: the search for it with made-up memory, and real trials within a real limit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from dlopt.artifact import Artifact
from dlopt.models import Mlp
from dlopt.optim.optimizers import Adam
from dlopt.optim.schedules import ScaleLr
from dlopt.part import DloptError
from dlopt.train.job import Fit, Train
from dlopt.train.loop.gradients import Sharpness
from dlopt.train.loop.largest_batch import FINE, MIB, Trials, free_bytes, largest, largest_batch, rates_for
from dlopt.train.watch.mistakes import is_lack_of_memory
from tests.models.test_models import image
from tests.sets import THREE, prepared, signature

CPU = torch.device("cpu")


def holding(most: int, asked: list[int] | None = None) -> Callable[[int], bool]:
    """Memory for so many rows."""

    def fits(rows: int) -> bool:
        if asked is not None:
            asked.append(rows)
        return rows <= most

    return fits


@pytest.mark.parametrize("most", [1, 2, 3, 7, 16, 17, 100, 1000, 1023, 1024, 1025, 99_999])
def test_the_search_ends_within_a_sixteenth_below_what_fits(most: int) -> None:
    asked: list[int] = []
    found = largest(holding(most, asked), 10**9)
    assert most - max(1, most // FINE) <= found <= most
    assert found in asked and found + max(1, most // FINE) + 1 > most
    assert len(asked) == len(set(asked)) < 2 * most.bit_length() + 8
    assert max(asked) <= 2 * most


def test_the_search_stops_at_the_rows_that_there_are() -> None:
    asked: list[int] = []
    assert largest(holding(10**9, asked), 1000) == 1000
    assert asked == [1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1000]
    assert largest(holding(700), 1000) in range(656, 701)
    assert largest(holding(1), 1) == 1


def test_where_not_even_one_row_fits_the_search_finds_none() -> None:
    assert largest(holding(0), 1000) == 0


def wide(**train: Any) -> Fit:
    return Fit(seed=3, model=Mlp(hidden=(1024,)), augment=(), train=Train(**train))


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return prepared(tmp_path_factory.mktemp("home"), signature(image(28, 28, 1), target=THREE), train=8192)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.slow
def test_the_batch_that_is_found_stays_within_the_limit_and_twice_as_many_rows_do_not(pictures: Artifact) -> None:
    limit = 64 * MIB
    found = largest_batch(wide(), pictures, CPU, limit)
    assert 128 < found.rows < found.most == 8192
    assert found.bytes <= found.limit == limit
    trials = Trials(wide(), pictures, CPU, limit)
    assert trials.bytes_of(2 * found.rows) > limit
    assert found.bytes > limit / 2  # and not by much more room than there need be


@pytest.mark.usefixtures("one_thread")
@pytest.mark.slow
def test_a_trial_takes_what_weights_gradients_and_optimizer_hold_and_more_for_more_rows(pictures: Artifact) -> None:
    weights = 4 * (784 * 1024 + 1024 + 1024 * 3 + 3)
    trials = Trials(wide(optimizer=Adam()), pictures, CPU, 1024 * MIB)
    few, many = trials.bytes_of(16), trials.bytes_of(4096)
    assert few > 3.5 * weights  # a copy of the weights, their gradients, two averages of Adam's
    assert many - few > 4080 * (784 + 4 * 2 * 1024)  # bytes of the rows, and of the layer before and after its activation
    assert Trials(wide(sharpness=Sharpness()), pictures, CPU, 1024 * MIB).bytes_of(16) > few + 0.5 * weights


@pytest.mark.slow
def test_all_rows_fit_where_there_is_room_and_none_where_there_is_not(pictures: Artifact) -> None:
    small = Fit(seed=3, model=Mlp(hidden=(4,)), augment=(), train=Train())
    assert largest_batch(small, pictures, CPU).rows == 8192
    with pytest.raises(DloptError, match=r"train\.batch_size: not even one row fits into 1 MiB"):
        largest_batch(wide(), pictures, CPU, MIB)


def test_what_would_take_far_too_much_is_not_tried(pictures: Artifact) -> None:
    trials = Trials(wide(), pictures, CPU, 64 * MIB)
    trials.taken = {1024: 30 * MIB, 2048: 50 * MIB}
    assert trials.expected(4096) == 90 * MIB
    assert not trials.fits(4096)
    assert 4096 not in trials.taken  # nothing was measured


@pytest.mark.slow
def test_a_trial_takes_less_where_activations_are_computed_again(tmp_path: Path) -> None:
    data = prepared(tmp_path, signature(image(8, 8), target=THREE), train=1024)
    deep = Fit(seed=3, model=Mlp(hidden=(256,) * 12, residual=True), augment=(), train=Train())
    kept, again = (Trials(deep, data, CPU, 10**9, recomputed=recomputed).bytes_of(1024) for recomputed in (False, True))
    assert again < 0.8 * kept
    parts = deep.model_copy(update={"train": Train(micro_batch_size=512)})
    assert Trials(parts, data, CPU, 10**9).bytes_of(4096) < 0.85 * kept


def test_a_trial_leaves_the_network_as_it_was(pictures: Artifact) -> None:
    trials = Trials(wide(), pictures, CPU, 64 * MIB)
    before = {name: value.clone() for name, value in trials.network.state_dict().items()}
    trials.bytes_of(64)
    assert all(torch.equal(before[name], value) for name, value in trials.network.state_dict().items())


def test_torchs_own_error_is_known_as_a_lack_of_memory() -> None:
    with pytest.raises(RuntimeError) as error:
        torch.empty(2**60, dtype=torch.uint8)
    assert is_lack_of_memory(error.value)
    assert not is_lack_of_memory(RuntimeError("shapes cannot be multiplied"))


def test_free_memory_is_at_most_what_the_machine_has() -> None:
    total = int(Path("/proc/meminfo").read_text().split()[1]) * 1024
    assert 0 < free_bytes(CPU) <= total


def test_the_rate_for_a_batch_is_by_the_jobs_rule_or_by_both_from_its_own_batch() -> None:
    job = wide(batch_size=64, optimizer=Adam(lr=0.002))
    assert rates_for(job, 256, 8192) == pytest.approx({"linear": 0.008, "sqrt": 0.004})
    scaled = wide(batch_size=64, optimizer=Adam(lr=0.002), scale_lr=ScaleLr(rule="sqrt", base=256))
    assert rates_for(scaled, 1024, 8192) == pytest.approx({"sqrt": 0.004})
    assert rates_for(wide(optimizer=Adam(lr="auto")), 1024, 8192) == {}
    assert rates_for(wide(batch_size="full", optimizer=Adam(lr=0.002)), 2048, 8192)["linear"] == pytest.approx(0.0005)
