"""A program that opens a tokenizer.json before we do, under limits: what it does not survive, we do not open.

The tokenizers library panics at some broken files, which ends in no Python exception, and a file may name normalizers
that multiply text or patterns that never end. `tokenizer_folder` starts this with the file's path; it prints what went
wrong, or nothing. An error that the library raises is none of its business: that is an exception, wherever it comes.
"""

import os
import resource
import string
import sys

import tokenizers

LOAD_SECONDS, LOAD_BYTES = 4, 256 << 20  # of processor time and of memory; both grow with the file
SECONDS_PER_MB, BYTES_PER_BYTE = 1, 16  # a vocabulary takes some 12 times its file
TRY_SECONDS, TRY_BYTES = 1, 256 << 20  # for the texts below, whatever the file's size

# Every character of the basic plane in short words, every letter and digit again and again, blanks, and an emoji.
WORDS = ("".join(map(chr, range(start, start + 16))) for start in [*range(0, 0xD800, 16), *range(0xE000, 0xFFF0, 16)])
RUNS = [f"{letter * 200} {letter}" for letter in string.ascii_letters + string.digits + string.punctuation + " \t\n"]
TEXTS = ["", *RUNS, "aaaa bb " + " \ufdfa" * 20, "yo " * 20 + "\U0001f600\u200d\U0001f680", *WORDS]


def limit(seconds: float, size: int) -> None:
    """Allow so much more processor time and memory from here on."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    whole = {
        resource.RLIMIT_CPU: int(used.ru_utime + used.ru_stime + seconds + 1),
        resource.RLIMIT_AS: used.ru_maxrss * 1024 + size,
    }
    for what, most in whole.items():
        hard = resource.getrlimit(what)[1]
        resource.setrlimit(what, (most if hard == resource.RLIM_INFINITY else min(most, hard), hard))


def main(path: str) -> None:
    """Load the file, and take all `TEXTS` to tokens and back."""
    length = os.path.getsize(path)
    limit(LOAD_SECONDS + SECONDS_PER_MB * length / 1e6, LOAD_BYTES + BYTES_PER_BYTE * length)
    try:
        backend = tokenizers.Tokenizer.from_file(path)
        limit(TRY_SECONDS, TRY_BYTES)
        for text in TEXTS:
            try:
                backend.decode(backend.encode(text, add_special_tokens=False).ids, skip_special_tokens=False)
            except Exception:
                continue
    except Exception:
        return
    except BaseException as panic:
        print(str(panic)[:300])


if __name__ == "__main__":
    main(sys.argv[2])
