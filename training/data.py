"""From a recipe's data to prepared rows: tokenised once, looked through, split into training and validation.

Shards of tokens are shared by every recipe that reads the same files in the same way (`training/token_cache.py`); a prepared data set
is which of their rows train and which validate. Every worker, epoch, trial and retry memory-maps the same files.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from hone.base_model import BaseModel
from hone.data.cache import SUMMARY_FILE, mark_used, split_folder
from hone.data.files import find_files
from hone.data.gate import joined, report
from hone.data.report import MEANINGS
from hone.errors import DataError
from hone.recipe import Recipe
from hone.storage import Home, digest_of, new_folder, write_text
from models.tasks import TASKS, Head, inputs_by
from models.tasks.tokenizer import NO_TEMPLATE, lacks_template
from training.job import PreparedData, SourceRows
from training.split import folds, held_out
from training.token_cache import Tokens, Watch, tokens_of, unwatched
from training.token_rows import Shards
from training.tokenise import longest

LAYOUT = 2
"""Raised whenever the same inputs would make a different split."""
REPORT_FILE = "report.json"
SHAPING = {"validation_fraction", "folds", "fold", "stratify", "stop_on", "max_bad_fraction", "retain_fraction", "retain_eval_rows"}
"""Settings that decide which rows train, beside those that shape the tokens."""


PARTS = ("train", "validation", "retain")
ANSWERS = ("label", "classes", "number")


@dataclass(frozen=True)
class _Source:
    """Some rows of the recipe, and what part they play."""

    role: str
    """train, mix, retain or validation."""
    name: str
    tokens: Tokens
    weight: float = 1.0


def prepare_data(recipe: Recipe, base: BaseModel, *, home: Home, watch: Watch = unwatched) -> PreparedData:
    """Read, check, tokenise and split the recipe's data, or find that done.

    Args:
        watch: Told how far each source is.

    Raises:
        DataError: bad files or rows, findings that the recipe stops at, or no targets left within max_length.
    """
    sources = _sources(recipe, base, home=home, watch=watch)
    each = [[source.role, source.weight, source.tokens.digest] for source in sources]
    digest = digest_of({"layout": LAYOUT, "sources": each, "seed": recipe.train.seed, **recipe.data.model_dump(include=SHAPING)})
    folder = split_folder(home, digest)
    if not (folder / SUMMARY_FILE).exists():
        try:
            prepared = _Prepared(recipe, sources)
        except FileNotFoundError as error:
            raise DataError(f"{error.filename}: prepared data was removed while it was read; start again") from None
        with new_folder(folder) as staging:
            for part in PARTS:
                np.save(staging / f"{part}.npy", getattr(prepared, part))
            summary = prepared.summary(digest, base)
            write_text(staging / REPORT_FILE, prepared.report.model_dump_json(indent=2))
            write_text(staging / SUMMARY_FILE, summary.model_dump_json(indent=2))
    mark_used(folder)
    summary = PreparedData.model_validate_json((folder / SUMMARY_FILE).read_bytes())
    return summary.model_copy(update={"folder": folder, "shards": [shard for source in sources for shard in source.tokens.shards]})


def _sources(recipe: Recipe, base: BaseModel, *, home: Home, watch: Watch) -> list[_Source]:
    """All of them, in the order in which their rows are numbered: those that train, then validation."""
    data = recipe.data
    named: list[tuple[str, str | list[str] | None, dict[str, str] | None, float]] = [
        ("train", data.train, None, 1.0),
        *(("mix", mixed.source, mixed.columns, mixed.weight) for mixed in data.mix),
        ("retain", data.retain, None, 1.0),
        ("validation", data.validation, None, 1.0),
    ]
    made = []
    for role, paths, columns, weight in named:
        if paths:
            files = find_files(paths)
            tokens = tokens_of(files, recipe, base, columns=columns or data.columns, home=home, watch=watch)
            made.append(_Source(role, _named(paths), tokens, weight))
    return made


class _Prepared:
    """Which rows train and which validate, by their numbers over all shards."""

    def __init__(self, recipe: Recipe, sources: Sequence[_Source]) -> None:
        self._recipe, self._sources = recipe, sources
        self._refuse_bad_rows()
        shards = [Shards(source.tokens.shards) for source in sources]
        self._of_source = np.repeat(np.arange(len(shards)), [len(each) for each in shards])
        validates = self._validates(shards)
        has_targets = _column(shards, "n_targets") > 0
        self.retain = self._hold_retained(has_targets)
        learns = ~validates & has_targets
        learns[self.retain] = False
        self.train, self.validation = np.flatnonzero(learns), np.flatnonzero(validates & has_targets)
        self._apart = self._leave_out_twins(shards)
        held = [source.tokens.look for source in sources if source.role == "validation"]
        seen = joined([source.tokens.look for source in sources if source.role != "validation"])
        answers = {name for name in ANSWERS for each in shards if len(each) and each.has(name)}
        self.head: Head = TASKS[recipe.task].find_head(seen.labels, answers)
        self.report = report(seen, held[0] if held else None, near_rows=recipe.data.near_duplicate_rows)
        self._dropped = int((~validates & ~has_targets).sum())
        self._refuse_findings()
        self._refuse_unlearnt_classes(shards)

    def summary(self, digest: str, base: BaseModel) -> PreparedData:
        counts = {finding.kind: finding.count for finding in self.report.findings}
        return PreparedData(
            digest=digest,
            train_rows=len(self.train),
            validation_rows=len(self.validation),
            sources=self._per_epoch(),
            cut_rows=counts.get("cut_targets", 0),
            dropped_rows=self._dropped,
            formats=list(self.report.train.formats),
            bad_rows=counts.get("bad_rows", 0),
            findings=counts,
            pad_token_id=inputs_by(TASKS[self._recipe.task].load_processor(base.folder)).pad_token_id,
            max_length=longest(self._recipe, base),
            labels=self.head.labels,
            problem_type=self.head.problem_type,
            retain_rows=len(self.retain),
            notes=self._notes(base),
        )

    def _notes(self, base: BaseModel) -> list[str]:
        notes = [f"{self._apart:,} training rows left out, because they or their group also validate"] if self._apart else []
        return [*notes, NO_TEMPLATE] if TASKS[self._recipe.task].shape == "chat" and lacks_template(base.folder) else notes

    def _per_epoch(self) -> list[SourceRows]:
        """What an epoch sees of each source that trains."""
        training = [source for source in self._sources if source.role != "validation"]
        rows = np.bincount(self._of_source[self.train], minlength=len(training)).tolist()
        wanted = [max(1, round(count * source.weight)) for count, source in zip(rows, training, strict=True)]
        if training[-1].role == "retain":
            share = self._recipe.data.retain_fraction
            wanted[-1] = max(1, round(sum(wanted[:-1]) * share / (1 - share))) if share else 0
        return [
            SourceRows(name=source.name, role=source.role, rows=count, per_epoch=each)
            for source, count, each in zip(training, rows, wanted, strict=True)
        ]

    def _refuse_bad_rows(self) -> None:
        looks = [source.tokens.look for source in self._sources]
        bad = sum(look.counts["bad_rows"] for look in looks)
        good = sum(len(look.digests) for look in looks)
        if bad > self._recipe.data.max_bad_fraction * (bad + good):
            found = report(joined(looks), near_rows=0)
            [rows] = [finding for finding in found.findings if finding.kind == "bad_rows"]
            more = [f"... and {rows.count - len(rows.where)} more bad rows"] if rows.count > len(rows.where) else []
            raise DataError("\n".join([*rows.where, *more]))
        for source in self._sources:
            if not source.tokens.look.digests:
                raise DataError(f"{source.name}: no rows")

    def _hold_retained(self, has_targets: npt.NDArray[np.bool_]) -> npt.NDArray[np.int64]:
        """Rows of `retain` on which forgetting is measured: some of them, or all where none are mixed in."""
        data = self._recipe.data
        at = next((n for n, source in enumerate(self._sources) if source.role == "retain"), None)
        if at is None:
            return np.empty(0, dtype=np.int64)
        rows = np.flatnonzero((self._of_source == at) & has_targets)
        most = len(rows) // 2 if data.retain_fraction else len(rows)
        if len(rows) and not most:
            raise DataError(
                f"{self._sources[at].name}: data.retain has {len(rows)} rows to learn from; it takes two, one of them to measure"
            )
        chosen = np.random.default_rng([self._recipe.train.seed, 3]).permutation(rows)[: min(most, data.retain_eval_rows)]
        return np.sort(chosen)

    def _refuse_unlearnt_classes(self, shards: Sequence[Shards]) -> None:
        """Every class must be there to be learnt; a small one may stand in the held out rows alone."""
        if self.head.problem_type != "single_label_classification":
            return
        labels = _column(shards, "label")
        missing = sorted(set(self.head.labels or []) - set(labels[self.train]))
        if missing:
            where = f"fold {self._recipe.data.fold} of {self._recipe.data.folds}" if self._recipe.data.folds else "this split"
            raise DataError(
                f"{_named(self._recipe.data.train)}: class {missing[0]!r} is in no training row of {where}; it has "
                f"{int((labels == missing[0]).sum())} rows in all; add some, or use fewer folds or a smaller validation_fraction"
            )

    def _validates(self, shards: Sequence[Shards]) -> npt.NDArray[np.bool_]:
        """True for each row that validates. The same row, and rows of one group, never stand on both sides of a split."""
        validates = np.zeros(len(self._of_source), dtype=bool)
        if self._sources[-1].role == "validation":
            validates[self._of_source == len(self._sources) - 1] = True
            return validates
        data, seed = self._recipe.data, self._recipe.train.seed
        strata = shards[0].codes("label") if data.stratify and shards[0].has("label") else None
        groups = shards[0].column("group")
        if data.folds:
            chosen = folds(groups, k=data.folds, seed=seed, strata=strata) == data.fold
        else:
            chosen = held_out(groups, fraction=data.validation_fraction, seed=seed, strata=strata)
        if (data.folds or data.validation_fraction) and not 0 < chosen.sum() < len(chosen):
            what = "groups" if data.group_by else "rows"
            how_many = f"split into {data.folds} folds" if data.folds else f"hold out {data.validation_fraction:.0%}"
            raise DataError(
                f"{_named(data.train)}: {len(np.unique(groups))} {what} are too few to {how_many}; "
                "give data.validation a file, or set data.validation_fraction=0"
            )
        validates[: len(chosen)] = chosen
        return validates

    def _leave_out_twins(self, shards: Sequence[Shards]) -> int:
        """Training rows do not stand among the rows held out, from another source, say, and share no group with them; how many did.

        The same rows in a validation file of their own are leakage, which the report tells.
        """
        is_own_file = self._sources[-1].role == "validation"
        names = ("digest", *(("group",) if self._recipe.data.group_by else ()))
        before = len(self.train)
        for name in names[is_own_file:]:
            values = _column(shards, name)
            self.train = self.train[~np.isin(values[self.train], values[self.validation])]
        return before - len(self.train)

    def _refuse_findings(self) -> None:
        data, found = self._recipe.data, {finding.kind: finding for finding in self.report.findings}
        if self.head.labels is not None and "unknown_labels" in found:
            raise DataError(
                f"{_named(data.validation or data.train)}: validation has classes that training never names: "
                f"{', '.join(found['unknown_labels'].where[:5])}; training names {', '.join(self.head.labels[:10])}"
            )
        for finding in self.report.stopping(data.stop_on):
            where = f" ({finding.where[0]})" if finding.where else ""
            raise DataError(f"{MEANINGS[finding.kind]}: {finding.count}{where}; mend the data, or take {finding.kind} out of data.stop_on")
        for number, source in enumerate(self._sources):
            side, what = (self.validation, "validate") if source.role == "validation" else (self.train, "learn")
            if source.role == "retain" and not data.retain_fraction:
                side = self.retain
            if not (self._of_source[side] == number).any():
                why = f"; {self._apart:,} rows also validate, or their group does" if self._apart else ""
                raise DataError(
                    f"{source.name}: no row has anything to {what} within data.max_length {data.max_length} tokens; raise it{why}"
                )
        if (data.validation_fraction or data.folds) and not len(self.validation):
            raise DataError(
                f"{_named(data.train)}: no row that was held out has anything to learn within data.max_length {data.max_length} tokens; "
                "raise it, or hold out more"
            )


def _column(shards: Sequence[Shards], name: str) -> npt.NDArray[Any]:
    return np.concatenate([each.column(name) for each in shards])


def _named(sources: str | list[str]) -> str:
    return sources if isinstance(sources, str) else ", ".join(sources)
