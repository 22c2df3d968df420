"""The test suite on every supported Python: `nox`. On one: `nox -s tests-3.12`. Fast tests: `nox -- -m "not slow"`."""

import nox

nox.options.sessions = ["tests"]
nox.options.reuse_existing_virtualenvs = True


@nox.session(python=["3.10", "3.11", "3.12", "3.13"])
def tests(session: nox.Session) -> None:
    """Install gram-meta[test] and run pytest with the arguments after `--`."""
    session.install("-e", ".[test]")
    session.run("python", "-m", "pytest", "--numprocesses", "2", "--dist", "loadfile", *session.posargs)


@nox.session(python="3.11")
def coverage(session: nox.Session) -> None:
    """Run the suite once more and report which lines no test reaches."""
    session.install("-e", ".[test]", "pytest-cov")
    session.run("python", "-m", "pytest", "--cov", "--cov-report=term-missing:skip-covered", *session.posargs)
