"""Every option of a config is documented once: in its docstring, from which the page of the trainer is written."""

import dataclasses

import pytest

import trl_blend
from tests.docs import options
from tests.docs.markdown import TRAINER_PAGES, read


CONFIGS = [pytest.param(page, name, id=name) for page, name in TRAINER_PAGES.items()]


@pytest.mark.parametrize(("page", "name"), CONFIGS)
def test_the_page_lists_the_options_of_the_docstring(page, name):
    text = read(page)
    assert options.with_options(text, getattr(trl_blend, name)) == text, "run `python -m tests.docs.options`"


@pytest.mark.parametrize(("page", "name"), CONFIGS)
def test_every_field_is_documented_once_and_nothing_else(page, name):
    config = getattr(trl_blend, name)
    described = [option.name for option in options.documented(config)] + list(options.changed_defaults(config))
    missing = set(options.own_fields(config)) - set(described)
    # A parent's default may be worth a line although it is not redefined; then it has to be the parent's own
    for field in set(described) - set(options.own_fields(config)):
        assert field in {field.name for field in dataclasses.fields(config)}, field
    assert not missing
    assert len(described) == len(set(described))
    text = read(page).partition(options.BEGIN)[2].partition(options.END)[0]
    for field in options.own_fields(config):
        assert text.count(f"* `{field}`") == 1, field


@pytest.mark.parametrize(("page", "name"), CONFIGS)
def test_documented_defaults_are_those_of_the_fields(page, name):
    config = getattr(trl_blend, name)
    fields = {field.name: field for field in dataclasses.fields(config)}
    for option in options.documented(config):
        default, said = options.default_of(fields[option.name]), options.as_value(option.default)
        assert default == said or default == [said], option
        assert option.text.endswith((".", "`", ")")), option
    parents = {field.name: field for field in dataclasses.fields(options.trl_parent(config))}
    for field, (ours, said, _) in options.changed_defaults(config).items():
        value = options.default_of(fields[field])
        assert str(value) == ours.strip("\"'") or value == options.as_value(ours), field
        if said:
            parent = options.default_of(parents[field])
            assert str(getattr(parent, "value", parent)) == said.strip("\"'") or parent == options.as_value(said), (
                field
            )
