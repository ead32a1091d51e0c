"""The config.json of a model: what is refused, what is kept."""

import json

import pytest
from published_models import SMALL, publish
from token_files import make_config, make_vocabulary

from cellformers.errors import UserError
from cellformers.models.bert_config import Config, for_layout

BASE = {"model_type": "bert", "architectures": ["BertForMaskedLM"], **SMALL}
CELL = {**BASE, "architectures": ["BertForSequenceClassification"]}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model_type": "gpt2"}, "not the config of a BERT encoder"),
        ({"hidden_size": 30, "num_attention_heads": 4}, "no multiple"),
        ({"hidden_size": "32"}, "hidden_size is '32'"),
        ({"num_hidden_layers": 0}, "num_hidden_layers is 0"),
        ({"vocab_size": 10**12}, "vocab_size"),
        ({"intermediate_size": None}, "lacks intermediate_size"),
        ({"hidden_act": "swish"}, "relu and gelu"),
        ({"layer_norm_eps": -1.0}, "layer_norm_eps"),
        ({"layer_norm_eps": float("nan")}, "layer_norm_eps"),
        ({"hidden_dropout_prob": True}, "hidden_dropout_prob"),
        ({"position_embedding_type": "relative_key"}, "position_embedding_type"),
        ({"is_decoder": True}, "is_decoder"),
        ({"qkv_weight_interleaved": False}, "qkv_weight_interleaved"),
        ({"pad_token_id": 5000}, "pad_token_id"),
        ({"architectures": ["BertForQuestionAnswering"]}, "BertForQuestionAnswering.*supported"),
        ({"architectures": "BertForMaskedLM"}, "architectures"),
        ({"architectures": [None]}, "architectures"),
    ],
)
def test_a_config_that_can_not_be_is_refused(changes, words):
    with pytest.raises(UserError, match=words):
        Config.from_dict({**BASE, **changes})


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"id2label": {"0": "a"}}, "two classes"),
        ({"id2label": {"0": "a", "2": "b"}}, "from 0"),
        ({"id2label": {"0": "a", "1": "a"}}, "twice"),
        ({"id2label": ["a", "b"]}, "id2label"),
        ({"num_labels": "three"}, "num_labels is 'three'"),
        ({"num_labels": 1}, "two classes"),
        ({"num_labels": 10**9}, "num_labels"),
        ({"problem_type": "regression"}, "problem_type 'regression'"),
    ],
)
def test_classes_that_can_not_be_are_refused(changes, words):
    with pytest.raises(UserError, match=words):
        Config.from_dict({**CELL, **changes})


def test_classes_have_names_or_a_number_or_are_two():
    named = {"id2label": {"1": "hcm", "0": "nf", "2": "dcm"}, "problem_type": "single_label_classification"}
    assert Config.from_dict({**CELL, **named}).labels == ("nf", "hcm", "dcm")
    assert Config.from_dict({**CELL, "num_labels": 3}).labels == ("LABEL_0", "LABEL_1", "LABEL_2")
    assert Config.from_dict(CELL).labels == ("LABEL_0", "LABEL_1")
    assert Config.from_dict({**BASE, **named}).labels == ()


@pytest.mark.parametrize(
    ("kind", "head"),
    [
        ("ForMaskedLM", "masked"),
        ("ForSequenceClassification", "cell"),
        ("ForTokenClassification", "gene"),
        ("Model", "none"),
    ],
)
def test_the_class_of_transformers_says_what_the_head_is(kind, head, tmp_path):
    publish(tmp_path, kind=kind, id2label={0: "x", 1: "y", 2: "z"}, classifier_dropout=0.25)
    config = Config.from_dict(json.loads((tmp_path / "config.json").read_text()))
    assert config.head == head
    assert config.labels == (("x", "y", "z") if head in ("cell", "gene") else ())
    assert config.head_dropout == 0.25


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"head": "none"},
        {"head": "cell", "labels": ("b", "a", "c"), "classifier_dropout": 0.3},
        {"head": "gene", "labels": ("0", "1")},
        {
            "head": "tasks",
            "tasks": (("type", ("a", "b")), ("state", ("x", "y", "z"))),
            "pooling": "attention",
        },
    ],
    ids=["masked", "none", "cell", "gene", "tasks"],
)
def test_the_config_survives_writing(changes):
    config = make_config(make_vocabulary(), **changes)
    written = json.loads(json.dumps(config.to_dict()))
    assert Config.from_dict(written) == config
    assert Config.from_dict(for_layout(written, "te")) == config
    assert for_layout(for_layout(written, "te"), "hf") == written


def test_other_json_is_refused():
    for content in ([1, 2], None, "bert", {}):
        with pytest.raises(UserError, match="BERT"):
            Config.from_dict(content)


def test_what_is_put_aside_comes_back():
    hf = {**BASE, "transformers_version": "4.37.1", "_name_or_path": "somewhere", "cellformers": {"note": 1}}
    assert for_layout(for_layout(hf, "te"), "hf") == hf
    assert for_layout(hf, "hf") == hf
    te = {
        **hf,
        "use_te_layers": True,
        "fuse_qkv_params": True,
        "auto_map": {"AutoConfig": "g.C"},
        "framework": "pytorch",
    }
    there = for_layout(te, "hf")
    assert not {"auto_map", "use_te_layers", "fuse_qkv_params", "framework"} & set(there)
    assert for_layout(there, "te") == te
    assert for_layout(te, "te") == te
