"""Whether two identities are of the same model, and by what that is known."""

from dataclasses import dataclass, field
from typing import Any, Literal

from trl_blend.teacher.identity import AdapterFingerprint, ModelIdentity
from trl_blend.teacher.weights import compare_weights


_WEIGHTS = {
    "different": "the weights",
    "equal_in_bfloat16": "the weights (equal after rounding both to bfloat16: an update that small, or noise)",
}


@dataclass(frozen=True)
class Comparison:
    """
    Args:
        relation (`str`):
            `"same"`, `"bfloat16_copy"` (one is the other rounded to bfloat16), `"different"` or `"unknown"`.
        by (`str`):
            `"weights"` where fingerprints were compared, `"name"` where there was nothing but names and commits.
        differences (`list[str]`):
            What differs.
    """

    relation: Literal["same", "bfloat16_copy", "different", "unknown"]
    by: Literal["weights", "name"]
    differences: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        return {"relation": self.relation, "compared_by": self.by, "differences": list(self.differences)}


def compare_identities(first: ModelIdentity, second: ModelIdentity) -> Comparison:
    """
    Compare weights, adapters and what the configuration makes of them; names and commits where the weights of one of
    the two were not hashed. An adapter that changes nothing yet counts as none.

    Names decide little: the same name may stand for other weights, and two names of which one is a folder may stand
    for the same ones (`"unknown"`).
    """
    differences, rounded = _compare_adapters(_effective(first.adapter), _effective(second.adapter))
    for key in sorted(first.config.keys() & second.config.keys()):
        if first.config[key] != second.config[key]:
            differences.append(f"config.{key} ({first.config[key]} and {second.config[key]})")
    if first.weights is not None and second.weights is not None:
        relation = compare_weights(first.weights, second.weights)
        rounded |= relation == "bfloat16_copy"
        if relation in _WEIGHTS:
            differences.insert(0, _WEIGHTS[relation])
        if differences:
            return Comparison("different", "weights", differences)
        return Comparison("bfloat16_copy" if rounded else "same", "weights")
    if differences:
        return Comparison("different", "weights", differences)
    return _compare_names(first, second)


def _effective(adapter: AdapterFingerprint | None) -> AdapterFingerprint | None:
    return None if adapter is None or adapter.is_neutral else adapter


def _compare_adapters(first: AdapterFingerprint | None, second: AdapterFingerprint | None) -> tuple[list[str], bool]:
    if first is None or second is None:
        return ([] if first is second else ["an adapter that only one of them has"]), False
    relation = compare_weights(first.weights, second.weights)
    differences = ["the adapter's weights"] if relation in _WEIGHTS else []
    if first.config_sha256 != second.config_sha256:
        differences.append("the adapter's settings")
    return differences, relation == "bfloat16_copy"


def _compare_names(first: ModelIdentity, second: ModelIdentity) -> Comparison:
    names = [first.name, second.name]
    if not (first.name and second.name):
        return Comparison("unknown", "name")
    if first.name.lower() != second.name.lower():
        relation: Literal["different", "unknown"] = "different" if all(map(_is_hub_id, names)) else "unknown"
        return Comparison(relation, "name", [f"the names ({first.name} and {second.name})"])
    if first.commit and second.commit and first.commit != second.commit:
        return Comparison("different", "name", [f"the commits ({first.commit} and {second.commit})"])
    return Comparison("same", "name")


def _is_hub_id(name: str | None) -> bool:
    return bool(name) and str(name).count("/") == 1 and str(name)[0] not in "./~"
