"""Hugging Face datasets: from the hub, saved with `save_to_disk`, or a folder of files that the library `datasets` reads."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa

from dlopt.data.sources.places import Place
from dlopt.data.sources.reading import MAX_BLOCK, MIN_BLOCK, Named, Piece, Rows, missing_package
from dlopt.data.types.columns import Stated
from dlopt.part import DloptError


class HuggingFace(Stated, Rows):
    """A data set of the library `datasets` (`pip install 'dlopt[huggingface]'`). Classes become their names; workers load it themselves,
    so a folder must be one that every node can see."""

    kind: Literal["huggingface"] = "huggingface"
    name: str
    """Name on the hub, or a folder: one that `save_to_disk` made, or one of csv, jsonl, parquet, image, ... files."""
    config: str | None = None
    """Which configuration, of a data set that has several."""
    split: str = "train"
    """Which split; the library's slices work as well, as in `train[:1000]`."""
    revision: str | None = None
    """Which commit, tag or branch of the hub."""

    def found(self) -> Any:
        """The fingerprint that the library makes of the data; of a folder, its files as well."""
        return [self._data()._fingerprint, _files(self.name)]

    def pieces(self) -> tuple[None, list[Piece]]:
        data = self._data()
        row = max(1, data.data.nbytes // max(len(data.data), 1))
        size = max(MIN_BLOCK, min(MAX_BLOCK, row * len(data) // 16)) // row + 1
        starts = range(0, max(len(data), 1), size)
        return None, [Piece(start=start, stop=min(start + size, len(data)), bytes=size * row) for start in starts]

    def load(self, place: Place | None, pieces: Sequence[Piece], columns: Sequence[str] | None = None) -> Iterator[Named]:
        data = self._data()
        for piece in pieces:
            yield self.name, _plain(data, piece.start, piece.stop)

    def first(self, rows: int) -> pa.Table:
        data = self._data()
        return _plain(data, 0, min(rows, len(data)))

    def _data(self) -> Any:
        folder = Path(self.name).expanduser().resolve()
        return _load(str(folder) if folder.is_dir() else self.name, self.config, self.split, self.revision, str(_files(self.name)))


def _files(name: str) -> list[Any]:
    """Names, sizes and times of the files of a folder; of a name on the hub, nothing."""
    found = sorted(path for path in Path(name).expanduser().rglob("*") if path.is_file())
    return [[str(path), (stat := path.stat()).st_size, stat.st_mtime_ns] for path in found]


@lru_cache(4)
def _load(name: str, config: str | None, split: str, revision: str | None, files: str) -> Any:
    """files: the state of a folder's files, so that changed ones are loaded anew."""
    try:
        import datasets
    except ImportError:
        raise missing_package("a Hugging Face data set", "huggingface") from None
    datasets.disable_progress_bars()
    try:
        if not _is_saved(Path(name)):
            return datasets.load_dataset(name, config, split=split, revision=revision)
        saved = datasets.load_from_disk(name)
        return saved if isinstance(saved, datasets.Dataset) else saved[split]
    except (OSError, ValueError, KeyError, ImportError, datasets.exceptions.DatasetsError) as error:
        said = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise DloptError(f"{name}: cannot be loaded as a Hugging Face data set (split {split}): {said}") from None


def _is_saved(folder: Path) -> bool:
    return (folder / "state.json").is_file() or (folder / "dataset_dict.json").is_file()


def _plain(data: Any, start: int, stop: int) -> pa.Table:
    """Rows with the bytes of images, wherever they lie, and the names of classes."""
    import datasets

    table = datasets.table.embed_table_storage(data.with_format("arrow")[start:stop])
    for index, (column, feature) in enumerate(data.features.items()):
        if isinstance(feature, datasets.ClassLabel):
            table = table.set_column(index, column, _names(table[column], feature.names))
    return table.replace_schema_metadata(None).cast(pa.schema([(f.name, _storage(f.type)) for f in table.schema]))


def _names(codes: pa.ChunkedArray, names: Sequence[str]) -> pa.Array:
    """-1 stands for a class that is not known."""
    return pa.array([None if code is None or code < 0 else names[code] for code in codes.to_pylist()], pa.string())


def _storage(kind: pa.DataType) -> pa.DataType:
    return kind.storage_type if isinstance(kind, pa.BaseExtensionType) else kind
