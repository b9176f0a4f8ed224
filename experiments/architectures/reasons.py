"""Why a class does not pass, in words."""

from __future__ import annotations

import re

from .records import Result

PACKAGE = re.compile(r"requires the (\w+) library")
REVERSIBLE = (
    "peft's LoRA beneath reversible layers: their backward starts at the embeddings, which are "
    "frozen, so that no gradient comes (also without this library)"
)
ASSISTANT = "drafts tokens for another model, and takes that model's caches"
QSA = "has a dozen fields of its sparse attention without defaults"
SOUND = "takes sound beside text, for which there is no batch here"
WORDS: dict[str, str] = {
    "Gemma4AssistantForCausalLM": ASSISTANT,
    "Gemma4UnifiedAssistantForCausalLM": ASSISTANT,
    "Dots3NoteForConditionalGeneration": "widths of its three parts are checked against each "
    "other, and no tiny set was found",
    "Granite4VisionForConditionalGeneration": "needs a map of layers that has no default",
    "LxmertForQuestionAnswering": "takes features of objects in an image, for which there is no "
    "batch here",
    "PI0ForConditionalGeneration": "takes states and actions of a robot beside images, for which "
    "there is no batch here",
    "PPFormulaNetForConditionalGeneration": "peft asks for `get_input_embeddings`, which the "
    "model does not have (also without this library); the other checks pass",
    "Qwen4ExpForCausalLM": QSA,
    "Qwen4ExpForConditionalGeneration": QSA,
    "ReformerForMaskedLM": REVERSIBLE,
    "ReformerForQuestionAnswering": REVERSIBLE,
    "ReformerForSequenceClassification": REVERSIBLE,
    "ReformerModelWithLMHead": REVERSIBLE,
    "Nemotron3_5TranscribeForConditionalGeneration": SOUND,
    "VibeVoiceAsrForConditionalGeneration": SOUND,
    "VoxtralRealtimeForConditionalGeneration": SOUND,
}
"""By class: what was found out. Else the message tells."""


def reason(name: str, result: Result) -> str:
    """One sentence: from `WORDS`, or made of what the class or a check said."""
    if name in WORDS:
        return WORDS[name]
    if "not_built" in result:
        message = result["not_built"]
        if package := PACKAGE.search(message):
            return f"needs the package {package[1]}"
        return f"not built tiny: {_shorter(message)}"
    return "; ".join(f"{check}: {_shorter(why)}" for check, why in result["failed"].items())


def _shorter(message: str) -> str:
    return message if len(message) <= 160 else message[:157] + "..."
