"""HTML pages as a browser would read them."""

from html.parser import HTMLParser

VOID = {"meta", "img", "input", "br", "link", "hr"}


class Page(HTMLParser):
    """The elements of a page in order. Open tags must be closed in order, and no element may run code on an event."""

    def __init__(self, text):
        super().__init__()
        self.elements, self.open, self.texts, self.styles = [], [], [], ""
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attributes):
        assert not [name for name, _ in attributes if name.startswith("on")], (tag, attributes)
        self.elements.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open and self.open.pop() == tag, f"</{tag}> closes nothing"

    def handle_data(self, data):
        if "style" in self.open:
            self.styles += data
        elif "script" not in self.open:
            self.texts.append(data)

    @property
    def text(self):
        return " ".join(" ".join(self.texts).split())

    def all(self, tag, **wanted):
        """Return the attributes of every element `tag` that has the wanted ones."""
        return [a for t, a in self.elements if t == tag and all(a.get(k) == v for k, v in wanted.items())]

    def values(self, *names):
        """Return the values of these attributes of all elements, in order."""
        return [a[name] for _, a in self.elements for name in names if name in a]
