"""HTML pages from the templates beside this module.

A page is one file that loads nothing: ``templates/base.html`` gives it a content security policy
that allows pictures inside the page and its own script, by its hash. What is put into a template
is escaped, and a name that a template uses but was not given is an error.
"""

import base64
import hashlib
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined

from flatdepth.errors import UserError
from flatdepth.show.pictures import write_atomic


def write_page(out: Path, template: str, **values: object) -> Path:
    """Write ``render_page`` to the file ``out`` and return its path.

    Raises:
        UserError: if ``out`` is a directory.
    """
    if out.is_dir():
        raise UserError(f"{out} is a directory; give the name of an HTML file to write")
    write_atomic(out, render_page(template, **values).encode("utf-8", "replace"))
    return out


def render_page(template: str, **values: object) -> str:
    """The page that a template makes of values; the same values give the same text."""
    return _TEMPLATES.get_template(template).render(values)


def data_uri(data: bytes, kind: str) -> str:
    """Data of a media type as an address that holds them."""
    return f"data:{kind};base64,{base64.b64encode(data).decode('ascii')}"


def _sha256(text: str) -> str:
    """The digest as a content security policy writes it."""
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode("ascii")


_TEMPLATES = Environment(
    loader=PackageLoader("flatdepth.show"),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)
_TEMPLATES.filters |= {"data_uri": data_uri, "sha256": _sha256}
