"""What mkdocs.yml needs beside its plugins: where the pages of the site lie, and what its API reference reads."""

from pathlib import Path
from typing import Any

import griffe
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

PAGES = ("docs/**/*", "*.md", "gram_meta/**/*.md")
LINKED = ("LICENSE", "NOTICE", "CITATION.cff", "examples/*.py", "scripts/bench/*.py")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Return the theme's files, and ours under their paths in the repository: a link is right in both places."""
    root = Path(config.docs_dir).parent
    paths = [path for pattern in PAGES + LINKED for path in sorted(root.glob(pattern)) if path.is_file()]
    place = str(root), config.site_dir, config.use_directory_urls
    own = [File(path.relative_to(root).as_posix(), *place) for path in paths]
    return Files([*(file for file in files if file.src_dir != config.docs_dir), *own])


class FieldComments(griffe.Extension):
    """Takes the comment behind or above a field of a dataclass as the field's docstring."""

    def on_attribute(self, *, attr: griffe.Attribute, **_: Any) -> None:
        fields = attr.parent.is_class and any("dataclass" in str(found.value) for found in attr.parent.decorators)
        if fields and attr.docstring is None:
            above, line = attr.lines_collection[attr.filepath][attr.lineno - 2 : attr.lineno]
            before = above.strip()[2:] if above.strip().startswith("# ") else ""
            if comment := line.partition("  # ")[2] or before:
                attr.docstring = griffe.Docstring(comment, parent=attr)
