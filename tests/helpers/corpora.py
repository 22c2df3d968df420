"""Rows of a source, split into good and skipped ones, and images as bytes."""

import io
from collections import Counter

from gram_meta.corpus.sources import all_rows, open_source


def rows_of(path, **options):
    return list(all_rows(open_source(path, **options)))


def good(rows):
    """Return (location, caption) of the rows that are not skipped."""
    return [(row.location, row.caption) for row in rows if not row.skip]


def skips(rows):
    """Return how many rows are skipped for each reason."""
    return Counter(row.skip for row in rows if row.skip)


def encoded(image, kind="PNG", **options):
    """Return an image's file as bytes."""
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()
