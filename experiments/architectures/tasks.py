"""What classes of transformers are for: rows of the results, and where their classes are listed."""

from __future__ import annotations

import re
from typing import NamedTuple

from transformers.models.auto import modeling_auto

MAPPING = re.compile(r"MODEL_FOR_(\w+)_MAPPING_NAMES")
UNLISTED = re.compile(
    r"(?!\w*(Output|PreTrainedModel))"
    r"(\w+(For[A-Z]\w+|Backbone|LMHeadModel|DoubleHeadsModel|WithProjection|EncoderModel)"
    r"|\w+(Encoder|Dual)\w*(Decoder|Encoder)Model)"
)
"""Names of classes that have a task also where no mapping lists them."""


class Task(NamedTuple):
    """One row."""

    title: str
    mappings: tuple[str, ...]
    """Of ``transformers.models.auto.modeling_auto``, without ``MODEL_FOR_``, ``_MAPPING_NAMES``."""
    unlisted: str = r"(?!)"
    """A pattern of class names that no mapping lists."""


TASKS = {
    "causal_lm": Task("causal language models", ("CAUSAL_LM",)),
    "seq2seq_lm": Task("sequence to sequence", ("SEQ_TO_SEQ_CAUSAL_LM",)),
    "masked_lm": Task("masked language models", ("MASKED_LM",)),
    "sequence_classification": Task("sequence classification", ("SEQUENCE_CLASSIFICATION",)),
    "token_classification": Task("token classification", ("TOKEN_CLASSIFICATION",)),
    "question_answering": Task(
        "question answering", ("QUESTION_ANSWERING",), r"(Flaubert|XLM|XLNet)ForQuestionAnswering"
    ),
    "image_classification": Task("image classification", ("IMAGE_CLASSIFICATION",)),
    "image_text_to_text": Task(
        "images and text to text",
        ("IMAGE_TEXT_TO_TEXT",),
        r"(Ernie4_5_VL_Moe|GlmImage)ForConditionalGeneration",
    ),
    "audio_classification": Task("audio classification", ("AUDIO_CLASSIFICATION",)),
    "multiple_choice": Task(
        "multiple choice", ("MULTIPLE_CHOICE",), r"(GPT2|OpenAIGPT)DoubleHeadsModel"
    ),
    "next_sentence": Task("next sentence", ("NEXT_SENTENCE_PREDICTION",)),
    "text_features": Task(
        "features of texts",
        ("TEXT_ENCODING",),
        r"\w+TextModelWithProjection|(?!Mimi|\w*Tokenizer|\w*Dual)\w+EncoderModel",
    ),
    "image_modeling": Task(
        "masked and causal images",
        ("MASKED_IMAGE_MODELING", "CAUSAL_IMAGE_MODELING"),
        r"\w+ForMaskedImageModeling",
    ),
    "segmentation": Task(
        "segmentation",
        (
            "SEMANTIC_SEGMENTATION",
            "INSTANCE_SEGMENTATION",
            "UNIVERSAL_SEGMENTATION",
            "IMAGE_SEGMENTATION",
        ),
        r"\w+(ForSegmentation|ForImageSegmentation)",
    ),
    "object_detection": Task(
        "object detection", ("OBJECT_DETECTION", "ZERO_SHOT_OBJECT_DETECTION")
    ),
    "dense_prediction": Task(
        "depth, normals, mattes, images from images",
        (
            "DEPTH_ESTIMATION",
            "NORMAL_ESTIMATION",
            "POINTMAP_ESTIMATION",
            "IMAGE_MATTING",
            "IMAGE_TO_IMAGE",
        ),
        r"\w+(ForDensePrediction|ForOpticalFlow)",
    ),
    "keypoints": Task(
        "key points and poses", ("KEYPOINT_DETECTION", "KEYPOINT_MATCHING", "POSE_ESTIMATION")
    ),
    "mask_generation": Task("masks from points", ("MASK_GENERATION",)),
    "text_recognition": Task(
        "texts and tables in images",
        ("TEXT_RECOGNITION", "TABLE_RECOGNITION"),
        r"\w+ForSceneTextRecognition",
    ),
    "backbone": Task("backbones", ("BACKBONE",), r"\w+Backbone"),
    "image_features": Task("features of images", ("IMAGE",), r"\w+VisionModelWithProjection"),
    "video_classification": Task("video classification", ("VIDEO_CLASSIFICATION",)),
    "zero_shot_image_classification": Task(
        "zero-shot image classification",
        ("ZERO_SHOT_IMAGE_CLASSIFICATION",),
        r"VisionTextDualEncoderModel",
    ),
    "image_and_text": Task(
        "other uses of images with texts",
        (
            "VISUAL_QUESTION_ANSWERING",
            "DOCUMENT_QUESTION_ANSWERING",
            "TABLE_QUESTION_ANSWERING",
            "RETRIEVAL",
        ),
        r"(Vilt|BridgeTower|VisualBert|Tvp|Blip|NeoMME)\w+",
    ),
    "ctc": Task("speech, aligned", ("CTC", "RNNT", "TDT")),
    "audio_frames": Task(
        "frames and speakers of audio", ("AUDIO_FRAME_CLASSIFICATION", "AUDIO_XVECTOR")
    ),
    "speech": Task(
        "speech and text",
        (
            "SPEECH_SEQ_2_SEQ",
            "MULTIMODAL_LM",
            "TEXT_TO_SPECTROGRAM",
            "TEXT_TO_WAVEFORM",
        ),
        r"(SeamlessM4T|SpeechT5|Moshi|Clvp|Clap|Csm|Qwen\d|Mimi|\w+AudioTokenizer|\w+AcousticTokenizer)\w+",
    ),
    "time_series": Task(
        "time series",
        ("TIME_SERIES_CLASSIFICATION", "TIME_SERIES_REGRESSION", "TIME_SERIES_PREDICTION"),
        r"(PatchTS|Informer|Autoformer|TimeSeries)\w+",
    ),
    "pretraining": Task("other pretraining", ("PRETRAINING",)),
    "other": Task(
        "others",
        tuple(found[1] for name in vars(modeling_auto) if (found := MAPPING.fullmatch(name))),
        r"\w+",
    ),
}
"""A class of several counts for the first, but for images and text rather than for ``causal_lm``.
What no other row takes is ``other``."""
