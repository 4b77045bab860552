from __future__ import annotations


class UsageError(Exception):
    """Something the user can mend; shown as one line, exit code 2."""
