"""Cases that fail today, by what happens: the list of what is to be mended. Who mends one takes its name out.

A reason that begins with "hangs" lets the case run for two seconds only (see harness.py).
"""

FAILS: dict[str, list[str]] = {
    "a panic of the tokenizers library goes through as a traceback": [
        "tokenizer: merges shorter than the prefix of what goes on",
        "tokenizer: a charsmap that is no base64",
        "tokenizer: a charsmap that is empty",
        "tokenizer: a charsmap of zeros",
        "tokenizer: a charsmap whose trie is longer than it",
        "tokenizer: a charsmap of ones",
        "tokenizer: a normalizer that replaces nothing",
        "tokenizer: a normalizer that replaces a pattern of nothing",
        "tokenizer: a normalizer with a pattern that goes back",
        "tokenizer: words by a pattern that goes back",
    ],
    "ends as a fault of fourbit: Exception": [
        "tokenizer: an unknown token that is missing, and letters too",
        "tokenizer: a word level without an unknown token",
        "tokenizer: a word piece without an unknown token",
        "tokenizer: a unigram without an unknown token",
        "tokenizer: a unigram without words or unknown token",
    ],
    "hangs": [
        "tokenizer: a normalizer of 400,000 steps",
    ],
    "is taken without a word": [
        "tokenizer: a vocabulary that is empty",
        "tokenizer: bytes that are missing",
        "tokenizer: an added token of another's id",
        "tokenizer: an added token of id 10^9",
    ],
    "takes more than 1 GiB": [
        "tokenizer: a normalizer that multiplies by 10^12",
        "tokenizer: a normalizer that prepends 50 MB",
    ],
}
KNOWN = {name: reason for reason, names in FAILS.items() for name in names}
