"""Compiling a template that may be anybody's."""

import pytest

from onebase_adapters.template_sandbox import compile_template


@pytest.mark.parametrize("expression", ["'ab' | upper", "'A' ~ 'B'"])
def test_nothing_is_computed_before_it_is_rendered(expression: str) -> None:
    template = compile_template(f"{{{{ {expression} }}}}")
    assert "AB" not in template.root_render_func.__code__.co_consts
    assert template.render() == "AB"
