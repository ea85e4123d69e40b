"""What other tools call our options: used only in the error for a name we do not know.

The other names are never accepted. A setting that means two things in two tools would run the wrong training in
silence; an error with the right name costs one retry.
"""

from collections.abc import Iterable
from difflib import get_close_matches

# name elsewhere (TRL and transformers, axolotl, LLaMA-Factory, litgpt, mlx-lm, Unsloth) -> our option
SYNONYMS = {
    **dict.fromkeys(
        ("model_name_or_path", "base_model", "checkpoint_dir", "model_name", "model_id", "hf_path"), "model"
    ),
    **dict.fromkeys(("dataset", "datasets", "dataset_name", "data_path", "train_file", "train_data", "path"), "data"),
    **dict.fromkeys(("val_set_size", "val_size", "eval_dataset", "validation_file", "val_split", "val_data"), "val"),
    **dict.fromkeys(("load_in_4bit", "quantization_bit", "quantize", "quantization", "bits"), "quant"),
    **dict.fromkeys(("r", "lora_r", "lora_rank", "adapter_rank"), "rank"),
    **dict.fromkeys(("lora_alpha", "lora_scale", "scale"), "alpha"),
    "lora_dropout": "dropout",
    **dict.fromkeys(("lora_target", "lora_target_modules", "target_modules", "lora_target_linear"), "target"),
    "use_rslora": "rslora",
    **dict.fromkeys(("max_seq_length", "max_seq_len", "sequence_len", "cutoff_len", "model_max_length"), "max_length"),
    **dict.fromkeys(("per_device_train_batch_size", "micro_batch_size", "per_device_batch_size"), "micro_batch"),
    "global_batch_size": "batch_size",
    **dict.fromkeys(("num_train_epochs", "num_epochs", "n_epochs"), "epochs"),
    **dict.fromkeys(("max_steps", "iters", "num_steps", "max_iters"), "steps"),
    **dict.fromkeys(("learning_rate", "peak_lr"), "lr"),
    **dict.fromkeys(("lr_scheduler_type", "lr_scheduler", "lr_schedule", "scheduler"), "schedule"),
    **dict.fromkeys(("warmup_ratio", "warmup_steps", "lr_warmup_steps", "warmup_iters"), "warmup"),
    **dict.fromkeys(("decay_steps", "lr_decay_steps", "num_decay_steps", "decay_ratio"), "decay"),
    **dict.fromkeys(("loraplus_lr_ratio", "loraplus_ratio", "loraplus", "lora_plus_ratio"), "lora_plus"),
    **dict.fromkeys(("lr_groups", "embedding_learning_rate", "embedding_lr", "loraplus_lr_embedding"), "lr_scale"),
    **dict.fromkeys(("optim", "optimizer_name", "optimizer_type"), "optimizer"),
    **dict.fromkeys(("max_grad_clip", "gradient_clipping", "grad_clip", "clip_grad"), "max_grad_norm"),
    **dict.fromkeys(
        ("completion_only_loss", "assistant_only_loss", "train_on_inputs", "mask_prompt", "train_on_prompt"), "loss_on"
    ),
    **dict.fromkeys(("sample_packing", "neat_packing", "packing_strategy"), "packing"),
    **dict.fromkeys(("gradient_checkpointing", "use_gradient_checkpointing", "grad_checkpoint"), "checkpointing"),
    **dict.fromkeys(("resume_from_checkpoint", "resume_adapter_file"), "resume"),
    **dict.fromkeys(("report_to", "logger", "logger_name", "use_tensorboard", "tensorboard"), "log"),
    **dict.fromkeys(("output_dir", "out_dir", "save_path", "output"), "out"),
    **dict.fromkeys(("eval_steps", "steps_per_eval", "evals_per_epoch"), "eval_every"),
    **dict.fromkeys(("save_steps", "save_interval", "saves_per_epoch"), "save_every"),
    "save_total_limit": "keep",
    "load_best_model_at_end": "keep_best",
    **dict.fromkeys(("early_stopping_patience", "early_stopping"), "patience"),
    **dict.fromkeys(("torch_dtype", "precision", "bf16", "fp16"), "dtype"),
    **dict.fromkeys(("device_map", "accelerator"), "device"),
    **dict.fromkeys(("chat_template", "prompt_template"), "template"),
    **dict.fromkeys(("adapter_path", "adapter_name_or_path", "lora_model_dir", "lora_path"), "adapter"),
    **dict.fromkeys(("loss_type", "rl", "pref_loss", "dpo_loss_type"), "loss"),
    **dict.fromkeys(("pref_beta", "dpo_beta", "rl_beta", "kto_beta"), "beta"),
    **dict.fromkeys(("dpo_label_smoothing", "cdpo_epsilon"), "label_smoothing"),
    **dict.fromkeys(("center_rewards_coefficient", "center_rewards"), "center"),
    **dict.fromkeys(("teacher_model_name_or_path", "teacher_model", "teacher_path"), "teacher"),
    **dict.fromkeys(("kd_temperature", "kl_temperature", "distill_temperature"), "temperature"),
    **dict.fromkeys(("kd_top_k", "kd_topk", "logprobs_k"), "top_k"),
    **dict.fromkeys(("kd_ce_alpha", "ce_weight"), "sft_weight"),
    **dict.fromkeys(("kl_type", "kd_loss", "divergence_type"), "divergence"),
    **dict.fromkeys(("simpo_gamma", "gamma_beta_ratio"), "gamma"),
    **dict.fromkeys(("f_divergence_type",), "divergence"),
    **dict.fromkeys(("f_alpha_divergence_coef", "f_divergence_params"), "divergence_alpha"),
    **dict.fromkeys(("ref_model", "reference_model", "ref_adapter_name", "ref_model_name_or_path"), "reference"),
    **dict.fromkeys(("precompute_ref_log_probs", "precompute_ref"), "reference_cache"),
    **dict.fromkeys(("truncation_mode",), "truncation"),
    **dict.fromkeys(("rpo_alpha", "cpo_alpha", "pref_ftx"), "loss"),
    **dict.fromkeys(("max_tokens", "max_new_token", "max_length_generation"), "max_new_tokens"),
    "temp": "temperature",
}

# Where the name is not the whole story.
REMARKS = {
    "gradient_accumulation_steps": "batch_size counts all examples of an optimizer step, and micro_batch splits them",
    "grad_accumulation_steps": "batch_size counts all examples of an optimizer step, and micro_batch splits them",
    "gradient_accumulation_iters": "batch_size counts all examples of an optimizer step, and micro_batch splits them",
    "per_device_train_batch_size": "batch_size counts all examples of an optimizer step; micro_batch never changes it",
    "micro_batch_size": "batch_size counts all examples of an optimizer step; micro_batch never changes it",
    "load_in_4bit": "quant is nf4, nf4-nodq or none",
    "quantization_bit": "quant is nf4, nf4-nodq or none",
    "double_quantization": "quant nf4 quantises the scales too, nf4-nodq does not",
    "bnb_4bit_use_double_quant": "quant nf4 quantises the scales too, nf4-nodq does not",
    "warmup_ratio": "warmup is a fraction of all steps below 1",
    "warmup_steps": "warmup is a number of steps from 1 on",
    "train_on_inputs": "loss_on is assistant, last or all",
    "mask_prompt": "loss_on is assistant, last or all",
    **dict.fromkeys(
        ("lr_groups", "embedding_learning_rate", "embedding_lr", "loraplus_lr_embedding"),
        "lr_scale has factors on lr by patterns of names, '*.embed_tokens.*=0.1'",
    ),
    "rpo_alpha": "a term that fits the chosen answers is one more loss: sigmoid=1 and sft=0.2",
    "ref_model": "reference is base or start; there never is a second model",
    "precompute_ref_log_probs": "reference_cache names a file for them",
    "plot_loss": "the loss curve is always drawn, as loss.png in the out folder",
    "bf16": "dtype is auto, float32, bfloat16 or float16",
    "fp16": "dtype is auto, float32, bfloat16 or float16",
}


def hint(name: str, known: Iterable[str], *, spell: str = "{}") -> str:
    """What to write instead of the unknown option `name`, as the end of a sentence; empty when nothing is near.

    known: the options there are. spell: how an option is written where the user wrote it, say `--{}`.
    """
    name, names = name.replace("-", "_").lower(), set(known)
    ours = SYNONYMS.get(name)
    if ours in names:
        remark = f" ({REMARKS[name]})" if name in REMARKS else ""
        return f": it is called {_spelled(ours, spell)} here{remark}"
    if name in REMARKS:
        return f": {REMARKS[name]}"
    near = get_close_matches(name, sorted(names), n=3, cutoff=0.6)
    return f"; did you mean {' or '.join(_spelled(other, spell) for other in near)}?" if near else ""


def _spelled(name: str, spell: str) -> str:
    return spell.format(name.replace("_", "-") if spell.startswith("--") else name)
