"""Where a converted data set lives, how it gets there, and what must not be overwritten."""

import csv
import io
import json
import os
import shutil
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from nnunet_ssl.dataset_conversion.writing import ENDING
from nnunet_ssl.errors import UserError
from nnunet_ssl.io import explain_os_error, write_json, write_text

RECORD = "conversion.json"


class Target:
    """Folders of a conversion.

    Cases are made in `part` (images) and `hidden_part` (masks, stamps), which nnU-Net does not
    see. Once all are done they move to `new` inside these, which then takes its final name.

    Args:
        raw_root: nnUNet_raw.
        dataset_id: 1-999.
        stem: NAME.
        labeled: as given, told in the name.
        draw: as given, told in the name.

    Attributes:
        name: `DatasetXXX_NAME`.
        folder: final raw folder.
        heldout: final folder of test and validation cases and of hidden masks.
    """

    def __init__(self, raw_root: Path, dataset_id: int, stem: str, labeled: int | None, draw: int):
        few = "" if labeled is None else f"_{labeled}labeled"
        drawn = f"_draw{draw}" if draw else ""
        self.id, self.name = dataset_id, f"Dataset{dataset_id:03d}_{stem}{few}{drawn}"
        hidden_root = raw_root.parent / "nnunet_ssl_heldout"
        self.folder, self.heldout = raw_root / self.name, hidden_root / self.name
        self.part = raw_root / f".{self.name}.part"
        self.hidden_part = hidden_root / f".{self.name}.part"

    def staged_image(self, case: str, channel: int) -> Path:
        """Where a finished image waits."""
        return self.part / "images" / f"{case}_{channel:04d}{ENDING}"

    def staged_mask(self, case: str) -> Path:
        """Where a finished mask waits."""
        return self.hidden_part / "masks" / f"{case}{ENDING}"

    def stamp(self, case: str) -> Path:
        """Where it is told that a case is done."""
        return self.hidden_part / "stamps" / f"{case}.json"

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other conversions with this id out; a run that is killed leaves no lock.

        Raises:
            UserError: another one is running, or nnUNet_raw is not writable.
        """
        path = self.folder.parent / f".convert_{self.id:03d}.lock"
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.open("a", encoding="utf-8").close()
        except OSError as error:
            raise UserError(explain_os_error(error, path)) from error
        lock = FileLock(path)
        try:
            lock.acquire(timeout=0)
        except Timeout as error:
            raise UserError(
                f"Another conversion to id {self.id} is running. Wait for it, or give another id "
                f"with -d."
            ) from error
        except (OSError, NotImplementedError):
            pass  # a file system without locks
        try:
            yield
        finally:
            with suppress(OSError):  # Windows keeps an open file; its lock removes it
                path.unlink()
            lock.release()

    def check_free(self, identity: Mapping[str, Any], overwrite: bool) -> dict | None:
        """Look at what has this id already.

        Args:
            identity: entries of the record that two runs of one conversion share.
            overwrite: the folder of this name may be replaced.

        Returns:
            Record of an earlier run of the same conversion, or None if the place is free.

        Raises:
            UserError: other data have this id or this folder, or masks would not be hidden.
        """
        roots: dict[str, Path] = {"nnUNet_raw": self.folder.parent}
        for variable in ("nnUNet_preprocessed", "nnUNet_results"):
            if os.environ.get(variable):
                roots[variable] = Path(os.environ[variable]).resolve()
        for variable, root in roots.items():
            if self.heldout.is_relative_to(root):
                raise UserError(
                    f"{self.heldout} lies inside {variable}; masks there are not hidden. Put "
                    f"nnUNet_raw into a folder of its own, beside the other two."
                )
            for taken in sorted(root.glob(f"Dataset{self.id:03d}_*")):
                if taken.name != self.name:
                    raise UserError(
                        f"Id {self.id} is taken by {taken}. Give another id with -d, or remove "
                        f"that folder."
                    )
        if overwrite:
            return None
        fix = "Add --overwrite to replace it, or give another id with -d."
        record = read_record(self.folder)
        if self.folder.exists() and record is None:
            raise UserError(f"{self.folder} exists and was not made by convert. {fix}")
        if self.heldout.exists() and record is None:
            raise UserError(f"{self.heldout} exists, but {self.folder} does not. {fix}")
        changed = [k for k, v in identity.items() if record and record.get(k) != v]
        if record and changed:
            before, now = ({**i, **i.get("options", {})} for i in (record, identity))
            keys = [k for k in now if k != "options" and before.get(k) != now[k]] or changed
            told = ", ".join(f"{k} = {before.get(k)}" for k in keys if k != "plan")
            told = told or "other cases, groups, lists or numbers per case"
            raise UserError(f"{self.folder} exists and was made with {told}. {fix}")
        return record

    def is_complete(self, record: Mapping[str, Any]) -> bool:
        """Tell whether all files of a finished conversion are still there."""
        annotated = {c for c, source in record["sources"].items() if "label" in source}
        moves = self._moves(record, len(record["channels"]), annotated)
        finals = [_swap(t, self.part / "new", self.folder) for _, t in moves]
        finals = [_swap(t, self.hidden_part / "new", self.heldout) for t in finals]
        return all(p.is_file() for p in (self.folder / "dataset.json", *finals))

    def place(
        self,
        record: Mapping[str, Any],
        dataset_json: Mapping[str, Any],
        tables: Mapping[str, Mapping[str, float]],
        channels: int,
        masked: Collection[str],
    ) -> None:
        """Move all finished cases to their places in `new`, and write the JSON files there.

        Raises:
            UserError: the disk is full, or a folder is not writable.
        """
        news = (self.part / "new", self.hidden_part / "new")
        try:
            for new in news:
                shutil.rmtree(new, ignore_errors=True)
                new.mkdir(parents=True)
            for source, target in self._moves(record, channels, masked):
                target.parent.mkdir(exist_ok=True)
                shutil.move(source, target)
        except OSError as error:
            raise UserError(explain_os_error(error, error.filename or news[0])) from error
        write_json(dataset_json, news[0] / "dataset.json")
        if any(tables.values()):
            write_text(_as_csv(tables), news[0] / "cases.csv")
        write_json(record, news[1] / RECORD)
        write_json(record, news[0] / RECORD)  # the last file: `new` is complete

    def _moves(
        self, record: Mapping[str, Any], channels: int, masked: Collection[str]
    ) -> list[tuple[Path, Path]]:
        """Pairs of staged file and place in `new`."""
        raw, hidden, splits = self.part / "new", self.hidden_part / "new", record["splits"]
        homes = [
            (record["labeled"], raw / "imagesTr", raw / "labelsTr"),
            (record["unlabeled"], raw / "imagesUn", hidden / "hidden_labels"),
            (splits["val"], hidden / "val_images", hidden / "val_labels"),
            (splits["test"], hidden / "test_images", hidden / "test_labels"),
        ]
        moves = []
        for cases, images, masks in homes:
            for case in cases:
                staged = [self.staged_image(case, i) for i in range(channels)]
                moves += [(p, images / p.name) for p in staged]
                if case in masked:
                    moves.append((self.staged_mask(case), masks / f"{case}{ENDING}"))
        return moves

    def publish(self) -> None:
        """Give the finished folders their final names, in place of what is there."""
        try:
            for part, final in ((self.hidden_part, self.heldout), (self.part, self.folder)):
                if (part / "new").is_dir():
                    if final.exists():
                        shutil.rmtree(final)
                    os.replace(part / "new", final)
        except OSError as error:
            raise UserError(explain_os_error(error, error.filename or self.folder)) from error
        self.remove_parts()

    def remove_parts(self) -> None:
        """Remove what finished or stopped runs left."""
        for part in (self.hidden_part, self.part):
            shutil.rmtree(part, ignore_errors=True)

    def finish_pending(self) -> None:
        """Complete a run that was stopped just before its folders got their names."""
        if (self.part / "new" / RECORD).is_file():
            self.publish()


def read_record(folder: Path) -> dict | None:
    """Read conversion.json; None if there is none."""
    try:
        return json.loads((folder / RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def _swap(path: Path, old: Path, new: Path) -> Path:
    return new / path.relative_to(old) if path.is_relative_to(old) else path


def _as_csv(tables: Mapping[str, Mapping[str, float]]) -> str:
    columns: Sequence[str] = list(dict.fromkeys(k for table in tables.values() for k in table))
    text = io.StringIO()
    writer = csv.DictWriter(text, ["case", *columns], lineterminator="\n")
    writer.writeheader()
    writer.writerows({"case": case, **table} for case, table in tables.items())
    return text.getvalue()
