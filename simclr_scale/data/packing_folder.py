"""The folder that a data set is packed into: whose it is, what of it is done, and its index when all is."""

import errno
import json
import os
import shutil
import tarfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import Any

import numpy as np

from simclr_scale.data.packing_shard import Shard, ShardWriter
from simclr_scale.data.sources.array_files import replacing, write_arrays
from simclr_scale.data.sources.packed import (
    BAD_FILES,
    IMAGES,
    INDEX,
    UNFINISHED,
    Index,
    file_sha256,
    is_packed,
    read_index,
)
from simclr_scale.data.sources.packed_names import PackedNames
from simclr_scale.errors import InputError

try:
    import fcntl
except ImportError:  # Windows, where two processes are not kept apart
    fcntl = None  # type: ignore[assignment]

_PLAN = "plan.json"
_LOCK = "lock"


class Workplace:
    """The output folder while it is worked on by this process alone."""

    def __init__(self, folder: str, plan: dict[str, Any]) -> None:
        self.folder, self._plan = folder, plan
        self._unfinished = os.path.join(folder, UNFINISHED)

    def __enter__(self) -> "Workplace":
        self._refuse_foreign()
        os.makedirs(self._unfinished, exist_ok=True)
        self._lock = _Lock(os.path.join(self._unfinished, _LOCK), self.folder)
        try:
            # Once more, as another process may have finished it meanwhile.
            self._refuse_foreign()
            self._adopt()
        except BaseException:
            self._lock.release()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._lock.release()

    def _refuse_foreign(self) -> None:
        """Raises InputError unless the folder is new, empty, or of the same plan."""
        if not os.path.lexists(self.folder):
            return
        if not os.path.isdir(self.folder):
            raise InputError(f"--output {self.folder}: is a file; name a new folder")
        plan_file = os.path.join(self._unfinished, _PLAN)
        if os.path.isfile(plan_file):
            with open(plan_file, encoding="utf-8") as file:
                self._compare(_parsed(file.read()), "an unfinished output")
        elif os.path.isfile(os.path.join(self.folder, INDEX)) and is_packed(self.folder):
            with open(os.path.join(self.folder, INDEX), encoding="utf-8") as file:
                self._compare(_parsed(file.read()), "an output")
        elif set(os.listdir(self.folder)) - {UNFINISHED} or self._holds_more_than_a_lock():
            raise InputError(f"--output {self.folder}: is not empty, and its files are not those of an earlier prepare")

    def _holds_more_than_a_lock(self) -> bool:
        return os.path.isdir(self._unfinished) and bool(
            {name for name in os.listdir(self._unfinished) if not name.startswith(f".{_PLAN}.")} - {_LOCK}
        )

    def _compare(self, found: dict[str, Any], kind: str) -> None:
        for key in ("version", "source", "settings", "classes", "splits"):
            there, here = found.get(key), self._plan[key]
            if key == "splits" and isinstance(there, dict):
                there = {
                    split: {fact: facts.get(fact) for fact in ("images", "description", "fingerprint")}
                    for split, facts in there.items()
                    if isinstance(facts, dict)
                }
            if there == here:
                continue
            if key in ("classes", "splits"):
                raise InputError(
                    f"--output {self.folder}: holds {kind} of other images: {self._plan['source']} has changed since; "
                    "name another folder"
                )
            if key == "settings" and isinstance(there, dict):
                key, there, here = next(
                    (f"--{name}", there.get(name), value) for name, value in here.items() if there.get(name) != value
                )
            raise InputError(
                f"--output {self.folder}: holds {kind} with {key} {there}, not {here}; name another folder"
            )

    def _adopt(self) -> None:
        """Write the plan; of an output that was finished, turn the index back into records."""
        if not os.path.isfile(os.path.join(self._unfinished, _PLAN)):
            self._write(_PLAN, self._plan)
        if not os.path.isfile(os.path.join(self.folder, INDEX)):
            return
        try:
            index = read_index(self.folder, whole=False)
        except InputError:
            # Nothing tells any more which shards are sound: all are made again.
            return
        for number, entry in enumerate(index.shards):
            self._write(f"{entry['name']}.json", _record_of(index, number))

    def record(self, name: str) -> dict[str, Any] | None:
        """The record of a shard that is there and sound; None where it is to be made."""
        record_file, shard = os.path.join(self._unfinished, f"{name}.json"), os.path.join(self.folder, name)
        if not os.path.isfile(record_file) or not os.path.isfile(shard):
            return None
        with open(record_file, encoding="utf-8") as file:
            record = _parsed(file.read())
        return record if record.get("sha256") == file_sha256(shard) else None

    @contextmanager
    def writing(self, name: str) -> Iterator[ShardWriter]:
        """A new shard, moved into place and recorded at the end."""
        partial, shard = os.path.join(self._unfinished, name), os.path.join(self.folder, name)
        with open(partial, "wb") as file, tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as tar:
            writer = ShardWriter(tar)
            yield writer
        writer.record |= {"bytes": os.path.getsize(partial), "sha256": file_sha256(partial)}
        os.replace(partial, shard)
        self._write(f"{name}.json", writer.record)

    def finish(self, plan: dict[str, Any], shards: Sequence[Shard], records: Sequence[dict[str, Any]]) -> None:
        """Write the index and the list of bad files, and clear away the rest."""
        entries: dict[str, list[Any]] = {key: [] for key in ("names", "labels", "positions", "offsets", "sizes")}
        for record in records:
            for key, values in entries.items():
                values += record[key]
        names, name_ends = PackedNames(entries.pop("names")).to_arrays()
        arrays = {key: np.array(values, dtype=np.int64) for key, values in entries.items()}
        images = os.path.join(self.folder, IMAGES)
        write_arrays(images, {**arrays, "names": names, "name_ends": name_ends}, self._unfinished)
        splits = {split: {**facts, "unreadable": []} for split, facts in plan["splits"].items()}
        listed = []
        for shard, record in zip(shards, records, strict=True):
            splits[shard.split]["unreadable"] += record["unreadable"]
            count = {"split": shard.split, "images": len(record["names"])}
            listed.append({"name": shard.name, **count, "bytes": record["bytes"], "sha256": record["sha256"]})
        bad = [entry for split in splits.values() for entry in split["unreadable"]]
        if bad:
            self._replace(BAD_FILES, "".join(f"{_one_line(e['place'])}\t{_one_line(e['reason'])}\n" for e in bad))
        facts = {**plan, "splits": splits, "shards": listed, "images_sha256": file_sha256(images)}
        self._replace(INDEX, json.dumps(facts, indent=1))
        shutil.rmtree(self._unfinished)

    def _write(self, name: str, value: dict[str, Any]) -> None:
        self._replace(os.path.join(UNFINISHED, name), json.dumps(value))

    def _replace(self, name: str, text: str) -> None:
        path = os.path.join(self.folder, name)
        # Names of files need not be UTF-8, and are kept as they are.
        with (
            replacing(path, self._unfinished) as partial,
            open(partial, "w", encoding="utf-8", errors="surrogateescape") as file,
        ):
            file.write(text)


class _Lock:
    """Of the output folder, for this process; it ends with it, however that ends."""

    def __init__(self, path: str, folder: str) -> None:
        self._file = open(path, "a+b")  # noqa: SIM115  open as long as it is held
        try:
            if fcntl is not None:
                fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            held = os.path.exists(path) and os.path.samestat(os.stat(path), os.fstat(self._file.fileno()))
        except OSError as error:
            self._file.close()
            if error.errno not in (errno.EACCES, errno.EAGAIN):
                raise
            held = False
        if not held:
            self._file.close()
            raise InputError(f"--output {folder}: another prepare is writing into it; wait for it, or stop it")

    def release(self) -> None:
        self._file.close()


def _record_of(index: Index, number: int) -> dict[str, Any]:
    """The record of a shard from the index of a finished folder."""
    entry, rows = index.shards[number], index.rows(number)
    names = PackedNames.from_arrays(index.arrays["names"], index.arrays["name_ends"])
    lists = {key: index.arrays[key][rows].tolist() for key in ("labels", "positions", "offsets", "sizes")}
    step = index.facts["settings"]["images_per_shard"]
    start = step * sum(shard["split"] == entry["split"] for shard in index.shards[:number])
    missing = index.facts["splits"][entry["split"]]["unreadable"]
    return {
        "names": [names[row] for row in range(rows.start, rows.stop)],
        **lists,
        "unreadable": [image for image in missing if start <= image["position"] < start + step],
        "bytes": entry["bytes"],
        "sha256": entry["sha256"],
    }


def _parsed(text: str) -> dict[str, Any]:
    """The JSON object; an empty one where it is none."""
    try:
        value = json.loads(text)
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


def _one_line(text: str) -> str:
    return " ".join(text.split())
