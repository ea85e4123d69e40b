"""The errors a user can cause or meet, each with the exit code that the command line ends with.

A leaf module: every layer may import it. Bad input raises `InputError` with one clear paragraph that says what is
wrong, where (file and line, key, tensor), the rule, the value received and what to do. Misuse of a function by a
program (a wrong shape, an impossible argument) stays a plain `ValueError` or `TypeError`.
"""


class FourbitError(Exception):
    """Base of every error below; `exit_code` is what the command line ends with."""

    exit_code = 1


class InputError(FourbitError, ValueError):
    """A file, a setting or a row that breaks a rule the user can mend."""

    exit_code = 2


class EnvironmentProblem(FourbitError, RuntimeError):
    """Something the machine lacks: a device, a library, a permission, a free output folder."""

    exit_code = 3


class DiskError(FourbitError, OSError):
    """A write that the disk refused; the message says how many bytes were needed."""

    exit_code = 5


class NumericError(FourbitError, ArithmeticError):
    """Training met NaN or infinity and stopped, so that no broken weights are saved."""

    exit_code = 6
