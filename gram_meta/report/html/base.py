"""What both pages share: jinja2 templates with autoescape, and the files that are copied into a page."""

import base64
import hashlib
import re
from functools import cache, partial
from importlib import resources
from typing import Any

import yaml
from jinja2 import Environment, FunctionLoader, StrictUndefined
from markupsafe import Markup

from gram_meta import __version__

_CONTROL = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ufffe\uffff]")


def render(template: str, **context: Any) -> str:
    """Return the page that `template` makes of `context`."""
    return _environment().get_template(template).render(version=__version__, **context)


def read(name: str) -> str:
    """Return the text of a file of this folder: a template, CSS or a script."""
    return resources.files(__package__).joinpath(name).read_text(encoding="utf-8").strip()


def data_uri(data: bytes, kind: str) -> str:
    """Return an image's file as the `src` of an `<img>`; `kind`: "png", "webp" or "jpeg"."""
    return f"data:image/{kind};base64,{base64.b64encode(data).decode('ascii')}"


@cache
def _environment() -> Environment:
    blocks: dict[str, Any] = {"trim_blocks": True, "lstrip_blocks": True}
    environment = Environment(
        loader=FunctionLoader(read), autoescape=True, finalize=_printable, undefined=StrictUndefined, **blocks
    )
    environment.globals["asset"] = lambda name: Markup(read(name))
    dump = partial(yaml.safe_dump, sort_keys=False, default_flow_style=None, allow_unicode=True, width=100)
    environment.filters |= {"data_uri": data_uri, "thousands": "{:,}".format, "sha256": _sha256, "yaml": dump}
    return environment


def _sha256(text: str) -> str:
    """Return the hash that a content security policy allows a script by."""
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode("ascii")


def _printable(value: Any) -> Any:
    """Replace what HTML cannot hold (control characters, lone surrogates) before jinja2 escapes the value."""
    if isinstance(value, Markup):
        return value
    text = str(value).encode("utf-8", "replace").decode()
    return _CONTROL.sub("\N{REPLACEMENT CHARACTER}", text)
