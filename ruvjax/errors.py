"""The errors ruvjax raises on purpose. Each says what was wrong and, in `hint`, what to do about it."""


class RuvjaxError(Exception):
    """An error with a hint. `exit_code` is what the command line leaves with (see README, Exit codes)."""

    exit_code = 1

    def __init__(self, message: str, hint: str = ""):
        super().__init__(message)
        self.hint = hint

    def line(self) -> str:
        """The message and its hint on one line, as the command line prints it."""
        text = " ".join(str(self).split())
        return f"{text} ({' '.join(self.hint.split())})" if self.hint else text


class ConfigError(RuvjaxError):
    """A configuration that cannot be built: a misspelt key, a wrong type, values that exclude each other."""

    exit_code = 2


class InputError(RuvjaxError):
    """Input the user named that cannot be used: missing, empty, binary, malformed or too long."""

    exit_code = 2


class BackendError(RuvjaxError):
    """A device, backend or kernel implementation that was asked for by name and cannot run here."""

    exit_code = 2


class NotYetError(RuvjaxError):
    """A documented name whose implementation has not landed yet (README, Not there yet)."""

    exit_code = 2


class RunError(RuvjaxError):
    """A run that started and could not go on: non-finite loss, full disk, unreadable checkpoint."""
