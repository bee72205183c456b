"""Nearly equal images and texts: sketches against imagehash and datasketch, what is found against all pairs, and crowds."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import imagehash
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasketch import MinHash
from PIL import Image

from dlopt.data.clean import NearDuplicateImages, NearDuplicateTexts
from dlopt.data.clean.images import WAVES, _transform
from dlopt.data.clean.near import WINDOW
from dlopt.data.clean.texts import HASHES, NOTHING, bands_for
from dlopt.data.counter import row_keys
from dlopt.data.types.columns import Columns


def keys(rows: int) -> np.ndarray:
    return row_keys([np.arange(rows)])


def by_all_pairs(near: np.ndarray, key: np.ndarray) -> set[int]:
    """The rows that go, of clusters found by walking: near is bool (rows, rows)."""
    left, gone = set(range(len(near))), set()
    while left:
        cluster, todo = set(), [min(left)]
        while todo:
            row = todo.pop()
            if row not in cluster:
                cluster.add(row)
                todo += np.flatnonzero(near[row]).tolist()
        gone |= cluster - {min(cluster, key=lambda row: tuple(key[row]))}
        left -= cluster
    return gone


def lost(mask: np.ndarray) -> set[int]:
    return set(np.flatnonzero(mask).tolist())


# Images


def bits_of(hashes: np.ndarray) -> np.ndarray:
    """bool (rows, 256) of uint64 (rows, 4)."""
    return np.unpackbits(hashes.astype(">u8").view(np.uint8).reshape(len(hashes), -1), axis=1).astype(bool)


def distances(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    return (bits_of(left) != bits_of(right)).sum(axis=1)


def pictures(rows: int, size: tuple[int, int], seed: int = 0) -> np.ndarray:
    """Random colours without hard edges, such as photographs have: energy falls with frequency."""
    random = np.random.default_rng(seed)
    rate = np.hypot(np.fft.fftfreq(size[0])[:, None], np.fft.fftfreq(size[1])[None, :])
    rate[0, 0] = 1
    waves = np.fft.fft2(random.normal(size=(rows, *size, 3)), axes=(1, 2)) / rate[None, :, :, None] ** 1.2
    values = np.fft.ifft2(waves, axes=(1, 2)).real
    low, high = values.min(axis=(1, 2), keepdims=True), values.max(axis=(1, 2), keepdims=True)
    return ((values - low) / (high - low) * 255).astype(np.uint8)


def as_jpeg(pixels: np.ndarray) -> np.ndarray:
    sink = io.BytesIO()
    Image.fromarray(pixels).save(sink, "JPEG", quality=90)
    return np.asarray(Image.open(sink))


def enlarged(pixels: np.ndarray) -> np.ndarray:
    return np.asarray(Image.fromarray(pixels).resize((pixels.shape[1] * 3 // 2, pixels.shape[0] * 3 // 2), Image.Resampling.BICUBIC))


def brighter(pixels: np.ndarray) -> np.ndarray:
    return np.clip(pixels * 1.05 + 3, 0, 255).astype(np.uint8)


@pytest.mark.parametrize("size", [(32, 32), (64, 48), (28, 100), (20, 20)])
@pytest.mark.parametrize("channels", [1, 3])
def test_hashes_are_those_of_imagehash_but_for_rounding(size: tuple[int, int], channels: int) -> None:
    images = pictures(60, size)[..., :channels]
    found = bits_of(NearDuplicateImages().sketch(images))
    theirs = [imagehash.phash(Image.fromarray(image.squeeze()), hash_size=WAVES, highfreq_factor=2).hash.ravel() for image in images]
    differ = (found != np.stack(theirs)).sum(axis=1)
    assert differ.max() <= 8 and differ.mean() < 2.6  # of 256; those of two images differ in about 128


def test_a_hash_does_not_depend_on_other_images_or_on_transparency() -> None:
    images = pictures(300, (40, 40))
    whole = NearDuplicateImages().sketch(images)
    assert (NearDuplicateImages().sketch(images[123:124]) == whole[123]).all()
    opaque = np.concatenate([images, np.full((300, 40, 40, 1), 9, np.uint8)], axis=3)
    assert (NearDuplicateImages().sketch(opaque) == whole).all()


def test_hashes_are_of_exact_sums_so_every_machine_finds_the_same() -> None:
    for images in (pictures(20, (50, 37))[..., :1], np.full((1, 1000, 700, 1), 255, np.uint8)):
        height, width = (_transform(size).astype(np.int64) for size in images.shape[1:3])
        waves = (height @ images[..., 0].astype(np.int64) @ width.T).reshape(len(images), WAVES * WAVES)
        assert np.abs(waves).max() < 2**53
        assert (bits_of(NearDuplicateImages().sketch(images)) == (waves > np.median(waves, axis=1, keepdims=True))).all()


@pytest.mark.parametrize("change", [as_jpeg, enlarged, brighter])
def test_changed_pictures_are_found_and_others_stay(change: Callable[[np.ndarray], np.ndarray]) -> None:
    images = pictures(200, (64, 64))
    clean = NearDuplicateImages()
    sketches = np.concatenate([clean.sketch(images), clean.sketch(np.stack([change(image) for image in images[:100]]))])
    gone = clean.losers(sketches, keys(300))
    assert gone.sum() >= 95
    pairs = gone[:100].astype(int) + gone[200:]
    assert pairs.max() == 1 and not gone[100:200].any()


def test_no_digit_is_taken_for_another(shared: Path) -> None:
    raw = pq.read_table(shared / "mnist" / "train.parquet", columns=["image"])["image"].to_pylist()[:20_000]
    digits = np.stack([np.asarray(Image.open(io.BytesIO(image))) for image in raw])[..., None]
    assert not NearDuplicateImages().losers(NearDuplicateImages().sketch(digits), row_keys([digits])).any()


def crowded(rows: int, seed: int, varied: int) -> np.ndarray:
    """Hashes of which only so many bits vary, so that there are many pairs of every small distance."""
    random = np.random.default_rng(seed)
    bits = np.zeros((rows, 256), dtype=bool)
    bits[:, random.permutation(256)[:varied]] = random.random((rows, varied)) < 0.5
    return np.packbits(bits, axis=1).view(">u8").astype(np.uint64)


@pytest.mark.parametrize("distance", [0, 1, 2, 3, 6, 8, 16])
def test_the_rows_that_go_are_those_of_all_pairs(distance: int) -> None:
    random = np.random.default_rng(distance)
    sketches = crowded(400, distance, 256)
    for row in range(0, 300, 3):  # the next two differ in up to distance + 1 bits from this one
        for copy in (1, 2):
            flipped = bits_of(sketches[row : row + 1])
            flipped[0, random.permutation(256)[: random.integers(0, distance + 2)]] ^= True
            sketches[row + copy] = np.packbits(flipped, axis=1).view(">u8").astype(np.uint64)[0]
    near = (bits_of(sketches)[:, None] != bits_of(sketches)[None]).sum(axis=2) <= distance
    key = keys(400)
    gone = lost(NearDuplicateImages(distance=distance).losers(sketches, key))
    assert gone == by_all_pairs(near, key) and 50 < len(gone) < 200


def test_rows_in_any_order_leave_the_same_survivors() -> None:
    random = np.random.default_rng(5)
    sketches, key = crowded(3000, 5, 19), keys(3000)
    clean = NearDuplicateImages(distance=2)
    before, order = clean.losers(sketches, key), random.permutation(3000)
    assert (clean.losers(sketches[order], key[order]) == before[order]).all() and 500 < before.sum() < 2900


def test_a_chain_of_near_images_is_one_cluster() -> None:
    bits = np.tri(200, 256, -1, dtype=bool)  # each differs from the next in one bit, the ends in 199
    sketches = np.packbits(bits, axis=1).view(">u8").astype(np.uint64)
    order = np.random.default_rng(0).permutation(200)
    gone = NearDuplicateImages(distance=1).losers(sketches[order], keys(200))
    assert gone.sum() == 199 and not gone[min(range(200), key=lambda row: tuple(keys(200)[row]))]


def test_many_equal_hashes_leave_one() -> None:
    for rows in (0, 1, 2, 100_000):
        gone = NearDuplicateImages().losers(np.zeros((rows, 4), np.uint64), keys(rows))
        assert gone.sum() == max(rows - 1, 0)
    assert NearDuplicateImages().sketch(np.zeros((0, 5, 5, 1), np.uint8)).shape == (0, 4)


def test_in_a_crowd_pairs_that_are_not_near_are_never_joined() -> None:
    sketches = np.zeros((20_000, 4), dtype=np.uint64)
    sketches[:, 0] = np.random.default_rng(0).permutation(2**20)[:20_000]
    sketches[:, 1:3] = (sketches[:, :1] * np.array([2**20 + 1, 2**30 + 2**10], np.uint64)) & np.uint64(2**63 - 1)
    clean = NearDuplicateImages(distance=1)
    assert len(sketches) > 100 * WINDOW
    assert not clean.losers(sketches, keys(20_000)).any()  # three copies of a number: different ones differ in at least 3 bits
    twice = np.concatenate([sketches, sketches[:5000] ^ np.array([0, 0, 0, 1], np.uint64)])
    gone = clean.losers(twice, keys(25_000))
    assert not (gone[:5000] & gone[20_000:]).any() and not gone[5000:20_000].any()
    assert gone.sum() > 4900  # nearly all of their only neighbours are found in the crowd all the same


# Texts


def shingles_of(text: str, size: int, words: bool) -> set[Any]:
    """Pieces of a text of lower-case words, the slow way."""
    units: Any = text.split() if words else text
    return {tuple(units[start : start + size]) for start in range(max(len(units) - size + 1, 1))} if units else set()


def jaccard(left: set[Any], right: set[Any]) -> float:
    return len(left & right) / len(left | right) if left | right else 0.0


def sentences(rows: int, seed: int = 0, words: int = 40) -> list[list[str]]:
    random = np.random.default_rng(seed)
    return [[f"w{word}" for word in row] for row in random.integers(0, 3000, (rows, words)).tolist()]


def edited(text: list[str], changes: int, random: np.random.Generator) -> list[str]:
    places = set(random.permutation(len(text))[:changes].tolist())
    return [f"new{place}" if place in places else word for place, word in enumerate(text)]


def planted_pairs() -> tuple[list[str], list[str]]:
    random, left = np.random.default_rng(1), sentences(400)
    right = [edited(text, row % 8, random) for row, text in enumerate(left)]
    return [" ".join(text) for text in left], [" ".join(text) for text in right]


@pytest.mark.parametrize(("shingles", "size"), [("words", 1), ("words", 3), ("characters", 5)])
def test_the_share_of_equal_hashes_is_the_jaccard_similarity(shingles: Any, size: int) -> None:
    clean = NearDuplicateTexts(columns=("a",), shingles=shingles, size=size)
    left, right = planted_pairs()
    ours = (clean.sketch(pa.array(left)) == clean.sketch(pa.array(right))).mean(axis=1)
    pieces = [[shingles_of(text, size, shingles == "words") for text in texts] for texts in (left, right)]
    true = np.array([jaccard(one, other) for one, other in zip(*pieces, strict=True)])
    error = ours - true
    theory = np.sqrt((true * (1 - true)).mean() / HASHES)  # of a binomial share
    assert abs(error.mean()) < 4 * theory / np.sqrt(len(error)) and 0.8 * theory < error.std() < 1.2 * theory
    assert (ours[true == 1] == 1).all() and true.min() < 0.75


def test_the_error_is_that_of_datasketch() -> None:
    left, right = planted_pairs()
    clean = NearDuplicateTexts(columns=("a",))
    ours = (clean.sketch(pa.array(left)) == clean.sketch(pa.array(right))).mean(axis=1)
    pairs = [[shingles_of(text, 3, True) for text in pair] for pair in zip(left, right, strict=True)]
    true = np.array([jaccard(*pair) for pair in pairs])
    theirs = np.array([_datasketch(one).jaccard(_datasketch(other)) for one, other in pairs])
    assert np.abs(ours - true).mean() < 1.25 * np.abs(theirs - true).mean()


def _datasketch(pieces: set[Any]) -> MinHash:
    sketch = MinHash(num_perm=HASHES)
    sketch.update_batch([" ".join(piece).encode() for piece in pieces])
    return sketch


def test_case_punctuation_spacing_and_forms_of_letters_do_not_matter() -> None:
    for shingles, texts in (
        ("words", ["Crème brûlée, 2 for 1!", "creme\u0300 bru\u0302le\u0301e 2 for 1", "  CRÈME--brûlée\t2 FOR (1)"]),
        ("characters", ["Crème brûlée", "  CRÈME \n brûlée ", "cre\u0300me bru\u0302le\u0301e"]),
    ):
        texts = [text.replace("creme\u0300", "cre\u0300me") for text in texts]
        sketches = NearDuplicateTexts(columns=("a",), shingles=shingles, size=2).sketch(pa.array(texts))
        assert (sketches == sketches[0]).all(), shingles


def test_a_sketch_does_not_depend_on_other_texts() -> None:
    random = np.random.default_rng(2)
    texts = [" ".join(text[: random.integers(0, 40)]) for text in sentences(600)]
    texts[7], texts[8] = " ".join(map(str, range(20_000))), "日本語 🙂 " * 50  # one longer than what is cut at a time
    for clean in (NearDuplicateTexts(columns=("a",)), NearDuplicateTexts(columns=("a",), shingles="characters", size=4)):
        whole = clean.sketch(pa.array(texts))
        for row in (0, 6, 7, 8, 9, 599):
            assert (clean.sketch(pa.array(texts[row : row + 1])) == whole[row]).all()
        assert (clean.sketch(pa.array(texts).slice(5, 10)) == whole[5:15]).all()
        assert (clean.sketch(pa.array(texts[:20], pa.large_string())) == whole[:20]).all()


def test_a_text_shorter_than_a_piece_is_a_piece() -> None:
    for clean in (NearDuplicateTexts(columns=("a",), size=6), NearDuplicateTexts(columns=("a",), shingles="characters", size=6)):
        sketches = clean.sketch(pa.array(["a b", "A  b", "a c", "b a"]))
        assert (sketches[0] == sketches[1]).all()
        assert (sketches[0] != sketches[2]).all() and (sketches[0] != sketches[3]).all()


def test_the_pieces_of_a_text_go_from_its_first_to_its_last_word() -> None:
    clean = NearDuplicateTexts(columns=("a",), size=3)
    sketches = clean.sketch(pa.array(["a b c d e", "a b c d", "b c d e", "b c d", "x b c d e", "a b c d x"]))
    assert (sketches[0] == np.minimum(sketches[1], sketches[2])).all() and (sketches[0] != sketches[4:]).any(axis=1).all()


def test_rows_without_a_text_stay() -> None:
    clean = NearDuplicateTexts(columns=("a", "b"))
    table = pa.table({"a": ["", None, "NA", "...", "one two three four"] * 3, "b": pa.array([None] * 15, pa.string())})
    sketches = clean.sketch(clean.texts(Columns().canonical(table)))
    assert (sketches.reshape(3, 5, HASHES)[:, :4] == NOTHING).all()
    gone = clean.losers(sketches, keys(15)).reshape(3, 5)
    assert not gone[:, :4].any() and gone[:, 4].sum() == 2


def test_several_columns_are_one_text() -> None:
    clean = NearDuplicateTexts(columns=("a", "b"))
    table = pa.table({"a": ["one two", "one two three", None], "b": ["three four", "four", "one two three four"]})
    sketches = clean.sketch(clean.texts(table))
    assert (sketches == sketches[0]).all()
    assert clean.title == "near_duplicate_texts of a, b"


@pytest.mark.parametrize("threshold", [0.3, 0.5, 0.8, 0.9, 1.0])
def test_bands_let_hardly_a_pair_at_the_threshold_slip(threshold: float) -> None:
    bands, hashes = bands_for(threshold)
    agree = np.random.default_rng(0).random((20_000, bands, hashes)) < threshold
    assert bands * hashes <= HASHES and np.any(np.all(agree, axis=2), axis=1).mean() > 0.985


@pytest.mark.parametrize(("shingles", "size", "threshold"), [("words", 1, 0.8), ("words", 3, 0.6), ("characters", 5, 0.8)])
def test_near_texts_are_found_and_far_ones_are_not(shingles: Any, size: int, threshold: float) -> None:
    random = np.random.default_rng(3)
    originals = sentences(1000, seed=3)
    texts = [" ".join(text) for text in originals + [edited(text, row % 12, random) for row, text in enumerate(originals[:600])]]
    pieces = [shingles_of(text, size, shingles == "words") for text in texts]
    true = np.array([jaccard(pieces[row], pieces[1000 + row]) for row in range(600)])
    clean = NearDuplicateTexts(columns=("a",), shingles=shingles, size=size, threshold=threshold)
    gone = clean.losers(clean.sketch(pa.array(texts)), keys(1600))
    found = gone[:600] | gone[1000:]
    assert not (gone[:600] & gone[1000:]).any() and not gone[600:1000].any()
    assert found[true > threshold + 0.15].all() and not found[true < threshold - 0.15].any()  # four deviations of the estimate
    assert (true > threshold + 0.15).sum() > 50 and (true < threshold - 0.15).sum() > 50


def test_texts_that_go_are_those_of_all_pairs_of_sketches() -> None:
    random = np.random.default_rng(4)
    originals = sentences(200, seed=4)
    texts = [" ".join(edited(originals[row % 200], int(random.integers(0, 4)), random)) for row in range(600)]
    clean, key = NearDuplicateTexts(columns=("a",), threshold=0.7), keys(600)
    sketches = clean.sketch(pa.array(texts))
    near = (sketches[:, None] == sketches[None]).mean(axis=2) >= 0.7
    assert lost(clean.losers(sketches, key)) == by_all_pairs(near, key)


def test_texts_in_any_order_leave_the_same_survivors() -> None:
    random = np.random.default_rng(6)
    originals = sentences(300, seed=6)
    texts = pa.array([" ".join(edited(originals[row % 300], int(random.integers(0, 3)), random)) for row in range(1500)])
    clean, key, order = NearDuplicateTexts(columns=("a",)), keys(1500), random.permutation(1500)
    before = clean.losers(clean.sketch(texts), key)
    assert (clean.losers(clean.sketch(texts.take(order)), key[order]) == before[order]).all() and 500 < before.sum() < 1300


def test_a_crowd_of_texts_that_agree_in_a_band_only_stays() -> None:
    random = np.random.default_rng(7)
    sketches = random.integers(0, 2**32, (20_000, HASHES), dtype=np.uint32)
    sketches[:, : bands_for(0.8)[1]] = 1
    sketches[15_000:] = sketches[:5000]
    sketches[15_000:, -1] ^= 1
    gone = NearDuplicateTexts(columns=("a",)).losers(sketches, keys(20_000))
    assert (gone[:5000] ^ gone[15_000:]).all() and not gone[5000:15_000].any()


def test_many_equal_texts_leave_one_and_none_leaves_none() -> None:
    clean = NearDuplicateTexts(columns=("a",))
    for rows in (0, 1, 30_000):
        sketches = clean.sketch(pa.array(["the same text for all"] * rows, pa.string()))
        assert sketches.shape == (rows, HASHES) and clean.losers(sketches, keys(rows)).sum() == max(rows - 1, 0)
    assert not clean.losers(clean.sketch(pa.array([None] * 5, pa.string())), keys(5)).any()
