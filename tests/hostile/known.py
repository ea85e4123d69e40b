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
    "a pipe, a device or a link as output is replaced by a file": [
        "output: answers into a pipe that is read",
        "output: answers by a link into a pipe",
        "output: answers to standard output by its name",
        "output: answers to a link to standard output",
        "output: answers by a link to a new file",
        "output: evaluation into a pipe that is read",
    ],
    "changes a file though it is refused": [
        "output: the starting adapter's folder",
        "output: the teacher's adapter",
    ],
    "ends as a fault of fourbit: Exception": [
        "tokenizer: an unknown token that is missing, and letters too",
        "tokenizer: a word level without an unknown token",
        "tokenizer: a word piece without an unknown token",
        "tokenizer: a unigram without an unknown token",
        "tokenizer: a unigram without words or unknown token",
    ],
    "ends as a fault of fourbit: KeyError": [
        "output: a folder with another's metrics",
        "output: a folder whose metrics are a link out",
    ],
    "ends as a fault of fourbit: OSError": [
        "output: a folder whose run.lock is a pipe",
    ],
    "ends as a fault of fourbit: RuntimeError": [
        "output: answers: a link to itself",
    ],
    "hangs": [
        "data preview: 20,000 turns",
        "data row: 20,000 turns",
        "data prompts: 20,000 turns",
        "tokenizer: a normalizer of 400,000 steps",
        "template: slow for 500 rows",
        "output: a folder whose metrics are a pipe",
    ],
    "is overwritten": [
        "output: the model's folder, full",
        "output: the model's folder by a link",
        "output: a folder whose curve is a link out",
        "output: answers: the rows",
        "output: answers: the rows by a link",
        "output: answers: the rows by another path",
        "output: answers: the rows by a hard link",
        "output: answers: the model's config",
        "output: answers: the model's weights",
        "output: answers: the model's file",
        "output: answers: the adapter's weights",
        "output: answers: the template",
        "output: answers: an existing file",
        "output: answers: a pipe that nobody reads",
        "output: evaluation: a file that is there",
        "output: evaluation: the base's name is there",
    ],
    "is taken without a word": [
        "tokenizer: a vocabulary that is empty",
        "tokenizer: bytes that are missing",
        "tokenizer: an added token of another's id",
        "tokenizer: an added token of id 10^9",
        "template: the roles alone",
        "template: the contents turned round",
    ],
    "is written into without a word": [
        "output: the model's folder, an adapter",
        "output: a folder in the model's",
        "output: a folder with files of another",
        "output: a folder with another's config.yaml",
        "output: a folder with another's adapter",
        "output: a folder with another's run.lock",
        "output: a folder whose config.yaml is a link out",
        "output: a folder whose adapter is a link out",
        "output: a folder whose checkpoints are a link out",
        "output: an empty name",
        "output: evaluation: the rows",
        "output: evaluation: the model's config",
    ],
    "prints control characters of the input": [
        "path: an output of escapes",
    ],
    "repeats more than 2,000 characters of the input": [],
    "takes more than 1 GiB": [
        "tokenizer: a normalizer that multiplies by 10^12",
        "tokenizer: a normalizer that prepends 50 MB",
    ],
}
KNOWN = {name: reason for reason, names in FAILS.items() for name in names}
