"""The metadata of a model card, at the top of its file, which the Hub reads."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCard, metadata_load, try_to_load_from_cache

from trl_blend.reports.names import shown_name


_LICENSE = ("license", "license_name", "license_link")
# What the publisher of a model adds to its metadata, kept when the card is written again
_KEPT = (*_LICENSE, "language")


def kept_metadata(path: Path, base_model: str | None = None) -> dict[str, Any]:
    """
    What somebody has added to the metadata of a card, such as its license. The license is not kept where the
    card is that of a model from another one than `base_model`.
    """
    try:
        present = metadata_load(path) if path.is_file() else None
    except (yaml.YAMLError, ValueError):  # TRL replaces a broken card without reading it
        present = None
    if not isinstance(present, dict):
        return {}
    former = present.get("base_model")
    names = _KEPT if base_model is None or former in (None, base_model, [base_model]) else ("language",)
    return {name: present[name] for name in names if present.get(name)}


def base_license(name: str, commit: str | None = None) -> dict[str, Any]:
    """
    The license of a base model as its own card states it, where that is here: in its folder or the Hub's cache, never
    from the network.
    """
    shown = shown_name(name)
    card = Path(name, "README.md")
    if shown.hub_id is not None and not card.is_file():
        cached = try_to_load_from_cache(shown.hub_id, "README.md", revision=commit or shown.commit)
        card = Path(cached) if isinstance(cached, str) else card
    found = kept_metadata(card) if name else {}
    if "://" not in found.get("license_link", ""):  # a file of the base's repository
        found.pop("license_link", None)
    return {field: found[field] for field in _LICENSE if isinstance(found.get(field), str)}


def complete_metadata(
    path: Path,
    *,
    base_model: str | None,
    is_adapter: bool,
    library: str,
    kept: Mapping[str, Any],
    eval_results: Sequence[EvalResult] = (),
) -> None:
    """
    Complete the metadata of a card that TRL has written, and leave no two blank lines in a row.

    `base_model` is the id on the Hub of the model that training started from (a folder is none: the Hub would refuse
    it), `library` the one that loads the repository, `"transformers"` or `"peft"`. `kept` is added: [`kept_metadata`]
    of the card before, [`base_license`].
    """
    card = ModelCard.load(path)
    data = card.data
    data.pop("licence")  # a placeholder of TRL, no field of the Hub
    data.base_model = base_model
    data.base_model_relation = ("adapter" if is_adapter else "finetune") if base_model else None
    data.library_name = library
    data.pipeline_tag = "text-generation"
    data.tags = sorted(data.tags or [])
    for name, value in kept.items():
        data[name] = value
    data.eval_results = list(eval_results) or None
    card.text = re.sub(r"\n{3,}", "\n\n", card.text).rstrip() + "\n"
    card.save(path)


def model_index(results: Mapping[str, Any] | None) -> list[EvalResult]:
    """
    Entries of the model index: only for `card_results` of a trainer that name a data set on the Hub and the policy
    that is published.
    """
    dataset = shown_name((results or {}).get("dataset")).hub_id
    if results is None or dataset is None or results.get("policy") not in results["after"]:
        return []
    return [
        EvalResult(
            task_type="text-generation",
            dataset_type=dataset,
            dataset_name=dataset,
            dataset_split=results.get("split"),
            metric_type=reward,
            metric_value=round(mean, 4),
        )
        for reward, (mean, _) in zip(results["rewards"], results["after"][results["policy"]], strict=True)
    ]
