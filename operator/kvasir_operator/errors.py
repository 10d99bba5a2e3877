"""What can go wrong between the operator and the cluster.

OperatorError
  ClusterError     the API server refused or did not answer: `status`, `reason`, `message`
  LeaseLostError   another process may lead: this one must end
"""


class OperatorError(Exception):
    """Base of the operator's errors."""


class ClusterError(OperatorError):
    """A call to the API server failed; status 0: there was no answer."""

    def __init__(self, status: int, reason: str, message: str) -> None:
        super().__init__(f"{status} {reason}: {message}")
        self.status = status
        self.reason = reason
        self.message = message

    @property
    def is_refusal(self) -> bool:
        """Whether the request itself is at fault: the same one again fares no better."""
        return self.status in (400, 403, 422)

    @property
    def is_conflict(self) -> bool:
        """Whether the object has changed since it was read."""
        return self.status == 409


class LeaseLostError(OperatorError):
    """The lease of the leader was lost."""
