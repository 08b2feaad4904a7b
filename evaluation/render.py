"""Pages from the templates beside this file. Every value is escaped: a text that holds `<script>` is shown, not run."""

import os

import jinja2


def render(template, **values):
    """A template of evaluation/templates and its values to a page of HTML."""
    loader = jinja2.FileSystemLoader(os.path.join(os.path.dirname(__file__), "templates"))
    environment = jinja2.Environment(
        loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.get_template(template).render(**values)
