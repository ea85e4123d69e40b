"""Cases that fail today, by what happens: the list of what is to be mended. Who mends one takes its name out.

A reason that begins with "hangs" lets the case run for two seconds only (see harness.py).
"""

FAILS: dict[str, list[str]] = {}
KNOWN = {name: reason for reason, names in FAILS.items() for name in names}
