"""The one kind of error a user sees: what is wrong, where, and how to mend it."""

from compress.words.escape import terminal

LONGEST = 1000  # characters of a line; what is quoted may be a file's whole content


class CompressError(Exception):
    """A fault the user can act on.

    Args:
        what: what is wrong, one sentence.
        where: the file, key, layer or device it concerns.
        fix: what to do about it.

    The command line prints it without a traceback and exits with ``exit_code``. What the parts quote may come from
    anywhere: as a string they are three lines at most, and no command for a terminal or a CI.
    """

    exit_code = 1

    def __init__(self, what: str, where: str = "", fix: str = "") -> None:
        self.what, self.where, self.fix = what, where, fix
        super().__init__(what)

    def rename(self, before: object, after: object) -> None:
        """What is being made has another place than what was asked for; the error speaks of the latter."""
        self.what, self.where = (text.replace(str(before), str(after)) for text in (self.what, self.where))
        self.args = (self.what,)

    def __str__(self) -> str:
        lines = [_line(self.what)]
        if self.where:
            lines.append(f"  where: {_line(self.where)}")
        if self.fix:
            lines.append(f"  fix:   {_line(self.fix)}")
        return "\n".join(lines)


def _line(text: str) -> str:
    if not text.strip():
        return repr(text)  # a name of blanks
    if len(text) > LONGEST:
        text = f"{text[: LONGEST // 2]} ... {text[-LONGEST // 2 :]}"
    return terminal(text)


class UsageError(CompressError):
    """The command, recipe or target file is wrong; nothing was started."""

    exit_code = 2
