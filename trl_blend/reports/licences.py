"""
What is known about the licences of the models and data that a model was made from.

A reminder, not advice: it repeats what the card of a model says of its license, and for a few families what is stated
in their license texts. What is not listed here may restrict as well.
"""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from huggingface_hub import metadata_load, try_to_load_from_cache

from trl_blend.reports.cards import model_link
from trl_blend.reports.names import shown_name


# Of https://huggingface.co/docs/hub/repositories-licenses: those that ask for attribution at most
PERMISSIVE = (
    r"apache-2\.0|mit|bsd(-[23]-clause(-clear)?)?|bsl-1\.0|isc|zlib|unlicense|wtfpl|0bsd|cc0-1\.0|cc-by-[234]\.[05]"
    r"|ncsa|postgresql|pddl|odc-by|cdla-permissive-[12]\.0|ecl-2\.0"
)

_LLAMA = (
    "a model made from it or trained on its outputs has to carry {name} at the beginning of its name, and whoever "
    "distributes it has to show {built} and pass the license on"
)
_LLAMA_2 = "its outputs may not be used to improve other large language models"
# Per pattern of a license identifier of the Hub, what its text asks for
TERMS = {
    r"llama2": f"{_LLAMA_2}, and the license has to be passed on",
    r"llama3": f"{_LLAMA.format(name='“Llama 3”', built='“Built with Meta Llama 3”')}; {_LLAMA_2}",
    r"llama(3\.\d+|4)": _LLAMA.format(name="“Llama”", built="“Built with Llama”"),
    r"gemma": "its terms also hold for models that are distilled from it or trained on its outputs, and have to be "
    "passed on with their use restrictions",
    r"cc-by-nc-nd-.*": "non-commercial use only, no derivatives",
    r"cc-by-nc.*": "non-commercial use only",
    r"cc-by-nd-.*": "no derivatives",
    r"cc-by-sa-.*": "what is adapted from it has to be shared under the same license",
    r"(a|l)?gpl.*": "what is derived from it has to be shared under the same license",
    r".*openrail.*|.*-rail-.*": "its use restrictions have to be passed on",
}
# Licenses of families whose card is often not at hand: (pattern of ids on the Hub, license identifier)
FAMILIES = (
    (r"meta-llama/llama-2-.*", "llama2"),
    (r"meta-llama/meta-llama-3-.*", "llama3"),
    (r"meta-llama/(meta-)?llama-3\.1-.*", "llama3.1"),
    (r"meta-llama/llama-3\.2-.*", "llama3.2"),
    (r"meta-llama/llama-3\.3-.*", "llama3.3"),
    (r"meta-llama/llama-4-.*", "llama4"),
    (r"google/gemma-(2b|7b|1\.1|2|3|3n)(-.*)?", "gemma"),
    (r"tatsu-lab/alpaca", "cc-by-nc-4.0"),
)
# Data sets whose cards say that models of OpenAI wrote them
WRITTEN_BY_OPENAI = (
    "tatsu-lab/alpaca",
    "vicgalle/alpaca-gpt4",
    "stingning/ultrachat",
    "huggingfaceh4/ultrachat_200k",
    "open-orca/openorca",
    "teknium/openhermes-2.5",
)


class Source(NamedTuple):
    """
    Something a model was made from.

    Args:
        role (`str`): `"base model"`, `"teacher"` or `"dataset"`.
        name (`str`): Name, id or path.
        commit (`str` or `None`): Commit on the Hub.
    """

    role: str
    name: str
    commit: str | None = None


def reminders(sources: Iterable[Source]) -> list[str]:
    """One sentence for each source that is known to restrict what is made from it."""
    found = []
    for source in dict.fromkeys(sources):
        kind = "datasets/" if source.role == "dataset" else ""
        name = f"The {source.role}, {model_link(source.name, kind=kind)},"
        license, title = find_license(source)
        if license and not re.fullmatch(PERMISSIVE, license):
            terms = next((terms for pattern, terms in TERMS.items() if re.fullmatch(pattern, license)), None)
            called = f"`{license}`" if title is None else f"`{license}` (`{title}`)"
            found.append(f"{name} has the license {called}: {terms or 'read what it asks for'}.")
        hub_id = shown_name(source.name).hub_id
        if kind and hub_id and hub_id.lower() in WRITTEN_BY_OPENAI:
            found.append(
                f"{name} was written by models of OpenAI, whose terms do not allow using their outputs for models "
                "that compete with OpenAI."
            )
    return found


def find_license(source: Source) -> tuple[str | None, str | None]:
    """License identifier and `license_name` of a source: from its own card, where that is here, else from its id."""
    license, title = _of_card(_card(source))
    if license:
        return license, title
    hub_id = (shown_name(source.name).hub_id or "").lower()
    return next((license for pattern, license in FAMILIES if re.fullmatch(pattern, hub_id)), None), None


def _card(source: Source) -> Path | None:
    local = Path(source.name) / "README.md"
    if local.is_file():
        return local
    shown = shown_name(source.name)
    if shown.hub_id is None:
        return None
    kind = "dataset" if source.role == "dataset" else "model"
    cached = try_to_load_from_cache(
        shown.hub_id, "README.md", revision=source.commit or shown.commit, repo_type=kind
    )  # never from the network
    return Path(cached) if isinstance(cached, str) else None


def _of_card(path: Path | None) -> tuple[str | None, str | None]:
    try:
        metadata: Any = metadata_load(path) if path is not None else None
    except (yaml.YAMLError, ValueError, OSError):
        metadata = None
    if not isinstance(metadata, dict):
        return None, None
    license = metadata.get("license")
    license = license[0] if isinstance(license, list) and license else license
    title = metadata.get("license_name")
    return (str(license).lower() if license else None), (str(title) if title else None)
