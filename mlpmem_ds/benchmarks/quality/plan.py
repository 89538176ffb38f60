"""Part of `quality`: a preset → its jobs and the reports that they leave, in the order in which they run.

texts ─▶ base ─▶ for each text: two key directories, one a kind of memory input; of those with an arm that
                   imitates the retriever: index ─▶ targets        once, for all arms and seeds
                   for each seed: memories, models                   each on one text
                     ─▶ a gate over the subject, fitted to both texts; one over both subjects, the bank
                     ─▶ report of the text's arms on its test split  (first seed: kNN too)
                     ─▶ report of the new domain's arms on the general text, at the same λ and gate
                     ─▶ report of the bank on each text
                     ─▶ a gate over the second model of a text, fitted as the subject's; its reports, as above
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

from mlpmem_ds.benchmarks.quality.arms import (
    BASE_OUTPUTS,
    MEMORIES,
    MODELS,
    PAPER_INPUTS,
    SECOND_MODELS,
    SUBJECT,
    MemoryArm,
)
from mlpmem_ds.benchmarks.quality.jobs import Job
from mlpmem_ds.benchmarks.quality.presets import Preset, Text

TextName = Literal["general", "domain"]
TEXTS: tuple[TextName, ...] = ("general", "domain")
_STAGES = ("keys", "index", "targets")  # of the published input, which the kNN arms read too
_OUTPUTS = "outputs-"  # before a stage of the other kind
QUESTIONS_JOB = "questions"
_QUESTIONS_A_SET = 200


@dataclass(frozen=True, kw_only=True)
class ReportPlace:
    """A report that the plan leaves: the arms of one text and seed, tested on this or the other text."""

    trained_on: TextName | Literal["bank"]
    tested_on: TextName
    seed: int
    of: Literal["arms", "ensemble"] = "arms"
    """all arms but the gated ensemble, which has reports of its own"""

    @property
    def name(self) -> str:
        """Of its job, below the output."""
        arms = "" if self.of == "arms" else f"_{self.of}"
        other = "" if self.trained_on == self.tested_on else f"_on_{self.tested_on}"
        return f"{self.trained_on}/report{arms}{other}-{self.seed}"


@dataclass(frozen=True, kw_only=True)
class Plan:
    """All jobs, each after those that it needs, and the reports among them."""

    jobs: tuple[Job, ...]
    reports: tuple[ReportPlace, ...]
    left_out: tuple[str, ...]
    """arms of the preset whose package is missing"""


def make_plan(
    preset: Preset,
    root: Path,
    *,
    seeds: Sequence[int],
    base: str | None,
    questions: Sequence[Path] = (),
) -> Plan:
    """The jobs of a preset below `root`; `base` in place of one that is trained."""
    planner = Planner(preset=preset, root=root, given_base=base, first_seed=seeds[0])
    planner.add_corpora()
    planner.add_base()
    for text in TEXTS:
        planner.add_datastore(text)
    for seed in seeds:
        for text in TEXTS:
            planner.add_trainings(text, seed)
    for seed in seeds:
        planner.add_gates(seed)
        planner.add_reports(seed)
        planner.add_gated_ensembles(seed)
    if questions:
        planner.add_questions(questions)
    return planner.plan()


@dataclass(kw_only=True)
class Planner:
    """Collects jobs; a method adds those of one step, after those that they need."""

    preset: Preset
    root: Path
    given_base: str | None = None
    first_seed: int = 0
    """the one whose reports have the datastore, and whose memory answers questions"""
    has_gates: bool = True
    """whether the subject's gate is in the reports of its text"""
    jobs: list[Job] = field(default_factory=list)
    reports: list[ReportPlace] = field(default_factory=list)

    def plan(self) -> Plan:
        """What was added."""
        arms = [arm for text in TEXTS for arm in self.text(text).arms]
        left_out = {arm: None for arm in arms if arm in MODELS and not MODELS[arm].is_possible}
        return Plan(jobs=tuple(self.jobs), reports=tuple(self.reports), left_out=tuple(left_out))

    def text(self, name: TextName) -> Text:
        return self.preset.general if name == "general" else self.preset.domain

    def add_corpora(self) -> None:
        tokenizer = self.given_base or f"train:{self.preset.vocab_size}"
        self.add_corpus("general", tokenizer)
        if self.given_base is None:  # one vocabulary for both texts
            tokenizer = self._at("general/corpus/tokenizer")
        self.add_corpus("domain", tokenizer, needs=() if self.given_base else ("general/corpus",))

    def add_corpus(self, name: TextName, tokenizer: str, needs: tuple[str, ...] = ()) -> None:
        preset, text = self.preset, self.text(name)
        self._add(
            f"{name}/corpus",
            *("prepare-corpus", "--input", *text.inputs, *text.flags, "--tokenizer", tokenizer),
            *("--block-size", preset.block_size, "--stride", preset.stride),
            *("--tuning-fraction", text.tuning_fraction, "--test-fraction", text.test_fraction),
            *("--max-bytes", f"{text.max_bytes:g}", "--processes", 1),
            *(() if text.max_train_bytes is None else ("--max-train-bytes", f"{text.max_train_bytes:g}")),
            needs=needs,
        )

    def add_base(self) -> None:
        if self.given_base is None:
            words = ("train-base", *self.preset.trainer_flags, "--corpus", self._at("general/corpus"))
            self._add("base", *words, *self.preset.base_flags, needs=("general/corpus",))

    def add_datastore(self, text: TextName) -> None:
        """Two extractions. The keys are alike in both, but targets belong to one key directory: they are
        written again, a search of a minute."""
        self._add_stages(text, "", PAPER_INPUTS)
        self._add_stages(text, _OUTPUTS, BASE_OUTPUTS)

    def _add_stages(self, text: TextName, kind: str, inputs: tuple[str, ...]) -> None:
        corpus = f"{text}/corpus"
        keys_job, index_job = f"{text}/{kind}keys", f"{text}/{kind}index"
        keys = ("--keys", self._at(keys_job))
        self._add(
            keys_job,
            *("extract-keys", "--model", self._base, "--corpus", self._at(corpus)),
            *(*inputs, "--unit-positions", 16384, *self.preset.reading_flags),
            needs=(corpus, *self._base_job),
        )
        self._add(index_job, "build-index", *keys, needs=(keys_job,))
        self._add(
            f"{text}/{kind}targets",
            *("write-targets", *keys, "--index", self._at(index_job), "--corpus", self._at(corpus)),
            *self.preset.target_flags,
            needs=(index_job,),
        )

    def add_trainings(self, text: TextName, seed: int) -> None:
        for arm in self._arms(text):
            if arm in MEMORIES:
                self._add_memory(text, arm, seed)
        for arm in self._arms(text):
            if arm in MODELS:
                self._add_model(text, arm, seed)

    def _add_memory(self, text: TextName, arm: str, seed: int) -> None:
        kind = MEMORIES[arm]
        keys, targets = _keys_of(text, kind), _targets_of(text, kind)
        starts_as_base = kind.is_default and not self.text(text).is_known
        self._add(
            training_job(text, arm, seed),
            *(
                "train",
                *self.preset.trainer_flags,
                "--corpus",
                self._at(f"{text}/corpus"),
                "--model",
                self._base,
            ),
            *("--keys", self._at(keys), "--targets", self._at(targets)),
            *("--seed", seed, *self.preset.memory_flags(starts_as_base=starts_as_base), *kind.flags),
            needs=(targets,),
        )

    def _add_model(self, text: TextName, arm: str, seed: int) -> None:
        kind, subject, rates = MODELS[arm], training_job(text, SUBJECT, seed), self.preset.rates
        made_of = (*(f"{text}/{_OUTPUTS}{stage}" for stage in _STAGES), subject)
        budget_of = made_of if kind.is_of_equal_time else ()
        size = ("--match-memory", self._at(subject)) if kind.matches_memory else ()
        needs = (f"{text}/corpus", *self._base_job, *budget_of, *((subject,) if size else ()))
        self._add(
            training_job(text, arm, seed),
            *(
                "train-baseline",
                *self.preset.trainer_flags,
                "--corpus",
                self._at(f"{text}/corpus"),
                "--model",
                self._base,
            ),
            *("--seed", seed, *self.preset.model_flags(starts_as_base=kind.starts_as_base)),
            *("--kind", kind.kind),
            *(("--learning-rate", rates[kind.kind]) if kind.kind in rates else ()),
            *(*kind.flags, *size),
            needs=needs,
            budget_of=budget_of,
        )

    def add_gates(self, seed: int) -> None:
        """One for each text's subject, fitted to both texts, and one for both subjects."""
        subjects = {text: training_job(text, SUBJECT, seed) for text in TEXTS}
        corpora = {text: self._at(f"{text}/corpus") for text in TEXTS}
        for text in TEXTS:
            self._add(
                f"{text}/gate-{seed}",
                *("fit-gate", "--model", self._base, "--memory", self._at(subjects[text])),
                *("--corpus", corpora[text], "--general", corpora[_other(text)], "--seed", seed),
                *self.preset.reading_flags,
                needs=(subjects[text], "general/corpus", "domain/corpus"),
            )
        self._add(
            f"bank/gate-{seed}",
            *("fit-gate", "--model", self._base, "--memory", *self._bank(seed)),
            *("--corpus", *corpora.values(), "--seed", seed, *self.preset.reading_flags),
            needs=(*subjects.values(), "general/corpus", "domain/corpus"),
        )

    def add_reports(self, seed: int) -> None:
        for text in TEXTS:
            self.add_own_report(text, seed)
        own = ReportPlace(trained_on="domain", tested_on="domain", seed=seed)
        on_general = ReportPlace(trained_on="domain", tested_on="general", seed=seed)
        self._add_report(on_general, ("--choices-from", self._at(own.name)), needs=(own.name,))
        for text in TEXTS:
            self._add_bank_report(ReportPlace(trained_on="bank", tested_on=text, seed=seed))

    def add_own_report(self, text: TextName, seed: int) -> None:
        """Of a text's arms on its own test split."""
        self._add_report(ReportPlace(trained_on=text, tested_on=text, seed=seed), (), needs=())

    def _add_report(self, place: ReportPlace, flags: Sequence[str], needs: tuple[str, ...]) -> None:
        text, seed = place.trained_on, place.seed
        assert text != "bank"
        jobs = {arm: training_job(text, arm, seed) for arm in self._arms(text)}
        gate = (f"{text}/gate-{seed}",) if self.has_gates else ()
        controls = [
            f"{'base+' if arm in MEMORIES else ''}{arm}={self._at(job)}"
            for arm, job in jobs.items()
            if arm != SUBJECT
        ]
        second = self._second_model(text, seed)
        datastore: tuple[object, ...] = ()
        if seed == self.first_seed and place.tested_on == text:
            datastore = tuple(word for name in _STAGES for word in (f"--{name}", self._at(f"{text}/{name}")))
            datastore += ("--k", self.preset.k)
        self._add_evaluation(
            place,
            *("--memory", self._at(jobs[SUBJECT])),
            *(word for job in gate for word in ("--gate", self._at(job))),
            *(("--control", *controls) if controls else ()),
            *(() if second is None else self._ensemble(second)),
            *(*datastore, *flags),
            needs=(*jobs.values(), *gate, *needs),
        )

    def add_gated_ensembles(self, seed: int) -> None:
        """The control of the subject's gate: the same fit with the text's second model in its place."""
        for text in TEXTS:
            second = self._second_model(text, seed)
            if second is not None:
                self._add_gated_ensemble(text, second, seed)

    def _add_gated_ensemble(self, text: TextName, second: str, seed: int) -> None:
        gate, other = f"{text}/gate_ensemble-{seed}", _other(text)
        self._add(
            gate,
            *("fit-gate", "--model", self._base, "--ensemble", self._at(second)),
            *("--corpus", self._at(f"{text}/corpus"), "--general", self._at(f"{other}/corpus")),
            *("--seed", seed, *self.preset.reading_flags),
            needs=(second, "general/corpus", "domain/corpus"),
        )
        flags = (*self._ensemble(second), "--gate", self._at(gate))
        own = ReportPlace(trained_on=text, tested_on=text, seed=seed, of="ensemble")
        self._add_evaluation(own, *flags, needs=(second, gate))
        if text == "domain":
            on_other = ReportPlace(trained_on=text, tested_on=other, seed=seed, of="ensemble")
            choices = ("--choices-from", self._at(own.name))
            self._add_evaluation(on_other, *flags, *choices, needs=(second, gate, own.name))

    def _second_model(self, text: TextName, seed: int) -> str | None:
        """The job that trains what the base is mixed with in the ensemble."""
        return next((training_job(text, arm, seed) for arm in SECOND_MODELS if arm in self._arms(text)), None)

    def _ensemble(self, second: str) -> tuple[str, str]:
        """Flags of `evaluate`."""
        return "--ensemble", f"ensemble={self._at(second)}"

    def _add_bank_report(self, place: ReportPlace) -> None:
        gate = f"bank/gate-{place.seed}"
        flags = ("--memory", *self._bank(place.seed), "--gate", self._at(gate))
        self._add_evaluation(place, *flags, needs=(gate,))

    def _add_evaluation(self, place: ReportPlace, *flags: object, needs: tuple[str, ...]) -> None:
        corpus = f"{place.tested_on}/corpus"
        self._add(
            place.name,
            *("evaluate", "--model", self._base, "--corpus", self._at(corpus)),
            *flags,
            *("--speed-positions", "none", "--samples", 0, *self.preset.reading_flags),
            needs=(corpus, *needs),
        )
        self.reports.append(place)

    def add_questions(self, questions: Sequence[Path]) -> None:
        """Question sets for the first seed: the exported subject under its gate, models, passages."""
        seed = self.first_seed
        memory = training_job("domain", SUBJECT, seed)
        export, gate, report = (f"domain/{job}-{seed}" for job in ("export", "gate", "report"))
        self._add(
            export,
            *("convert-checkpoint", "--checkpoint", self._at(memory), "--model", self._base),
            *("--gate", self._at(gate), "--report", self._at(report)),
            needs=(memory, gate, report),
            last_file="mlpmem_export.json",
        )
        models = {arm: training_job("domain", arm, seed) for arm in self._arms("domain") if arm in MODELS}
        controls = [f"{arm}={self._at(job)}" for arm, job in models.items()]
        self._add(
            QUESTIONS_JOB,
            "answer-questions",
            *("--model", self._at(export), "--questions", *questions),
            *(("--passages", self._at("domain/corpus")) if find_spec("bm25s") else ()),
            *("--limit", _QUESTIONS_A_SET),
            *(("--control", *controls) if controls else ()),
            needs=(export, "domain/corpus", *models.values()),
        )

    def _bank(self, seed: int) -> list[str]:
        """Both subjects as --memory takes them."""
        return [f"{text}={self._at(training_job(text, SUBJECT, seed))}" for text in TEXTS]

    def _arms(self, text: TextName) -> list[str]:
        """Those of the preset that can be trained here."""
        return [arm for arm in self.text(text).arms if arm not in MODELS or MODELS[arm].is_possible]

    @property
    def _base(self) -> str:
        return self.given_base or self._at("base")

    @property
    def _base_job(self) -> tuple[str, ...]:
        return () if self.given_base else ("base",)

    def _at(self, name: str) -> str:
        return str(self.root / name)

    def _add(
        self,
        name: str,
        command: str,
        *flags: object,
        needs: tuple[str, ...],
        budget_of: tuple[str, ...] = (),
        last_file: str = "manifest.json",
    ) -> None:
        self.jobs.append(
            Job(
                name=name,
                words=(command, *map(str, flags)),
                needs=needs,
                budget_of=budget_of,
                last_file=last_file,
                expected_seconds=self.preset.seconds.get(command, 0.0),
            )
        )


def training_job(text: TextName, arm: str, seed: int) -> str:
    """The job that trains an arm on a text."""
    return f"{text}/{arm}-{seed}"


def _keys_of(text: TextName, arm: MemoryArm) -> str:
    """The job that extracts what an arm reads."""
    return f"{text}/{_OUTPUTS if arm.is_default else ''}keys"


def _targets_of(text: TextName, arm: MemoryArm) -> str:
    return f"{text}/{_OUTPUTS if arm.is_default else ''}targets"


def _other(text: TextName) -> TextName:
    return "general" if text == "domain" else "domain"
