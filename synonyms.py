"""What other tools call our options and commands: used only in the error for a name we do not know.

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
    "dropout": "lora_dropout",
    "target": "lora_target lora_target_modules target_modules lora_target_linear",
    "rslora": "use_rslora",
    "max_length": "max_seq_length max_seq_len sequence_len cutoff_len model_max_length",
    "micro_batch": "per_device_train_batch_size micro_batch_size per_device_batch_size",
    "batch_size": "global_batch_size",
    "epochs": "num_train_epochs num_epochs n_epochs",
    "steps": "max_steps iters num_steps max_iters",
    "lr": "learning_rate peak_lr",
    "schedule": "lr_scheduler_type lr_scheduler lr_schedule scheduler",
    "warmup": "warmup_ratio warmup_steps lr_warmup_steps warmup_iters",
    "decay": "decay_steps lr_decay_steps num_decay_steps decay_ratio",
    "lora_plus": "loraplus_lr_ratio loraplus_ratio loraplus lora_plus_ratio",
    "lr_scale": "lr_groups embedding_learning_rate embedding_lr loraplus_lr_embedding",
    "optimizer": "optim optimizer_name optimizer_type",
    "rounding": "stochastic_rounding bf16_stochastic_round",
    "max_grad_norm": "max_grad_clip gradient_clipping grad_clip clip_grad",
    "loss_on": "completion_only_loss assistant_only_loss train_on_inputs mask_prompt train_on_prompt",
    "packing": "sample_packing neat_packing packing_strategy",
    "checkpointing": "gradient_checkpointing use_gradient_checkpointing grad_checkpoint",
    "resume": "resume_from_checkpoint resume_adapter_file",
    "log": "report_to logger logger_name use_tensorboard tensorboard",
    "out": "output_dir out_dir save_path output",
    "eval_every": "eval_steps steps_per_eval evals_per_epoch",
    "save_every": "save_steps save_interval saves_per_epoch",
    "keep": "save_total_limit",
    "keep_best": "load_best_model_at_end",
    "patience": "early_stopping_patience early_stopping",
    "dtype": "torch_dtype precision bf16 fp16",
    "device": "device_map accelerator",
    "template": "chat_template prompt_template",
    "adapter": "adapter_path adapter_name_or_path lora_model_dir lora_path",
    "loss": "loss_type rl pref_loss dpo_loss_type rpo_alpha cpo_alpha pref_ftx",
    "beta": "pref_beta dpo_beta rl_beta kto_beta",
    "label_smoothing": "dpo_label_smoothing cdpo_epsilon",
    "center": "center_rewards_coefficient center_rewards",
    "teacher": "teacher_model_name_or_path teacher_model teacher_path",
    "temperature": "kd_temperature kl_temperature distill_temperature temp",
    "top_k": "kd_top_k kd_topk logprobs_k",
    "sft_weight": "kd_ce_alpha ce_weight",
    "divergence": "kl_type kd_loss divergence_type f_divergence_type",
    "gamma": "simpo_gamma gamma_beta_ratio",
    "divergence_alpha": "f_alpha_divergence_coef f_divergence_params",
    "reference": "ref_model reference_model ref_adapter_name ref_model_name_or_path",
    "reference_cache": "precompute_ref_log_probs precompute_ref",
    "truncation": "truncation_mode",
    "max_new_tokens": "max_tokens max_new_token max_length_generation",
    # commands
    "sft": "train finetune fine_tune finetune_lora lora qlora",
    "dpo": "preference orpo kto simpo cpo ipo rlhf",
    "reward": "rm reward_model reward_modeling rw",
    "distill": "distillation distil kd gkd minillm",
    "eval": "evaluate test lm_eval",
    "generate": "inference predict infer",
    "doctor": "env info check",
}
SYNONYMS = {theirs: ours for ours, names in ELSEWHERE.items() for theirs in names.split()}

# where the name is not the whole story: what to know -> names elsewhere
NOTES = {
    "batch_size counts all examples of an optimizer step, and micro_batch splits them": (
        "gradient_accumulation_steps grad_accumulation_steps gradient_accumulation_iters"
    ),
    "batch_size counts all examples of an optimizer step; micro_batch never changes it": (
        "per_device_train_batch_size micro_batch_size"
    ),
    "quant nf4 quantises the scales too, nf4-nodq does not": "double_quantization bnb_4bit_use_double_quant",
    "warmup is a fraction of all steps below 1": "warmup_ratio",
    "warmup is a number of steps from 1 on": "warmup_steps",
    "lr_scale has factors on lr by patterns of names, '*.embed_tokens.*=0.1'": (
        "lr_groups embedding_learning_rate embedding_lr loraplus_lr_embedding"
    ),
    "a term that fits the chosen answers is one more loss: sigmoid=1 and sft=0.2": "rpo_alpha",
    "reference is base or start; there never is a second model": "ref_model",
    "reference_cache names a file for them": "precompute_ref_log_probs",
    "the loss curve is always drawn, as loss.png in the out folder": "plot_loss",
}
REMARKS = {theirs: note for note, names in NOTES.items() for theirs in names.split()}


def hint(name: str, known: Iterable[str], *, flag: bool = False) -> str:
    """What to write instead of the unknown option or command `name`, as the end of a sentence; "" when nothing is near.

    known: those there are. flag: write them as flags.
    """

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
