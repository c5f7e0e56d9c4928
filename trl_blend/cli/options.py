"""
Options of commands, read from the sources of their dataclasses: importing TRL takes five seconds.

This is for `--help`, and for a misspelt name; parsing is left to TRL and accelerate. What cannot be read here raises
`LookupError`, and is then theirs to judge.
"""

import argparse
import ast
import re
from collections.abc import Iterator, Sequence
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from trl_blend.trainers._options import described_options


# Options of TRL and transformers that most runs set, in the order of the help
COMMON = (
    *("model_name_or_path", "dtype", "dataset_name", "output_dir", "learning_rate", "lr_scheduler_type"),
    *("per_device_train_batch_size", "gradient_accumulation_steps", "max_steps", "num_train_epochs"),
    *("num_generations", "max_completion_length", "temperature", "bf16", "use_cpu", "gradient_checkpointing"),
    *("use_peft", "lora_r", "lora_target_modules", "logging_steps", "save_steps", "report_to", "seed"),
    *("resume_from_checkpoint", "push_to_hub", "hub_model_id"),
)


class Option(NamedTuple):
    """
    A field of a dataclass.

    Args:
        annotation (`str`): Source of its type, such as `"int | None"`.
        choices (`tuple`): Its words, where it is annotated as a `Literal`.
        default (`str` or `None`): Source of its default, if it has one.
        help (`str`): Its help.
        group (`str`): Heading in the docstring of the class of ours that documents it, or `""`.
    """

    annotation: str
    choices: tuple[str, ...]
    default: str | None
    help: str
    group: str


def read_options(dataclasses: Sequence[str]) -> dict[str, Option]:
    """
    Fields, by name, of dataclasses such as `"trl:ModelConfig"`.

    Raises:
        `LookupError`: If a source is not found.
    """
    options: dict[str, Option] = {}
    for dataclass in dataclasses:
        options |= _fields(*dataclass.split(":"))
    return options


def spellings(options: dict[str, Option]) -> set[str]:
    """Names that the parser of TRL accepts for these fields: with hyphens too, and `no_` for what is on by default."""
    names = {"help", *options}
    for name, option in options.items():
        if option.annotation.split(" | ")[0] == "bool" and option.default == "True":
            names |= {f"no_{name}", f"no-{name.replace('_', '-')}"}
    return names | {name.replace("_", "-") for name in options}


def launch_spellings() -> set[str]:
    """Names that `accelerate launch` accepts."""
    calls = (node for node in ast.walk(_parse(_file("accelerate.commands.launch"))) if isinstance(node, ast.Call))
    added = [node for node in calls if isinstance(node.func, ast.Attribute) and node.func.attr == "add_argument"]
    constants = (argument.value for node in added for argument in node.args if isinstance(argument, ast.Constant))
    names = {name[2:] for name in constants if name.startswith("--")} - {"help"}
    if not names:
        raise LookupError("accelerate launch")
    return names | {name.replace("_", "-") for name in names}


def format_help(options: dict[str, Option], program: str, summary: str, epilog: str | None = None) -> str:
    """The help of a command: the options of ours, by group, and those of others in [`COMMON`]."""
    parser = argparse.ArgumentParser(program, "%(prog)s [--config FILE] [options]", summary, epilog, add_help=False)
    common = parser.add_argument_group("Parameters that most runs set")
    for name in COMMON:
        if name in options:
            _add(common, name, options[name])
    groups: dict[str, Any] = {}
    for name, option in options.items():
        if option.group and name not in COMMON:
            if option.group not in groups:
                groups[option.group] = parser.add_argument_group(option.group)
            _add(groups[option.group], name, option)
    others = parser.add_argument_group("Others")
    others.add_argument("--config", metavar="FILE", help="YAML file of options; those on the command line win")
    if any(name not in COMMON and not option.group for name, option in options.items()):
        others.add_argument("--help-all", action="store_true", help="show all options of TRL too; takes some seconds")
    return parser.format_help()


def _add(group: Any, name: str, option: Option) -> None:
    default = "" if option.default in (None, "None", "''") else f" (default: {option.default})"
    text = option.help.replace("%%", "%") + default
    group.add_argument(f"--{name}", metavar=_metavar(option), help=text.replace("%", "%%"))


def _metavar(option: Option) -> str:
    if option.choices:
        return f"{{{','.join(option.choices)}}}"
    kinds = [kind for kind in option.annotation.split(" | ") if kind != "None"]
    if any(kind.startswith("dict") for kind in kinds):
        return "JSON"
    several = re.fullmatch(r"list\[(\w+)\]", kinds[0])
    return f"{several[1].upper()} ..." if several else kinds[0].upper()


def _fields(module: str, name: str) -> dict[str, Option]:
    """Fields of a dataclass with those of its bases, which it may override."""
    module, definition = _find_class(module, name)
    fields: dict[str, Option] = {}
    for base in reversed(definition.bases):
        if isinstance(base, ast.Name):
            fields |= _fields(module, base.id)
    if not any("dataclass" in ast.unparse(decorator) for decorator in definition.decorator_list):
        return fields
    is_ours = module.startswith("trl_blend.")
    groups = _groups(definition) if is_ours else {}
    described = described_options(ast.get_docstring(definition)) if is_ours else {}
    ungrouped = "Parameters of the command" if is_ours and not groups else ""
    for node in definition.body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            field = node.target.id
            option = _option(node, groups.get(field, ungrouped))
            if option is not None:
                inherited = fields[field].help if field in fields else ""
                fields[field] = option._replace(help=option.help or described.get(field, inherited))
    return fields


def _option(node: ast.AnnAssign, group: str) -> Option | None:
    """The option of a field; `None` for what is no argument of the class."""
    annotation, choices, value = ast.unparse(node.annotation), _words(node.annotation), node.value
    if annotation.startswith("ClassVar"):
        return None
    if not (isinstance(value, ast.Call) and ast.unparse(value.func) == "field"):
        return Option(annotation, choices, None if value is None else ast.unparse(value), "", group)
    given = {keyword.arg: keyword.value for keyword in value.keywords}
    if "init" in given and ast.unparse(given["init"]) == "False":
        return None
    default = given.get("default")
    if default is None and isinstance(given.get("default_factory"), ast.Lambda):
        default = given["default_factory"].body
    source = None if default is None else ast.unparse(default)
    return Option(annotation, choices, source, _help(given.get("metadata")), group)


def _help(metadata: ast.expr | None) -> str:
    if not isinstance(metadata, ast.Dict):
        return ""
    for key, value in zip(metadata.keys, metadata.values):
        if isinstance(key, ast.Constant) and key.value == "help" and isinstance(value, ast.Constant):
            return " ".join(value.value.split())
    return ""


def _groups(definition: ast.ClassDef) -> dict[str, str]:
    """Headings, marked by `>`, above the arguments in the docstring of a class."""
    heading, groups = "", {}
    for line in (ast.get_docstring(definition) or "").splitlines():
        if found := re.fullmatch(r"    > (Parameters .*)", line):
            heading = found[1]
        elif heading and (found := re.match(r"    (\w+) \(", line)):
            groups[found[1]] = heading
    return groups


def _words(annotation: ast.expr) -> tuple[str, ...]:
    """The words in the `Literal` of an annotation."""
    literals = [
        node
        for node in ast.walk(annotation)
        if isinstance(node, ast.Subscript) and ast.unparse(node.value).endswith("Literal")
    ]
    constants = [node.value for literal in literals for node in ast.walk(literal) if isinstance(node, ast.Constant)]
    return tuple(word for word in constants if isinstance(word, str))


def _find_class(module: str, name: str) -> tuple[str, ast.ClassDef]:
    """The definition that a module has, or imports, under this name, and the module that has it."""
    file = _file(module)
    for node in _statements(_parse(file)):
        if isinstance(node, ast.ClassDef) and node.name == name:
            return module, node
        if isinstance(node, ast.ImportFrom):
            for alias in node.names:
                if (alias.asname or alias.name) == name:
                    package = module.split(".") if file.name == "__init__.py" else module.split(".")[:-1]
                    parts = package[: len(package) + 1 - node.level] if node.level else []
                    return _find_class(".".join([*parts, *filter(None, [node.module])]), alias.name)
    raise LookupError(f"{module}:{name}")


def _statements(tree: ast.Module) -> Iterator[ast.stmt]:
    """Statements of a module, also those under an `if`, such as the imports for type checkers."""
    for node in tree.body:
        yield node
        if isinstance(node, ast.If):
            yield from node.body


@cache
def _parse(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"))


def _file(module: str) -> Path:
    """Source of a module. Only its top-level package is looked for: that imports nothing."""
    top, *rest = module.split(".")
    spec: Any = find_spec(top)
    for folder in getattr(spec, "submodule_search_locations", None) or ():
        path = Path(folder, *rest)
        for file in (path.with_suffix(".py"), path / "__init__.py"):
            if file.is_file():
                return file
    raise LookupError(module)
