"""Why a class does not pass, in words."""

from __future__ import annotations

import re

from .records import Result

PACKAGE = re.compile(r"requires the (\w+) library")
REVERSIBLE = (
    "peft's LoRA beneath reversible layers: their backward starts at the embeddings, which are "
    "frozen, so that no gradient comes (also without this library)"
)
PEFT = {
    "get_input_embeddings": "peft asks for `get_input_embeddings`, which the model does not have",
    "does not require grad|no adapter weight has a gradient|No `target_modules`": "peft's LoRA "
    "fits no layer that the output depends on",
    "'Conv2d' object has no attribute": "the model reads a field of its convolutions that peft's "
    "do not have",
    "": "the model does not run with peft's LoRA",
}
"""By what an error says: why a model with LoRA does not train by itself."""
OTHERS = " (also without this library); the other checks pass"
ASSISTANT = "drafts tokens for another model, and takes that model's caches"
QSA = "has a dozen fields of its sparse attention without defaults"
WIDTHS = "widths of its parts are checked against each other, and no tiny set was found"
MODALITIES = "takes an array of pixels of its own shape, for which there is no batch here"
RETRIEVED = "reads documents that a retriever finds, for which there is no batch here"
CODES = "takes words and codes of sound at once, for which there is no batch here"
NO_FORWARD = "has no forward of its own"
LARGE = "parts for sound are large, and no tiny set of widths was found"
SHARED = "needs a width of shared experts that has no default"
TALKER = "speaks what another model thought, and takes that model's states"
SOUND = "takes sound beside text, for which there is no batch here"
WORDS: dict[str, str] = {
    "Gemma4AssistantForCausalLM": ASSISTANT,
    "Gemma4UnifiedAssistantForCausalLM": ASSISTANT,
    "Dots3NoteForConditionalGeneration": WIDTHS,
    "Granite4VisionForConditionalGeneration": "needs a map of layers that has no default",
    "Nemotron3DiarizationForAudioFrameClassification": WIDTHS,
    "FunAsrNanoForConditionalGeneration": SOUND,
    "KyutaiSpeechToTextForConditionalGeneration": CODES,
    "MoshiForConditionalGeneration": CODES,
    "VibeVoiceForConditionalGeneration": LARGE,
    "VibeVoiceAcousticTokenizerEncoderModel": LARGE,
    "Qwen2_5OmniForConditionalGeneration": NO_FORWARD,
    "Qwen3OmniMoeForConditionalGeneration": SHARED,
    "Qwen3OmniMoeTalkerForConditionalGeneration": SHARED,
    "Qwen2_5OmniTalkerForConditionalGeneration": TALKER,
    "Qwen3OmniMoeTalkerCodePredictorModelForConditionalGeneration": TALKER,
    "SeamlessM4TTextToUnitForConditionalGeneration": TALKER,
    "ClapAudioModelWithProjection": WIDTHS,
    "ClvpModelForConditionalGeneration": SOUND,
    "GlmImageForConditionalGeneration": "takes the grids of images to come beside a text, for "
    "which there is no batch here",
    "PocketTTSAudioTokenizerEncoderModel": "takes waves by channels, for which there is no batch "
    "here",
    "OmDetTurboForObjectDetection": WIDTHS,
    "Sam2Model": WIDTHS,
    "TvpForVideoGrounding": "takes one example alone: it views positions by the number of examples",
    "JevForDecision": "takes marks of options beside questions, for which there is no batch here",
    "EsmForProteinFolding": "needs a configuration of folding that has no default",
    "DiffusionGemmaEncoderModel": "takes positions of patches of images, for which there is no "
    "batch here",
    "PerceiverForMultimodalAutoencoding": MODALITIES,
    "PerceiverForOpticalFlow": MODALITIES,
    "RagSequenceForGeneration": RETRIEVED,
    "RagTokenForGeneration": RETRIEVED,
    "BarkModel": NO_FORWARD,
    "Qwen4ExpForCausalLM": QSA,
    "Qwen4ExpForConditionalGeneration": QSA,
    "ReformerForMaskedLM": REVERSIBLE,
    "ReformerForQuestionAnswering": REVERSIBLE,
    "ReformerForSequenceClassification": REVERSIBLE,
    "ReformerModel": REVERSIBLE,
    "ReformerModelWithLMHead": REVERSIBLE,
    "Nemotron3_5TranscribeForConditionalGeneration": SOUND,
    "VibeVoiceAsrForConditionalGeneration": SOUND,
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
    failed = result["failed"]
    if list(failed) == ["lora"] and failed["lora"].startswith("PeftAlone"):
        why = next(why for said, why in PEFT.items() if re.search(said, failed["lora"]))
        return why + OTHERS
    return "; ".join(f"{check}: {_shorter(why)}" for check, why in failed.items())


def _shorter(message: str) -> str:
    return message if len(message) <= 160 else message[:157] + "..."
