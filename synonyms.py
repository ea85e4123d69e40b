"""What other tools call our commonest options and commands: used only in the error for a name we do not know.

The other names are never accepted. A setting that means two things in two tools would run the wrong training in
silence; an error with the right name costs one retry.
"""

from collections.abc import Iterable
from difflib import get_close_matches

# ours -> names elsewhere (TRL and transformers, axolotl, LLaMA-Factory, litgpt, mlx-lm, Unsloth)
ELSEWHERE = {
    "model": "model_name_or_path base_model checkpoint_dir model_name model_id hf_path",
    "data": "dataset datasets dataset_name data_path train_file train_data path preprocess preview",
    "val": "val_set_size val_size eval_dataset validation_file val_split val_data",
    "quant": "load_in_4bit quantization_bit quantization bits",
    "rank": "r lora_r lora_rank adapter_rank",
    "alpha": "lora_alpha lora_scale scale",
    "target": "lora_target lora_target_modules target_modules lora_target_linear",
    "max_length": "max_seq_length max_seq_len sequence_len cutoff_len model_max_length",
    "micro_batch": "per_device_train_batch_size micro_batch_size per_device_batch_size",
    "epochs": "num_train_epochs num_epochs n_epochs",
    "steps": "max_steps iters num_steps max_iters",
    "lr": "learning_rate peak_lr",
    "schedule": "lr_scheduler_type lr_scheduler lr_schedule scheduler",
    "warmup": "warmup_ratio warmup_steps lr_warmup_steps warmup_iters",
    "loss_on": "completion_only_loss assistant_only_loss train_on_inputs mask_prompt train_on_prompt",
    "out": "output_dir out_dir save_path output",
    "adapter": "adapter_path adapter_name_or_path lora_model_dir lora_path",
    "loss": "loss_type pref_loss",
    "group_size": "num_generations",
    "updates": "num_iterations",
    "max_new_tokens": "max_completion_length",
    "clip_low": "epsilon",
    "clip_high": "epsilon_high",
    "reward": "reward_funcs",
    # commands
    "sft": "train finetune fine_tune finetune_lora lora qlora",
    "dpo": "preference orpo kto simpo cpo ipo",
    "rl": "grpo ppo rloo reinforce rlhf",
    "eval": "evaluate test lm_eval",
}
SYNONYMS = {theirs: ours for ours, names in ELSEWHERE.items() for theirs in names.split()}

# where the name is not the whole story
REMARKS = {
    "gradient_accumulation_steps": "batch_size counts all examples of an optimizer step, and micro_batch splits them",
    "per_device_train_batch_size": "batch_size counts all examples of an optimizer step; micro_batch never changes it",
    "warmup_ratio": "warmup is a fraction of all steps below 1",
    "warmup_steps": "warmup is a number of steps from 1 on",
}


def hint(name: str, known: Iterable[str], *, flag: bool = False) -> str:
    """What to write instead of the unknown option or command `name`, as the end of a sentence; "" when nothing is near.

    known: those there are. flag: write them as flags."""

    def spelled(ours: str) -> str:
        return "--" + ours.replace("_", "-") if flag else ours

    name, names = name.replace("-", "_").lower(), set(known)
    remark = REMARKS.get(name, "")
    if (ours := SYNONYMS.get(name)) in names:
        return f": it is called {spelled(ours)} here" + (remark and f" ({remark})")
    if remark:
        return f": {remark}"
    near = get_close_matches(name, sorted(names), n=3, cutoff=0.6)
    return f"; did you mean {' or '.join(map(spelled, near))}?" if near else ""
