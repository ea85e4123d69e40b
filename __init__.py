"""fourbit: fine-tune language models with LoRA and QLoRA on PyTorch alone.

This page and the namespaces that it names are the public API: what their `__all__` lists. Everything else is internal.
"""

import gc

_collects = gc.isenabled()
gc.disable()  # nothing that importing makes is garbage, and passes over torch's objects took half of the time
try:
    from . import data, kernels, losses, nf4, optim
    from .errors import DiskError, EnvironmentProblem, FourbitError, InputError, NumericError
    from .lora.active import adapters_off, copy_adapter, remove_adapter, train_only, use, using
    from .lora.adapter import Adapter
    from .lora.attach import attach
    from .lora.combine import combine
    from .lora.config import LoRAConfig
    from .lora.convert import dequantize, from_bitsandbytes, to_bitsandbytes
    from .lora.layer import AdapterLayer, delta
    from .lora.linear4bit import NF4Embedding, NF4Linear
    from .lora.lora import LoRA
    from .lora.merge import merge, merged_state, merging, unmerge
    from .lora.peft_files import load_adapter, save_adapter
    from .lora.quantize import Form, dense_weights, quantize_
    from .lora.rows import rows
    from .models.generate import generate
    from .models.load import load, load_model, read_weights
    from .models.plan import quantize_checkpoint, read_plan
    from .models.protocol import CausalLM
    from .models.save import save_model
    from .text.tokenizer import Tokenizer
    from .trainer.callbacks import Callback
    from .trainer.config import DistillConfig, DPOConfig, RewardConfig, SFTConfig
    from .trainer.distill import DistillTrainer
    from .trainer.evaluate import Answer, answer_all, evaluate_loss, share_right
    from .trainer.loop import Completion, Run
    from .trainer.policy import PolicyTrainer
    from .trainer.preference import DPOTrainer
    from .trainer.reward import RewardTrainer
    from .trainer.reward_model import RewardModel
    from .trainer.rewards import Rewards, rewards_of
    from .trainer.rl_config import RLConfig
    from .trainer.run import TrainResult
    from .trainer.sft import SFTTrainer
    from .trainer.step import StepResult, Sums
    from .trainer.sweep import SweepResult, SweepTrainer, grid
    from .trainer.trainer import Trainer
finally:
    if _collects:
        gc.enable()

__version__ = "0.1.0"
__all__ = [
    "CausalLM", "Tokenizer", "generate", "load", "load_model", "read_weights", "save_model",  # models
    "Form", "quantize_checkpoint", "read_plan",  # 4-bit folders by a plan
    "delta", "dequantize", "from_bitsandbytes", "merge", "merged_state", "merging", "to_bitsandbytes",
    "unmerge",  # layers in other forms
    "Adapter", "AdapterLayer", "LoRA", "LoRAConfig", "NF4Embedding", "NF4Linear", "adapters_off", "attach", "combine",
    "copy_adapter", "dense_weights", "load_adapter", "quantize_", "remove_adapter", "rows", "save_adapter",
    "train_only", "use", "using",  # adapters, 4 bits
    "DPOConfig", "DPOTrainer", "DistillConfig", "DistillTrainer", "PolicyTrainer", "RLConfig", "RewardConfig",
    "RewardModel", "RewardTrainer", "Rewards", "SFTConfig", "SFTTrainer", "SweepResult", "SweepTrainer", "TrainResult",
    "Trainer", "grid", "rewards_of",  # training
    "Callback", "Completion", "Run", "StepResult", "Sums",  # loops and parts of one's own
    "Answer", "answer_all", "evaluate_loss", "share_right",  # evaluation
    "DiskError", "EnvironmentProblem", "FourbitError", "InputError", "NumericError",
    "data", "kernels", "losses", "nf4", "optim",  # functions on tensors, optimizers
]  # fmt: skip
