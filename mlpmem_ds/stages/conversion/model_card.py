"""Part of `convert_checkpoint`: README.md of an export, the model card."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from mlpmem_ds.engines.model_cards import CardFacts, CardFigure, card_head, facts_of
from mlpmem_ds.formats.corpus import CorpusManifest
from mlpmem_ds.formats.evaluation import ArmFigures
from mlpmem_ds.formats.targets import TargetsManifest
from mlpmem_ds.formats.trained_models import Provenance
from mlpmem_ds.models.memory_config import MemoryConfig
from mlpmem_ds.stages.conversion.config import Config
from mlpmem_ds.stages.conversion.inputs import EXPORT_FILE, ExportInputs

_logger = logging.getLogger(__name__)


def model_card(
    inputs: ExportInputs,
    config: Config,
    base_facts: CardFacts | None,
    verification: Mapping[str, Any],
    num_base_parameters: int,
    weight_bytes: int,
) -> str:
    """README.md of the export; what no input says is called unknown. `base_facts` as `facts_from_base`
    gives it."""
    on_hub = not Path(inputs.model).is_dir()
    base = inputs.model if on_hub else Path(inputs.model).resolve().name
    title = f"{base} with {'an MLP memory' if not inputs.further else f'{len(inputs.memories)} MLP memories'}"
    facts = _facts(config, base_facts)
    head = card_head(
        title=title,
        base_model=base if on_hub else None,
        facts=facts,
        tags=["mlp-memory", "retrieval-imitation", "custom_code"],
        figures=_figures(inputs, config.base_only_threshold),
    )
    verified = describe_verification(verification)
    made_of = [
        f"Base: {base}, {num_base_parameters:,} parameters, frozen"
        f" (SHA-256 of its files {inputs.base_sha256})",
        f"Weights: {config.dtype}, {weight_bytes:,} bytes"
        f" ({_bytes_of(num_base_parameters + inputs.num_parameters)})",
        *_ingredients(inputs, config.base_only_threshold),
    ]
    sections = [
        head,
        f"# {title}",
        "A frozen causal language model (the base) and a token-wise MLP (the memory) that was trained to"
        " give the next-token distribution of a kNN retriever over a corpus (arXiv 2508.01832):"
        " `p = (1 - λ) p_base + λ p_memory`. No index and no search are needed. The logits are those of the"
        " mixture on the base's scale, so that settings of generation act as with the base.",
        f"```python\n{_example(inputs)}\n```",
        "## What it is made of\n" + _bullet_list(made_of),
        "## How good it is\n" + _quality(inputs),
        f"## Verification\n{verified[0].upper()}{verified[1:]}."
        f" `{EXPORT_FILE}` has the SHA-256 of every file.",
        "## Licence\n" + _bullet_list(_licences(config, facts)),
        "## Limits\n" + _bullet_list(_LIMITS),
        "## To the Hub\nThis directory is complete: `hf upload NAME PATH` copies it as it is. `push_to_hub`"
        " of the loaded model writes it anew, with this card unless the repository has one.",
    ]
    return "\n\n".join(sections) + "\n"


_LIMITS = [
    "Not for decisions about people, nor for medical, legal, financial or safety-critical advice: it says"
    " what is likely in its corpus, not what is true, and names no source.",
    "Memorization: the memory was trained to recall its corpus, and may give back passages of it word for"
    " word, personal data, secrets and licensed text included. Publish it only where the corpus itself"
    " might be published.",
    "Facts are as old as the corpus. The figures above hold for text like it; elsewhere the memory may"
    " make the base worse, which a smaller `lmbda` limits, or a gate that was fitted to other text, too.",
]


def _example(inputs: ExportInputs) -> str:
    """A user's first lines."""
    lines = [
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "# trust_remote_code runs hf.py and the other Python files of this directory;",
        "# transformers reads the tokenizer through the same class, and would ask without it.",
        'model = AutoModelForCausalLM.from_pretrained("PATH", trust_remote_code=True)',
        'tokenizer = AutoTokenizer.from_pretrained("PATH", trust_remote_code=True)',
        'prompt = tokenizer("…", return_tensors="pt")',
        "print(tokenizer.decode(model.generate(**prompt, max_new_tokens=40)[0]))",
    ]
    if getattr(inputs.tokenizer, "chat_template", None):
        lines += [
            'asked = [{"role": "user", "content": "…"}]  # or as a chat',
            "chat = tokenizer.apply_chat_template(",
            '    asked, add_generation_prompt=True, return_tensors="pt", return_dict=True',
            ")",
            "print(tokenizer.decode(model.generate(**chat, max_new_tokens=40)[0]))",
        ]
    what = "one weight in the place of the gate" if inputs.gate is not None else "any weight in [0, 1]"
    return "\n".join([*lines, f"model.lmbda = 0.0  # the base alone; {what}"])


def facts_from_base(inputs: ExportInputs, config: Config) -> CardFacts | None:
    """Licence and languages of the base's card, where no flag gives others; None where the card cannot be
    read."""
    if config.license is not None and config.language:
        return CardFacts()
    facts = facts_of(inputs.model)
    if facts is None:
        return None
    if config.license is not None:
        facts = CardFacts(language=facts.language)
    return replace(facts, language=()) if config.language else facts


def warn_of_unread_card(inputs: ExportInputs, config: Config, base_facts: CardFacts | None) -> None:
    """Say what a card that is written now will lack; `base_facts` as `facts_from_base` gives them."""
    if base_facts is None and config.license is None:
        _logger.warning(
            "the model card of the base %s cannot be read (without the network the Hub gives none), so"
            " the export's says that its licence is not stated: give it with --license, and its"
            " languages with --language",
            inputs.model,
        )


def _facts(config: Config, base_facts: CardFacts | None) -> CardFacts:
    """Licence and languages: of the flags, else the base's."""
    facts = CardFacts() if base_facts is None else base_facts
    return replace(facts, license=config.license or facts.license, language=config.language or facts.language)


def _licences(config: Config, facts: CardFacts) -> list[str]:
    stated = facts.license_name or facts.license
    licence = "not stated" if stated is None else stated
    whose = "" if stated is None or config.license is not None else ", as the base's card says"
    return [
        f"This model: {licence}{whose}. The licences of the base and of the corpus apply.",
        f"Corpus: {config.corpus_license or 'its licence was not stated'}.",
    ]


def _figures(inputs: ExportInputs, threshold: float | None) -> list[CardFigure]:
    """What the report measured of this very model: its arm at the λ of the export. One with a threshold, a
    gate or several memories is another model."""
    if inputs.report is None or threshold is not None:
        return []
    evaluation, named = inputs.report.evaluation, inputs.report.inputs
    own = [arm for arm in evaluation.arms if named.get(arm.name) == inputs.trained.sha256]
    is_measured = inputs.gate is None and not inputs.further
    if not is_measured or len(own) != 1 or own[0].lmbda != inputs.lmbda:
        return []
    [arm] = own
    text = {"dataset": Path(evaluation.corpus).name, "split": evaluation.test_split}
    return [
        CardFigure(metric="perplexity", name=f"perplexity at λ {arm.lmbda:g}", value=arm.ppl, **text),
        CardFigure(metric="bits_per_byte", name="bits a byte", value=arm.bits_per_byte, **text),
        CardFigure(
            metric="perplexity", name="perplexity of the base alone", value=evaluation.base.ppl, **text
        ),
    ]


def _bytes_of(num_parameters: int) -> str:
    """What the parameters take in each dtype, in words."""
    sizes = {"float32": 4, "bfloat16 or float16": 2}
    return ", ".join(f"{dtype}: {num_parameters * size / 1e9:.3g} GB" for dtype, size in sizes.items())


def _window(memory: MemoryConfig) -> str:
    return "" if memory.window == 1 else f" at {memory.window} positions, its own the last"


def _layers(provenance: Provenance) -> str:
    if not provenance.input_earlier_layers:
        return f"layer {provenance.input_layer}"
    return f"layers {', '.join(map(str, provenance.input_earlier_layers))} and {provenance.input_layer}"


def _ingredients(inputs: ExportInputs, threshold: float | None) -> list[str]:
    """The memory, its weight, its corpus and its training, a line each."""
    provenance, memory, targets = inputs.trained.provenance, inputs.memory, inputs.targets
    lines = [
        (
            f"Memory: {memory.num_parameters():,} parameters, {memory.num_blocks} {memory.family} blocks of"
            f" width {memory.hidden_size} ({memory.intermediate_size} inside), vocabulary"
            f" {memory.vocab_size:,}; it reads the base's"
            f" {_layers(provenance)}"
            f" ({provenance.input_point}){_window(memory)}{_head(memory)}"
        ),
        *_further(inputs),
        _weight(inputs),
        *_threshold(inputs, threshold),
        *_imported(provenance),
        f"Corpus: {_tokens(inputs.corpus)} (SHA-256 of its manifest {_shown(provenance.corpus)})",
        (
            f"Training: α {_shown(provenance.alpha)} (weight of KL against the retriever; 1 - α of cross"
            f" entropy, {_shown(provenance.ce_through)}), {_length(provenance)}"
        ),
    ]
    if provenance.alpha == 0:
        return [*lines, "Retriever: none (trained on cross entropy alone)"]
    if targets is None:
        sha256 = _shown(provenance.targets)
        return [*lines, f"Retriever: unknown k and temperature (SHA-256 of its targets' manifest {sha256})"]
    return [
        *lines,
        (
            f"Retriever: k {targets.k}, T {targets.weighting.temperature:.6g} in squared key units"
            f" ({targets.search} search, excluded: {_excluded(targets)}),"
            f" keys of layer {_shown(provenance.key_layer)}"
        ),
    ]


def _head(memory: MemoryConfig) -> str:
    return "" if memory.shared_head is None else "; its output head is the base's own, which is not counted"


def _further(inputs: ExportInputs) -> list[str]:
    """The other memories of a bank, a line each."""
    lines = []
    for number, trained in enumerate(inputs.further, start=2):
        memory, provenance = MemoryConfig.from_dict(dict(trained.memory)), trained.provenance
        lines.append(
            f"Memory {number}: {memory.num_parameters():,} parameters, {memory.num_blocks} {memory.family}"
            f" blocks of width {memory.hidden_size}; it reads the base's {_layers(provenance)}"
            f" ({provenance.input_point}){_window(memory)}{_head(memory)};"
            f" SHA-256 of its corpus's manifest {_shown(provenance.corpus)}"
        )
    return lines


def _weight(inputs: ExportInputs) -> str:
    """How much of each memory there is."""
    if inputs.gate is None:
        shared = ", shared equally" if inputs.further else ""
        return f"λ: {inputs.lmbda:g} ({inputs.lmbda_rule}){shared}"
    manifest = inputs.gate.manifest
    texts = "; ".join(f"{text.name} {text.base_ppl:.2f} → {text.gate_ppl:.2f}" for text in manifest.texts)
    names = ", ".join(memory.name for memory in manifest.memories)
    return (
        f"Gate: kind {manifest.gate['kind']}, over {names} in this order, which finds the weight at each"
        f" token (fixed weights that it began from: {', '.join(f'{value:g}' for value in manifest.fixed)};"
        f" perplexity of the base → with the gate on the text that chose when to stop: {texts};"
        f" SHA-256 of its manifest {inputs.gate.sha256})"
    )


def _threshold(inputs: ExportInputs, threshold: float | None) -> list[str]:
    """What is left out of the mixture, and whether the figures say so."""
    if threshold is None:
        return []
    measured = "" if inputs.report is None else "; the figures below were measured without this"
    return [f"Threshold: a memory is left out where its weight is below {threshold:g}{measured}"]


def _shown(value: object) -> str:
    return "unknown" if value is None else str(value)


def _excluded(targets: TargetsManifest) -> str:
    """In words, the positions that are never neighbours of a position."""
    document = ", its document" if targets.exclude.rule == "same-document" else ""
    window = f", {targets.exclude.window} on either side" if targets.exclude.window else ""
    return f"the position itself{document}{window}"


def _length(provenance: Provenance) -> str:
    """The steps done, and those planned where the training ended early or a checkpoint was taken."""
    done, planned = provenance.steps, provenance.steps_planned
    steps = f"{_shown(done)} steps of {_shown(provenance.batch_positions)} positions"
    epochs = f"{_shown(provenance.epochs)} epochs"
    if planned in (None, done):
        return f"{steps}, {epochs}"
    return f"{steps} ({planned} in {epochs} were planned)"


def _imported(provenance: Provenance) -> list[str]:
    imported = provenance.imported
    if imported is None:
        return []
    return [
        f"The memory was imported from {imported.name} ({imported.kind} type, SHA-256 of its shape and"
        f" files {imported.sha256}); its own page describes its corpus, retriever and training"
    ]


def _tokens(corpus: CorpusManifest | None) -> str:
    if corpus is None:
        return "unknown number of tokens"
    train = corpus.splits["train"]
    return f"{train.num_tokens:,} training tokens of {train.num_documents:,} documents"


def _name(inputs: ExportInputs, arm: ArmFigures) -> str:
    own = None if inputs.gate is None else inputs.gate.sha256
    return arm.name if arm.settings.get("gate") in (None, own) else f"{arm.name} (not with this model's gate)"


def _quality(inputs: ExportInputs) -> str:
    if inputs.report is None:
        return "Not measured: the export was made without a report of `launch/evaluate.py`."
    rows = ["| arm | test perplexity | change from the base (95 % interval) | λ |", "|---|---|---|---|"]
    is_own = inputs.report.evaluation.choices_from is None
    place = "on a tuning split" if is_own else "in another report"
    arms = inputs.report.evaluation.arms
    for arm in arms:
        change, interval, lmbda = arm.ppl_change, arm.ppl_interval, arm.lmbda
        shown = (
            ""
            if change is None or interval is None
            else f"{change:+.1%} ({interval[0]:+.1%} to {interval[1]:+.1%})"
        )
        weight = "" if lmbda is None else f"{lmbda:g}"
        rows.append(f"| {_name(inputs, arm)} | {arm.ppl:.2f} | {shown} | {weight} |")
    return (
        "\n".join(rows)
        + "".join(_curve(arm) for arm in arms)
        + f"\n\nλ was chosen {place}; the figures are of the test split, at each arm's own λ."
    )


def _curve(arm: ArmFigures) -> str:
    """A line with an arm's tuning perplexity by λ; "" for one that is not mixed with the base."""
    points = [point for point in arm.tuning_curve or () if point.ppl is not None]
    if not points:
        return ""
    curve = ", ".join(f"{point.lmbda:g}: {point.ppl:.2f}" for point in points)
    return f"\n\nTuning perplexity of {arm.name} by λ: {curve}."


def describe_verification(verification: Mapping[str, Any]) -> str:
    """The verification in one sentence."""
    text = (
        "loaded again through its own code, every tensor is the trained one in its dtype, and"
        f" log-probabilities on {verification['num_positions']} random tokens differ from those of base and"
        f" memory by {verification['logit_difference']:.1g} relative (bound {verification['logit_bound']:g})"
    )
    if verification["rounding"]:
        text += (
            f"; against float32 the distributions change by {verification['rounding']:.2g} "
            f"(mean total variation, bound {verification['rounding_bound']:g})"
        )
    return text


def _bullet_list(lines: list[str]) -> str:
    return "\n".join(f"- {line}" for line in lines)
