"""Which classes are swept, and what their forwards are given."""

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("peft")

from transformers.models.auto import modeling_auto

from experiments.architectures.building import build, own_loss
from experiments.architectures.classes import all_cases
from experiments.architectures.reasons import reason
from experiments.architectures.tasks import MAPPING, TASKS

CASES = all_cases()


def test_every_mapping_of_a_task_is_read():
    """Those of base models and of configurations apart."""
    for name, pairs in vars(modeling_auto).items():
        if MAPPING.fullmatch(name):
            for names in pairs.values():
                for one in [names] if isinstance(names, str) else names:
                    assert one in CASES, f"{one} of {name}"


@pytest.mark.parametrize(
    ("name", "task"),
    [
        ("VisualBertForVisualReasoning", "image_and_text"),
        ("BeitForMaskedImageModeling", "image_modeling"),
        ("CLIPVisionModelWithProjection", "image_features"),
        ("RagTokenForGeneration", "other"),
    ],
)
def test_names_tell_the_task_of_classes_in_no_mapping(name, task):
    assert CASES[name].task == task


def test_no_class_is_an_output_or_abstract():
    assert not [name for name in CASES if "Output" in name or "PreTrainedModel" in name]
    assert {case.task for case in CASES.values()} == set(TASKS)


@pytest.mark.parametrize(
    ("name", "labels"),
    [
        ("YolosForObjectDetection", {"labels"}),
        ("BertForMultipleChoice", {"labels"}),
        ("EomtForUniversalSegmentation", {"mask_labels", "class_labels"}),
        ("ViltForQuestionAnswering", {"labels"}),
        ("PatchTSTForPrediction", {"future_values"}),
        ("Wav2Vec2ForAudioFrameClassification", {"labels"}),
        ("BertForPreTraining", {"labels", "next_sentence_label"}),
    ],
)
def test_a_class_with_a_loss_gets_labels(name, labels):
    model, batch = build(CASES[name])
    assert labels <= set(batch)
    with torch.no_grad():
        assert own_loss(model(**batch)) is not None


@pytest.mark.parametrize("name", ["CLIPVisionModelWithProjection", "ResNetBackbone"])
def test_one_without_a_loss_gets_none(name):
    model, batch = build(CASES[name])
    assert set(batch) == {"pixel_values"}
    with torch.no_grad():
        assert own_loss(model(**batch)) is None


def test_reasons_are_words():
    failed = {"failed": {"lora": "PeftAlone: NotImplementedError: `get_input_embeddings` not"}}
    assert reason("A", failed).startswith("peft asks for `get_input_embeddings`")
    assert reason("A", failed).endswith("the other checks pass")
    failed["failed"]["streamed"] = "Disagreement: losses differ by 1"
    assert "streamed: Disagreement: losses differ by 1" in reason("A", failed)
    assert reason("A", {"not_built": "requires the timm library"}) == "needs the package timm"
