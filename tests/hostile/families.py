"""All tables, by family."""

from dataclasses import replace

import config_cases
import data_cases
import folder_cases
import gguf_cases
import run_cases
import safetensors_cases
import settings_cases
import template_cases
import tokenizer_cases
from harness import Case

LEGAL = {  # refused once; by now they mean something, or nothing reads them any more
    "gguf tensor: rope factors of nothing known",
    "data row: prompt a list, completion a text",
    "data row: messages beside a completion",
    "config: hidden_act = null",
    'adapter: bias = "all"',
    "adapter: bias = []",
    "adapter stamp: another base's norms",  # with its signs: the same base, rounded otherwise
    "run settings, resumed: rank a list",  # a checkpoint says what its run was
    "run settings, resumed: model a number",
    "run settings, resumed: target a mapping",
    "run settings, resumed: quant of 10,000 characters",
    "run settings, resumed: no YAML",
    "run settings, resumed: aliases that unfold",
    "yaml: steps = 1.0",
    "yaml: rank = 33",
    "settings together: a rank above the layers",
    "checkpoint state: config of 100,000 characters",
}
TABLES: dict[str, list[Case]] = {
    "data": data_cases.CASES,
    "gguf": gguf_cases.CASES,
    "safetensors": safetensors_cases.CASES,
    "config": config_cases.CASES,
    "tokenizer": tokenizer_cases.CASES,
    "template": template_cases.CASES,
    "runs": run_cases.CASES,
    "settings": settings_cases.CASES,
    "folders": folder_cases.CASES,
}
FAMILIES = {
    family: [
        replace(case, ends="either", outputs=(*case.outputs, "run")) if case.name in LEGAL else case for case in cases
    ]
    for family, cases in TABLES.items()
}
