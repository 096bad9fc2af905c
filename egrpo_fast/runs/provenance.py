"""Which code a run is made by."""

import os
import subprocess
from pathlib import Path


def commit() -> str | None:
    """The commit that the package runs from, with `-dirty` where files differ; None: no checkout of its own."""
    folder = Path(__file__).parents[1]

    def git(*arguments: str) -> str | None:
        command = ["git", "-C", str(folder), *arguments]
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, timeout=10, env={**os.environ, "GIT_OPTIONAL_LOCKS": "0"}
            )
        except (OSError, subprocess.SubprocessError):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    # Installed below somebody else's checkout, the commit would be theirs.
    ours = git("ls-files", "--error-unmatch", "__init__.py")
    return git("describe", "--always", "--dirty", "--abbrev=40", "--exclude=*") if ours else None
