"""All tables, by family."""

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

FAMILIES: dict[str, list[Case]] = {
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
