"""Engines: serve a model elsewhere, evaluate a population there, keep its weights in step."""

from .base import Engine
from .lora import Target, lora_config, lora_tensors
from .vllm import VLLMEngine, vllm_options

__all__ = ["Engine", "Target", "VLLMEngine", "lora_config", "lora_tensors", "vllm_options"]
