"""What a check of consistency found, and the report of all of them."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

from trl_blend.errors import ConsistencyError


Severity = Literal["ok", "info", "warning", "error", "missing"]


@dataclass(frozen=True)
class Finding:
    """
    Result of one check.

    Args:
        name (`str`):
            The check.
        severity (`str`):
            `"ok"`; `"info"`, worth knowing; `"warning"`, likely a mistake; `"error"`, the data does not fit the model
            or its teacher; `"missing"`, it cannot be checked because something was not recorded.
        message (`str`):
            One or two sentences.
        evidence (`dict[str, Any]`, *optional*):
            What the check saw, as a JSON value.
        remedy (`str`, *optional*):
            What to do about it.
    """

    name: str
    severity: Severity
    message: str
    evidence: dict[str, Any] = field(default_factory=dict)
    remedy: str = ""

    @property
    def failed(self) -> bool:
        """Whether it stops a strict run."""
        return self.severity in ("error", "missing")

    def __str__(self) -> str:
        text = f"[{self.severity}] {self.name}: {self.message}"
        return f"{text}\n    remedy: {self.remedy}" if self.remedy else text


@dataclass(frozen=True)
class ConsistencyReport:
    """
    The findings of [`~trl_blend.consistency.check.check_teacher_consistency`].

    Args:
        findings (`Sequence[Finding]`):
            One per check, in the order of the checks.
    """

    findings: Sequence[Finding]

    @classmethod
    def of_stores(cls, reports: Mapping[str, "ConsistencyReport"]) -> "ConsistencyReport":
        """The findings about several stores in one report, each with the name of its store; of one, its own."""
        if len(reports) == 1:
            return next(iter(reports.values()))
        return cls(
            [
                replace(finding, message=f"{name}: {finding.message}")
                for name, report in reports.items()
                for finding in report
            ]
        )

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong or missing. Warnings do not count."""
        return not self.errors

    @property
    def errors(self) -> list[Finding]:
        """What stops a strict run: findings of severity `"error"` and `"missing"`."""
        return [finding for finding in self.findings if finding.failed]

    @property
    def warnings(self) -> list[Finding]:
        return [finding for finding in self.findings if finding.severity == "warning"]

    def __iter__(self) -> Iterator[Finding]:
        return iter(self.findings)

    def __getitem__(self, name: str) -> Finding:
        """The finding of a check, by its name."""
        for finding in self.findings:
            if finding.name == name:
                return finding
        raise KeyError(f"no check {name!r} in this report: {[finding.name for finding in self.findings]}")

    def raise_if_failed(self) -> None:
        """Raise [`ConsistencyError`] with every failed check and its remedy; its `report` is this one."""
        if self.ok:
            return
        failed = "\n".join(f"  {finding}".replace("\n", "\n  ") for finding in self.errors)
        raise ConsistencyError(
            f"teacher consistency: {len(self.errors)} of {len(self.findings)} checks failed\n{failed}\n"
            '`teacher_consistency="warn"` goes on in spite of it.',
            report=self,
        )

    def to_dict(self) -> dict[str, Any]:
        """A JSON value: `ok` and the list of findings."""
        return {"ok": self.ok, "findings": [asdict(finding) for finding in self.findings]}

    def __str__(self) -> str:
        return "\n".join(str(finding) for finding in self.findings)
