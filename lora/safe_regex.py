"""How costly a regular expression from an untrusted file can get, known before it runs.

Python's matcher backtracks, and an adapter's config may hold a pattern made to never end on the names of some model.
Without a repeated group, every choice in the pattern is met once on a path through it, so the product of the choices
bounds the paths.
"""

import re

NAME_LENGTH = 64  # characters a repetition may give back, one by one
MOST_PATHS = 2_000_000  # well under a second a name


def backtracks_little(pattern: str) -> bool:
    """True if matching `pattern` against a module path provably takes few steps; False for the rest."""
    plain = re.sub(r"\\.", "x", pattern, flags=re.DOTALL)
    plain = re.sub(r"\[\^?\]?[^\]]*\]", "x", plain)  # a character class is one choice
    repeated_group = re.search(r"\)[*+{]", plain)
    hidden = re.search(r"\(\?(#|[a-zA-Z]*x)", plain)  # blanks and comments may stand before a repetition
    if repeated_group or hidden:
        return False
    repetitions = len(re.findall(r"[*+{]", plain))
    options = len(re.findall(r"(?<!\()\?", plain))  # not the ? that opens (?:
    if repetitions + options > 64:
        return False
    return NAME_LENGTH**repetitions * 2**options * _alternatives(plain) <= MOST_PATHS


def _alternatives(plain: str) -> int:
    """Product over all groups of the number of alternatives in each, cut off above the limit."""
    open_groups, product = [1], 1
    for character in plain:
        if character == "(":
            open_groups.append(1)
        elif character == "|":
            open_groups[-1] += 1
        elif character == ")" and len(open_groups) > 1:
            product = min(product * open_groups.pop(), MOST_PATHS + 1)
    for group in open_groups:
        product = min(product * group, MOST_PATHS + 1)
    return product
