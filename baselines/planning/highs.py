"""HiGHS, the solver of linear and mixed-integer programs, without its banner and interruptible."""

from __future__ import annotations

import highspy

# mypy: disable-error-code="no-untyped-call"


class _SilentHighs(highspy.Highs):
    """A model that prints nothing, not even the banner that the base class's constructor prints."""

    def enableCallbacks(self) -> None:  # noqa: N802 - called by the constructor, before the banner
        self.silent()
        super().enableCallbacks()


def silent_highs() -> highspy.Highs:
    """Return an empty model: no output, one thread."""
    model = _SilentHighs()
    model.silent()
    model.setOptionValue("threads", 1)
    return model


def solve_interruptibly(model: highspy.Highs) -> None:
    """Run the solver; on Ctrl-C stop it first, then let ``KeyboardInterrupt`` pass.

    ``model.solve()`` would print a line and carry on as if the time were up.
    """
    model.HandleKeyboardInterrupt = True  # lets cancelSolve work
    model.startSolve()
    try:
        _wait(model)
    except KeyboardInterrupt:
        model.cancelSolve()
        _wait(model)
        raise


def _wait(model: highspy.Highs) -> None:
    finished = False
    while not finished:
        finished, _ = model.wait(0.1)  # short: Ctrl-C is noticed only between waits
