"""The HTML pages of `gram report --html` and `gram inspect --html`."""
