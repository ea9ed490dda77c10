"""What a TensorRT says while it works: its calls return None or False when they fail, and log the reason."""

from rd_deploy.common import UserError, one_line

# Logged after every failure where there is no driver, whatever the failure was.
MISLEADING = "catchCudaError"
MAX_REASON = 240  # characters of a reason that are shown


class Messages:
    """Collects all messages of one TensorRT module's builder, parser or runtime. ``logger``: what to give to it."""

    def __init__(self, module):
        severity = module.ILogger.Severity
        self._bad = {severity.INTERNAL_ERROR, severity.ERROR}
        self._said: list[tuple[object, str]] = []
        said = self._said

        class Logger(module.ILogger):
            def __init__(self):
                module.ILogger.__init__(self)

            def log(self, severity, message):
                said.append((severity, message))

        self.logger = Logger()

    @property
    def lines(self) -> list[str]:
        """Every message so far, of any severity, in order."""
        return [text for _, text in self._said]

    def reason(self) -> str:
        """The first error in one line; later ones mostly follow from it."""
        errors = [text for severity, text in self._said if severity in self._bad]
        telling = [text for text in errors if MISLEADING not in text] or errors
        return one_line(telling[0])[:MAX_REASON] if telling else "it gives no reason"

    def checked(self, result, what: str):
        """A call's result, or `UserError` with the reason when it is None or False."""
        if result is None or result is False:
            raise UserError(f"TensorRT cannot {what}: {self.reason()}")
        return result
