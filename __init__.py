"""fourbit: fine-tune language models with LoRA and QLoRA on PyTorch alone.

This page is the public API; everything else is internal.
"""

from . import kernels as kernels
from . import optim as optim
from .errors import DiskError as DiskError
from .errors import EnvironmentProblem as EnvironmentProblem
from .errors import FourbitError as FourbitError
from .errors import InputError as InputError
from .errors import NumericError as NumericError
from .kernels import nf4 as nf4
from .lora.adapter import AdapterLayer as AdapterLayer
from .lora.adapter import adapters_off as adapters_off
from .lora.adapter import copy_adapter as copy_adapter
from .lora.adapter import remove_adapter as remove_adapter
from .lora.adapter import use as use
from .lora.adapter import using as using
from .lora.attach import attach as attach
from .lora.config import LoRAConfig as LoRAConfig
from .lora.linear4bit import NF4Linear as NF4Linear
from .lora.lora import LoRA as LoRA
from .lora.peft_files import load_adapter as load_adapter
from .lora.peft_files import save_adapter as save_adapter
from .lora.quantize import quantize_ as quantize_
from .models.generate import generate as generate
from .models.load import load as load
from .models.save import save_model as save_model
from .trainer.config import DistillConfig as DistillConfig
from .trainer.config import DPOConfig as DPOConfig
from .trainer.config import RewardConfig as RewardConfig
from .trainer.config import SFTConfig as SFTConfig
from .trainer.distill import DistillTrainer as DistillTrainer
from .trainer.evaluate import answer_all as answer_all
from .trainer.evaluate import evaluate_loss as evaluate_loss
from .trainer.evaluate import share_right as share_right
from .trainer.preference import DPOTrainer as DPOTrainer
from .trainer.reward import RewardTrainer as RewardTrainer
from .trainer.reward_model import RewardModel as RewardModel
from .trainer.run import TrainResult as TrainResult
from .trainer.sft import SFTTrainer as SFTTrainer

__version__ = "0.1.0"
