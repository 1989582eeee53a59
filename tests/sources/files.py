"""Files of every format with the same rows, as the tests of sources need them."""

from __future__ import annotations

import csv
import datetime as dt
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from PIL import Image
from pyarrow import parquet

from kapsl_scheduler.core.runs import Firing
from kapsl_scheduler.ports import SourceItem
from kapsl_scheduler.sources import FolderSource, ImageSettings

WIDTH = 3


def firing(hour: int = 3, attempt: int = 1) -> Firing:
    return Firing("job", dt.datetime(2026, 11, 25, hour, tzinfo=dt.UTC), "schedule", attempt)


def write_json_lines(path: Path, rows: Any) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in np.asarray(rows).tolist()))


def write_csv(path: Path, rows: Any) -> None:
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow([f"c{index}" for index in range(np.shape(rows)[1])])
        writer.writerows(np.asarray(rows).tolist())


def write_npy(path: Path, rows: Any) -> None:
    np.save(path, np.asarray(rows))


def write_fortran(path: Path, rows: Any) -> None:
    np.save(path, np.asfortranarray(rows))


def write_npz(path: Path, rows: Any) -> None:
    np.savez_compressed(path, x=np.asarray(rows))


def write_parquet(path: Path, rows: Any) -> None:
    columns = {f"c{index}": column for index, column in enumerate(np.asarray(rows).T)}
    parquet.write_table(pa.table(columns), path, row_group_size=max(4, len(rows) // 10))


def write_list_column(path: Path, rows: Any) -> None:
    parquet.write_table(pa.table({"x": list(np.asarray(rows))}), path, row_group_size=max(4, len(rows) // 10))


def write_image(path: Path, rows: Any) -> None:
    Image.fromarray(np.asarray(rows, np.uint8)).save(path)


@dataclass(frozen=True)
class Format:
    """A way to store rows of numbers; `first` is the number of the first row in keys, None for one row a file."""

    suffix: str
    write: Callable[[Path, Any], None]
    first: int | None
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def alone(self) -> bool:
        return self.first is None

    def source(self, folder: Path, **settings: Any) -> FolderSource:
        return FolderSource(path=str(folder), **{"pattern": f"*{self.suffix}", **self.settings, **settings})

    def key(self, name: str, row: int, last: int | None = None) -> str:
        if self.first is None:
            return name
        span = "" if last is None or last == row else f"-{last + self.first}"
        return f"{name}:{row + self.first}{span}"


FORMATS = {
    "JSON lines": Format(".jsonl", write_json_lines, 1),
    "CSV": Format(".csv", write_csv, 2),
    "npy": Format(".npy", write_npy, 0),
    "npy in Fortran order": Format(".npy", write_fortran, 0),
    "npz": Format(".npz", write_npz, 0, {"inputs": "x"}),
    "Parquet, columns": Format(".parquet", write_parquet, 0),
    "Parquet, a list": Format(".parquet", write_list_column, 0, {"inputs": "x"}),
    "image": Format(".png", write_image, None, {"image": ImageSettings(mode="L", layout="flat")}),
}


def remember(memory: dict[str, str], items: Iterable[SourceItem]) -> dict[str, str]:
    """What a store has after these items were delivered."""
    for item in items:
        for key, mark in item.marks.items():
            if mark is None:
                memory.pop(key, None)
            else:
                memory[key] = mark
    return memory
