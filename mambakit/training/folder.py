"""The folder of a run belongs to that run: its id, its configuration, and what it wrote.

``run.json`` names the run and every file that it has written or is about to write. Only those are replaced and removed;
everything else in the folder is the user's and stays.
"""

from __future__ import annotations

import contextlib
import datetime
import fnmatch
import json
import os
import shutil
import uuid
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from mambakit.training.best import remove_best
from mambakit.training.checkpoint import (
    Found,
    checkpoints,
    find_checkpoints,
    keep_latest,
    remove_checkpoints,
    written_with,
)
from mambakit.training.config import TrainConfig
from mambakit.training.resumption import differences, plain_config
from mambakit.writing import replace_text, set_aside

_RECORD = "run.json"
# Written during the run; a group of its own in run.json.
_DIARY = ("train_config.json", "environment.json", "metrics.jsonl", "loss.png")
_EVENTS = "tensorboard/events.out.tfevents.*"
# Patterns of all that a run writes. In a folder without run.json, files of these names belong to the user.
_WRITTEN = (
    *_DIARY, "checkpoints", "tensorboard", "adapter", "state.safetensors", "summary.json", "README.md", "config.json",
    "generation_config.json", "model.safetensors", "model.safetensors.index.json",
    "model-*-of-*.safetensors", "tokenizer*.json", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "vocab.txt", "merges.txt", "chat_template.jinja", "preprocessor_config.json",
)  # fmt: skip


# What a run of an older mambakit, which wrote no run.json, had written before its first checkpoint.
_BEGUN = (*_DIARY, "checkpoints", "tensorboard", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")


class RunFolder:
    """``config.out``, checked; nothing in it changes before `begin`. Made by `mambakit.training.claim`.

    Args:
        config: of the run that is to write there.

    Attributes:
        path: the folder.
        run: the run's id: a new one, or that of the run which is continued.

    Raises:
        ValueError: the folder is used and the configuration neither resumes nor overwrites, a resumed run had other
            settings, or files that no run wrote are in the way.
    """

    def __init__(self, config: TrainConfig):
        self.path, self.config = Path(config.out), config
        self._record = self._read()
        self._unmarked = self._record is None and (self.path / "train_config.json").is_file()
        self._check()
        if self._record is not None and config.resume:
            self.run = str(self._record["id"])
        else:
            self.run = uuid.uuid4().hex

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    def latest(self) -> tuple[Path | None, list[Found]]:
        """The run's latest complete checkpoint, and those in the folder that cannot be resumed from."""
        found = find_checkpoints(self.checkpoints)
        mine = [f for f in found if f.run == self.run and not f.problem]
        foreign = [f if f.problem else f._replace(problem="another run wrote it") for f in found if f not in mine]
        return (mine[-1].path if mine else None), foreign

    def begin(self) -> None:
        """Take over the folder: write run.json, then remove what an overwritten run left."""
        old = self._record
        if old is not None and self.config.resume:
            self._record = {**old, "config": plain_config(self.config)}
        else:
            now = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
            self._record = {"id": self.run, "started": now, "config": plain_config(self.config), "files": {}}
            if old is not None:
                # Written before anything is removed: a run that is killed in between continues the removal when
                # resumed.
                runs = [*old.get("replaces", {"runs": []})["runs"], old["id"]]
                self._record["replaces"] = {"runs": runs, "files": sorted(_files(old))}
        diary = {
            *self._record["files"].get("diary", ()),
            *_DIARY,
            *([_EVENTS] if "tensorboard" in self.config.report_to else []),
        }
        self._record["files"]["diary"] = sorted(diary)
        self._save()
        if "replaces" in self._record:
            self._remove(**self._record["replaces"])
            del self._record["replaces"]
            self._save()
        for unfinished in self.path.glob(f".writing-{self.run}-*"):
            shutil.rmtree(unfinished, ignore_errors=True)
        keep_latest(self.checkpoints, self.run, self.config.keep_checkpoints)
        if self._unmarked:
            for unfinished in self.checkpoints.glob("step-*.tmp"):
                shutil.rmtree(unfinished, ignore_errors=True)
        replace_text(self.path / "train_config.json", json.dumps(plain_config(self.config), indent=2))

    def place(self, group: str, write: Callable[[Path], object]) -> None:
        """Add files to the folder, each whole or not at all: ``write`` is given a temporary folder to write them to.

        Files of an earlier call with the same ``group`` that it no longer writes are removed.
        """
        assert self._record is not None, "begin comes first"
        temporary = self.path / f".writing-{self.run}-{group}"
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        write(temporary)
        names = sorted(p.relative_to(temporary).as_posix() for p in temporary.rglob("*") if p.is_file())
        earlier = self._record["files"].get(group, [])
        ours = _files(self._record)
        aside = [name for name in names if name not in ours and (self.path / name).exists()]
        self._record["files"][group] = sorted({*earlier, *names})
        self._save()
        for name in aside:  # the user's, put there since the run began
            set_aside(self.path / name)
        for name in names:
            (self.path / name).parent.mkdir(parents=True, exist_ok=True)
            with open(temporary / name, "rb") as file:
                os.fsync(file.fileno())
            os.replace(temporary / name, self.path / name)
        for name in set(earlier) - set(names):
            (self.path / name).unlink(missing_ok=True)
        self._record["files"][group] = names
        self._save()
        shutil.rmtree(temporary)

    # -- checks ------------------------------------------------------------------------------------------------------

    def _check(self) -> None:
        out, config, record = self.path, self.config, self._record
        if self._unmarked:
            # Without a checkpoint and a model there is nothing to continue, and nothing to mistake for this run's.
            begun = not _results(out)
            if not (config.resume and begun):
                raise ValueError(
                    f"{out} holds a run of a mambakit that did not mark its runs, so that nothing says which settings "
                    "its "
                    "checkpoints had: it is neither resumed nor overwritten; rename or remove it, or choose another "
                    "out "
                    f"(init_from={out} starts a new run from its model)"
                )
            self._refuse_foreign(_BEGUN)
            return
        if record is None:
            if config.resume:
                raise ValueError(
                    f"resume=true, but no run was ever started in {out}; start without resume, or correct out"
                )
            self._refuse_foreign(())
            return
        if config.resume:
            changed = differences(record["config"], plain_config(config))
            made = checkpoints(self.checkpoints, str(record["id"]))
            if made and ((wrote := written_with(made[-1])["parallel"]) == "fsdp") != (config.parallel == "fsdp"):
                changed.append(
                    f"{made[-1].name} was written with parallel={wrote}, which parallel={config.parallel} does not read"
                )
            if changed:
                raise ValueError(
                    f"resume=true continues the run in {out}, which was started with other settings: "
                    f"{'; '.join(changed)}. Set "
                    f"them back, or start a new run in another out (init_from={out} starts from its model)"
                )
        elif config.overwrite:
            for field in ("init_from", "tokenizer"):
                place = Path(getattr(config, field))
                if (
                    getattr(config, field)
                    and place.exists()
                    and out.resolve() in (place.resolve(), *place.resolve().parents)
                ):
                    raise ValueError(
                        f"{field} is {place}, which overwrite=true removes; choose another out, or move {place} away"
                    )
            self._refuse_foreign(_files(record))
        else:
            made = checkpoints(self.checkpoints, str(record["id"]))
            state = f"its latest checkpoint is {made[-1].name}" if made else "it has no checkpoint"
            raise ValueError(
                f"{out} holds a run (started {record.get('started', '?')}; {state}); resume=true continues it, "
                "overwrite=true "
                "removes it and starts anew, or choose another out"
            )

    def _refuse_foreign(self, known: Iterable[str]) -> None:
        """Refuse files that the run would replace and no run has written; folders that hold a run's files are known."""
        if not self.path.is_dir():
            return
        known = {*known, *(("checkpoints", "tensorboard", "adapter") if self._record else ())}
        names = sorted(path.name for path in self.path.iterdir())
        foreign = [n for n in names if n not in known and any(fnmatch.fnmatch(n, pattern) for pattern in _WRITTEN)]
        if foreign:
            shown = ", ".join(foreign[:5]) + (f" and {len(foreign) - 5} more" if len(foreign) > 5 else "")
            also = " (overwrite=true removes what a run wrote, nothing else)" if self.config.overwrite else ""
            raise ValueError(
                f"{self.path} holds {shown}, which no run wrote there and this one would replace{also}; move them "
                "away, or choose "
                "another out"
            )

    # -- run.json ----------------------------------------------------------------------------------------------------

    def _read(self) -> dict[str, Any] | None:
        path = self.path / _RECORD
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
            if not (isinstance(record["id"], str) and isinstance(record["config"], dict)):
                raise ValueError("an id and a configuration belong there")
            outside = [name for name in _files(record) if Path(name).is_absolute() or ".." in Path(name).parts]
            if outside:
                raise ValueError(f"{outside[0]!r} is outside of the folder")
        except FileNotFoundError:
            return None
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"{path} does not describe a run ({error}); if the folder is no run's, remove it, or choose another out"
            ) from error
        return record

    def _save(self) -> None:
        replace_text(self.path / _RECORD, json.dumps(self._record, indent=2))

    def _remove(self, runs: list[str], files: list[str]) -> None:
        remove_checkpoints(self.checkpoints, runs)
        remove_best(self.checkpoints, runs)
        for name in files:
            for path in (self.path / name, self.path / (name + ".tmp")):
                if path.is_file() or path.is_symlink():
                    path.unlink()
        for run in runs:
            for unfinished in self.path.glob(f".writing-{run}-*"):
                shutil.rmtree(unfinished, ignore_errors=True)
        if _EVENTS in files:
            for events in self.path.glob(_EVENTS):
                events.unlink()
        for folder in ("checkpoints", "tensorboard", "adapter"):
            with contextlib.suppress(OSError):  # not empty: what is left is not the run's
                (self.path / folder).rmdir()


def _results(out: Path) -> list[Path]:
    """Checkpoints and models in the folder of a run that is not marked."""
    steps = [found.path for found in find_checkpoints(out / "checkpoints") if found.path.suffix != ".tmp"]
    return [*steps, *out.glob("model*.safetensors"), *out.glob("summary.json")]


def _files(record: dict[str, Any]) -> set[str]:
    """Everything that the run has written or was about to, and what it was about to remove."""
    listed = {name for names in record["files"].values() for name in names}
    return listed.union(record.get("replaces", {}).get("files", ()))
